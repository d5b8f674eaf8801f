"""The pocket base's own figures: what the classifier reads right, what the base draws right, how varied, how fast.

python -m benchmarks.pocket_base            # appends to pocket_base.csv and pocket_base_readings.csv in benchmarks/data
python -m benchmarks.pocket_base --table    # the figures as Markdown
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

from benchmarks.pocket_subjects import base_digest
from benchmarks.records import DATA, append, load
from oft_diffusion.evaluation.intervals import Group, mean_interval
from oft_diffusion.evaluation.measure import BATCH
from oft_diffusion.evaluation.prompts import Prompt, held_out_prompts, prompt
from oft_diffusion.evaluation.reading import read
from oft_diffusion.generate import generate
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.pocket import GUIDANCE, STEPS, pocket_pipeline
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.pocket.pretrain.data import to_model, to_pictures
from oft_diffusion.pocket.world import ATTRIBUTES, CAPTIONED, OBJECTS, PATTERNS, UNCAPTIONED, render, sample_scene

FILE = DATA / "pocket_base.csv"
READINGS = DATA / "pocket_base_readings.csv"
HIT = ("object", *UNCAPTIONED)  # what must be right for a subject hit
RENDERS, RECONSTRUCTIONS, PICTURES, TIMED = 2000, 1000, 500, 5
PER_PROMPT = 20  # pictures of one prompt, whose uncaptioned attributes should differ


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


def rows_of(measure: str, values: dict[str, list[float]], groups: dict[str, list[Group]] | None = None) -> list[dict]:
    """One row per attribute: mean and interval; pictures of one group are drawn together in the bootstrap."""
    rows = []
    for name, numbers in values.items():
        i = mean_interval(numbers, groups[name] if groups else None)
        shown = {"value": f"{i.mean:.4f}", "low": f"{i.low:.4f}", "high": f"{i.high:.4f}", "bounds": "95 %"}
        rows.append({"measure": measure, "of": name, **shown, "n": i.pictures})
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
    right = accuracy(readings, scenes, ATTRIBUTES)
    right["all eight"] = [min(values) for values in zip(*right.values(), strict=True)]
    right["the five of a hit"] = [min(values) for values in zip(*(right[name] for name in HIT), strict=True)]
    for pattern in PATTERNS:
        right[f"pattern, of {pattern} ones"] = of_pattern(right["pattern"], [s.pattern for s in scenes], pattern)
    rows = rows_of("classifier on reconstructions", right)
    return rows + rows_of("reconstruction, mean absolute error (0 to 1)", {"pixels": errors})


def drawn(pipe, prompts, seeds) -> list:
    """Pictures, one per prompt and seed."""
    done = 0

    def note(*_: object) -> None:
        nonlocal done
        done += 1
        print(f"\rdrawn {done} of {len(prompts)}", end="" if done < len(prompts) else "\n", flush=True)

    found = generate(pipe, prompts, seeds, steps=STEPS, guidance=GUIDANCE, batch_size=BATCH, on_picture=note)
    return [picture.image for picture in found]


def of_pattern(values: list, patterns: list[str], pattern: str) -> list:
    """Those of the pictures that should have a pattern."""
    return [value for value, p in zip(values, patterns, strict=True) if p == pattern]


def drawing(classifier, pipe, grid: Path | None, measure: str = "drawn from held-out captions") -> list[dict]:
    """What is right of pictures of held-out captions. Pictures of one caption are alike, and are resampled together."""
    prompts = held_out_prompts(PICTURES)
    pictures = drawn(pipe, [p.text for p in prompts], range(PICTURES))
    readings = read(classifier, pictures)
    keep(measure, prompts, readings)
    if grid:
        rows = [pictures[i : i + 8] for i in range(0, 48, 8)]
        save_png(labelled_grid(rows), grid)
    return drawn_right(measure, prompts, readings)


def drawn_right(measure: str, prompts: list[Prompt], readings) -> list[dict]:
    right = {n: [float(r[n] == p.named[n]) for r, p in zip(readings, prompts, strict=True)] for n in CAPTIONED}
    right["all four"] = [min(values) for values in zip(*right.values(), strict=True)]
    asked = [p.named["pattern"] for p in prompts]
    captions: list[Group] = [(p.text,) for p in prompts]
    groups = dict.fromkeys(right, captions)
    for pattern in PATTERNS:
        name = f"pattern, of {pattern} ones"
        right[name], groups[name] = (of_pattern(values, asked, pattern) for values in (right["pattern"], captions))
    return rows_of(measure, right, groups)


def keep(measure: str, prompts: list[Prompt], readings) -> None:
    """What was read of each picture beside its caption, so that others can count anew."""
    rows = [
        {"base": base_digest(), "measure": measure, "caption": p.text, "seed": seed, **{n: r[n] for n in CAPTIONED}}
        for seed, (p, r) in enumerate(zip(prompts, readings, strict=True))
    ]
    append(READINGS, rows)


def varying(classifier, pipe) -> list[dict]:
    """How varied the uncaptioned attributes of one prompt's pictures are, per object, against even draws as many."""
    texts = [prompt(kind).text for kind in OBJECTS for _ in range(PER_PROMPT)]
    readings = read(classifier, drawn(pipe, texts, range(10_000, 10_000 + len(texts))))
    by_object = [readings[i : i + PER_PROMPT] for i in range(0, len(readings), PER_PROMPT)]
    shares = {name: [diversity(own, name) for own in by_object] for name in UNCAPTIONED}
    return rows_of(f"diversity within a prompt ({PER_PROMPT} pictures each; 1 is an even draw)", shares)


