"""What a training step of models of full size takes, counted without a card: benchmarks/data/full_counts.csv.

python -m benchmarks.full_counts            # five minutes, and no memory to speak of
python -m benchmarks.full_counts --table    # the newest counts as Markdown, from the data alone

SD 1.5, SDXL, SD 3.5 Medium and Flux.1 are gone through on the device "meta", which has shapes and no numbers: forward
and backward in float32, of one picture, with attention as a card's fused kernels have it (`step_memory`). This package
runs in plain PyTorch, its kernels need numbers. Counted are:

- operations that the dispatcher is given and that are a pass over data (`counting.NOT_WORK`).
  `counting.leaf_operations` looks below it, and counts a product with a scalar, of which LoRA has two a layer, as two;
- bytes that the forward saves for backward, parameters aside;
- the peak above the base's weights: storages alive at once in forward and backward, gradients of what is trained
  included, and the adapter with AdamW's two moments. An allocator's gaps and workspaces are not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.counting import NOT_WORK, saved_bytes
from benchmarks.methods import BASE, DENSE, EQUAL_LORA, LORA, METHODS, NATIVE, OURS, TRITON, WEIGHT_CENTRIC
from benchmarks.records import DATA, append, load
from benchmarks.stamps import commits
from benchmarks.step_memory import FAMILIES, fused_attention
from benchmarks.turns import told
from benchmarks.works import WORKS, Sizes
from oft_diffusion.hooks import bank_of
from oft_diffusion.training.memory import LiveStorages

FILE = DATA / "full_counts.csv"
COUNTED = tuple(method for method in METHODS if method not in (TRITON, NATIVE))
BLOCK_SIZE = 32
_COPIES = {"aten::clone", "aten::_to_copy"}  # which `NOT_WORK` leaves to the copy that they make
_MOMENTS = 2  # of AdamW, of each number that is trained
_FIGURES = ("trained", "operations", "saved_bytes", "step_bytes", "state_bytes")
Row = Mapping[str, str]


class _Operations(TorchDispatchMode):
    """Counts what the dispatcher is given."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        self.count += name not in NOT_WORK or name in _COPIES
        return func(*args, **(kwargs or {}))


def counts(model: str, method: str, *, checkpointing: bool) -> dict[str, int]:
    """`_FIGURES` of one step.

    Raises:
        UnsupportedError: what the method cannot do; and whatever else it raises without numbers.
    """
    with torch.device("meta"):
        work = WORKS[model](Sizes())
        work.requires_grad_(False).train()
        parts = zip(work.components(), work.targets(), strict=True)
        adapted = [METHODS[method].adapt(part, names, BLOCK_SIZE) for part, names in parts]
        for part in work.components():
            if (bank := bank_of(part)) is not None:
                bank.to("meta")  # no model moves it
        if method == BASE:
            work.let_gradients_through()
        if checkpointing:
            work.checkpoint()
        trained = [parameter for own in adapted for parameter in own.trained]

        def loss() -> Tensor:
            return work().square().mean()

        with fused_attention():
            saved = saved_bytes(loss, [*work.parameters(), *trained])
            with _Operations() as operations, LiveStorages("meta") as alive:
                loss().backward()
    numbers = sum(parameter.numel() for parameter in trained)
    state = 4 * numbers * (_MOMENTS + (not METHODS[method].own_weights))
    return dict(zip(_FIGURES, (numbers, operations.count, saved, alive.most, state), strict=True))


def measure(methods: Sequence[str]) -> None:
    """Append a row for each model, with checkpointing and without, and method."""
    for model, checkpointing in product(filter(WORKS.__contains__, FAMILIES), (False, True)):
        rows = []
        for method in methods:
            found: dict[str, Any] = dict.fromkeys(_FIGURES, "") | {"reason": ""}
            try:
                found |= counts(model, method, checkpointing=checkpointing)
            except Exception as error:  # noqa: BLE001 - whatever it is, others go on
                found["reason"] = told(method, error)
            rows.append({"work": model, "checkpointing": "yes" if checkpointing else "no", "method": method, **found})
            print(*rows[-1].values(), flush=True)
        append(FILE, rows)


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The newest counts of one model, with checkpointing or without, by method."""

    model: str
    checkpointing: bool
    rows: Mapping[str, Row]

    def of(self, method: str, name: str) -> int | None:
        """A figure; the peak is that of a step and what stays between steps."""
        row = self.rows.get(method)
        if row is None or row["reason"]:
            return None
        return int(row[name]) if name != "peak" else int(row["step_bytes"]) + int(row["state_bytes"])

    def ratio(self, method: str, name: str, *, above_base: bool = False) -> float | None:
        """Of our figure to a method's; None where the method has none, or no more than the base."""
        ours, theirs, base = self.of(OURS, name), self.of(method, name), self.of(BASE, name)
        if ours is None or theirs is None or base is None:
            return None
        less = base if above_base else 0
        return (ours - less) / (theirs - less) if theirs > less else None


