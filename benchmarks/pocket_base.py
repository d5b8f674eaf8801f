"""The pocket base's own figures: what the classifier reads right, what the base draws right, how varied, how fast.

python -m benchmarks.pocket_base            # appends to benchmarks/data/pocket_base.csv
python -m benchmarks.pocket_base --table    # the newest figures as Markdown
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from benchmarks.records import DATA, append, load
from oft_diffusion.evaluation.evaluate import GUIDANCE, STEPS
from oft_diffusion.evaluation.intervals import bootstrap
from oft_diffusion.evaluation.prompts import held_out_prompts
from oft_diffusion.evaluation.reading import draw, read
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.pocket import pocket_pipeline
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.pocket.pretrain.data import to_model, to_pictures
from oft_diffusion.pocket.world import ATTRIBUTES, CAPTIONED, UNCAPTIONED, render, sample_scene

FILE = DATA / "pocket_base.csv"
RENDERS, RECONSTRUCTIONS, PICTURES, TIMED = 2000, 1000, 500, 5


def held_out_scenes(count: int) -> list:
    """Scenes of a stream of their own, which no training picture came from."""
    rng = random.Random("benchmark")
    return [sample_scene(rng) for _ in range(count)]


def accuracy(readings, scenes, names) -> dict[str, list[float]]:
    """Per attribute, one 0 or 1 per picture."""
    return {
        name: [float(r[name] == getattr(scene, name)) for r, scene in zip(readings, scenes, strict=True)]
        for name in names
    }


def rows_of(measure: str, values: dict[str, list[float]]) -> list[dict]:
    """One row per attribute: mean and interval."""
    rows = []
    for name, numbers in values.items():
        i = bootstrap(numbers)
        rows.append(
            {
                "measure": measure,
                "of": name,
                "mean": f"{i.mean:.4f}",
                "low": f"{i.low:.4f}",
                "high": f"{i.high:.4f}",
                "n": i.pictures,
            }
        )
    return rows


def reading_renders(classifier, scenes) -> list[dict]:
    readings = []
    for start in range(0, len(scenes), 100):
        readings += read(classifier, [render(scene) for scene in scenes[start : start + 100]])
    return rows_of("classifier on held-out renders", accuracy(readings, scenes, ATTRIBUTES))


def reading_reconstructions(classifier, vae, scenes) -> list[dict]:
    readings, errors = [], []
    for start in range(0, len(scenes), 50):
        pictures = np.stack([np.asarray(render(scene)) for scene in scenes[start : start + 50]])
        with torch.no_grad():
            x = to_model(pictures)
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        errors += (x - y).abs().mean(dim=(1, 2, 3)).div(2).tolist()
        readings += read(classifier, to_pictures(y))
    rows = rows_of("classifier on reconstructions", accuracy(readings, scenes, ATTRIBUTES))
    return rows + rows_of("reconstruction, mean absolute error (0 to 1)", {"pixels": errors})


def drawing(classifier, pipe, grid: Path | None) -> list[dict]:
    prompts = held_out_prompts(PICTURES)
    pictures = []
    for batch in draw(pipe, [p.text for p in prompts], range(PICTURES), steps=STEPS, guidance=GUIDANCE):
        pictures += batch
        print(f"\rdrawn {len(pictures)} of {PICTURES}", end="", flush=True)
    print()
    readings = read(classifier, pictures)
    right = {n: [float(r[n] == p.named[n]) for r, p in zip(readings, prompts, strict=True)] for n in CAPTIONED}
    right["all four"] = [min(values) for values in zip(*right.values(), strict=True)]
    if grid:
        rows = [pictures[i : i + 8] for i in range(0, 48, 8)]
        save_png(labelled_grid(rows), grid)
    return rows_of("drawn from held-out captions", right) + rows_of("diversity", diversity(readings))


def diversity(readings) -> dict[str, list[float]]:
    """Per uncaptioned attribute, the entropy of what is drawn, as a share of that of the world's even draw."""
    shares = {}
    for name, values in UNCAPTIONED.items():
        counts = Counter(r[name] for r in readings)
        entropy = -sum(c / len(readings) * math.log(c / len(readings)) for c in counts.values())
        shares[name] = [entropy / math.log(len(values))]
    return shares


def speed(pipe) -> list[dict]:
    def seconds(count: int) -> list[float]:
        times = []
        for _ in range(TIMED + 1):
            start = time.perf_counter()
            list(draw(pipe, ["a red mug"] * count, range(count), steps=STEPS, guidance=GUIDANCE, batch_size=count))
            times.append((time.perf_counter() - start) / count)
        return times[1:]

    rows = []
    for count in (1, 16):
        times = seconds(count)
        middle, low, high = statistics.median(times), min(times), max(times)
        rows.append(
            {
                "measure": f"seconds per picture, {STEPS} steps (median, min, max)", "of": f"batch of {count}",
                "mean": f"{middle:.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}", "n": TIMED,
            }
        )  # fmt: skip
    return rows


def table() -> str:
    """The newest measurement as Markdown."""
    rows = load(FILE)
    newest = {(row["measure"], row["of"]): row for row in rows}
    lines = ["| measure | of | value | 95 % interval | n |", "|---|---|---|---|---|"]
    for (measure, of), row in newest.items():
        interval = "" if measure == "diversity" else f"{row['low']} to {row['high']}"
        lines.append(f"| {measure} | {of} | {row['mean']} | {interval} | {row['n']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest figures as Markdown, measure nothing")
    parser.add_argument("--grid", type=Path, help="write the first 48 pictures here")
    options = parser.parse_args()
    if not options.table:
        pipe, classifier = pocket_pipeline(), load_classifier()
        pipe.set_progress_bar_config(disable=True)
        scenes = held_out_scenes(RENDERS)
        rows = speed(pipe)
        rows += reading_renders(classifier, scenes)
        rows += reading_reconstructions(classifier, pipe.vae, scenes[:RECONSTRUCTIONS])
        rows += drawing(classifier, pipe, options.grid)
        append(FILE, rows)
    print(table())


if __name__ == "__main__":
    main()