def diversity(readings, name: str) -> float:
    """The entropy of an attribute over pictures, as a share of that of even draws as many, on average."""
    values, rng = ATTRIBUTES[name], random.Random(0)
    even = [entropy([rng.choice(values) for _ in readings]) for _ in range(400)]
    return entropy([r[name] for r in readings]) / (sum(even) / len(even))


def entropy(values) -> float:
    """Of a sample's distribution, in nats."""
    counts = Counter(values)
    return -sum(c / len(values) * math.log(c / len(values)) for c in counts.values())


def speed(pipe) -> list[dict]:
    def seconds(count: int) -> list[float]:
        times = []
        for _ in range(TIMED + 1):
            start = time.perf_counter()
            generate(pipe, "a red mug", range(count), steps=STEPS, guidance=GUIDANCE, batch_size=count)
            times.append((time.perf_counter() - start) / count)
        return times[1:]

    rows = []
    for count in (1, BATCH):
        times = seconds(count)
        middle, low, high = statistics.median(times), min(times), max(times)
        rows.append(
            {
                "measure": f"seconds per picture, {STEPS} steps", "of": f"batch of {count}", "value": f"{middle:.3f}",
                "low": f"{low:.3f}", "high": f"{high:.3f}", "bounds": "least and most", "n": TIMED,
            }
        )  # fmt: skip
    return rows


def table() -> str:
    """The base that ships as Markdown; beside it the one of others that was measured last, after it."""
    rows, ships = load(FILE), base_digest()
    newest = {(r["measure"], r["of"]): r for r in rows if r["base"] == ships}
    later = [r["base"] for r in rows[[r["base"] for r in rows].index(ships) :] if r["base"] != ships]
    again = {(r["measure"], r["of"]): r["value"] for r in rows if later and r["base"] == later[-1]}
    lines = ["| measure | of | value | bounds | n |", "|---|---|---|---|---|"]
    if again:
        lines = [line + more for line, more in zip(lines, (" made again |", "---|"), strict=True)]
    for (measure, of), row in newest.items():
        bounds = f"{row['low']} to {row['high']} ({row['bounds']})"
        beside = f" {again.get((measure, of), '')} |" if again else ""
        lines.append(f"| {measure} | {of} | {row['value']} | {bounds} | {row['n']} |{beside}")
    timed = [row for row in newest.values() if row["measure"].startswith("seconds")]
    told = ["", f"Times on {timed[-1]['hardware']}, {timed[-1]['threads']} threads."] if timed else []
    return "\n".join([*lines, *told])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the figures as Markdown, measure nothing")
    parser.add_argument("--busy", action="store_true", help="other work runs meanwhile: measure no times")
    parser.add_argument("--grid", type=Path, help="write the first 48 pictures here")
    options = parser.parse_args()
    if not options.table:
        pipe, classifier = pocket_pipeline(), load_classifier()
        pipe.set_progress_bar_config(disable=True)
        scenes = held_out_scenes(RENDERS)
        rows = [] if options.busy else speed(pipe)
        rows += reading_renders(classifier, scenes)
        rows += reading_reconstructions(classifier, pipe.vae, scenes[:RECONSTRUCTIONS])
        rows += drawing(classifier, pipe, options.grid)
        rows += varying(classifier, pipe)
        half = pocket_pipeline(torch_dtype=torch.bfloat16)  # as benchmarks.pocket_subjects draws
        half.set_progress_bar_config(disable=True)
        rows += drawing(classifier, half, None, "the same in bfloat16")
        append(FILE, [{"base": base_digest(), **row} for row in rows])
    print(table())


if __name__ == "__main__":
    main()
