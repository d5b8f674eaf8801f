"""What is aimed at, beside what was reached, and what of it has never been measured on a card."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.methods import BASE, DENSE, LORA, NATIVE, OURS, PEFT_OFT, TRITON, WEIGHT_CENTRIC
from benchmarks.records import load
from benchmarks.rotate_bandwidth import DTYPES, SIZES, WAYS
from benchmarks.rotate_bandwidth import FILE as BANDWIDTH
from benchmarks.speed_groups import Group, Row, quartiles, spread
from benchmarks.speed_setups import SETUPS, STACK
from benchmarks.stamps import commits

# What a figure is made of: one value each round, a single one where it is counted, none where there are no rows for it.
Figure = Callable[[Group], Sequence[float]]
# The models that a card is to be measured with.
FAMILIES = tuple(dict.fromkeys(setup.work for setup in SETUPS["cuda"] if setup.work != STACK))
OF_COPY = 80  # per cent of a copy's bandwidth, at least


@dataclass(frozen=True)
class Aim:
    """A bound on a figure.

    Attributes:
        modes: in which every one of `FAMILIES` is to be measured; where one is not, a row says so.
    """

    words: str
    bound: float
    figure: Figure
    kind: str = "train"
    device: str = ""  # "cpu", "cuda" or either
    modes: tuple[str, ...] = ()

    def is_of(self, group: Group) -> bool:
        """Whether the group is of what is aimed at; the scaling's stacks are no models and count for none."""
        return group.kind == self.kind and self.device in ("", group.about["device"]) and group.about["work"] != STACK

    def reached(self, values: Sequence[float]) -> str:
        """By the median; and whether the bound lies between the quartiles, so that another run may say otherwise."""
        low, middle, high = quartiles(values)
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


_EAGER, _BOTH = ("eager",), ("eager", "compiled")
# On a card, of plain PyTorch and of the kernels: words, bound, figure, and in which modes every model is to have it.
# (One dense R is timed where all methods are, upon SD 1.5 and SDXL.)
_ON_CARD: list[tuple[str, float, Callable[[str], Figure], tuple[str, ...]]] = [
    ("kernel launches, of PEFT LoRA's", 0.35, lambda own: _above("kernels", own, LORA), _EAGER),
    ("kernel launches, of PEFT OFT's", 0.10, lambda own: _above("kernels", own, PEFT_OFT), _EAGER),
    # What a compiled step saves is not counted.
    ("bytes saved for backward, of PEFT LoRA's", 1.00, lambda own: _whole("saved_bytes", own, LORA), _EAGER),
    ("training step, of PEFT LoRA's", 1.00, lambda own: _ratio(own, LORA), _BOTH),
    ("training step, of PEFT OFT's", 0.60, lambda own: _ratio(own, PEFT_OFT), _BOTH),
    ("overhead, of PEFT LoRA's", 0.5, lambda own: _overheads(own, LORA), _EAGER),
    ("overhead, of weight-centric OFT's", 0.1, lambda own: _overheads(own, WEIGHT_CENTRIC), _EAGER),
    ("overhead, of weight-centric OFT's with a dense R", 0.1, lambda own: _overheads(own, DENSE), ()),
    ("overhead on the card alone, of PEFT LoRA's", 0.5, lambda own: _above("kernel_seconds", own, LORA), _EAGER),
    ("overhead on the card alone, of weight-centric OFT's", 0.1,
     lambda own: _above("kernel_seconds", own, WEIGHT_CENTRIC), _EAGER),
    ("peak memory above weights, of PEFT LoRA's", 1.00, lambda own: _whole("peak_bytes", own, LORA), _EAGER),
    ("peak memory above the base's, of weight-centric OFT's", 1 / 3,
     lambda own: _above("peak_bytes", own, WEIGHT_CENTRIC), _EAGER),
    ("peak memory above the base's, of weight-centric OFT's with a dense R", 1 / 3,
     lambda own: _above("peak_bytes", own, DENSE), ()),
]  # fmt: skip

