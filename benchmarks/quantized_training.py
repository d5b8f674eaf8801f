"""Training on quantized bases, ours beside PEFT's LoRA and OFT: benchmarks/data/quantized_training.csv.

python -m benchmarks.quantized_training --search     # learning rates of PEFT's methods, on a subject of their own
python -m benchmarks.quantized_training              # the comparison, with the rates that the search found
python -m benchmarks.quantized_training --table      # the newest setup as Markdown, from the CSV alone

Times and memory are for `benchmarks.quantized_times` to take. --workers N runs N at once; --minutes M begins no run
after that. Each finished run is kept, so that the command can be stopped at any time and given again; but never beside
a call that runs on the same folder: each begins by taking back all claims, and the two would do the same runs. What a
run is, `benchmarks.quantized_run` says.

Our learning rate, block size and epsilon are those of train_scripts/configs/pocket.toml, which were searched for us
(benchmarks/pocket_recipe.py), as were its steps, its decay, its targets and the text encoder's share of the rate, which
all methods have here. Theirs are searched on the base as it is, by default LoRA's with AdamW's usual epsilon as well as
that one: the best is the one with most hits that are faithful too, and of equals that of the lower validation loss. The
table lists what was tried.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import EQUAL_LORA, LORA, OURS, PEFT_OFT
from benchmarks.pocket_recipe import SUBJECTS as SEARCHED
from benchmarks.pocket_subjects import CONFIG, FINAL, PICTURES, setup_digest
from benchmarks.quantized_run import NONE, Bench, Task
from benchmarks.quantized_tables import Row, best, table
from benchmarks.records import DATA, append, load
from benchmarks.turns import told
from oft_diffusion.autocast import computes_in_bfloat16
from oft_diffusion.pocket import SUBJECTS
from oft_diffusion.training import TrainConfig

FILE = DATA / "quantized_training.csv"
QUANTIZATIONS = (NONE, "nf4", "int8")
METHODS = (OURS, LORA, PEFT_OFT)
ON_DEMAND = (EQUAL_LORA,)
USUAL_EPSILON = 1e-8  # AdamW's in torch
_KEY = ("purpose", "quantization", "method", "subject", "seed", "learning_rate", "epsilon")


def search_tasks(options: argparse.Namespace, config: TrainConfig) -> list[Task]:
    """Every setting of PEFT's methods on the subject that is kept for it, and our own one beside them."""
    ours, usual = config.learning_rate, config.adam_epsilon
    tried = [(OURS, ours, usual)]
    epsilons = options.epsilons or (usual, USUAL_EPSILON)
    tried += [(m, rate, e) for m in (LORA, EQUAL_LORA) for e in epsilons for rate in options.lora_rates]
    tried += [(PEFT_OFT, ours * factor, usual) for factor in options.oft_factors]
    return [
        Task("search", NONE, method, options.search_subject, seed, rate, epsilon)
        for seed in options.search_seeds
        for method, rate, epsilon in tried
        if method in options.methods
    ]


def final_tasks(options: argparse.Namespace, config: TrainConfig, rows: Sequence[Row]) -> list[Task]:
    """The comparison.

    Raises:
        SystemExit: nothing was searched yet.
    """
    settings = {OURS: (config.learning_rate, config.adam_epsilon)}
    for method in options.methods:
        if method != OURS:
            found = best(rows, method)
            if found is None:
                raise SystemExit(f"{options.file} has no search for {method}: run --search first, with this setup")
            settings[method] = found
    groups = list(product(options.seeds, options.subjects))
    return [
        Task("final", quantization, method, subject, seed, *settings[method])
        for (seed, subject), quantization, method in product(groups, options.quantizations, options.methods)
    ]


class Queue:
    """Runs that several processes share. What is finished is in the file, what somebody is at has a claim."""

    def __init__(self, options: argparse.Namespace, device: str) -> None:
        self.options, self.device = options, device
        self.settings = _settings(options)
        self.setup = setup_digest(self.settings, options.pictures)
        self.folder: Path = options.out / self.setup
        self.bench = Bench(
            self.settings, options.pictures, self.folder, device,
            busy=options.busy or options.workers > 1, validation=options.validation,
        )  # fmt: skip

    def tasks(self) -> list[Task]:
        """All of this call's, finished or not."""
        config = TrainConfig.from_toml(CONFIG, {"model": "pocket", "output_dir": "unused", **self.settings})
        if self.options.search:
            return search_tasks(self.options, config)
        return final_tasks(self.options, config, self._rows())

    def work(self, until: float) -> None:
        """Do what nobody else does, until all is done or the time is over.

        What runs have in common comes first, so that they need not wait for each other.
        """
        missing = [task for task in self.tasks() if not self._is_done(task)]
        groups = {(t.subject, t.seed): t for t in missing}
        for task in groups.values():
            self._shared("class images", task, until, self.bench.make_class_images)
        for task in {(t.quantization, t.subject, t.seed): t for t in missing}.values():
            self._shared(f"pictures of {task.quantization}", task, until, self.bench.draw_base)
        for task in missing:
            if time.time() < until and self._claimed(repr(task)) and not self._is_done(task):
                self._run(task, until)

    def _shared(self, what: str, task: Task, until: float, make: Callable[[Task], object]) -> None:
        name = f"{what}, {task.subject}/{task.seed}"
        if time.time() < until and self._claimed(name):
            with self._locked(name):
                make(task)

    def _run(self, task: Task, until: float) -> None:
        started = time.perf_counter()
        # Another process may still be at what this run needs.
        for name in ("class images", f"pictures of {task.quantization}"):
            with self._locked(f"{name}, {task.subject}/{task.seed}"):
                pass
        try:
            row = self.bench.run(task)
        except Exception as error:  # noqa: BLE001 - whatever it is, other runs go on
            traceback.print_exc()
            row = self.bench.failed(task, told(task.method, error))
        with self._locked("file"):
            append(self.options.file, [{"setup": self.setup, **row}], self.device)
        about = row["failed"] or f"loss {row['loss']}, validation {row['validation_loss']}, hit {row['hit']}"
        print(f"{task}: {about}; {time.perf_counter() - started:.0f} s", flush=True)

    def _rows(self) -> list[Row]:
        """Of this setup and as many validation batches, whose loss is another with others."""
        wanted = {"setup": self.setup, "validation_batches": str(self.options.validation), "failed": ""}
        return [row for row in load(self.options.file) if all(row[name] == value for name, value in wanted.items())]

    def _is_done(self, task: Task) -> bool:
        own = task.columns()
        with self._locked("file"):
            return any(all(row[name] == own[name] for name in _KEY) for row in self._rows())

    def _claimed(self, name: str) -> bool:
        """Whether this process is the first that asks."""
        folder = self.folder / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / _digest(name)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _digest(name)).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back with the file, even by a process that is killed
            yield


