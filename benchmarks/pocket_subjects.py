"""DreamBooth on the pocket base, measured: subjects x training seeds, the five figures of docs/evaluation.md.

python -m benchmarks.pocket_subjects            # trains, draws and reads what is not in benchmarks/data yet
python -m benchmarks.pocket_subjects --table    # the table from benchmarks/data, as Markdown

Settings are those of train_scripts/configs/pocket.toml. The subjects are not those on which they were searched
(benchmarks/pocket_recipe.py). How many pictures are behind each cell is fixed here, beforehand. Each finished run is
kept, so that the command can be stopped at any time and given again.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.records import DATA, append, load
from oft_diffusion import load_oft_weights, unload_oft_weights
from oft_diffusion.evaluation import Row, figures, looks_of
from oft_diffusion.evaluation.evaluate import draw_rows, prompt_sets
from oft_diffusion.pocket import SUBJECTS, pocket_path, pocket_pipeline, subjects_path
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.training import TrainConfig, train

CONFIG = Path("train_scripts/configs/pocket.toml")
FINAL = ("captain_mug", "royal_teapot", "cosy_robot", "bow_cat", "star_rocket", "merry_boat")
SEEDS = (0, 1)
PICTURES = 64  # per set and run: 768 pairs behind each line of the pooled table
RUNS, PICTURES_FILE = DATA / "pocket_runs.csv", DATA / "pocket_pictures.csv"
_COLUMNS = ("group", "set", "prompt", "seed", "adapted", "hit", "faithful", "nearest", "closest")


@dataclass(frozen=True)
class Trained:
    """One run: its rows, with and without the adapter, and what it took."""

    rows: list[Row]
    closest: float
    seconds: float
    megabytes: float


class Bench:
    """The pocket base and its classifier, loaded once; the base's own rows, drawn once per subject."""

    def __init__(self) -> None:
        self.pipe = pocket_pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        self.classifier = load_classifier()
        self._base: dict[tuple[str, int, float], list[Row]] = {}

    def run(
        self, name: str, seed: int, settings: Mapping[str, Any], count: int, out: Path, *, captions: bool = True
    ) -> Trained:
        """Train one subject from one seed, draw and read `count` pictures per set with and without the adapter."""
        group = f"{name}/{seed}"
        photos = subjects_path(name)
        if not captions:
            photos = out / name / "uncaptioned"
            shutil.copytree(subjects_path(name), photos, ignore=shutil.ignore_patterns("*.txt"), dirs_exist_ok=True)
        config = TrainConfig.from_toml(
            CONFIG,
            {
                "model": str(pocket_path()),
                "instance_dir": str(photos),
                "class_word": SUBJECTS[name].object,
                "output_dir": str(out / name / str(seed)),
                "validation_prompts": [],
                "seed": seed,
                "overwrite": True,
                **settings,
            },
        )
        with train(config, progress=False) as run:
            for _ in run:
                pass
        images = [Image.open(path) for path in sorted(subjects_path(name).glob("*.png"))]
        looks = looks_of(self.classifier, images)
        sets = prompt_sets(looks, config.trigger, count)
        how: Any = {"steps": config.sampling_steps, "guidance": config.guidance_scale}
        key = (name, count, config.guidance_scale)
        if key not in self._base:
            self._base[key] = draw_rows(self.pipe, self.classifier, looks, sets, group=group, adapted=False, **how)
        load_oft_weights(self.pipe, run.result.adapter, adapter_name="subject")
        adapted = draw_rows(self.pipe, self.classifier, looks, sets, group=group, adapted=True, **how)
        unload_oft_weights(self.pipe)
        base = [Row(**{**row.to_json(), "group": group}) for row in self._base[key]]
        megabytes = run.result.adapter.stat().st_size / 1e6
        return Trained(base + adapted, looks.closest(), run.result.seconds, megabytes)


def measure(out: Path) -> None:
    """Every run that is not in the data yet."""
    done, bench = {row["group"] for row in load(RUNS)}, Bench()
    for seed in SEEDS:
        for name in FINAL:
            if f"{name}/{seed}" in done:
                continue
            found = bench.run(name, seed, {}, PICTURES, out)
            _keep(found)
            append(
                RUNS,
                [{"group": f"{name}/{seed}", "seconds": f"{found.seconds:.1f}", "megabytes": f"{found.megabytes:.3f}"}],
            )
            print(f"{name}/{seed}: trained in {found.seconds:.0f} s", flush=True)


def _keep(found: Trained) -> None:
    fresh = not PICTURES_FILE.exists()
    with PICTURES_FILE.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(_COLUMNS)
        for r in found.rows:
            flags = (int(r.adapted), int(r.hit), int(r.faithful))
            writer.writerow((r.group, r.set, r.prompt, r.seed, *flags, r.nearest, round(found.closest, 5)))


def table() -> str:
    """One line per subject, and one over all runs with intervals, which resample runs first and pictures second."""
    finished = {row["group"]: row for row in load(RUNS)}
    kept = [row for row in load(PICTURES_FILE) if row["group"] in finished]
    closest = {row["group"]: float(row["closest"]) for row in kept}
    rows = list({(r.group, r.set, r.prompt, r.seed, r.adapted): r for r in map(_row, kept)}.values())
    lines = [
        "| subject | hit | base's | prompt fidelity | base's | preservation | leakage | memorisation | s | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(group.split("/")[0] for group in finished):
        own = [group for group in finished if group.startswith(f"{name}/")]
        lines.append(
            _line(name, [r for r in rows if r.group in own], closest, [finished[g] for g in own], bounds=False)
        )
    lines.append(_line(f"all, {len(finished)} runs", rows, closest, list(finished.values()), bounds=True))
    return "\n".join(lines)


def _row(row: Mapping[str, str]) -> Row:
    flags = {name: row[name] == "1" for name in ("adapted", "hit", "faithful")}
    return Row(
        row["group"], row["set"], row["prompt"], int(row["seed"]), reading={}, nearest=float(row["nearest"]), **flags
    )


def _line(name: str, rows, closest, runs, *, bounds: bool) -> str:
    f = figures(rows, closest)
    shown = [
        f["subject hit"].adapted, f["subject hit"].base, f["prompt fidelity"].adapted, f["prompt fidelity"].base,
        f["preservation"].difference, f["leakage"].adapted, f["memorisation"].adapted,
    ]  # fmt: skip
    cells = [
        f"{100 * i.mean:.1f}" + (f" ({100 * i.low:.1f} to {100 * i.high:.1f}, n = {i.pictures})" if bounds else "")
        for i in shown
    ]
    most = [max(float(run[key]) for run in runs) for key in ("seconds", "megabytes")]
    return f"| {name} | {' | '.join(cells)} | {most[0]:.0f} | {most[1]:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, measure nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/pocket-subjects"), help="adapters, losses and reports")
    options = parser.parse_args()
    if not options.table:
        measure(options.out)
    print(table())


if __name__ == "__main__":
    main()
