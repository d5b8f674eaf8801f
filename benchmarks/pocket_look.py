"""Pictures of the table's runs with what the classifier reads in them, to be looked at: is the judge right?

python -m benchmarks.pocket_look docs/images/readings.png    # with the adapters of benchmarks.pocket_subjects

Two pictures that name the subject and two that do not, of each run, drawn by lot.
"""

from __future__ import annotations

import argparse
import random
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.pocket_subjects import FINAL, PICTURES, SEEDS, Bench
from oft_diffusion import load_oft_weights, unload_oft_weights
from oft_diffusion.evaluation import looks_of
from oft_diffusion.evaluation.looks import instance_images
from oft_diffusion.evaluation.measure import prompt_sets, seed_of
from oft_diffusion.evaluation.reading import Reading, read
from oft_diffusion.files import FILE_NAME
from oft_diffusion.generate import generate
from oft_diffusion.images import save_png
from oft_diffusion.pocket import subjects_path

SETS, EACH = ("subject", "other"), 2
COLUMNS, SIDE, LINE = 8, 128, 13


def drawn_by_lot(out: Path) -> list[tuple[Image.Image, Reading]]:
    """Four pictures of each run, with their readings."""
    bench, rng = Bench(), random.Random(7)
    found: list[tuple[Image.Image, Reading]] = []
    for name, seed in product(FINAL, SEEDS):
        group = f"{name}/{seed}"
        config = bench.config(name, seed, {}, out, captions=True)
        looks = looks_of(bench.classifier, instance_images(subjects_path(name)))
        sets = prompt_sets(looks, config.trigger, PICTURES, salt=group)
        places = [(key, i) for key in SETS for i in rng.sample(range(PICTURES), EACH)]
        texts, seeds = [sets[k][i].text for k, i in places], [seed_of(group, k, i) for k, i in places]
        load_oft_weights(bench.pipe, out / group / FILE_NAME, adapter_name="subject")
        how: Any = {"steps": config.sampling_steps, "guidance": config.guidance_scale, "batch_size": len(places)}
        pictures = [picture.image for picture in generate(bench.pipe, texts, seeds, **how)]
        unload_oft_weights(bench.pipe)
        found += zip(pictures, read(bench.classifier, pictures), strict=True)
    return found


def sheet(found: list[tuple[Image.Image, Reading]]) -> Image.Image:
    """The pictures with their readings under them."""
    font, width, height = ImageFont.load_default(size=11), SIDE + 8, SIDE + 4 * LINE + 8
    page = Image.new("RGB", (COLUMNS * width, -(-len(found) // COLUMNS) * height), "white")
    pen = ImageDraw.Draw(page)
    for number, (picture, seen) in enumerate(found):
        x, y = number % COLUMNS * width + 4, number // COLUMNS * height + 4
        page.paste(picture, (x, y))
        lines = (
            f"{number + 1}: {seen['colour']} {seen['pattern']}", f"{seen['object']}, {seen['background']}",
            f"{seen['accent']}, {seen['face']} face", f"hat {seen['hat']}, badge {seen['badge']}",
        )  # fmt: skip
        for i, line in enumerate(lines):
            pen.text((x, y + SIDE + i * LINE), line, "black", font)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="where to write the picture")
    parser.add_argument("--runs", type=Path, default=Path("runs/pocket-subjects"), help="of benchmarks.pocket_subjects")
    options = parser.parse_args()
    save_png(sheet(drawn_by_lot(options.runs)), options.path)


if __name__ == "__main__":
    main()
