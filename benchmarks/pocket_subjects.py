"""DreamBooth on the pocket base, measured: subjects x training seeds, the figures of docs/evaluation.md.

python -m benchmarks.pocket_subjects            # trains, draws and reads what is not in benchmarks/data yet
python -m benchmarks.pocket_subjects --table    # the table from benchmarks/data, as Markdown

Settings are those of train_scripts/configs/pocket.toml. The subjects are not those on which they were searched
(benchmarks/pocket_recipe.py). How many pictures are behind each cell is fixed here, beforehand, and no two runs share a
prompt and a seed. Each finished run is kept, so that the command can be stopped at any time and given again; after a
change of base, classifier or settings everything is measured anew.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from benchmarks.records import DATA, append, load
from oft_diffusion import load_oft_weights, unload_oft_weights
from oft_diffusion.evaluation import Row, figures, looks_of
from oft_diffusion.evaluation.figures import SETS, is_difference
from oft_diffusion.evaluation.looks import instance_images
from oft_diffusion.evaluation.measure import BATCH, draw_rows, prompt_sets, seed_of
from oft_diffusion.evaluation.prompts import OTHER_TRIGGERS
from oft_diffusion.files import FILE_NAME
from oft_diffusion.generate import generate
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.pocket import SUBJECTS, pocket_path, pocket_pipeline, subjects_path
from oft_diffusion.pocket.classifier import classifier_path, load_classifier
from oft_diffusion.pocket.world import ATTRIBUTES, PATTERNS
from oft_diffusion.training import TrainConfig, train

CONFIG = Path(__file__).parent.parent / "train_scripts" / "configs" / "pocket.toml"
FINAL = ("sunny_flower", "winter_fish", "candy_tree", "fairy_mushroom", "tired_robot", "admiral_boat")
SEEDS = (0, 1)
PICTURES = 48  # per set and run: 576 pairs behind each line of the pooled table
# Of the configuration, what no figure depends on.
_NO_RECIPE = (
    "instance_dir", "class_word", "output_dir", "validation_prompts", "validation_every", "validation_count",
    "evaluation_count",
)  # fmt: skip
_SHOWN = 4  # pictures per set and subject in the grid
_HIT = ("object", "accent", "face", "hat", "badge")
DTYPE = torch.bfloat16  # of drawing, in which all the pictures take 45 minutes; training has the configuration's
RUNS, PICTURES_FILE = DATA / "pocket_runs.csv", DATA / "pocket_pictures.csv"
SETUPS = DATA / "pocket_setups.json"
_COLUMNS = (
    "setup", "group", "set", "prompt", "seed", "adapted", "hit", "shared", "faithful", "nearest", "closest",
    *ATTRIBUTES,
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """One run: its rows, with and without the adapter, and what it took.

    Attributes:
        rows: one per picture.
        closest: distance between the two instance images that are most alike.
        training: seconds of training, class images and caching not counted.
        wall: seconds from the call to the finished adapter, everything counted.
        megabytes: of the adapter file.
    """

    rows: list[Row]
    closest: float
    training: float
    wall: float
    megabytes: float


class Bench:
    """The pocket base and its classifier, loaded once; the base's own pictures are drawn once per subject and seed."""

    def __init__(self, device: str = "cpu") -> None:
        self.pipe = pocket_pipeline(torch_dtype=DTYPE).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.classifier = load_classifier(device)
        self.base: dict[tuple[Any, ...], list[Row]] = {}

    def config(self, name: str, seed: int, settings: Mapping[str, Any], out: Path, *, captions: bool) -> TrainConfig:
        """The settings of one run. Its folder is `out/name/seed`."""
        photos = subjects_path(name)
        if not captions:
            photos = out / name / "uncaptioned"
            shutil.copytree(subjects_path(name), photos, ignore=shutil.ignore_patterns("*.txt"), dirs_exist_ok=True)
        own = {
            "model": str(pocket_path()),
            "instance_dir": str(photos),
            "class_word": SUBJECTS[name].object,
            "output_dir": str(out / name / str(seed)),
            "validation_prompts": [],
            "evaluation_count": 0,
            "seed": seed,
            "overwrite": True,
        }
        config = TrainConfig.from_toml(CONFIG, {**own, **settings})
        if not config.prior_preservation:
            return config
        images = out / "class-images" / f"{name}-{seed}-{_digest(config.class_prompts)}"  # made once
        return replace(config, class_dir=str(images))

    def run(
        self, name: str, seed: int, settings: Mapping[str, Any], count: int, out: Path, *, captions: bool = True
    ) -> Trained:
        """Train one subject from one seed, draw and read `count` pictures per set with and without the adapter."""
        config = self.config(name, seed, settings, out, captions=captions)
        adapter, training, wall = trained(config)
        rows, closest = self.draw(name, seed, config, adapter, count)
        return Trained(rows, closest, training, wall, adapter.stat().st_size / 1e6)

    def draw(
        self, name: str, seed: int, config: TrainConfig, adapter: Path, count: int, only: Sequence[str] = SETS
    ) -> tuple[list[Row], float]:
        """`count` pictures per set with and without an adapter, read; and how near two instance images are at most."""
        group = f"{name}/{seed}"
        looks = looks_of(self.classifier, instance_images(subjects_path(name)))
        sets = {key: p for key, p in prompt_sets(looks, config.trigger, count, salt=group).items() if key in only}
        how: Any = {"group": group, "steps": config.sampling_steps, "guidance": config.guidance_scale}
        asked = (group, config.trigger, count, config.sampling_steps, config.guidance_scale, *only)
        if asked not in self.base:  # the same for most recipes, and a search asks for it again and again
            self.base[asked] = draw_rows(self.pipe, self.classifier, looks, sets, adapted=False, **how)
        rows = self.base[asked]
        load_oft_weights(self.pipe, adapter, adapter_name="subject")
        rows = rows + draw_rows(self.pipe, self.classifier, looks, sets, adapted=True, **how)
        unload_oft_weights(self.pipe)
        return rows, looks.closest()


