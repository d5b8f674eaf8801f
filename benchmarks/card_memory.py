"""How near an estimate's memory comes to the run's on a card, by preset, in benchmarks/data/card_memory.csv.

python -m benchmarks.card_memory            # SD 1.5 and SDXL at full size, random weights; needs a CUDA card
python -m benchmarks.card_memory --families Flux.1 --minutes 2
python -m benchmarks.card_memory --table    # the newest measurements as Markdown

It has not been run yet: there is no such file.

A base is made on the card and written to memory (/dev/shm) or a temporary folder. For each preset, the estimate and a
run of a few steps follow, with the first grid, the last one and the report. Both are looked at by what torch's
allocator has handed out at most, beyond what it had before: that is exact, whatever this process did earlier, so that
no process of its own has to be started for each. Presets that come to the same settings are measured once, under the
least memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import INCOMPLETE
from benchmarks.full_size import FULL_SIZE, write_full_size
from benchmarks.records import DATA, append, load
from oft_diffusion.errors import OFTError
from oft_diffusion.training import TrainConfig, estimate, train
from oft_diffusion.training.memory import Meter
from oft_diffusion.training.memory_presets import row_for
from tests.helpers.tiny_sd import draw_pictures

FILE = DATA / "card_memory.csv"
STEPS = 6
_GB = 1e9
USUAL = ("SD 1.5", "SDXL")


@dataclass(frozen=True)
class Peaks:
    """Bytes at most: of all, of training alone, and with what the allocator holds in reserve; 0 where unknown."""

    whole: int
    steps: int
    reserved: int = 0


def config(model: Path, out: Path, memory: str, knobs: Mapping[str, Any]) -> TrainConfig:
    """A run of a few steps with a preset."""
    return TrainConfig.from_dict({
        "model": str(model), "instance_dir": str(model.parent / "pictures"), "output_dir": str(out), "trigger": "sks",
        "class_word": "mug", "steps": STEPS, "sampling_steps": 1, "checkpoint_every": 0, "learning_rate": 1e-6,
        "memory": memory, **knobs,
    })  # fmt: skip


def predicted(settings: TrainConfig) -> Peaks:
    """What the estimate says."""
    memory = estimate(settings).memory
    return Peaks(memory.peak, memory.while_training)


def true(settings: TrainConfig) -> Peaks:
    """What the run takes. A processor tells nothing but its process's growth."""
    cuda = torch.cuda.is_available()
    meter, before = Meter(torch.device("cuda" if cuda else "cpu")), torch.cuda.memory_allocated() if cuda else 0

    def lap() -> int:
        """The most since the last one."""
        if not cuda:
            return meter.process_growth()
        most = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        return most

    lap()
    reserved = 0
    with train(settings, progress=False) as run:
        laps = []
        for _ in run:
            laps.append(lap())  # the first with all before it, the last with its grid
            reserved = max(reserved, torch.cuda.memory_reserved() if cuda else 0)
    if run.result.interrupted:  # half a run is no measurement
        raise KeyboardInterrupt
    return Peaks(max(*laps, lap()), max(laps[1:-1]), reserved)


def measure(family: str, model: Path, memory: str, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """A row about one preset of one base."""
    started, found, problem = time.perf_counter(), {}, ""
    with tempfile.TemporaryDirectory() as out:
        try:
            settings = config(model, Path(out) / "run", memory, knobs)
            for way, look in (("predicted", predicted), ("true", true)):
                found[way] = look(settings)
                _forget()
        except (OFTError, RuntimeError) as error:  # such as that it does not fit: this is to be known, too
            problem = str(error).splitlines()[0][:200]
            _forget()
    said, was = (found.get(way, Peaks(0, 0)) for way in ("predicted", "true"))
    return {
        "family": family, "memory": memory, "settings": json.dumps(dict(row_for(model).settings.get(memory, {}))),
        "knobs": json.dumps(dict(knobs)), "predicted GB": _gb(said.whole), "true GB": _gb(was.whole),
        "predicted steps GB": _gb(said.steps), "true steps GB": _gb(was.steps), "reserved GB": _gb(was.reserved),
        "seconds": f"{time.perf_counter() - started:.0f}", "problem": problem,
    }  # fmt: skip


def measure_all(families: Sequence[str], minutes: float, knobs: Mapping[str, Any], file: Path = FILE) -> bool:
    """Append a row for each preset of each family, until the time is up; what began then is brought to its end.

    Returns:
        Whether there was time for all of them.
    """
    complete = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    end, shm = time.monotonic() + 60 * minutes, Path("/dev/shm")
    for family in families:
        if time.monotonic() > end:
            print(f"no time for {family}", flush=True)
            complete = False
            continue
        with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
            model = written(family, Path(folder), device)
            _forget()
            knobs_here = {"resolution": resolution_of(family), **knobs}
            for memory in distinct(model):
                if time.monotonic() > end:
                    print(f"no time for {family} with {memory}", flush=True)
                    complete = False
                    continue
                row = measure(family, model, memory, knobs_here)
                append(file, [row], device)
                print(json.dumps(row), flush=True)
    return complete


def written(family: str, folder: Path, device: str) -> Path:
    """The base of a family in a folder, with pictures beside it."""
    resolution = resolution_of(family)
    draw_pictures(folder / "pictures", 3, resolution)
    return write_full_size(family, folder, device)


def resolution_of(family: str) -> int:
    """In pixels, that its base was made for."""
    return FULL_SIZE[family].resolution


def distinct(model: Path) -> list[str]:
    """The memories whose presets differ, of equal ones the least."""
    settings = row_for(model).settings
    first: dict[str, str] = {}
    for memory, chosen in settings.items():
        first.setdefault(json.dumps(dict(chosen)), memory)
    return list(first.values())


def table(file: Path = FILE) -> str:
    """The newest row of each preset and family."""
    newest = {(row["family"], row["memory"]): row for row in load(file)}
    lines = [
        "| base | card | predicted | true | of the true | steps, predicted | true | reserved | settings |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (family, memory), row in newest.items():
        said, was = float(row["predicted GB"]), float(row["true GB"])
        share = f"{said / was:.0%}" if was else row["problem"] or "-"
        steps = f"{row['predicted steps GB']} | {row['true steps GB']} | {row['reserved GB']}"
        told = ", ".join(f"{knob} {value}" for knob, value in json.loads(row["settings"]).items())
        lines.append(f"| {family} | {memory} | {said:.4g} | {was:.4g} | {share} | {steps} | {told} |")
    hardware = {f"{row['hardware']}, torch {row['torch']}, commit {row['commit']}" for row in newest.values()}
    return "\n".join([*lines, "", f"GB are 1e9 bytes of tensors. {'; '.join(sorted(hardware))}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest measurements, measure nothing")
    parser.add_argument(
        "--families", nargs="+", choices=FULL_SIZE, default=USUAL, metavar="NAME", help=", ".join(FULL_SIZE)
    )
    parser.add_argument("--minutes", type=float, default=2.0, help="after which no preset is begun (default: 2)")
    parser.add_argument(
        "--settings", type=json.loads, default={}, metavar="JSON", help="knobs that differ, such as the resolution"
    )
    options = parser.parse_args()
    if not options.table:
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device: this measures a card")
        complete = measure_all(options.families, options.minutes, options.settings)
    print(table())
    if not complete:
        raise SystemExit(INCOMPLETE)


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _gb(count: int) -> str:
    return f"{count / _GB:.4g}"


if __name__ == "__main__":
    main()