def steps(rows: Iterable[Row]) -> list[Step]:
    """In the order of the first rows."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["work"], row["checkpointing"]), {})[row["method"]] = row
    return [Step(model, checkpointing == "yes", own) for (model, checkpointing), own in found.items()]


Figure = Callable[[Step], "float | None"]


def _above_unless_checkpointed(method: str) -> Figure:
    """With checkpointing nearly all of the peak is one block's, recomputed: what is above the base's says nothing."""
    return lambda step: None if step.checkpointing else step.ratio(method, "peak", above_base=True)


# With what is aimed at, or None.
RATIOS: list[tuple[str, float | None, Figure]] = [
    ("bytes saved, of PEFT LoRA's", 1.00, lambda step: step.ratio(LORA, "saved_bytes")),
    ("peak above the weights, of PEFT LoRA's", 1.00, lambda step: step.ratio(LORA, "peak")),
    ("peak without adapter and moments, of PEFT LoRA's", None, lambda step: step.ratio(LORA, "step_bytes")),
    ("peak, of PEFT LoRA's with equal parameters", None, lambda step: step.ratio(EQUAL_LORA, "peak")),
    ("peak above the base's, of weight-centric OFT's", 1 / 3, _above_unless_checkpointed(WEIGHT_CENTRIC)),
    ("peak above the base's, of weight-centric OFT's with a dense R", 1 / 3, _above_unless_checkpointed(DENSE)),
]  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown: ratios by model, with aims, then megabytes and operations of every method."""
    if not rows:
        return "Nothing is counted yet."
    found = steps(rows)
    names = [step.model + ", checkpointed" * step.checkpointing for step in found]
    lines = [f"| | at most | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for words, bound, figure in RATIOS:
        cells = [_reached(figure(step), bound) for step in found]
        lines.append(f"| {words} | {'' if bound is None else f'{bound:.2f}'} | {' | '.join(cells)} |")
    lines += ["", f"| peak above the weights, MB (operations) | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for method in COUNTED:
        cells = [_cell(step, method) for step in found]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    reasons = dict.fromkeys(
        f"- {method}: {row['reason']}" for step in found for method, row in step.rows.items() if row["reason"]
    )
    last = rows[-1]
    about = f"Float32, one picture, b = {BLOCK_SIZE}; torch {last['torch']}, diffusers {last['diffusers']}; "
    return "\n".join([*lines, "", *reasons, "", f"{about}{_counted_at(found)}."])


def _counted_at(found: Iterable[Step]) -> str:
    """The commits of what is shown; where there are several, the methods of all but the most usual one."""
    methods: dict[str, list[str]] = {}
    for step in found:
        for method, row in step.rows.items():
            methods.setdefault(commits([row]), []).append(method)
    usual = max(methods, key=lambda commit: len(methods[commit]))
    others = [f"{', '.join(dict.fromkeys(own))}: {commit}" for commit, own in methods.items() if commit != usual]
    return "; ".join([f"commit {usual}", *others])


def _reached(value: float | None, bound: float | None) -> str:
    return "" if value is None else f"{value:.3f}" + ", missed" * (bound is not None and value > bound)


def _cell(step: Step, method: str) -> str:
    peak, operations = step.of(method, "peak"), step.of(method, "operations")
    return "" if peak is None or operations is None else f"{peak / 1e6:,.0f} ({operations:,})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest counts, count nothing")
    parser.add_argument("--methods", nargs="+", default=COUNTED, choices=COUNTED, help="count these alone")
    options = parser.parse_args()
    if not options.table:
        measure(options.methods)
    print(table(load(FILE)))


if __name__ == "__main__":
    main()
