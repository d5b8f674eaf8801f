"""Calls that take turns, so that whatever slows a machine for a while slows all of them alike."""

from __future__ import annotations

import gc
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from benchmarks.methods import UnsupportedError

Calls = Mapping[str, Callable[[], object]]
Around = Callable[[], AbstractContextManager[None]]


def take_turns(
    stage: Mapping[str, Calls], rounds: int, device: str = "cpu", around: Mapping[str, Around] | None = None
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Seconds of each method's calls, by kind, one per round, and why a method fell out.

    Args:
        stage: by method, what it does within one turn, by kind.
        rounds: how often each has its turn, in another order in every round, the same in every run: what one leaves
            behind, in caches and in an allocator, is not always the same other's to meet.
        device: what is waited for before the clock is read.
        around: by method, what its turns are taken in; not timed.
    """
    times: dict[str, dict[str, list[float]]] = {m: {kind: [] for kind in calls} for m, calls in stage.items()}
    reasons: dict[str, str] = {}
    order = random.Random(0)
    with _no_collection():
        for _ in range(rounds):
            for method in order.sample([*stage], len(stage)):
                if method in reasons:
                    continue
                try:
                    with (around or {}).get(method, nullcontext)():
                        for kind, call in stage[method].items():
                            times[method][kind].append(seconds_of(call, device))
                except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
                    reasons[method] = told(method, error)
    return {method: taken for method, taken in times.items() if method not in reasons}, reasons


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Until all of it is done, on a card too."""
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def spread(times: Sequence[float]) -> dict[str, str]:
    """Median and quartiles, and all of them, in the order of the rounds, so that ratios can be paired."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if times else ("", "", "")
    shown = {"median": median, "low": low, "high": high}
    cells = {name: f"{value:.6g}" if times else "" for name, value in shown.items()}
    return {"rounds": str(len(times)), **cells, "seconds": " ".join(f"{t:.6g}" for t in times)}


class CardStoppedError(SystemExit):
    """An error of CUDA's, after which nothing that this process does on the card would be true."""


def told(method: str, error: Exception) -> str:
    """A reason as a row holds it: one line, and no paths of this machine.

    Raises:
        CardStoppedError: it is one of CUDA's, other than too little memory.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"(/[\w.+-]+){2,}", "...", lines[0])[:160]
    if "CUDA error" in str(error):
        raise CardStoppedError(f"the card stopped in {method!r}: {text}") from error
    return text if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {text}"


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection amid a step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
