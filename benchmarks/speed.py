"""Speed and memory of adapting a diffusion model, method beside method: benchmarks/data/speed.csv.

python -m benchmarks.speed                  # measures the processor and appends; make bench
python -m benchmarks.speed --device cuda    # a CUDA card; make bench-gpu
python -m benchmarks.speed --list           # what would be measured
python -m benchmarks.speed --table          # the newest figures as Markdown, from the data alone

All methods of a setup (`speed_setups`) lie in one process, upon the same weights. After a warm-up they take turns: in
each round every method makes one step, in another order than before, so that noise hits all alike. What
was measured of the same tree on the same hardware is skipped, so a run that was cut off, or had too little time, goes
on when it is called again.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from benchmarks.candidates import Candidate, builder
from benchmarks.command import INCOMPLETE
from benchmarks.records import DATA, append, environment, load
from benchmarks.speed_setups import AIMED, KINDS, SETUPS, Setup
from benchmarks.speed_tables import plots, table
from benchmarks.turns import Around, Calls, CardStoppedError, spread, take_turns, told
from benchmarks.works import WORKS, Work
from oft_diffusion.quantization import quantize_with_bitsandbytes, scheme

FILE = DATA / "speed.csv"
LEAST = 3  # rounds, without which there is no spread
WARM_UPS = 2
_FIGURES = ("peak_bytes", "operations", "saved_bytes", "kernels", "kernel_seconds")
# What makes two rows the same measurement, made again.
_SAME = ("hardware", "threads", "commit", "oft-diffusion", "torch", "diffusers", "transformers", "peft", "lycoris")


class OutOfTimeError(Exception):
    """A setup does not fit into what is left."""


def measure(setup: Setup, device: str, out: Path, deadline: float, rounds: int | None = None) -> None:
    """Append the rows of one setup.

    Raises:
        OutOfTimeError: it does not fit before the deadline, by `time.monotonic`; nothing is written then.
    """
    load_before = os.getloadavg()[0]
    stand = _Stand(setup, device, deadline, rounds or setup.rounds)
    try:
        # One code object serves every block of every method: by default dynamo falls back to eager, and says nothing.
        with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
            (stand.build if setup.kind == "build" else stand.compare)()
    except OutOfTimeError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, such as a base that does not fit: others go on
        note_stop(setup, device, out, told("the base", error))
    else:
        stand.append_to(out, f"{load_before:.1f}")


def note_stop(setup: Setup, device: str, out: Path, reason: str) -> None:
    """Append a setup's rows with why they have no figures."""
    stand = _Stand(setup, device, 0.0, 0)
    stand.reasons = dict.fromkeys(setup.cells(), reason)
    stand.append_to(out, "")


