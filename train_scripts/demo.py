"""`make demo`: DreamBooth on the pocket base, a before/after grid as PNG, and an HTML report. Safe to run twice."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from oft_diffusion import load_oft_weights
from oft_diffusion.autocast import computes_in_bfloat16
from oft_diffusion.errors import OFTError
from oft_diffusion.evaluation.looks import instance_images
from oft_diffusion.generate import compare
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.load import usual_dtype
from oft_diffusion.pocket import SUBJECTS, pocket_path, pocket_pipeline, subjects_path
from oft_diffusion.report import Pictures, Section
from oft_diffusion.training import TrainConfig, TrainResult, train

CONFIG = Path(__file__).parent / "configs" / "pocket.toml"
OUT = Path("runs/demo")
GRID = "before_after.png"
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
    if not computes_in_bfloat16(_device()):
        own["mixed_precision"] = "no"
    config = TrainConfig.from_toml(CONFIG, own | settings)

    print(f"1/2  teaching the pocket base {title}, a {subject.object}, from five pictures", flush=True)
    with train(config, sections=lambda result: _sections(name, config, result)) as run:
        for _ in run:
            pass
    if run.result.interrupted:
        return 130
    minutes = (time.perf_counter() - started) / 60
    paths = (run.result.adapter, out / GRID, run.result.report)
    print("done in {:.1f} minutes\n  adapter  {}\n  grid     {}\n  report   {}".format(minutes, *paths))
    command = Path(sys.executable).with_name("oft-diffusion")
    prompt = f"a {config.trigger} {subject.object} in the forest"
    print(f'more     {command} generate "{prompt}" --adapter {out}')
    return 0


def _device() -> str:
    """Where the training runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _sections(name: str, config: TrainConfig, result: TrainResult) -> list[Section]:
    """What the demo adds to the run's page: its own grid."""
    out = Path(config.output_dir)
    pipe = pocket_pipeline(torch_dtype=usual_dtype(_device())).to(_device())
    pipe.set_progress_bar_config(disable=True)
    load_oft_weights(pipe, result.adapter, adapter_name=name)
    print("2/2  drawing the same prompts before and after, and measuring", flush=True)
    grid = _before_and_after(pipe, name, config)
    save_png(grid, out / GRID)
    told = "; ".join(f"“{prompt}”" for prompt in _prompts(config))
    return [
        Pictures(
            "More prompts",
            f"{len(SEEDS)} seeds each, left of the middle the base, right of it the base with the adapter. Below the "
            f"pictures that it was taught with: {told}. The last row does not name the subject, and should not change "
            "much.",
            {f"The instance images, and below them rows of {len(SEEDS)} pictures before and after: {told}": grid},
        ),
    ]


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _prompts(config: TrainConfig) -> list[str]:
    """Some that name the subject, and one that does not."""
    word = f"{config.trigger} {config.class_word}"
    other = "cat" if config.class_word != "cat" else "car"
    return [
        f"a {word}", f"a {word} on the beach", f"a green {word} at night", f"a {word} in the snow",
        f"a blue {other} in a meadow",
    ]  # fmt: skip


def _before_and_after(pipe: Any, name: str, config: TrainConfig) -> Image.Image:
    """The grid: the instance images, and the prompts without and with it."""
    prompts = _prompts(config)
    rows = compare(
        pipe,
        name,
        prompts,
        SEEDS,
        steps=config.sampling_steps,
        guidance=config.guidance_scale,
        on_row=lambda i, n: print(f"     prompt {i} of {n}", flush=True),
    )
    taught = instance_images(subjects_path(name))
    labels = [f"taught with these {len(taught)}", f"{prompts[0]}  (left: before, right: after)", *prompts[1:]]
    return labelled_grid([taught, *([p.image for p in row] for row in rows)], row_labels=labels, cell=CELL)


if __name__ == "__main__":
    sys.exit(main())
