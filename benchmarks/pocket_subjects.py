"""DreamBooth on the pocket base, measured: subjects x training seeds, the figures of docs/evaluation.md.

python -m benchmarks.pocket_subjects            # trains, draws and reads what is not in benchmarks/data yet
python -m benchmarks.pocket_subjects --table    # the table from benchmarks/data, as Markdown
python -m benchmarks.pocket_subjects --table --setup e1b44348e680    # an earlier one, of pocket_setups.json

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.pocket_tables import tables
from benchmarks.records import DATA, append, load
from oft_diffusion import load_oft_weights, unload_oft_weights
from oft_diffusion.evaluation import Row, looks_of
from oft_diffusion.evaluation.figures import SETS
from oft_diffusion.evaluation.looks import instance_images
from oft_diffusion.evaluation.measure import BATCH, draw_rows, prompt_sets, seed_of
from oft_diffusion.files import FILE_NAME
from oft_diffusion.generate import generate
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.pocket import SUBJECTS, pocket_path, pocket_pipeline, subjects_path
from oft_diffusion.pocket.classifier import classifier_path, load_classifier
from oft_diffusion.pocket.world import ATTRIBUTES, COLOURS, PATTERNS
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

    def config(
        self, name: str, seed: int, settings: Mapping[str, Any], out: Path, *, captions: str = "all"
    ) -> TrainConfig:
        """The settings of one run. Its folder is `out/name/seed`; for `captions` see `_recaptioned`."""
        photos = subjects_path(name) if captions == "all" else _recaptioned(name, captions, out / name / captions)
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
        self, name: str, seed: int, settings: Mapping[str, Any], count: int, out: Path, *, captions: str = "all"
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


def _recaptioned(name: str, captions: str, photos: Path) -> Path:
    """A subject's pictures with captions of which each tells all, "half" tell neither colour nor pattern, or "none"."""
    shutil.rmtree(photos, ignore_errors=True)
    shutil.copytree(subjects_path(name), photos)
    for i, file in enumerate(sorted(photos.glob("*.txt"))):
        if captions == "none":
            file.unlink()
        elif i % 2 == 0:
            words = file.read_text(encoding="utf-8").split()
            file.write_text(" ".join(word for word in words if word not in (*COLOURS, *PATTERNS)), encoding="utf-8")
    return photos


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


def _recipe(settings: Mapping[str, Any]) -> tuple[dict[str, Any], bool | str]:
    """Settings that are not at their defaults, so that a new one changes no digest; and whether there are captions."""
    own = dict(settings)
    told = own.pop("captions", "all")
    captions = {"all": True, "none": False}.get(told, told)  # as the first runs were noted
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
            config = bench.config(name, seed, {}, out)
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
        adapter, training, wall = trained(bench.config(name, SEEDS[0], {}, out))
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


def table(setup: str | None = None) -> str:
    """What `benchmarks.pocket_tables` makes of a setup, the newest if none is named."""
    runs = load(RUNS)
    setup = setup or runs[-1]["setup"]
    finished = {row["group"]: row for row in runs if row["setup"] == setup}
    kept = [r for r in load(PICTURES_FILE) if r["setup"] == setup and r["group"] in finished]
    closest = {row["group"]: float(row["closest"]) for row in kept}
    # A run that was cut off while it was written is in the file twice, with the same pictures.
    rows = list({(r.group, r.set, r.prompt, r.seed, r.adapted): r for r in map(_row, kept)}.values())
    return tables(rows, closest, list(finished.values()))


def grid(out: Path, device: str) -> Image.Image:
    """A row per subject, with the adapters in `out`: not chosen, but the first pictures of two sets."""
    bench, rows = Bench(device), []
    for name in FINAL:
        config, group = bench.config(name, SEEDS[0], {}, out), f"{name}/{SEEDS[0]}"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, measure nothing")
    parser.add_argument("--setup", help="with --table: an earlier one, by its digest")
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
    print(table(options.setup))


if __name__ == "__main__":
    main()