class _Stand:
    """What is found of one setup, by method and kind."""

    def __init__(self, setup: Setup, device: str, deadline: float, rounds: int) -> None:
        self.setup, self.device, self.deadline, self.rounds = setup, device, deadline, rounds
        self.times: dict[tuple[str, str], list[float]] = {}
        self.figures: dict[tuple[str, str], dict[str, Any]] = {}
        self.reasons: dict[tuple[str, str], str] = {}
        self.about = {"cut": "", "base_parameters": "", "base_bytes": ""}

    def append_to(self, out: Path, load_before: str) -> None:
        """Write what was found, a row for each method and kind."""
        run = uuid4().hex[:8]
        rows = [
            {
                **_versions(), "device": self.device, "run": run, **self.setup.columns(), **self.about,
                "kind": kind, "method": method,
                **dict.fromkeys(("settings", "trained", "adapter_bytes", *_FIGURES), ""),
                **self.figures.get((method, kind), {}), **spread(self.times.get((method, kind), [])),
                "load": load_before,
                "reason": "" if (method, kind) in self.times else self.reasons.get((method, kind), ""),
            }
            for method, kind in self.setup.cells()
        ]  # fmt: skip
        append(out, rows, self.device)

    def compare(self) -> None:
        """Methods upon one work."""
        work = make_work(self.setup, self.device)
        parameters = list(work.parameters())
        self.about = {
            "cut": work.note,
            "base_parameters": str(sum(p.numel() for p in parameters)),
            "base_bytes": str(sum(p.numel() * p.element_size() for p in parameters)),
        }
        targets = work.targets()
        candidates: dict[str, Candidate] = {}
        for method in self.setup.methods:  # all are adapted before any is compiled: adapting makes dynamo forget
            with self._falling_out(method):
                candidates[method] = Candidate(work, targets, method, self.setup)
            _give_back(self.device)
        for method in list(candidates):
            self._check_time(0.0)
            with self._falling_out(method, candidates):
                self._warm_up(method, candidates[method])
            _give_back(self.device)
        for stage in range(max((len(candidate.stages()) for candidate in candidates.values()), default=0)):
            for method in list(candidates):
                with self._falling_out(method, candidates):
                    candidates[method].between(stage)
            calls = {method: candidate.stages()[stage] for method, candidate in candidates.items()}
            around = {method: candidate.kernels for method, candidate in candidates.items()}
            self._take_turns({method: own for method, own in calls.items() if own}, around)
        for method, candidate in candidates.items():
            for kind in KINDS[self.setup.kind]:
                if (method, kind) not in self.times and (method, kind) not in self.reasons:
                    self.reasons[method, kind] = candidate.reason()

    def build(self) -> None:
        """D of the work's layers, by each parametrisation."""
        with torch.device("meta"):
            work = WORKS[self.setup.work](self.setup.sizes, text=self.setup.text, small=self.setup.small)
        parts = zip(work.components(), work.targets(), strict=True)
        layers: list[Any] = [part.get_submodule(name) for part, names in parts for name in names]
        blocks = sum(layer.in_features for layer in layers) // self.setup.block_size
        self.about["cut"] = work.note
        self._take_turns(
            {method: builder(method, blocks, self.setup.block_size, self.device) for method in self.setup.methods}
        )
        for method in self.setup.methods:
            for kind in KINDS["build"]:
                self.figures[method, kind] = {"settings": f"{blocks} blocks of {self.setup.block_size}"}

    def _warm_up(self, method: str, candidate: Candidate) -> None:
        """And note what is counted."""
        noted = {
            "settings": " and ".join(dict.fromkeys(a.settings for a in candidate.adapted if a.settings)),
            "trained": sum(p.numel() for p in candidate.trained),
            "adapter_bytes": candidate.adapter_bytes,
        }
        with candidate.kernels():
            candidate.warm_up(WARM_UPS)
            counted = candidate.counts()
        for kind in KINDS[self.setup.kind]:
            self.figures[method, kind] = noted | (counted if kind in ("train", "live") else {})

    def _take_turns(self, stage: Mapping[str, Calls], around: Mapping[str, Around] | None = None) -> None:
        once, failed = take_turns(stage, 1, self.device, around)  # a warm-up that says how long a round takes
        a_round = sum(sum(taken[-1] for taken in kinds.values()) for kinds in once.values())
        self._check_time(LEAST * a_round)
        fitting = int((self.deadline - time.monotonic()) / a_round) if a_round else self.rounds
        live = {method: calls for method, calls in stage.items() if method in once}
        times, late = take_turns(live, max(LEAST, min(self.rounds, fitting)), self.device, around)
        for method, reason in {**failed, **late}.items():
            self.reasons |= {(method, kind): reason for kind in stage[method]}
        self.times |= {(method, kind): taken for method, kinds in times.items() for kind, taken in kinds.items()}

    def _check_time(self, seconds: float) -> None:
        if time.monotonic() + seconds > self.deadline:
            raise OutOfTimeError

    @contextmanager
    def _falling_out(self, method: str, candidates: dict[str, Candidate] | None = None) -> Iterator[None]:
        """A method that fails in here is out, with its reason; the others go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is
            self.reasons |= {(method, kind): told(method, error) for kind in KINDS[self.setup.kind]}
            if candidates is not None:
                del candidates[method]


def make_work(setup: Setup, device: str) -> Work:
    """A setup's work on a device, with random weights and inputs of its dtype, frozen."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, setup.dtype))  # made as such: in float32 Flux.1 has 48 GB
    try:
        with torch.device(device):
            work = WORKS[setup.work](setup.sizes, text=setup.text, small=setup.small)
    finally:
        torch.set_default_dtype(before)
    work = work.to(device).requires_grad_(False)
    if setup.quantization != "none":
        way = scheme(setup.quantization)
        quantize_with_bitsandbytes(work.denoiser, way, torch.float32 if device == "cpu" else torch.bfloat16)
        with torch.no_grad():
            work()  # LLM.int8's layers move their bytes at their first call, which copies of them could not share
        if all(parameter.is_floating_point() for parameter in work.denoiser.parameters()):
            raise RuntimeError(f"{setup.quantization} has quantized nothing")
    return work


