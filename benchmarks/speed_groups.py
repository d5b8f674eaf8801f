"""Rows of `benchmarks.speed` as runs: which rows belong together, and what is made of their figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.methods import BASE
from benchmarks.stamps import commits

Row = Mapping[str, str]
# What tells one setup from another.
KEY = (
    "hardware", "threads", "work", "cut", "dtype", "quantization", "block_size", "compiled", "checkpointing", "text",
    "batch", "tokens", "width", "layers",
)  # fmt: skip
_KINDS = {
    "train": "a training step", "live": "a sampling step, adapter live", "fused": "a sampling step, adapter fused",
    "merge": "merging", "unmerge": "unmerging", "swap": "swapping", "build": "building D",
    "build and backward": "building D, and its gradient",
}  # fmt: skip
_SIZES = {"tokens": "tokens", "width": "wide", "layers": "layers"}
_SWITCHES = {"checkpointing": "gradient checkpointing", "text": "text encoders too"}


class Group:
    """One run of one setup and kind, or several of one commit: rows by method."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {row["method"]: row for row in rows}
        self.about, self.kind = rows[0], rows[0]["kind"]
        self._runs: dict[str, dict[str, Row]] = {}
        for row in rows:
            self._runs.setdefault(row["run"], {})[row["method"]] = row

    def seconds(self, method: str) -> list[float]:
        """Round by round, empty where there are none; of the run of most methods: hosts differ from run to run."""
        return _seconds(max(self._runs.values(), key=len), method)

    def ratios(self, method: str, other: str) -> list[float]:
        """Of a method's step to another's in the same round."""
        return [a / b for a, b in self._pairs(method, other)]

    def overhead(self, method: str) -> list[float]:
        """Seconds above the base's step in the same round."""
        return [a - b for a, b in self._pairs(method, BASE)]

    def _pairs(self, method: str, other: str) -> list[tuple[float, float]]:
        runs = self._runs.values()
        return [pair for own in runs for pair in zip(_seconds(own, method), _seconds(own, other), strict=False)]

    def figure(self, method: str, name: str) -> float | None:
        """A counted figure."""
        text = self.rows[method][name] if method in self.rows else ""
        return float(text) if text else None

    def above_base(self, method: str, name: str) -> float | None:
        """A counted figure less the base's."""
        own, base = self.figure(method, name), self.figure(BASE, name)
        return None if own is None or base is None else own - base

    def words(self, but: str = "") -> list[str]:
        """With what it was measured.

        Args:
            but: a column to say nothing of.
        """
        row = self.about
        told = {
            "dtype": row["dtype"],
            "quantization": f"base in {row['quantization']}" if row["quantization"] != "none" else "",
            "batch": f"batch {row['batch']}",
            **{name: f"{row[name]} {word}" for name, word in _SIZES.items() if row[name]},
            "block_size": f"b = {row['block_size']}",
            "compiled": self.mode(),
            **{name: words for name, words in _SWITCHES.items() if row[name] == "yes"},
        }
        return [word for name, word in told.items() if word and name != but]

    def mode(self) -> str:
        return "compiled" if self.about["compiled"] == "yes" else "eager"

    def title(self) -> str:
        """What was measured, in words."""
        told = filter(None, [self.about["cut"], *self.words()])
        return f"{self.about['work']}, {_KINDS[self.kind]} ({', '.join(told)})"

    def run(self) -> str:
        """Of which commit and day it is, and how often each method had its turn, run by run."""
        rounds = [max(int(row["rounds"]) for row in own.values()) for own in self._runs.values()]
        return f"{commits([self.about])}, {' + '.join(map(str, rounds))} rounds"

    def machine(self) -> str:
        row = self.about
        where = f"{row['hardware']}, {row['threads']} threads" + (
            f", CUDA {row['cuda']}" if row["device"] == "cuda" else ""
        )
        versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "diffusers", "peft", "lycoris"))
        return f"{where}; {versions}; commit {self.run()}"


def runs(rows: Sequence[Row]) -> list[list[Group]]:
    """All runs of each setup and kind, the newest last, in the order of the setups' first rows."""
    found: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        key = (*(row[name] for name in KEY), row["kind"])
        found.setdefault(key, {}).setdefault(row["run"], []).append(row)
    return [[Group(own) for own in each.values()] for each in found.values()]


def newest(each: Sequence[Group]) -> Group:
    """The runs of the newest one's commit together: a run of few methods may add rounds to one of all."""
    commit = each[-1].about["commit"]
    alike = [run for run in each if commit and run.about["commit"] == commit] or [each[-1]]
    return Group([row for run in alike for row in run.rows.values()])


def groups(rows: Sequence[Row]) -> list[Group]:
    """The newest commit's runs of each setup and kind."""
    return [newest(each) for each in runs(rows)]


def _seconds(run: Mapping[str, Row], method: str) -> list[float]:
    return [float(word) for word in run[method]["seconds"].split()] if method in run else []


def quartiles(values: Sequence[float], times: float = 1.0) -> tuple[float, float, float]:
    if len(values) == 1:
        return (times * values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return times * low, times * middle, times * high


def spread(values: Sequence[float], times: float = 1.0, digits: int | None = None) -> str:
    """Median and quartiles; of a single value, that."""
    if not values:
        return ""
    low, middle, high = quartiles(values, times)
    if digits is None:
        digits = 1 if times > 1 else 2
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
