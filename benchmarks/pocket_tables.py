"""The tables of docs/evaluation.md, from the rows of several runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from oft_diffusion.evaluation import Row, figures
from oft_diffusion.evaluation.figures import is_difference
from oft_diffusion.evaluation.intervals import Interval, mean_interval
from oft_diffusion.evaluation.prompts import OTHER_TRIGGERS
from oft_diffusion.pocket import SUBJECTS
from oft_diffusion.pocket.world import PATTERNS

_HIT, _TOLD = ("object", "accent", "face", "hat", "badge"), ("colour", "pattern")
_SHORT = "of three letters"


def tables(rows: Sequence[Row], closest: Mapping[str, float], runs: Sequence[Mapping[str, str]]) -> str:
    """Markdown: the figures, what stands beside them, each attribute of a subject, other words by their kind.

    Args:
        rows: of whole runs, whose groups are "subject/seed".
        closest: per group, as `figures` takes it.
        runs: what each took, as benchmarks/data/pocket_runs.csv has it.
    """
    subjects = list(dict.fromkeys(run["group"].split("/")[0] for run in runs))
    columns = [_cells(rows, closest, bounds=True)]
    columns += [_cells([r for r in rows if r.group.startswith(f"{name}/")], closest) for name in subjects]
    lines = [f"| | **all {len(runs)} runs** | {' | '.join(subjects)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    parts = lines, [*_pooled(rows, closest, runs), *_missed(rows)], _attributes(rows, subjects), _called(rows)
    return "\n\n".join("\n".join(part) for part in parts)


def _cells(rows: Sequence[Row], closest: Mapping[str, float], *, bounds: bool = False) -> dict[str, str]:
    """Each figure as the table shows it."""
    cells = {}
    for key, figure in figures(rows, closest).items():
        shown = figure.difference if is_difference(key) else figure.adapted
        text = f"{100 * shown.mean:.1f}"
        if shown is figure.adapted:
            text += f" / {100 * figure.base.mean:.1f}"
        cells[key] = text + (f" ({_bounds(shown)})" if bounds else "")
    return cells


def _pooled(rows: Sequence[Row], closest: Mapping[str, float], runs: Sequence[Mapping[str, str]]) -> list[str]:
    """What the table has no column for."""
    fidelity = figures(rows, closest)["prompt fidelity"]
    ratio = fidelity.ratio
    lines = [
        "Cells: with the adapter / without it, per cent; preservation and attribute drift: the difference, points."
    ]
    if ratio:
        lines.append(
            f"Prompt fidelity is {100 * ratio.mean:.1f} % ({100 * ratio.low:.1f} to {100 * ratio.high:.1f}) of the "
            f"base's. Each figure over all runs has {fidelity.adapted.pictures} pairs of pictures."
        )
    lines.append(_lost(rows))
    timed = [run for run in runs if not math.isnan(float(run["training"]))]
    training, wall = (max((float(run[key]) for run in timed), default=math.nan) for key in ("training", "wall"))
    lines.append(
        f"At most {training:.0f} s of training, {wall:.0f} s with loading and caching, in the {len(timed)} runs beside "
        f"which the machine was idle ({runs[-1]['hardware']}); adapters of at most "
        f"{max(float(run['megabytes']) for run in runs):.2f} MB."
    )
    return lines


def _attributes(rows: Sequence[Row], subjects: Iterable[str]) -> list[str]:
    """How often each attribute of a subject is right where no prompt names it: the first five make a hit.

    Colour and pattern stand in the captions of the instance images, so that a prompt may change them; how much of them
    comes along unasked is another matter, which the last columns tell. A plain subject's captions name no pattern, and
    the base's own pictures are mostly plain: what comes along of a pattern, striped and spotted subjects tell.
    """
    drawn = drawn_as_subject(rows)
    if not drawn:
        return []
    lines = [f"| right, per cent | {' | '.join((*_HIT, *_TOLD))} | hit, and both |", f"|{'---|' * (len(_HIT) + 4)}"]
    kinds = {name: {name} for name in subjects}
    kinds["**plain ones**"] = {name for name in subjects if SUBJECTS[name].pattern == "plain"}
    kinds["**striped and spotted ones**"] = kinds.keys() & set(SUBJECTS) - kinds["**plain ones**"]
    kinds["**all**"] = set(subjects)
    for name, members in kinds.items():
        own = [r for r in drawn if r.group.split("/")[0] in members]
        if not own:
            continue
        shares = [*(fmean(column) for column in zip(*map(_right, own), strict=True)), own_look(own)]
        lines.append(f"| {name} | {' | '.join(f'{100 * share:.0f}' for share in shares)} |")
    return lines


def _missed(rows: Sequence[Row]) -> list[str]:
    """Why pictures are no hits, and what fidelity loses and wins, pair by pair."""
    missed = [r for r in drawn_as_subject(rows) if not r.hit]
    wrong = Counter(a for r in missed for a, right in zip(_HIT, _right(r), strict=False) if not right)
    told = ", ".join(f"{n} another {a}" for a, n in wrong.most_common())
    pairs: dict[tuple[str, str, int], dict[bool, bool]] = {}
    for r in rows:
        if r.set == "recoloured":
            pairs.setdefault((r.group, r.prompt, r.seed), {})[r.adapted] = r.faithful
    lost = sum(pair[False] and not pair[True] for pair in pairs.values())
    won = sum(pair[True] and not pair[False] for pair in pairs.values())
    return [f"Of {len(missed)} misses, {told}. Prompt fidelity: {lost} lost, {won} won of {len(pairs)} pairs."]


def drawn_as_subject(rows: Sequence[Row]) -> list[Row]:
    """The adapter's pictures of the subject, where no prompt names more than object and place."""
    return [r for r in rows if r.adapted and r.set == "subject" and r.reading]


