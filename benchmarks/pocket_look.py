"""Pictures of the table's runs, to be looked at: is the judge right?

python -m benchmarks.pocket_look docs/images/readings.png        # four of each run with their readings under them
python -m benchmarks.pocket_look runs/blind.png --blind          # eight of each run's subject, nothing under them
python -m benchmarks.pocket_look --table                         # eyes against the judge, from benchmarks/data

All are drawn by lot, with the adapters of benchmarks.pocket_subjects. The second command keeps the judge's readings in
benchmarks/data/pocket_by_judge.csv; what eyes see on its sheet, written down before anyone looks there, belongs beside
it, in pocket_by_eye.csv: the same columns, an attribute left empty where it cannot be told. Both say of which setup
(pocket_setups.json) the adapters were.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from benchmarks.pocket_subjects import FINAL, PICTURES, SEEDS, Bench, setup_digest
from benchmarks.records import DATA, load
from oft_diffusion import load_oft_weights, unload_oft_weights
from oft_diffusion.evaluation import looks_of
from oft_diffusion.evaluation.intervals import mean_interval
from oft_diffusion.evaluation.looks import instance_images
from oft_diffusion.evaluation.measure import prompt_sets, seed_of
from oft_diffusion.evaluation.reading import Reading, read
from oft_diffusion.files import FILE_NAME
from oft_diffusion.generate import generate
from oft_diffusion.images import save_png
from oft_diffusion.pocket import SUBJECTS, subjects_path

SHOWN, BLIND = {"subject": 2, "other": 2}, {"subject": 8}
BY_JUDGE, BY_EYE = DATA / "pocket_by_judge.csv", DATA / "pocket_by_eye.csv"
READ = ("accent", "face", "hat", "badge")
COLUMNS, SIDE, LINE = 8, 128, 13


class Looked(NamedTuple):
    """A picture, the run that it is of, and what the judge reads in it."""

    group: str
    image: Image.Image
    reading: Reading


def drawn_by_lot(out: Path, sets: Mapping[str, int]) -> list[Looked]:
    """So many pictures of each set, from every run."""
    bench, rng = Bench(), random.Random(7)
    found: list[Looked] = []
    for name, seed in product(FINAL, SEEDS):
        group = f"{name}/{seed}"
        config = bench.config(name, seed, {}, out)
        looks = looks_of(bench.classifier, instance_images(subjects_path(name)))
        prompts = prompt_sets(looks, config.trigger, PICTURES, salt=group)
        places = [(key, i) for key, count in sets.items() for i in rng.sample(range(PICTURES), count)]
        texts, seeds = [prompts[k][i].text for k, i in places], [seed_of(group, k, i) for k, i in places]
        load_oft_weights(bench.pipe, out / group / FILE_NAME, adapter_name="subject")
        how: Any = {"steps": config.sampling_steps, "guidance": config.guidance_scale, "batch_size": len(places)}
        pictures = [picture.image for picture in generate(bench.pipe, texts, seeds, **how)]
        unload_oft_weights(bench.pipe)
        readings = read(bench.classifier, pictures)
        found += [Looked(group, image, reading) for image, reading in zip(pictures, readings, strict=True)]
    return found


def sheet(found: Sequence[Looked], *, blind: bool) -> Image.Image:
    """The pictures with their numbers, and unless blind with their readings, under them."""
    lines = 1 if blind else 4
    font, width, height = ImageFont.load_default(size=11), SIDE + 8, SIDE + lines * LINE + 8
    page = Image.new("RGB", (COLUMNS * width, -(-len(found) // COLUMNS) * height), "white")
    pen = ImageDraw.Draw(page)
    for number, (_, picture, seen) in enumerate(found):
        x, y = number % COLUMNS * width + 4, number // COLUMNS * height + 4
        page.paste(picture, (x, y))
        told = (
            f"{number + 1}: {seen['colour']} {seen['pattern']}", f"{seen['object']}, {seen['background']}",
            f"{seen['accent']}, {seen['face']} face", f"hat {seen['hat']}, badge {seen['badge']}",
        )  # fmt: skip
        for i, line in enumerate([str(number + 1)] if blind else told):
            pen.text((x, y + SIDE + i * LINE), line, "black", font)
    return page


def keep(found: Sequence[Looked]) -> None:
    """The judge's readings of a blind sheet."""
    with BY_JUDGE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        setup = setup_digest({}, PICTURES)
        writer.writerow(("setup", "number", "group", *READ))
        writer.writerows((setup, i + 1, own.group, *(own.reading[a] for a in READ)) for i, own in enumerate(found))


def table() -> str:
    """How often eyes and judge agree, and the hits by each; where eyes cannot tell, they do not count."""
    pairs = list(zip(load(BY_JUDGE), load(BY_EYE), strict=True))
    lines = ["| | pictures | eyes cannot tell | of the others, the judge agrees, per cent |", "|---|---|---|---|"]
    for name in READ:
        told = [float(judge[name] == eye[name]) for judge, eye in pairs if eye[name]]
        lines.append(f"| {name} | {len(pairs)} | {len(pairs) - len(told)} | {_percent(told)} |")
    whole = [(judge, eye) for judge, eye in pairs if all(eye[name] for name in READ)]
    hits = [[float(_is_subject(row)) for row in side] for side in zip(*whole, strict=True)]
    both = [float(a == b) for a, b in zip(*hits, strict=True)]
    lines.append(f"| hit or not | {len(pairs)} | {len(pairs) - len(whole)} | {_percent(both)} |")
    by_judge, by_eye = (f"{100 * sum(own) / len(own):.0f} %" for own in hits)
    return "\n".join([*lines, "", f"Of those {len(whole)} pictures {by_judge} are hits by the judge, {by_eye} by eye."])


def _percent(values: Sequence[float]) -> str:
    found = mean_interval(values)
    return f"{100 * found.mean:.0f} ({100 * found.low:.0f} to {100 * found.high:.0f})"


def _is_subject(row: Mapping[str, str]) -> bool:
    subject = SUBJECTS[row["group"].split("/")[0]]
    return all(row[name] == getattr(subject, name) for name in READ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="where to write the picture")
    parser.add_argument("--runs", type=Path, default=Path("runs/pocket-subjects"), help="of benchmarks.pocket_subjects")
    parser.add_argument("--blind", action="store_true", help="without the readings, which go to benchmarks/data")
    parser.add_argument("--table", action="store_true", help="eyes against the judge")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if not options.path:
        parser.error("say where to write the picture")
    found = drawn_by_lot(options.runs, BLIND if options.blind else SHOWN)
    if options.blind:
        keep(found)
    save_png(sheet(found, blind=options.blind), options.path)


if __name__ == "__main__":
    main()
