"""The aims of a processor in few lines: what steps of SD 1.5 say of each, in C and in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.speed_aims import AIMS, Aim
from benchmarks.speed_groups import Group, Row, groups, spread

_MEANT = {
    "device": "cpu", "work": "SD 1.5", "dtype": "float32", "quantization": "none", "batch": "1", "block_size": "32",
    "checkpointing": "no", "text": "no",
}  # fmt: skip
_FORMS = ("in C", "in plain PyTorch")


def brief(rows: Sequence[Row]) -> str:
    """Markdown: of the processor that was measured last, the newest commit's runs of each setup."""
    meant = [row for row in rows if all(row[name] == value for name, value in _MEANT.items())]
    if not meant:
        return "Not measured yet."
    hardware = meant[-1]["hardware"]
    lines = [f"| {hardware} | at most | {' | '.join(_FORMS)} | commit, rounds |", "|---|---|---|---|---|"]
    for mode in ("eager", "compiled"):
        for group in groups([row for row in meant if row["hardware"] == hardware]):
            if group.mode() == mode:
                lines += _lines(group)
    return "\n".join(lines)


def _lines(group: Group) -> list[str]:
    """A row for each aim that the group has a figure of."""
    found: dict[str, dict[str, tuple[Aim, Sequence[float]]]] = {}
    for aim in AIMS:
        form = next((form for form in _FORMS if form in aim.words), None)
        if form and aim.is_of(group) and (values := aim.figure(group)):
            words = aim.words.replace(f", {form}", "").replace(f" {form}", "")
            found.setdefault(words, {})[form] = aim, values
    how = group.mode() if group.about["cut"] else f"{group.mode()}, uncut"
    return [_line(f"{words}, {how}", of, group.run()) for words, of in found.items()]


def _line(words: str, of: dict[str, tuple[Aim, Sequence[float]]], run: str) -> str:
    cells = [
        f"{spread(of[form][1], digits=3)}: {of[form][0].reached(of[form][1])}" if form in of else "" for form in _FORMS
    ]
    bound = next(iter(of.values()))[0].bound
    return f"| {words} | {bound:.2f} | {' | '.join(cells)} | {run} |"