def own_look(drawn: Sequence[Row]) -> float:
    """The share of pictures that hit the subject in its own colour and pattern."""
    return fmean(all(_right(r)) for r in drawn)


def _right(row: Row) -> list[bool]:
    """Attribute by attribute: those of a hit, then colour and pattern."""
    wanted = SUBJECTS[row.group.split("/")[0]]
    return [row.reading[a] == getattr(wanted, a) for a in (*_HIT, *_TOLD)]


def _lost(rows: Sequence[Row]) -> str:
    """What preservation loses and wins, by the pattern that the prompt names."""
    others = {(r.group, r.prompt, r.seed, r.adapted): r.faithful for r in rows if r.set == "other"}
    lost, won, asked = Counter[str](), Counter[str](), Counter[str]()
    for (group, prompt, seed, adapted), faithful in others.items():
        pattern = next((p for p in PATTERNS if p in prompt.split()), "no")
        asked[pattern] += adapted
        if adapted and faithful != others[group, prompt, seed, False]:
            (won if faithful else lost)[pattern] += 1
    told = "; ".join(f"{p} pattern: {lost[p]} lost, {won[p]} won of {n}" for p, n in asked.most_common())
    return f"Preservation by the pattern that the prompt names: {told}."


def _called(rows: Sequence[Row]) -> list[str]:
    """How much of the subject is called by words that nobody trained, by the kind of word."""
    kinds: dict[str, list[Row]] = {}
    for r in rows:
        if r.set in ("other trigger", "long trigger"):
            short = any(word in r.prompt.split() for word in OTHER_TRIGGERS)
            kind = "as long, unrelated" if r.set == "long trigger" else _SHORT if short else "as long, begins alike"
            kinds.setdefault(kind, []).append(r)
    kinds["as long, both"] = [r for kind, own in kinds.items() if kind != _SHORT for r in own]
    lines = ["| another word | pairs | subject hit, with / without | attribute drift, points |", "|---|---|---|---|"]
    for kind, own in sorted(kinds.items()):
        groups, on, off = [tuple(r.group.split("/")) for r in own if r.adapted], *(
            [r for r in own if r.adapted is side] for side in (True, False)
        )  # fmt: skip
        hits = mean_interval([float(r.hit) for r in on], groups)
        told = f"{100 * hits.mean:.1f} / {100 * fmean(r.hit for r in off):.1f} ({_bounds(hits)})"
        drift = 25 * (fmean(r.shared for r in on) - fmean(r.shared for r in off))
        lines.append(f"| {kind} | {len(on)} | {told} | {drift:+.1f} |")
    return lines


def _bounds(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
