"""Tables and plots of `benchmarks.speed`, from its rows and, of the kernel alone, those of `rotate_bandwidth`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.methods import BASE, LORA
from benchmarks.speed_aims import aims
from benchmarks.speed_groups import KEY, Group, Row, groups, quartiles, spread
from benchmarks.speed_pooled import pooled
from benchmarks.speed_setups import KINDS, SETUPS, STACK, Setup
from benchmarks.stamps import commits

_SCALED = {"tokens": "tokens", "width": "width", "layers": "layers", "block_size": "block size"}
Line = dict[str, list[tuple[float, float]]]  # by method, (size, ms of overhead)


# -- tables ------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown: the aims, all runs beside the newest, then what has no figure, then a table per setup and kind."""
    if not rows:
        return "No figures have been taken yet."
    found = groups(rows)
    parts = [aims(found), pooled(rows), unmeasured(rows)] + [one(group) for group in found]
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
        "ms": lambda m: spread(group.seconds(m), 1000.0),
        "of LoRA": lambda m: spread(group.ratios(m, LORA)) if of_lora else "",
        "of the base": lambda m: spread(group.ratios(m, BASE)),
        "overhead, ms": lambda m: spread(group.overhead(m), 1000.0) if m != BASE else "",
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
    return "\n".join([*lines, "", f"{group.machine()}; load {group.about['load']} before it."])


# -- plots -------------------------------------------------------------------------------------------------------------


def plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """`pictures` as PNG files."""
    from matplotlib import pyplot

    written = []
    for name, draw in pictures(rows).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = draw()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)
    return written


def pictures(rows: Sequence[Row]) -> dict[str, Callable[[], Any]]:
    """What draws each, by path: training steps of the models, and how the adapter's share grows with each size.

    A path tells the hardware and the setup, so that rows of others never take its place.
    """
    found = [group for group in groups(rows) if group.kind == "train"]
    models = [group for group in found if group.about["work"] != STACK and any(map(group.seconds, group.rows))]
    drawn: dict[str, Callable[[], Any]] = {_path("step", group): partial(_steps, group) for group in models}
    for size in _SCALED:
        for alike in series(found, size):
            drawn[_path(size, alike[0], size)] = partial(_lines, alike, size)
    return drawn


def _path(what: str, group: Group, but: str = "") -> str:
    about = group.about
    where = f"{about['hardware']} {about['threads']} threads".replace("(R)", "")
    told = [about["work"].partition(" of ")[0], what, "cut" if about["cut"] else "", *group.words(but)]
    return f"{_plain(where)}/{_plain(' '.join(told))}.png"


def _plain(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def _steps(group: Group) -> Any:
    from matplotlib import pyplot

    methods = [m for m in group.rows if group.seconds(m)]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 + 0.4 * len(methods)), layout="constrained")
    low, middle, high = zip(*(quartiles(group.seconds(m), 1000.0) for m in methods), strict=True)
    errors = [[b - a for a, b in zip(low, middle, strict=True)], [b - a for a, b in zip(middle, high, strict=True)]]
    axes.barh(methods[::-1], middle[::-1], xerr=[side[::-1] for side in errors], color="tab:blue")
    axes.set_title(f"{group.title()}\n{group.about['hardware']}; {group.run()}", fontsize=8)
    axes.set_xlabel("ms a step, median and quartiles")
    return figure


def _lines(alike: Sequence[Group], size: str) -> Any:
    from matplotlib import pyplot

    about = alike[0].about
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    line = scaling(alike, size)
    for method, points in line.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.set_title(f"{STACK}: adapter alone\n{about['hardware']}; {commits(g.about for g in alike)}", fontsize=9)
    axes.set(xlabel=_SCALED[size], ylabel="overhead, ms", xscale="log")
    axes.set_ylim(bottom=0.0)
    sizes = sorted({int(x) for points in line.values() for x, _ in points})
    axes.set_xticks(sizes, labels=map(str, sizes))
    axes.minorticks_off()
    axes.legend()
    return figure


def series(found: Sequence[Group], size: str) -> list[list[Group]]:
    """Stacks that differ in one size alone, in order of it."""
    alike: dict[tuple[str, ...], list[Group]] = {}
    for group in found:
        if group.about["work"] == STACK:
            alike.setdefault(tuple(group.about[name] for name in KEY if name != size), []).append(group)
    return [sorted(own, key=lambda group: int(group.about[size])) for own in alike.values() if len(own) > 1]


def scaling(alike: Sequence[Group], size: str) -> Line:
    """By method, how its overhead grows along such a series."""
    line: Line = {}
    for group in alike:
        for method in group.rows:
            if method != BASE and (overhead := group.overhead(method)):
                point = float(group.about[size]), 1000.0 * statistics.median(overhead)
                line.setdefault(method, []).append(point)
    return line


# -- cells -------------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{1000 * value:.1f}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"