def is_done(setup: Setup, device: str, rows: Sequence[Mapping[str, str]]) -> bool:
    """Whether the data has every row of a setup, of this tree and hardware.

    Old rows of trees that differed from their commit have a + without a digest, as no tree has now: they never count.
    """
    now = environment(device) | _versions()
    if not now["commit"]:
        return False  # outside of git nothing tells which code it was
    wanted = {name: now[name] for name in _SAME} | setup.columns()
    found = {(row["method"], row["kind"]) for row in rows if all(row.get(k) == v for k, v in wanted.items())}
    return found >= set(setup.cells())


def run(
    setups: Sequence[Setup],
    device: str,
    out: Path,
    *,
    minutes: float,
    rounds: int | None = None,
    again: bool = False,
    begin: int = 0,
) -> bool:
    """Measure what is not measured yet, until time is up.

    Args:
        begin: with which setup. Where a card stops, a new process goes on with the next one.

    Returns:
        Whether there was time for all of it.
    """
    complete = True
    deadline = time.monotonic() + 60 * minutes
    with _set_aside():
        for number, setup in enumerate(setups[begin:], begin):
            if not again and is_done(setup, device, load(out)):
                print(f"measured already: {setup}", flush=True)
                continue
            started = time.monotonic()
            try:
                if time.monotonic() > deadline:
                    raise OutOfTimeError
                measure(setup, device, out, deadline, rounds)
            except OutOfTimeError:
                print(f"no time left, run it again: {setup}", flush=True)
                complete = False
            except CardStoppedError as stopped:
                print(f"{stopped}: {setup}", flush=True)
                _go_on(number, str(stopped), (deadline - time.monotonic()) / 60)
            else:
                print(f"measured in {time.monotonic() - started:.0f} s: {setup}", flush=True)
            torch.compiler.reset()
            gc.collect()
            _give_back(device)
    return complete


def _go_on(stopped_at: int, reason: str, minutes: float) -> None:
    """Become a new process, which notes why a setup has no figures and goes on behind it."""
    more = ["--stopped-at", str(stopped_at), "--because", reason, "--minutes", f"{max(0.0, minutes):.2f}"]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.speed", *sys.argv[1:], *more])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest figures, measure nothing")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the newest figures, measure nothing")
    parser.add_argument("--list", action="store_true", help="print what would be measured")
    parser.add_argument("--device", choices=SETUPS, default="cpu", help="(default: cpu)")
    parser.add_argument(
        "--only", action="append", metavar="WORDS", help="setups whose line in --list has these words in it (or others)"
    )
    parser.add_argument("--aimed", action="store_true", help="of a card only what the aims ask for")
    parser.add_argument("--without", action="append", default=[], metavar="METHOD", help="leave a method out")
    parser.add_argument("--minutes", type=float, default=13.0, help="begin nothing after these (default: 13)")
    parser.add_argument("--rounds", type=int, help="in place of each setup's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor (default: all)")
    parser.add_argument("--out", type=Path, default=FILE, help="another file to append to, and to read")
    parser.add_argument("--again", action="store_true", help="measure what was measured already, too")
    parser.add_argument("--stopped-at", type=int, default=-1, help=argparse.SUPPRESS)  # the last word counts
    parser.add_argument("--because", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table or options.plots:
        if options.plots:
            print("\n".join(map(str, plots(load(options.out), options.plots))))
        if options.table:
            print(table(load(options.out)))
        return
    if options.aimed and options.device != "cuda":
        parser.error("--aimed is for a card: add --device cuda")
    setups = [
        replace(setup, methods=tuple(method for method in setup.methods if method not in options.without))
        for setup in (AIMED if options.aimed else SETUPS[options.device])
        if any(words in str(setup) for words in options.only or [""])
    ]
    if options.list:
        print("\n".join(map(str, setups)))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this measures a card")
    torch.set_num_threads(options.threads)
    if options.because:
        note_stop(setups[options.stopped_at], options.device, options.out, options.because)
    complete = run(
        setups, options.device, options.out, minutes=options.minutes, rounds=options.rounds, again=options.again,
        begin=options.stopped_at + 1,
    )  # fmt: skip
    if not complete:
        raise SystemExit(INCOMPLETE)


def _versions() -> dict[str, str]:
    """Of the peers; `records.environment` has the rest."""
    return {"peft": version("peft"), "lycoris": version("lycoris-lora"), "cuda": torch.version.cuda or ""}


def _give_back(device: str) -> None:
    """What a card's memory still holds of a method that fell out, or of what building another left behind."""
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def _set_aside() -> Iterator[None]:
    """What was imported is no garbage, and need not be gone through each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


if __name__ == "__main__":
    main()
