"""Tables and plots of `benchmarks.speed`, from its rows and nothing else; aims beside what was reached."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.methods import BASE, DENSE, LORA, NATIVE, OURS, PEFT_OFT, TRITON, WEIGHT_CENTRIC
from benchmarks.records import load
from benchmarks.rotate_bandwidth import FILE as BANDWIDTH
from benchmarks.speed_setups import KINDS, SETUPS, STACK, Setup

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
_SCALED = {"tokens": "tokens", "width": "width", "layers": "layers", "block_size": "block size"}


class Group:
    """The newest run of one setup and kind: its rows by method."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {row["method"]: row for row in rows}
        self.about, self.kind = rows[0], rows[0]["kind"]

    def seconds(self, method: str) -> list[float]:
        """Round by round, empty where there are none."""
        return [float(word) for word in self.rows[method]["seconds"].split()] if method in self.rows else []

    def ratios(self, method: str, other: str) -> list[float]:
        """Of a method's step to another's in the same round."""
        return [a / b for a, b in zip(self.seconds(method), self.seconds(other), strict=False)]

    def overhead(self, method: str) -> list[float]:
        """Seconds above the base's step in the same round."""
        return [a - b for a, b in zip(self.seconds(method), self.seconds(BASE), strict=False)]

    def figure(self, method: str, name: str) -> float | None:
        """A counted figure."""
        text = self.rows[method][name] if method in self.rows else ""
        return float(text) if text else None

    def above_base(self, method: str, name: str) -> float | None:
        """A counted figure less the base's."""
        own, base = self.figure(method, name), self.figure(BASE, name)
        return None if own is None or base is None else own - base

    def title(self) -> str:
        """What was measured, in words."""
        row = self.about
        kept = f"base in {row['quantization']}" if row["quantization"] != "none" else ""
        told = [row["cut"], row["dtype"], kept, f"batch {row['batch']}"]
        told += [f"{row[name]} {word}" for name, word in _SIZES.items() if row[name]]
        told += [f"b = {row['block_size']}", "compiled" if row["compiled"] == "yes" else "eager"]
        told += [words for name, words in _SWITCHES.items() if row[name] == "yes"]
        return f"{row['work']}, {_KINDS[self.kind]} ({', '.join(filter(None, told))})"

    def machine(self) -> str:
        row = self.about
        where = f"{row['hardware']}, {row['threads']} threads" + (
            f", CUDA {row['cuda']}" if row["device"] == "cuda" else ""
        )
        versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "diffusers", "peft", "lycoris"))
        return f"{where}; {versions}; commit {row['commit'] or 'unknown'}; {row['date']}"


def groups(rows: Sequence[Row]) -> list[Group]:
    """The newest run of each setup and kind, in the order of their first rows."""
    runs: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        key = (*(row[name] for name in KEY), row["kind"])
        runs.setdefault(key, {}).setdefault(row["run"], []).append(row)
    return [Group(list(found.values())[-1]) for found in runs.values()]


# -- tables ------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown: the aims, then what has no figure, then a table per setup and kind."""
    if not rows:
        return "No figures have been taken yet."
    found = groups(rows)
    parts = [aims(found), unmeasured(rows)] + [one(group) for group in found]
    return "\n\n".join(parts)


def unmeasured(rows: Sequence[Row]) -> str:
    """What `benchmarks.speed` would measure and has not: every setup without a row, or without some methods' rows.

    A method that was tried and has a reason in place of a figure counts as measured.
    """
    lines = ["| not measured | on | methods |", "|---|---|---|"]
    for device, setups in SETUPS.items():
        for setup in setups:
            missing = [method for method in setup.methods if not _is_there(setup, method, device, rows)]
            if missing:
                whose = "all" if len(missing) == len(setup.methods) else "; ".join(missing)
                lines.append(f"| {setup} | {'a processor' if device == 'cpu' else 'a card'} | {whose} |")
    return "\n".join(lines)


