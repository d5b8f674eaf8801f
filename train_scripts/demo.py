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
from oft_diffusion.generate import compare
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.load import load_pipeline
from oft_diffusion.pocket import SUBJECTS, pocket_path, subjects_path
from oft_diffusion.report import Figure, write_report
from oft_diffusion.training import TrainConfig, TrainResult, train

CONFIG = Path(__file__).parent / "configs" / "pocket.toml"
OUT = Path("runs/demo")
SEEDS = (1, 2, 3, 4)
CELL = 128


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

    print(f"1/3  teaching the pocket base {title}, a {subject.object}, from five pictures", flush=True)
    with train(config) as run:
        for _ in run:
            pass
    if run.result.interrupted:
        return 130
    adapter = run.result.adapter

    print("2/3  drawing the same prompts before and after", flush=True)
    grid = _before_and_after(name, config, adapter)
    grid_path = save_png(grid, out / "before_after.png")

    print("3/3  writing the report", flush=True)
    minutes = (time.perf_counter() - started) / 60
    report = _write_report(name, config, run.result, grid, minutes)
    print(f"done in {minutes:.1f} minutes\n  adapter  {adapter}\n  grid     {grid_path}\n  report   {report}")
    command = Path(sys.executable).with_name("oft-diffusion")
    prompt = f"a {config.trigger} {subject.object} in the forest"
    print(f'more     {command} generate "{prompt}" --adapter {out} --guidance {config.guidance_scale}')
    return 0


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _before_and_after(name: str, config: TrainConfig, adapter: Path) -> Image.Image:
    """The grid: prompts that name the subject, and one that does not, with and without the adapter."""
    word = f"{config.trigger} {config.class_word}"
    prompts = [f"a {word}", f"a {word} on the beach", f"a red {word} at night", f"a {word} in the snow"]
    prompts.append(f"a blue {'cat' if config.class_word != 'cat' else 'car'} in a meadow")
    pipe = load_pipeline(pocket_path())
    load_oft_weights(pipe, adapter, adapter_name=name)
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


def _write_report(name: str, config: TrainConfig, result: TrainResult, grid: Image.Image, minutes: float) -> Path:
    title, word = _title(name), config.class_word
    photos = [Image.open(path) for path in sorted(subjects_path(name).glob("*.png"))]
    return write_report(
        Path(config.output_dir) / "report.html",
        title=f"{title}, a {word}",
        lead=(
            f"The pocket base had never been told of {title}. {result.steps} steps of OFTv2 on five pictures taught it "
            f'the word "{config.trigger}". Left of the middle is the base, right of it the base with the adapter: same '
            "prompts, same seeds. The last row does not name the subject, and should not change much."
        ),
        figures=[
            Figure(
                "The subject", "All that was shown to it.", labelled_grid([photos], cell=CELL),
                f"Five pictures of {title}",
            ),
            Figure("Before and after", f"{len(SEEDS)} seeds each.", grid, "Grid of prompts before and after"),
        ],
        losses=result.losses,
        facts={
            "adapter size": f"{result.adapter.stat().st_size / 1e6:.2f} MB",
            "training": f"{result.seconds / 60:.1f} min",
            "in all": f"{minutes:.1f} min",
            "steps": result.steps,
        },
        settings=config.to_dict(),
        usage=(
            "from oft_diffusion import load_oft_weights\nfrom oft_diffusion.pocket import pocket_pipeline\n\n"
            f'pipe = pocket_pipeline()\nload_oft_weights(pipe, "{result.adapter}")\n'
            f'prompt = "a {config.trigger} {word} on the beach"\n'
            f"image = pipe(prompt, guidance_scale={config.guidance_scale}).images[0]\n"
            f'image.save("{name}.png")'
        ),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