def trained(config: TrainConfig) -> tuple[Path, float, float]:
    """The adapter of a whole run, its seconds of training, and those from the call to the finished adapter."""
    started = time.perf_counter()
    with train(config, progress=False) as run:
        for _ in run:
            pass
    wall = time.perf_counter() - started
    if run.result.interrupted:  # half a training is no measurement
        raise KeyboardInterrupt
    return run.result.adapter, run.result.seconds, wall


def base_digest() -> str:
    """Of the weights of base and classifier."""
    found = hashlib.sha256()
    for path in (classifier_path(), *sorted(pocket_path().rglob("*.safetensors"))):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def setup_digest(settings: Mapping[str, Any], count: int) -> str:
    """Of all that a run's figures depend on beside its subject and seed: base, classifier, settings, pictures."""
    changed, captions = _recipe(settings)
    return _digest((sorted(changed.items()), captions, count, base_digest()))


def note_setup(settings: Mapping[str, Any], count: int) -> str:
    """`setup_digest`, noted in `pocket_setups.json` with what it stands for."""
    digest, (changed, captions) = setup_digest(settings, count), _recipe(settings)
    known = json.loads(SETUPS.read_text(encoding="utf-8")) if SETUPS.exists() else {}
    known[digest] = {"pictures": count, "drawn in": str(DTYPE), "captions": captions, **dict(sorted(changed.items()))}
    SETUPS.parent.mkdir(parents=True, exist_ok=True)
    SETUPS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return digest


