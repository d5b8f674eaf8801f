"""`make demo`: DreamBooth on the pocket base, a before/after grid as PNG, and an HTML report. Safe to run twice."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from oft_diffusion import load_oft_weights
from oft_diffusion.errors import OFTError
from oft_diffusion.evaluation import Evaluation, evaluate, looks_of
from oft_diffusion.generate import compare
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.pocket import SUBJECTS, pocket_path, pocket_pipeline, subjects_path
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.report import Table
from oft_diffusion.training import TrainConfig, train
from oft_diffusion.training.summary import write_summary

CONFIG = Path(__file__).parent / "configs" / "pocket.toml"
OUT = Path("runs/demo")
SEEDS = (1, 2, 3, 4)
CELL = 128
EVALUATED = 24  # pictures per figure, with and without the adapter


def main() -> int:
    """Train, draw, report. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--subject", default="party_car", choices=sorted(SUBJECTS), help="which example subject to teach"
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for everything that is made (default: {OUT})")
    parser.add_argument("--overwrite", action="store_true", help=f"delete an earlier run there; {OUT} always is")
    options = parser.parse_args()
    try:
        return run_demo(options.subject, options.out, overwrite=options.overwrite or options.out == OUT)
    except OFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run_demo(name: str, out: Path, **settings: Any) -> int:
    """Teach the pocket base one subject, and show what changed.

    Args:
        name: one of `SUBJECTS`.
        out: folder for everything that is made.
        **settings: of `TrainConfig`, in place of those in `configs/pocket.toml`.

    Returns:
        0, or 130 where Ctrl-C ended the training: then no grid and no report are made.
    """
    started = time.perf_counter()
    subject, title = SUBJECTS[name], _title(name)
    own = {
        "model": str(pocket_path()),
        "instance_dir": str(subjects_path(name)),
        "class_word": subject.object,
        "output_dir": str(out),
    }
    config = TrainConfig.from_toml(CONFIG, own | settings)

    print(f"1/4  teaching the pocket base {title}, a {subject.object}, from five pictures", flush=True)
    with train(config) as run:
        for _ in run:
            pass
        if run.result.interrupted:
            return 130
        adapter = run.result.adapter
        pipe = pocket_pipeline()
        pipe.set_progress_bar_config(disable=True)
        load_oft_weights(pipe, adapter, adapter_name=name)

        print("2/4  drawing the same prompts before and after", flush=True)
        grid_path = save_png(_before_and_after(pipe, name, config), out / "before_after.png")

        print("3/4  measuring: is the subject learnt, is the rest kept", flush=True)
        found = _evaluated(pipe, name, config)
        found.save(out / "evaluation.json")
        print(found.table())

        print("4/4  writing the report", flush=True)
        minutes = (time.perf_counter() - started) / 60
        pictures = run.plan.pictures
        assert run.parts is not None
        report = write_summary(run.parts, config, run.result, pictures, sections=[_figures_table(found)])
    print(f"done in {minutes:.1f} minutes\n  adapter  {adapter}\n  grid     {grid_path}\n  report   {report}")
    command = Path(sys.executable).with_name("oft-diffusion")
    prompt = f"a {config.trigger} {subject.object} in the forest"
    print(f'more     {command} generate "{prompt}" --adapter {out} --guidance {config.guidance_scale}')
    return 0


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _before_and_after(pipe: Any, name: str, config: TrainConfig) -> Image.Image:
    """The grid: prompts that name the subject, and one that does not, with and without the adapter."""
    word = f"{config.trigger} {config.class_word}"
    prompts = [f"a {word}", f"a {word} on the beach", f"a green {word} at night", f"a {word} in the snow"]
    prompts.append(f"a blue {'cat' if config.class_word != 'cat' else 'car'} in a meadow")
    rows = compare(
        pipe,
        name,
        prompts,
        SEEDS,
        steps=config.sampling_steps,
        guidance=config.guidance_scale,
        on_row=lambda i, n: print(f"     prompt {i} of {n}", flush=True),
    )
    labels = [f"{len(SEEDS)} x before"] + [""] * (len(SEEDS) - 1) + [f"{len(SEEDS)} x after"]
    return labelled_grid([[p.image for p in row] for row in rows], row_labels=prompts, column_labels=labels, cell=CELL)


def _evaluated(pipe: Any, name: str, config: TrainConfig) -> Evaluation:
    classifier = load_classifier()
    looks = looks_of(classifier, [Image.open(path) for path in sorted(subjects_path(name).glob("*.png"))])
    how: Any = {"steps": config.sampling_steps, "guidance": config.guidance_scale}
    return evaluate(pipe, name, classifier=classifier, looks=looks, trigger=config.trigger, count=EVALUATED, **how)


def _figures_table(found: Evaluation) -> Table:
    return Table(
        "Figures",
        f"Read by a classifier in {EVALUATED} pictures per line and side; per cent, with 95 % bootstrap intervals. "
        "docs/evaluation.md says what each line means; with so few pictures the intervals are wide.",
        ["", "with the adapter", "base", "difference"],
        [
            [name, *(f"{100 * i.mean:.0f} ({100 * i.low:.0f} to {100 * i.high:.0f})" for i in figure)]
            for name, figure in found.figures.items()
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
