"""The tables of `benchmarks.quantized_training`, from rows of its CSV alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from benchmarks.methods import METHODS

Row = Mapping[str, str]

_NONE = "none"
_RUN = ("quantization", "method", "subject", "seed")
_LOSSES = {
    "loss, last 50 steps": "loss", "validation loss": "validation_loss",
    "of it, the subject's pictures": "validation_instance_loss",
}  # fmt: skip
_SHARES = {
    "hit": "hit", "prompt fidelity": "fidelity", "hit and fidelity": "hit_and_fidelity",
    "preservation, points": "preservation",
}  # fmt: skip


def best(rows: Iterable[Row], method: str) -> tuple[float, float] | None:
    """Learning rate and epsilon of the search's best runs of a method; None where there are none.

    That is where most pictures are hits and faithful, and where several have as many, that of least validation loss.
    """
    tried: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        if row["purpose"] == "search" and row["method"] == method and not row["failed"]:
            tried.setdefault((float(row["learning_rate"]), float(row["epsilon"])), []).append(row)

    def worth(setting: tuple[float, float]) -> tuple[float, float]:
        loss = _mean(tried[setting], "validation_loss")
        return _mean(tried[setting], "hit_and_fidelity"), -loss if math.isfinite(loss) else -math.inf

    return max(tried, key=worth, default=None)


def table(rows: Sequence[Row], setup: str | None = None) -> str:
    """Markdown: the comparison, and the search behind it.

    Args:
        rows: of the CSV.
        setup: the newest if none is named.
    """
    if not rows:
        return "Nothing is measured yet."
    setup = setup or rows[-1]["setup"]
    own = [row for row in rows if row["setup"] == setup]
    done = [row for row in own if not row["failed"]]
    finals = _newest(row for row in done if row["purpose"] == "final")
    parts = [_compared(finals), _searched(done), _failures(own, done), _about(done)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _newest(rows: Iterable[Row]) -> list[Row]:
    return list({tuple(row[name] for name in _RUN): row for row in rows}.values())


def _compared(finals: Sequence[Row]) -> list[str]:
    if not finals:
        return []
    cells = _cells(finals)
    lines = [f"| base | method | runs | {' | '.join((*_LOSSES, *_SHARES))} |", "|---" * (3 + len(_LOSSES) + 4) + "|"]
    for (base, method), own in cells.items():
        plain = cells.get((_NONE, method), []) if base != _NONE else []
        shown = [_cell(own, plain, name, ".4f") for name in _LOSSES.values()]
        shown += [_cell(own, plain, name, ".1f", 100) for name in _SHARES.values()]
        lines.append(f"| `{base}` | {method} | {len(own)} | {' | '.join(shown)} |")
    about = (
        "Cells: mean of all runs (least to most of the seeds' means); the difference to the same runs of the method "
        "upon the base as it is. Shares are per cent; preservation is the difference to the same base without adapter."
    )
    return [*lines, "", about]


def _cells(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by base and method, always in the same order, whichever was finished first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["quantization"], row["method"]), []).append(row)
    order = [*METHODS, *(method for _, method in found)]
    return dict(sorted(found.items(), key=lambda item: (item[0][0] != _NONE, item[0][0], order.index(item[0][1]))))


def _cell(own: Sequence[Row], plain: Sequence[Row], name: str, places: str, unit: float = 1.0) -> str:
    seeds: dict[str, list[Row]] = {}
    for row in own:
        seeds.setdefault(row["seed"], []).append(row)
    means = [unit * _mean(rows, name) for rows in seeds.values()]
    text = f"{unit * _mean(own, name):{places}} ({min(means):{places}} to {max(means):{places}})"
    partners = {(row["subject"], row["seed"]): float(row[name]) for row in plain}
    pairs = [
        float(row[name]) - partners[row["subject"], row["seed"]]
        for row in own
        if (row["subject"], row["seed"]) in partners
    ]
    return text + (f"; {unit * fmean(pairs):+{places}}" if pairs else "")


def _searched(done: Sequence[Row]) -> list[str]:
    tried: dict[tuple[str, float, float], list[Row]] = {}
    for row in done:
        if row["purpose"] == "search":
            key = row["method"], float(row["learning_rate"]), float(row["epsilon"])
            tried.setdefault(key, []).append(row)
    lines = []
    for (method, rate, epsilon), own in sorted(tried.items()):
        chosen = best(done, method) == (rate, epsilon)
        rates = [r for m, r, e in tried if m == method and e == epsilon]
        edge = chosen and len(rates) > 1 and rate in (min(rates), max(rates))
        note = "chosen, at the edge of what was tried" if edge else "chosen" if chosen else ""
        if len({(r, e) for m, r, e in tried if m == method}) == 1:
            note = "not searched here"
        shares = [f"{100 * _mean(own, name):.1f}" for name in ("hit_and_fidelity", "hit", "fidelity", "preservation")]
        losses = [f"{_mean(own, name):.4f}" for name in ("loss", "validation_loss")]
        lines.append(f"| {method} | {rate:g} | {epsilon:g} | {len(own)} | {' | '.join((*shares, *losses))} | {note} |")
    names = ("learning rate", "epsilon", "runs", "hit and fidelity", "hit", "fidelity", "preservation", "loss")
    header = [f"| searched: method | {' | '.join(names)} | validation loss | |", "|---" * 11 + "|"]
    return header + lines if lines else []


def _failures(own: Sequence[Row], done: Sequence[Row]) -> list[str]:
    """Runs that came to nothing, and were not done since."""
    key = ("purpose", *_RUN, "learning_rate", "epsilon")
    finished = {tuple(row[name] for name in key) for row in done}
    failed = {tuple(row[name] for name in key): row["failed"] for row in own if row["failed"]}
    return [f"- failed: {', '.join(run)}: {why}" for run, why in failed.items() if run not in finished]


def _about(done: Sequence[Row]) -> list[str]:
    def of(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in done if row[name]))

    versions = "; ".join(
        f"{name} {of(name)}" for name in ("torch", "diffusers", "transformers", "peft", "bitsandbytes")
    )
    kept = [row for row in done if row["pictures"]]
    size = f"{of('steps')} steps, {of('pictures')} pictures per set and run; " if kept else ""
    return [f"{size}{of('hardware')}; {versions}; commit {of('commit')}; {of('date')}."] if done else []


def _mean(rows: Sequence[Row], name: str) -> float:
    return fmean(float(row[name]) for row in rows)
