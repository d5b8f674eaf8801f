"""How near an estimate comes to the run: seconds and memory, predicted and true, in benchmarks/data/estimates.csv.

python -m benchmarks.estimates            # estimates and trains train_scripts/configs/pocket.toml, and appends
python -m benchmarks.estimates --table    # the newest measurement as Markdown

Either is done in a process of its own, since a processor's memory is that by which the process grows: its most, by
Linux's count, less what it had when torch and diffusers were loaded. On a GPU it is the most that torch had allocated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import DATA, append, load
from oft_diffusion.pocket import pocket_path, subjects_path
from oft_diffusion.training import TrainConfig, estimate, train

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "train_scripts" / "configs" / "pocket.toml"
FILE = DATA / "estimates.csv"
SUBJECT = "party_car"
# What is measured, its unit, and how many of that unit a number of the two ways has.
_MEASURES = (("a step", "s", 1.0), ("the run", "s", 1.0), ("memory", "MB", 1e6), ("adapter file", "MB", 1e6))


def config(settings: Mapping[str, Any], out: Path) -> TrainConfig:
    """The pocket recipe in a folder, class images to be made included."""
    own = {"model": str(pocket_path()), "instance_dir": str(subjects_path(SUBJECT)), "output_dir": str(out / "run")}
    return TrainConfig.from_toml(CONFIG, {**own, **settings})


def predicted(settings: TrainConfig) -> dict[str, float]:
    """What the estimate says, and how long it takes itself."""
    started = time.perf_counter()
    found = estimate(settings)
    return {
        "a step": found.seconds_per_step,
        "the run": found.seconds,
        "memory": found.memory.peak,
        "adapter file": found.file_bytes,
        "took": time.perf_counter() - started,
    }


def true(settings: TrainConfig) -> dict[str, float]:
    """What the run takes."""
    started, before = time.perf_counter(), _memory("VmRSS")
    with train(settings, progress=False) as run:
        for _ in run:
            pass
    if run.result.interrupted:  # half a run is no measurement
        raise KeyboardInterrupt
    wall = time.perf_counter() - started
    return {
        "a step": run.result.seconds / run.result.steps,
        "the run": wall,
        "memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _memory("VmHWM") - before,
        "adapter file": run.result.adapter.stat().st_size,
        "took": wall,
    }


WAYS: dict[str, Callable[[TrainConfig], dict[str, float]]] = {"predicted": predicted, "true": true}


def apart(way: str, settings: Mapping[str, Any], threads: int) -> dict[str, float]:
    """What one of `WAYS` finds, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.estimates", "--threads", str(threads), "--settings"]
    done = subprocess.run(
        [*command, json.dumps(dict(settings)), "--way", way], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(settings: Mapping[str, Any], threads: int) -> None:
    """Append one measurement."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        steps = config(settings, Path(folder)).steps
    found = {way: apart(way, settings, threads) for way in WAYS}
    rows = [
        {
            "steps": steps, "settings": json.dumps(dict(settings)), "measure": name, "unit": unit,
            **{way: f"{found[way][name] / size:.4g}" for way in WAYS},
            "estimate took": f"{found['predicted']['took']:.1f}",
        }
        for name, unit, size in _MEASURES
    ]  # fmt: skip
    append(FILE, rows, "cuda" if torch.cuda.is_available() else "cpu")


def table() -> str:
    """The newest measurement."""
    newest = load(FILE)[-len(_MEASURES) :]
    lines = ["| | predicted | true | of the true |", "|---|---|---|---|"]
    for row in newest:
        name, unit, said, was = row["measure"], row["unit"], float(row["predicted"]), float(row["true"])
        lines.append(f"| {name} | {said:.4g} {unit} | {was:.4g} {unit} | {said / was:.0%} |")
    told = newest[-1]
    how = f"{told['hardware']}, {told['threads']} thread(s), {told['steps']} steps, torch {told['torch']}"
    return "\n".join([*lines, "", f"{how}; the estimate took {told['estimate took']} s."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest measurement, measure nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor (default: all)")
    parser.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON", help="knobs that differ from the recipe's"
    )
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # what a process of its own is to do
    options = parser.parse_args()
    if options.way:
        torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(WAYS[options.way](config(options.settings, Path(folder)))))
        return
    if not options.table:
        measure(options.settings, options.threads)
    print(table())


def _memory(entry: str) -> int:
    """Bytes of this process now ("VmRSS") or at most ("VmHWM")."""
    [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{entry}:")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
