"""The training step of SD 1.5 in C: beside what each processor says of the newest commit what all its runs say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.methods import LORA, NATIVE, PEFT_OFT
from benchmarks.speed_groups import Group, Row, newest, runs, spread

WORK = "SD 1.5"


def pooled(rows: Sequence[Row]) -> str:
    """Markdown: of every setup and processor the newest commit's runs, all rounds of all runs, and each run's median.

    All runs count, also of commits in which C was slower, so that the newest are not taken for being the luckiest.
    """
    heads = [f"{other}'s, {of}" for other in (f"of {LORA}", f"of {PEFT_OFT}") for of in ("newest commit", "all runs")]
    lines = [f"| {WORK}, in C | on | {' | '.join(heads)} | {LORA}'s, run by run |", "|---" * 7 + "|"]
    setups: dict[str, list[list[Group]]] = {}
    for each in runs(rows):
        if own := [run for run in each if _is_of_c(run)]:
            setups.setdefault(", ".join(own[0].words()), []).append(own)
    for words, machines in setups.items():
        for own in machines:
            cells = [cell for other in (LORA, PEFT_OFT) for cell in _newest_and_all(own, other)]
            medians = "; ".join(f"{statistics.median(run.ratios(NATIVE, LORA)):.3f} ({run.run()})" for run in own)
            lines.append(f"| {words} | {own[0].about['hardware']} | {' | '.join(cells)} | {medians} |")
    return "\n".join(lines)


def _is_of_c(run: Group) -> bool:
    return run.about["work"] == WORK and run.kind == "train" and bool(run.ratios(NATIVE, LORA))


def _newest_and_all(own: Sequence[Group], other: str) -> tuple[str, str]:
    all_runs = [ratio for run in own for ratio in run.ratios(NATIVE, other)]
    return spread(newest(own).ratios(NATIVE, other), digits=3), spread(all_runs, digits=3)