def _recipe(settings: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Settings that are not at their defaults, so that a new one changes no digest; and whether there are captions."""
    own = dict(settings)
    captions = bool(own.pop("captions", True))
    config = TrainConfig.from_toml(CONFIG, own)
    recipe = {f.name: getattr(config, f.name) for f in fields(TrainConfig) if f.name not in _NO_RECIPE}
    changed = {name: value for name, value in recipe.items() if value != getattr(TrainConfig, name, None)}
    return changed, captions


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def measure(out: Path, device: str, subjects: Sequence[str], *, busy: bool = False) -> None:
    """Every run that is not in the data yet; of the others the sets that are missing, if `out` has their adapters.

    Args:
        out: folder of the adapters.
        device: where pictures are drawn.
        subjects: of these alone.
        busy: whether other work runs meanwhile, so that no times are worth keeping.
    """
    setup, bench = note_setup({}, PICTURES), Bench(device)
    for seed, name in product(SEEDS, subjects):
        missing = _missing(setup, f"{name}/{seed}")
        adapter = out / name / str(seed) / FILE_NAME
        if not missing:
            continue
        if len(missing) < len(SETS) and adapter.is_file():
            config = bench.config(name, seed, {}, out, captions=True)
            _keep(*bench.draw(name, seed, config, adapter, PICTURES, missing), setup)
            print(f"{name}/{seed}: drew {', '.join(missing)}", flush=True)
            continue
        found = bench.run(name, seed, {}, PICTURES, out)
        _keep(found.rows, found.closest, setup)
        took = (math.nan, math.nan) if busy else (found.training, found.wall)
        _finished(setup, f"{name}/{seed}", *took, found.megabytes, device)


def clock(out: Path, device: str, subjects: Sequence[str]) -> None:
    """Train once more, from nothing (class images too), what was trained beside other work, and keep the times.

    Args:
        out: folder of adapters, which is not to be the one of `measure`.
        device: as for `measure`.
        subjects: of these the first seed.
    """
    setup, bench = note_setup({}, PICTURES), Bench(device)
    for name in subjects:
        shutil.rmtree(out / "class-images", ignore_errors=True)
        adapter, training, wall = trained(bench.config(name, SEEDS[0], {}, out, captions=True))
        _finished(setup, f"{name}/{SEEDS[0]}", training, wall, adapter.stat().st_size / 1e6, device)


def _finished(setup: str, group: str, training: float, wall: float, megabytes: float, device: str) -> None:
    """Keep what a run took. Of two rows of one run the later one counts."""
    times = {"training": f"{training:.1f}", "wall": f"{wall:.1f}", "megabytes": f"{megabytes:.3f}"}
    append(RUNS, [{"setup": setup, "group": group, **times}], device)
    print(f"{group}: {training:.0f} s of training, {wall:.0f} s in all", flush=True)


def _missing(setup: str, group: str) -> list[str]:
    """The sets of which a run has no pictures yet: all, where it was never finished."""
    if not any(row["setup"] == setup and row["group"] == group for row in load(RUNS)):
        return list(SETS)
    found = {row["set"] for row in load(PICTURES_FILE) if row["setup"] == setup and row["group"] == group}
    return [name for name in SETS if name not in found]


def _keep(rows: Sequence[Row], closest: float, setup: str) -> None:
    fresh = not PICTURES_FILE.exists()
    PICTURES_FILE.parent.mkdir(parents=True, exist_ok=True)
    with PICTURES_FILE.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(_COLUMNS)
        for r in rows:
            read = (int(r.adapted), int(r.hit), r.shared, int(r.faithful), r.nearest, round(closest, 5))
            seen = (r.reading.get(name, "") for name in ATTRIBUTES)
            writer.writerow((setup, r.group, r.set, r.prompt, r.seed, *read, *seen))


def table() -> str:
    """One line per figure, over all runs with intervals and per subject; of the newest setup alone."""
    runs = load(RUNS)
    finished = {row["group"]: row for row in runs if row["setup"] == runs[-1]["setup"]}
    kept = [r for r in load(PICTURES_FILE) if r["setup"] == runs[-1]["setup"] and r["group"] in finished]
    closest = {row["group"]: float(row["closest"]) for row in kept}
    # A run that was cut off while it was written is in the file twice, with the same pictures.
    rows = list({(r.group, r.set, r.prompt, r.seed, r.adapted): r for r in map(_row, kept)}.values())
    subjects = list(dict.fromkeys(group.split("/")[0] for group in finished))
    columns = [_cells(rows, closest, bounds=True)]
    columns += [_cells([r for r in rows if r.group.startswith(f"{name}/")], closest) for name in subjects]
    lines = [f"| | **all {len(finished)} runs** | {' | '.join(subjects)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    return "\n".join([*lines, "", *_pooled(rows, closest, list(finished.values())), "", *_attributes(rows, subjects)])


def grid(out: Path, device: str) -> Image.Image:
    """A row per subject, with the adapters in `out`: not chosen, but the first pictures of two sets."""
    bench, rows = Bench(device), []
    for name in FINAL:
        config, group = bench.config(name, SEEDS[0], {}, out, captions=True), f"{name}/{SEEDS[0]}"
        photos = instance_images(subjects_path(name))
        sets = prompt_sets(looks_of(bench.classifier, photos), config.trigger, _SHOWN, salt=group)
        asked = [(p.text, seed_of(group, key, i)) for key in ("subject", "recoloured") for i, p in enumerate(sets[key])]
        load_oft_weights(bench.pipe, out / group / FILE_NAME, adapter_name="subject")
        texts, seeds = zip(*asked, strict=True)
        how: Any = {"steps": config.sampling_steps, "guidance": config.guidance_scale, "batch_size": BATCH}
        rows.append([*photos[:2], *(picture.image for picture in generate(bench.pipe, texts, seeds, **how))])
        unload_oft_weights(bench.pipe)
    told = "two of its pictures, then the subject in other places, and in other colours and places"
    return labelled_grid(rows, row_labels=[f"{name}: {told}" for name in FINAL], cell=96)


def _row(row: Mapping[str, str]) -> Row:
    return Row(
        group=row["group"],
        set=row["set"],
        prompt=row["prompt"],
        seed=int(row["seed"]),
        adapted=row["adapted"] == "1",
        reading={name: row[name] for name in ATTRIBUTES if row.get(name)},
        hit=row["hit"] == "1",
        shared=int(row["shared"]),
        faithful=row["faithful"] == "1",
        nearest=float(row["nearest"]),
    )


def _cells(rows: Sequence[Row], closest: Mapping[str, float], *, bounds: bool = False) -> dict[str, str]:
    """Each figure as the table shows it."""
    cells = {}
    for key, figure in figures(rows, closest).items():
        shown = figure.difference if is_difference(key) else figure.adapted
        text = f"{100 * shown.mean:.1f}"
        if shown is figure.adapted:
            text += f" / {100 * figure.base.mean:.1f}"
        cells[key] = text + (f" ({100 * shown.low:.1f} to {100 * shown.high:.1f})" if bounds else "")
    return cells


def _pooled(rows: Sequence[Row], closest: Mapping[str, float], runs: Sequence[Mapping[str, str]]) -> list[str]:
    """What the table has no column for."""
    fidelity = figures(rows, closest)["prompt fidelity"]
    ratio = fidelity.ratio
    lines = [
        "Cells: with the adapter / without it, per cent; preservation and attribute drift: the difference, points."
    ]
    if ratio:
        lines.append(
            f"Prompt fidelity is {100 * ratio.mean:.1f} % ({100 * ratio.low:.1f} to {100 * ratio.high:.1f}) of the "
            f"base's. Each figure over all runs has {fidelity.adapted.pictures} pairs of pictures."
        )
    lines += [_lost(rows), _called(rows)]
    timed = [run for run in runs if not math.isnan(float(run["training"]))]
    training, wall = (max((float(run[key]) for run in timed), default=math.nan) for key in ("training", "wall"))
    lines.append(
        f"At most {training:.0f} s of training, {wall:.0f} s with loading and caching, in the {len(timed)} runs beside "
        f"which the machine was idle ({runs[-1]['hardware']}); adapters of at most "
        f"{max(float(run['megabytes']) for run in runs):.2f} MB."
    )
    return lines


def _attributes(rows: Sequence[Row], subjects: Iterable[str]) -> list[str]:
    """How often each attribute of a subject is right, where it is asked for: all five must be for a hit."""
    lines = [f"| right, per cent | {' | '.join(_HIT)} |", "|---" * (len(_HIT) + 1) + "|"]
    drawn = [r for r in rows if r.adapted and r.set == "subject" and r.reading]
    for name in subjects:
        own = [r for r in drawn if r.group.startswith(f"{name}/")]
        right = (sum(r.reading[a] == getattr(SUBJECTS[name], a) for r in own) / max(1, len(own)) for a in _HIT)
        lines.append(f"| {name} | {' | '.join(f'{100 * share:.0f}' for share in right)} |")
    return lines if drawn else []


def _lost(rows: Sequence[Row]) -> str:
    """What preservation loses and wins, by the pattern that the prompt names."""
    others = {(r.group, r.prompt, r.seed, r.adapted): r.faithful for r in rows if r.set == "other"}
    lost, won, asked = Counter[str](), Counter[str](), Counter[str]()
    for (group, prompt, seed, adapted), faithful in others.items():
        pattern = next((p for p in PATTERNS if p in prompt.split()), "no")
        asked[pattern] += adapted
        if adapted and faithful != others[group, prompt, seed, False]:
            (won if faithful else lost)[pattern] += 1
    told = "; ".join(f"{p} pattern: {lost[p]} lost, {won[p]} won of {n}" for p, n in asked.most_common())
    return f"Preservation by the pattern that the prompt names: {told}."


def _called(rows: Sequence[Row]) -> str:
    """How much of the subject is called by words that nobody trained, by the kind of word."""
    shared: dict[str, dict[bool, list[int]]] = {}
    for r in rows:
        if r.set in ("other trigger", "long trigger"):
            short = any(word in r.prompt.split() for word in OTHER_TRIGGERS)
            kind = "long" if r.set == "long trigger" else "three letters" if short else "begins as the trigger does"
            shared.setdefault(kind, {True: [], False: []})[r.adapted].append(r.shared)
    told = (
        f"{kind}: {25 * (fmean(both[True]) - fmean(both[False])):+.1f} points, {len(both[True])} pairs"
        for kind, both in sorted(shared.items())
    )
    return f"Attribute drift by the kind of another word: {'; '.join(told)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, measure nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/pocket-subjects"), help="adapters, losses and reports")
    parser.add_argument("--device", default="cpu", help="where pictures are drawn; training takes a GPU by itself")
    parser.add_argument("--grid", type=Path, help="write a picture of all subjects here, with the adapters in --out")
    parser.add_argument("--subjects", nargs="*", default=FINAL, choices=FINAL, help="these alone")
    parser.add_argument("--busy", action="store_true", help="other work runs meanwhile: keep no times")
    parser.add_argument("--times", type=Path, help="on an idle machine: train --subjects anew in here, keep the times")
    options = parser.parse_args()
    if options.grid:
        save_png(grid(options.out, options.device), options.grid)
        return
    if options.times:
        clock(options.times, options.device, options.subjects)
    elif not options.table:
        measure(options.out, options.device, options.subjects, busy=options.busy)
    print(table())


if __name__ == "__main__":
    main()