def _is_there(setup: Setup, method: str, device: str, rows: Sequence[Row]) -> bool:
    wanted = setup.columns() | {"method": method, "kind": KINDS[setup.kind][0], "device": device}
    return any(all(row.get(name, "") == value for name, value in wanted.items()) for row in rows)


def one(group: Group) -> str:
    """All methods of a setup. Columns that are empty throughout are left out."""
    of_lora = bool(group.seconds(LORA))
    columns: dict[str, Callable[[str], str]] = {
        "settings": lambda m: group.rows[m]["settings"],
        "trained": lambda m: _number(group.figure(m, "trained") or None),
        "ms": lambda m: _spread(group.seconds(m), 1000.0),
        "of LoRA": lambda m: _spread(group.ratios(m, LORA)) if of_lora else "",
        "of the base": lambda m: _spread(group.ratios(m, BASE)),
        "overhead, ms": lambda m: _spread(group.overhead(m), 1000.0) if m != BASE else "",
        "operations": lambda m: _number(group.figure(m, "operations")),
        "kernels": lambda m: _number(group.figure(m, "kernels")),
        "card, ms": lambda m: _milliseconds(group.figure(m, "kernel_seconds")),
        "saved, MB": lambda m: _megabytes(group.figure(m, "saved_bytes")),
        "peak above weights, MB": lambda m: _megabytes(group.figure(m, "peak_bytes")),
        "adapter, MB": lambda m: _megabytes(group.figure(m, "adapter_bytes") or None),
        "why not": lambda m: group.rows[m]["reason"].replace("|", "/"),
    }
    cells = {name: [cell(method) for method in group.rows] for name, cell in columns.items()}
    shown = {name: column for name, column in cells.items() if any(column)}
    lines = [f"**{group.title()}**", "", f"| | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for number, method in enumerate(group.rows):
        lines.append(f"| {method} | {' | '.join(column[number] for column in shown.values())} |")
    rounds = max(int(row["rounds"]) for row in group.rows.values())
    load = group.about["load"]
    return "\n".join([*lines, "", f"{group.machine()}; at most {rounds} rounds; load {load} before it."])


# -- aims --------------------------------------------------------------------------------------------------------------


# What a figure is made of: one value each round, a single one where it is counted, none where there are no rows for it.
Figure = Callable[[Group], Sequence[float]]


@dataclass(frozen=True)
class Aim:
    """A bound on a figure."""

    words: str
    bound: float
    figure: Figure
    kind: str = "train"
    device: str = ""  # "cpu", "cuda" or either

    def reached(self, values: Sequence[float]) -> str:
        """By the median; and whether the bound lies between the quartiles, so that another run may say otherwise."""
        low, middle, high = _quartiles(values)
        answer = "yes" if middle <= self.bound else "no"
        return f"{answer}, within the spread" if low <= self.bound < high else answer


def _ratio(method: str, other: str) -> Figure:
    return lambda group: group.ratios(method, other)


def _overheads(method: str, other: str) -> Figure:
    def figure(group: Group) -> Sequence[float]:
        own, others = group.overhead(method), group.overhead(other)
        # Of single rounds the smaller overhead may be none at all.
        return _quotient(statistics.median(own), statistics.median(others)) if own and others else ()

    return figure


def _above(name: str, method: str, other: str) -> Figure:
    return lambda group: _quotient(group.above_base(method, name), group.above_base(other, name))


def _whole(name: str, method: str, other: str) -> Figure:
    return lambda group: _quotient(group.figure(method, name), group.figure(other, name))


def _quotient(a: float | None, b: float | None) -> Sequence[float]:
    return (a / b,) if a is not None and b is not None and b > 0 else ()


AIMS = [
    Aim("adapter operations, of PEFT LoRA's", 0.35, _above("operations", OURS, LORA), device="cpu"),
    Aim("adapter operations, of PEFT OFT's", 0.10, _above("operations", OURS, PEFT_OFT), device="cpu"),
    *(
        Aim(f"{words}{', in C' if own == NATIVE else ''}", bound, figure(own), kind, "cpu")
        for own in (OURS, NATIVE)
        for words, bound, kind, figure in (
            ("bytes saved for backward, of PEFT LoRA's", 1.00, "train", lambda own: _whole("saved_bytes", own, LORA)),
            ("training step, of PEFT LoRA's", 0.97, "train", lambda own: _ratio(own, LORA)),
            ("training step, of PEFT OFT's", 0.85, "train", lambda own: _ratio(own, PEFT_OFT)),
            ("live sampling step, of the base's", 1.05, "live", lambda own: _ratio(own, BASE)),
        )
    ),
    Aim("live sampling step, of the base's", 1.05, _ratio(OURS, BASE), "live", "cuda"),
    Aim("live sampling step, of the base's, by Triton", 1.05, _ratio(TRITON, BASE), "live", "cuda"),
    *(
        Aim(f"{words}{', by Triton' if own == TRITON else ''}", bound, figure(own), device="cuda")
        for own in (OURS, TRITON)
        for words, bound, figure in (
            # Of operations the profiler sees torch's own, and of Triton's kernels none: launches are counted there.
            ("adapter operations, of PEFT LoRA's", 0.35,
             lambda own: _above("operations", own, LORA) if own == OURS else lambda _: ()),
            ("adapter operations, of PEFT OFT's", 0.10,
             lambda own: _above("operations", own, PEFT_OFT) if own == OURS else lambda _: ()),
            ("kernel launches, of PEFT LoRA's", 0.35, lambda own: _above("kernels", own, LORA)),
            ("kernel launches, of PEFT OFT's", 0.10, lambda own: _above("kernels", own, PEFT_OFT)),
            ("bytes saved for backward, of PEFT LoRA's", 1.00, lambda own: _whole("saved_bytes", own, LORA)),
            ("training step, of PEFT LoRA's", 1.00, lambda own: _ratio(own, LORA)),
            ("training step, of PEFT OFT's", 0.60, lambda own: _ratio(own, PEFT_OFT)),
            ("overhead, of PEFT LoRA's", 0.5, lambda own: _overheads(own, LORA)),
            ("overhead, of weight-centric OFT's", 0.1, lambda own: _overheads(own, WEIGHT_CENTRIC)),
            ("overhead, of weight-centric OFT's with a dense R", 0.1, lambda own: _overheads(own, DENSE)),
            ("overhead on the card alone, of PEFT LoRA's", 0.5, lambda own: _above("kernel_seconds", own, LORA)),
            ("overhead on the card alone, of weight-centric OFT's", 0.1,
             lambda own: _above("kernel_seconds", own, WEIGHT_CENTRIC)),
            ("peak memory above weights, of PEFT LoRA's", 1.00, lambda own: _whole("peak_bytes", own, LORA)),
            ("peak memory above the base's, of weight-centric OFT's", 1 / 3,
             lambda own: _above("peak_bytes", own, WEIGHT_CENTRIC)),
            ("peak memory above the base's, of weight-centric OFT's with a dense R", 1 / 3,
             lambda own: _above("peak_bytes", own, DENSE)),
        )
    ),
]  # fmt: skip


def aims(found: Sequence[Group], bandwidth: Sequence[Row] | None = None) -> str:
    """Each aim, on each setup that has the figure; the scaling's stacks are no models and count for none.

    Args:
        found: the newest groups.
        bandwidth: rows of `benchmarks.rotate_bandwidth`; by default those of its file.
    """
    lines = ["| aim | at most | measured | on | reached |", "|---|---|---|---|---|"]
    for aim in AIMS:
        for group in found:
            if group.kind != aim.kind or aim.device not in ("", group.about["device"]) or group.about["work"] == STACK:
                continue
            if values := aim.figure(group):
                where, measured = f"{group.title()}, {group.about['hardware']}", _spread(values)
                lines.append(f"| {aim.words} | {aim.bound:.2f} | {measured} | {where} | {aim.reached(values)} |")
    for where, share in _copied(load(BANDWIDTH) if bandwidth is None else bandwidth).items():
        reached = "yes" if share >= 0.8 else "no"
        lines.append(
            f"| rotation kernel, of a copy's bandwidth (at least) | 0.80 | {share:.2f} | {where} | {reached} |"
        )
    return "\n".join(lines)


def _copied(rows: Iterable[Row]) -> dict[str, float]:
    """What share of a copy's bandwidth the rotation reaches at b = 32, in the newest run of each input on each card."""
    return {
        f"{row['shape']} ({row['rows']} x {row['columns']}, {row['dtype']}), {row['hardware']}": float(row["of_copy"])
        for row in rows
        if row["way"] == "rotate" and row["block_size"] == "32"
    }


# -- plots -------------------------------------------------------------------------------------------------------------


def plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Training steps of the models, and how the adapter's share grows with each size, as PNG files."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    found = [group for group in groups(rows) if group.kind == "train"]
    for number, group in enumerate(g for g in found if g.about["work"] != STACK):
        methods = [m for m in group.rows if group.seconds(m)]
        figure, axes = pyplot.subplots(figsize=(9, 0.5 + 0.4 * len(methods)), layout="constrained")
        low, middle, high = zip(*(_quartiles(group.seconds(m), 1000.0) for m in methods), strict=True)
        errors = [[b - a for a, b in zip(low, middle, strict=True)], [b - a for a, b in zip(middle, high, strict=True)]]
        axes.barh(methods[::-1], middle[::-1], xerr=[side[::-1] for side in errors], color="tab:blue")
        axes.set(title=group.title(), xlabel="ms a step, median and quartiles")
        axes.title.set_fontsize(8)
        written.append(_save(figure, folder / f"speed_step_{number}.png"))
    for size, word in _SCALED.items():
        for number, line in enumerate(scaling(found, size)):
            figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
            for method, points in line.items():
                axes.plot(*zip(*points, strict=True), marker="o", label=method)
            axes.set(xlabel=word, ylabel="overhead, ms", xscale="log", title=f"{STACK}: adapter alone")
            axes.set_ylim(bottom=0.0)
            sizes = sorted({int(x) for points in line.values() for x, _ in points})
            axes.set_xticks(sizes, labels=map(str, sizes))
            axes.minorticks_off()
            axes.legend()
            written.append(_save(figure, folder / f"speed_{size}_{number}.png"))
    return written


def scaling(found: Sequence[Group], size: str) -> list[dict[str, list[tuple[float, float]]]]:
    """For each series of stacks that differ in one size alone: by method, (size, ms of overhead), in order of size."""
    series: dict[tuple[str, ...], list[Group]] = {}
    for group in found:
        if group.about["work"] == STACK:
            series.setdefault(tuple(group.about[name] for name in KEY if name != size), []).append(group)
    lines = []
    for alike in series.values():
        if len(alike) > 1:
            line: dict[str, list[tuple[float, float]]] = {}
            for group in sorted(alike, key=lambda group: int(group.about[size])):
                for method in group.rows:
                    if method != BASE and (overhead := group.overhead(method)):
                        point = float(group.about[size]), 1000.0 * statistics.median(overhead)
                        line.setdefault(method, []).append(point)
            lines.append(line)
    return lines


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _quartiles(values: Sequence[float], times: float = 1.0) -> tuple[float, float, float]:
    if len(values) == 1:
        return (times * values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return times * low, times * middle, times * high


def _spread(values: Sequence[float], times: float = 1.0) -> str:
    """Median and quartiles; of a single value, that."""
    if not values:
        return ""
    low, middle, high = _quartiles(values, times)
    digits = 1 if times > 1 else 2
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{1000 * value:.1f}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"
