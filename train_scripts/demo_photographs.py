"""The whole path on real JPEG photographs: scikit-image's astronaut, cat, coffee and rocket, one adapter each.

The pocket base has only ever seen drawings, so what this shows is the path (decode, crop, encode, train, save, load,
draw) and what a few hundred steps make of a photograph, not photographic quality. Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage import data

from oft_diffusion import load_oft_weights, unload_oft_weights
from oft_diffusion.errors import OFTError
from oft_diffusion.generate import compare
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.load import load_pipeline
from oft_diffusion.pocket import pocket_path
from oft_diffusion.training import TrainConfig, train

CONFIG = Path(__file__).parent / "configs" / "pocket.toml"
SEEDS = (1, 2, 3)
VIEWS = 4
# photograph: its class word, and the square around the subject as (left, top, side) fractions of width, height, height
PHOTOGRAPHS = {
    "astronaut": ("astronaut", data.astronaut, (0.18, 0.0, 0.6)),
    "cat": ("cat", data.chelsea, (0.12, 0.0, 1.0)),
    "coffee": ("mug", data.coffee, (0.2, 0.05, 0.9)),
    "rocket": ("rocket", data.rocket, (0.3, 0.0, 0.9)),
}


def main() -> int:
    """Train one adapter per photograph, and draw all of them into one grid. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/photographs"), help="folder for everything made")
    options = parser.parse_args()
    try:
        return run(options.out)
    except OFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(out: Path, names: Sequence[str] = tuple(PHOTOGRAPHS), **settings: Any) -> int:
    """Crop, train, draw. `settings` are of `TrainConfig`. Returns 0, or 130 where Ctrl-C ended a training."""
    pipe = load_pipeline(pocket_path())
    rows, labels = [], []
    for name in names:
        class_word, load, square = PHOTOGRAPHS[name]
        views = write_views(Image.fromarray(np.asarray(load())), square, out / name / "views")
        overrides = {
            "model": str(pocket_path()),
            "instance_dir": str(out / name / "views"),
            "class_word": class_word,
            "output_dir": str(out / name),
            "overwrite": True,
            "evaluation_count": 0,  # the classifier reads the pocket world alone
            **settings,
        }
        config = TrainConfig.from_toml(CONFIG, overrides)
        print(f"{name}: {len(views)} views", flush=True)
        with train(config) as training:
            for _ in training:
                pass
        if training.result.interrupted:
            return 130
        load_oft_weights(pipe, training.result.adapter, adapter_name=name)
        prompt = f"a photo of a {config.trigger} {class_word}"
        [row] = compare(pipe, name, [prompt], SEEDS, steps=config.sampling_steps, guidance=config.guidance_scale)
        unload_oft_weights(pipe, name)
        rows.append([*views[:2], *(picture.image for picture in row)])
        labels.append(f"{prompt}: two of the {VIEWS} views, {len(SEEDS)} x before, {len(SEEDS)} x after")
    print(save_png(labelled_grid(rows, row_labels=labels, cell=128), out / "photographs.png"))
    return 0


def write_views(photograph: Image.Image, square: tuple[float, float, float], folder: Path) -> list[Image.Image]:
    """Several overlapping crops of a photograph's subject, as JPEG files of 256 x 256 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = photograph.size
    left, top, side = square[0] * width, square[1] * height, square[2] * height
    views = []
    for index, (dx, dy, zoom) in enumerate(((0.0, 0.0, 1.0), (0.06, 0.02, 0.9), (0.0, 0.08, 0.88), (0.1, 0.05, 0.85))):
        size = side * zoom
        x, y = min(left + dx * side, width - size), min(top + dy * side, height - size)
        box = (x, y, x + size, y + size)
        view = photograph.convert("RGB").resize((256, 256), Image.Resampling.LANCZOS, box=box)
        view.save(folder / f"{index + 1}.jpg", quality=92)
        views.append(view)
    return views


if __name__ == "__main__":
    sys.exit(main())