AIMS = [
    # Of plain PyTorch: who counts torch's operations has none done in C.
    Aim("adapter operations in plain PyTorch, of PEFT LoRA's", 0.35, _above("operations", OURS, LORA), device="cpu"),
    Aim("adapter operations in plain PyTorch, of PEFT OFT's", 0.10, _above("operations", OURS, PEFT_OFT), device="cpu"),
    *(
        Aim(f"{words}, in {'C' if own == NATIVE else 'plain PyTorch'}", bound, figure(own), kind, "cpu")
        for own in (OURS, NATIVE)
        for words, bound, kind, figure in (
            ("bytes saved for backward, of PEFT LoRA's", 1.00, "train", lambda own: _whole("saved_bytes", own, LORA)),
            ("training step, of PEFT LoRA's", 0.97, "train", lambda own: _ratio(own, LORA)),
            ("training step, of PEFT OFT's", 0.85, "train", lambda own: _ratio(own, PEFT_OFT)),
            ("live sampling step, of the base's", 1.05, "live", lambda own: _ratio(own, BASE)),
        )
    ),
    Aim("live sampling step, of the base's", 1.05, _ratio(OURS, BASE), "live", "cuda"),
    Aim("live sampling step, of the base's, by Triton", 1.05, _ratio(TRITON, BASE), "live", "cuda", _BOTH),
    # Of operations the profiler sees torch's own, and of Triton's kernels none: launches are counted there.
    Aim("adapter operations, of PEFT LoRA's", 0.35, _above("operations", OURS, LORA), device="cuda"),
    Aim("adapter operations, of PEFT OFT's", 0.10, _above("operations", OURS, PEFT_OFT), device="cuda"),
    *(Aim(words, bound, figure(OURS), device="cuda") for words, bound, figure, _ in _ON_CARD),
    *(
        Aim(f"{words}, by Triton", bound, figure(TRITON), device="cuda", modes=modes)
        for words, bound, figure, modes in _ON_CARD
    ),
]


def aims(found: Sequence[Group], bandwidth: Sequence[Row] | None = None) -> str:
    """Each aim, on each setup that has the figure, and what it has no figure of.

    Args:
        found: the newest groups.
        bandwidth: rows of `benchmarks.rotate_bandwidth`; by default those of its file.
    """
    lines = ["| aim | at most | measured | on | commit, rounds | reached |", "|---|---|---|---|---|---|"]
    for aim in AIMS:
        lines += [_row(aim, group, values) for group in found if aim.is_of(group) and (values := aim.figure(group))]
        lines += _missing(aim, found)
    return "\n".join(lines + _copied(load(BANDWIDTH) if bandwidth is None else bandwidth))


def _row(aim: Aim, group: Group, values: Sequence[float]) -> str:
    where = f"{group.title()}, {group.about['hardware']}"
    measured = spread(values, digits=3)  # 0.35 would not tell on which side of an aim of 0.35 it is
    return f"| {aim.words} | {aim.bound:.2f} | {measured} | {where} | {group.run()} | {aim.reached(values)} |"


def _missing(aim: Aim, found: Sequence[Group]) -> list[str]:
    """A row for each of an aim's modes, of the models that it has no figure of."""
    lines = []
    for mode in aim.modes:
        told = {g.about["work"] for g in found if aim.is_of(g) and _counts(g, mode) and aim.figure(g)}
        if lacking := [family for family in FAMILIES if family not in told]:
            where = f"{', '.join(lacking)} ({mode}), a card"
            lines.append(f"| {aim.words} | {aim.bound:.2f} |  | {where} |  | not measured |")
    return lines


def _counts(group: Group, mode: str) -> bool:
    """Whether a group answers for its model: a quantized base is another."""
    return group.mode() == mode and group.about["quantization"] == "none"


# -- the kernel alone --------------------------------------------------------------------------------------------------


_WORDS = "rotation kernel, {}, of a copy's bandwidth (at least)"


def _copied(rows: Iterable[Row]) -> list[str]:
    """What share of a copy's bandwidth is reached, from the least to the most of the inputs, the newest of each."""
    newest: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["way"] in WAYS:
            key = row["hardware"], row["dtype"], row["block_size"], row["way"]
            newest.setdefault(key, {})[row["shape"]] = row
    lines = [_of_copy(key, list(own.values())) for key, own in newest.items()]
    measured = {key[1:3] for key in newest}
    lacking: dict[str, list[str]] = {}  # by sizes of blocks, dtypes
    for dtype in DTYPES:
        if sizes := ", ".join(str(size) for size in SIZES if (dtype, str(size)) not in measured):
            lacking.setdefault(sizes, []).append(dtype)
    for sizes, dtypes in lacking.items():
        where = f"b = {sizes} ({', '.join(dtypes)}), a card"
        lines.append(f"| {_WORDS.format(', '.join(WAYS))} | {OF_COPY} % |  | {where} |  | not measured |")
    return lines


def _of_copy(key: tuple[str, ...], rows: Sequence[Row]) -> str:
    hardware, dtype, size, way = key
    shares = [100 * float(row["of_copy"]) for row in rows]
    enough = sum(share >= OF_COPY for share in shares)
    models = " and ".join(dict.fromkeys(row["shape"].partition(",")[0] for row in rows))
    return (
        f"| {_WORDS.format(way)} | {OF_COPY} % | {min(shares):.0f} to {max(shares):.0f} % | "
        f"{models}, {len(rows)} inputs ({dtype}, b = {size}), {hardware} | {commits(rows)} | "
        f"{'yes' if enough == len(rows) else f'by {enough} of {len(rows)} inputs' if enough else 'no'} |"
    )
