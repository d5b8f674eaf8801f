"""All measurements that need a CUDA card, within 20 minutes: `make bench-gpu`.

python -m benchmarks.on_card                                           # all of them; that has not been run yet
python -m benchmarks.on_card --parts models --minutes 7 --out FOLDER   # a part, where a card is lent for minutes
python -m benchmarks.on_card --parts kernels --minutes 4 --out FOLDER  # another

First the kernels are tested, then what the aims ask for is measured, then the rest. Each is a process of its own, goes
on whatever became of the one before, and has its share of the time, at most what is left: `benchmarks.speed` begins
nothing that would not fit, and two minutes later whatever runs is stopped. Rows are appended to benchmarks/data. What
changes there is copied to FOLDER every few seconds, eight files at most, so that a machine that is taken away has given
what it had. With these back in benchmarks/data of the same tree, on the same hardware, `models`, `peers` and `rest` go
on where they stopped: `rest` is all other setups of `benchmarks.speed`, which take longer, and is asked for by name.

It takes a Python that has this checkout on its path, installed or not, what the package needs with its extras train,
eval and quant, and pytest, hypothesis, peft and lycoris-lora; what of these is lacking is told first.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.command import INCOMPLETE
from benchmarks.records import DATA


@dataclass(frozen=True)
class Measurement:
    """A module, its options, and its share of the time, in minutes."""

    module: str
    options: tuple[str, ...]
    minutes: float


def _on_card(module: str, *options: str, minutes: float) -> Measurement:
    return Measurement(f"benchmarks.{module}", ("--device", "cuda", *options), minutes)


_TESTS = [
    f"tests/core/test_{name}.py" for name in ("gpu_rotate", "gpu_graphs", "inlined", "fused_linear", "solve_kernel")
]
# By part, in order: what the aims ask for comes first, when the kernels compute what they should. Shares are 17 minutes
# in all but the last part, by what is known of an H200.
PARTS: dict[str, tuple[Measurement, ...]] = {
    "tests": (Measurement("pytest", ("-q", "-m", "gpu", *_TESTS), 1),),
    "models": (_on_card("speed", "--aimed", minutes=9.5),),
    "kernels": (
        Measurement("benchmarks.rotate_bandwidth", ("--rounds", "1"), 1.5),
        _on_card("stages", minutes=0.5),
        _on_card("build_forms", minutes=0.5),
        Measurement("benchmarks.fused_linear", (), 0.5),
    ),
    "peers": (_on_card("speed", "--only", "SD 1.5 (train, bfloat16, batch 2,", minutes=1),),
    "memory": (
        Measurement("benchmarks.card_memory", ("--minutes", "0.5"), 0.5),
        Measurement(
            "benchmarks.card_memory",
            ("--families", "SDXL", "--minutes", "0.5", "--settings", '{"layer_offload": 1.0}'), 0.5,
        ),
    ),
    "quantized": (_on_card("quantized_times", minutes=0.75), _on_card("quantized_layers", minutes=0.75)),
    "rest": (_on_card("speed", minutes=17),),
}  # fmt: skip
NEEDED = (
    "accelerate", "bitsandbytes", "diffusers", "gguf", "hypothesis", "lycoris", "optimum", "peft", "pytest",
    "safetensors", "torchao", "transformers", "triton",
)  # fmt: skip
USUAL = tuple(part for part in PARTS if part != "rest")
GRACE = 2.0  # minutes, for what has begun
CLEARING = 10.0  # seconds, for what is stopped
COPIED_EVERY = 5.0  # seconds


def measure(parts: Sequence[str], minutes: float, out: Path | None) -> list[str]:
    """Run them in processes of their own.

    Args:
        parts: names of `PARTS`.
        minutes: after which nothing begins. Of a part alone that is one measurement it is that one's share, too.
        out: a folder for copies of the data that the run changes.

    Returns:
        What failed, was stopped, has not begun or not come to its end, each with a word on it.
    """
    lacking = []
    before = _digests()
    deadline = time.monotonic() + 60 * minutes
    all_of_them = [(part, number, one) for part in parts for number, one in enumerate(PARTS[part], 1)]
    for part, number, one in all_of_them:
        share = min(one.minutes if len(all_of_them) > 1 else minutes, (deadline - time.monotonic()) / 60)
        word = "no time left"
        if share > 0:
            limit = ["--minutes", f"{share:.3g}"] if one.module == "benchmarks.speed" else []
            command = [sys.executable, "-m", one.module, *one.options, *limit]
            print("::", *command[2:], flush=True)
            with _copied(out, before):
                word = _run(command, 60 * (share + GRACE))
        if word:
            lacking.append(f"{part} {number}, {one.module} ({word})")
    return lacking


def _run(command: Sequence[str], seconds: float) -> str:
    """A word on what went wrong, or none."""
    # Or the profiler would write two lines for every count.
    environment = {"KINETO_LOG_LEVEL": "99", "HYPOTHESIS_PROFILE": "quick", **os.environ}
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        _end(child)
    return {0: "", INCOMPLETE: "not all of it"}.get(status, "failed")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Stop it, if it still runs, and what it has begun: first as by Ctrl-C, so that folders and locks are cleared."""
    for way in (signal.SIGINT, signal.SIGKILL):
        if child.poll() is None or way is signal.SIGKILL:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, way)
            with suppress(subprocess.TimeoutExpired):  # what hangs in a driver is not waited for
                child.wait(CLEARING)


@contextmanager
def _copied(out: Path | None, before: Mapping[Path, str]) -> Iterator[None]:
    """Copy what changes inside to a folder, again and again: amid a measurement a machine can be taken away, too."""
    if out is None:
        yield
        return
    ended = threading.Event()

    def copy_until_ended() -> None:
        while not ended.wait(COPIED_EVERY):
            _copy_changed(out, before)

    copying = threading.Thread(target=copy_until_ended, daemon=True)
    copying.start()
    try:
        yield
    finally:
        ended.set()
        copying.join()
        _copy_changed(out, before)


def _copy_changed(out: Path, before: Mapping[Path, str]) -> None:
    """The files of the data that are not what they were: only a few may come back from a machine that is lent."""
    out.mkdir(parents=True, exist_ok=True)
    for file, digest in _digests().items():
        if digest != before.get(file):
            shutil.copy2(file, out)


def _digests() -> dict[Path, str]:
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in DATA.glob("*.csv")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=USUAL, help="(default: all but the last)")
    parser.add_argument(
        "--minutes", type=float, default=17.0,
        help="after which nothing begins; two later what still runs is stopped (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="copies of the data that changes go there")
    options = parser.parse_args()
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        raise SystemExit(f"benchmarks.on_card needs these packages, too: {', '.join(lacking)}; nothing is measured")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.on_card needs a CUDA card, and torch finds none: nothing is measured")
    if lacking := measure(options.parts, options.minutes, options.out):
        raise SystemExit(f"not measured, or not all of it: {', '.join(lacking)}")


if __name__ == "__main__":
    main()