def settings_for(device: str, *, float32: bool = False) -> dict[str, Any]:
    """What differs from pocket.toml: the dtype, where bfloat16 is emulated or not wanted."""
    return {} if computes_in_bfloat16(device) and not float32 else {"mixed_precision": "no"}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Those, and in a trial the length, warm-up and decay."""
    found = settings_for(options.device, float32=options.float32)
    if options.sampling_steps is not None:
        found["sampling_steps"] = options.sampling_steps
    if options.steps is not None:
        usual = TrainConfig.from_toml(CONFIG, {"model": "pocket", "output_dir": "unused"})
        found |= {
            "steps": options.steps,
            "warmup_steps": usual.warmup_steps * options.steps // usual.steps,
            "decay_steps": usual.decay_steps * options.steps // usual.steps,
        }
    return found


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def spawn(options: argparse.Namespace, until: float) -> None:
    """As many processes as are wanted, with the processor's cores shared among them."""
    threads = str(max(1, (os.cpu_count() or 1) // options.workers))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    command = [sys.executable, "-m", "benchmarks.quantized_training", *sys.argv[1:], "--until", str(until)]
    workers = [subprocess.Popen([*command, "--worker"], env=environment) for _ in range(options.workers)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or they would outlive a call that `timeout` ends
    try:
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.terminate()
    if any(codes):
        print(f"some workers failed: {codes}; give the command again for the runs that are missing", flush=True)


def main() -> None:
    """Run the command. All claims are taken back first: a call beside one that runs would do its runs twice."""
    options = _parser().parse_args()
    if options.table:
        print(table(load(options.file), options.setup))
        return
    queue = Queue(options, options.device)
    if options.worker:
        queue.work(options.until)
        return
    until = time.time() + 60 * options.minutes
    shutil.rmtree(queue.folder / "claims", ignore_errors=True)  # of a call that was stopped
    if options.workers > 1:
        queue.tasks()  # what is wrong with them is told once
        spawn(options, until)
    else:
        queue.work(until)
    print(table(load(options.file), queue.setup))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--search", action="store_true", help="search learning rates")
    kind.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    add("--setup", help="with --table: an earlier one, by its digest")
    add("--file", type=Path, default=FILE, help="(default: %(default)s)")
    add("--out", type=Path, default=Path("runs/quantized-training"), help="class images and claims")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=1, help="processes at once (default: %(default)s)")
    add("--minutes", type=float, default=math.inf, help="after these no run is begun")
    add("--float32", action="store_true", help="even where the processor computes in bfloat16")
    add("--busy", action="store_true", help="other work runs meanwhile: the rows say so")
    add("--quantizations", nargs="+", default=QUANTIZATIONS, choices=QUANTIZATIONS)
    add("--methods", nargs="+", default=METHODS, choices=(*METHODS, *ON_DEMAND))
    add("--subjects", nargs="+", default=FINAL[:2], choices=FINAL)
    add("--seeds", nargs="+", type=int, default=(0, 1, 2))
    add("--pictures", type=int, default=PICTURES, help="per set and run (default: %(default)s)")
    add("--validation", type=int, default=64, help="batches of the validation loss (default: %(default)s)")
    add("--search-subject", default=SEARCHED[0], choices=[name for name in SUBJECTS if name not in FINAL])
    add("--search-seeds", nargs="+", type=int, default=(0,))
    add("--lora-rates", nargs="+", type=float, default=(5e-4, 1e-3, 2e-3, 4e-3))
    add("--epsilons", nargs="+", type=float, help="AdamW's for LoRA (default: pocket.toml's, and torch's)")
    add("--oft-factors", nargs="+", type=float, default=(0.5, 1.0, 2.0), help="of our learning rate, for PEFT's OFT")
    add("--steps", type=int, help="for a trial: so many, the schedule in proportion")
    add("--sampling-steps", type=int, help="for a trial: of a picture")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
