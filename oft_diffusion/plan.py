"""How the active adapters become deltas: consecutive adapters of one block size are composed into one *stage*.

A layer's input meets the adapters in activation order, `y = W(x R_1 R_2 ...)`. Within a stage the small blocks are
multiplied once, so that n adapters cost a layer as much as one; stages follow one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterError

StrengthMode = Literal["rotation", "linear"]
STRENGTH_MODES: tuple[StrengthMode, ...] = ("rotation", "linear")


@dataclass(frozen=True)
class Adapter:
    """One adapter's settings (block size resolved to a number) and layout: blocks per layer, in the bank's order."""

    config: OFTConfig
    block_size: int
    blocks: Mapping[str, int]

    @property
    def total_blocks(self) -> int:
        return sum(self.blocks.values())

    def slices(self) -> dict[str, slice]:
        """Each layer's rows of the adapter's parameter."""
        result, start = {}, 0
        for name, count in self.blocks.items():
            result[name] = slice(start, start + count)
            start += count
        return result


@dataclass(frozen=True)
class Active:
    """An adapter in use, with its strength s: `R^s` in mode "rotation", `(1-s) I + s R` in mode "linear"."""

    name: str
    strength: float = 1.0
    mode: StrengthMode = "rotation"


@dataclass(frozen=True)
class Member:
    """An active adapter in a stage; `rows` are its blocks' places in the stage, None where it has all of them."""

    active: Active
    rows: Tensor | None


@dataclass(frozen=True)
class Stage:
    """Consecutive adapters of one block size, over the union of their layers."""

    block_size: int
    blocks: Mapping[str, int]
    members: tuple[Member, ...]

    @property
    def total_blocks(self) -> int:
        return sum(self.blocks.values())

    def structure(self) -> tuple[int, tuple[tuple[str, int], ...]]:
        """What fixes the shapes of a stage's deltas; strengths and generators may change under it."""
        return self.block_size, tuple(self.blocks.items())


def make_stages(active: Sequence[Active], adapters: Mapping[str, Adapter]) -> tuple[Stage, ...]:
    """Group the active adapters, in order, into stages."""
    groups: list[list[Active]] = []
    for item in active:
        if groups and adapters[groups[-1][0].name].block_size == adapters[item.name].block_size:
            groups[-1].append(item)
        else:
            groups.append([item])
    return tuple(_make_stage(group, adapters) for group in groups)


def _make_stage(group: Sequence[Active], adapters: Mapping[str, Adapter]) -> Stage:
    blocks: dict[str, int] = {}
    for item in group:
        blocks.update(adapters[item.name].blocks)
    total = Adapter(OFTConfig(), adapters[group[0].name].block_size, blocks)
    places = total.slices()
    members = []
    for item in group:
        layers = adapters[item.name].blocks
        rows = None
        if tuple(layers) != tuple(blocks):
            rows = torch.cat([torch.arange(places[name].start, places[name].stop) for name in layers])
        members.append(Member(item, rows))
    return Stage(total.block_size, blocks, tuple(members))


def split_by_layer(stages: Sequence[Stage], flats: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Per layer, its deltas `(r, b, b)` of every stage that has it, as views of the stages' flat deltas."""
    result: dict[str, tuple[Tensor, ...]] = {}
    for stage, flat in zip(stages, flats, strict=True):
        # One split: slicing layer by layer costs many times as much in backward.
        for name, view in zip(stage.blocks, flat.split(list(stage.blocks.values())), strict=True):
            result[name] = (*result.get(name, ()), view)
    return result


def make_active(names: Sequence[str], strengths: float | Sequence[float], mode: StrengthMode) -> tuple[Active, ...]:
    """Pair adapter names with strengths.

    Raises:
        AdapterError: a name is repeated, counts differ, a strength is not finite, or the mode is unknown.
    """
    if isinstance(strengths, Iterable) and getattr(strengths, "ndim", None) != 0:
        values = [_number(strength) for strength in strengths]
    else:
        values = [_number(strengths)] * len(names)
    if len(values) != len(names):
        raise AdapterError(
            f"{len(names)} adapter(s) but {len(values)} strength(s)",
            expected="one strength for all, or one each",
            fix="pass lists of equal length",
        )
    if repeated := sorted({n for n in names if list(names).count(n) > 1}):
        raise AdapterError(
            f"adapter {repeated[0]!r} is named twice",
            expected="each adapter at most once",
            fix="name it once, with the strength you want",
        )
    for value in values:
        if not abs(value) < float("inf") or mode not in STRENGTH_MODES:
            raise AdapterError(
                f"strength {value!r} with mode {mode!r} is not usable",
                expected=f"a finite number, and one of {', '.join(STRENGTH_MODES)}",
                fix="use a strength between -1 and 2 to begin with",
            )
    return tuple(Active(n, s, mode) for n, s in zip(names, values, strict=True))


def _number(strength: object) -> float:
    """A strength as a plain float: numpy's and torch's scalars are fine, text is a mistake."""
    try:
        if isinstance(strength, (str, bool)):
            raise TypeError
        return float(strength)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise AdapterError(
            f"strength {strength!r} is no number",
            expected="a number: 0 is the base, 1 as trained",
            fix="pass one number for all adapters, or a list with one each",
        ) from None


def as_names(names: str | Sequence[str]) -> list[str]:
    """One adapter name or several, as a list.

    Raises:
        AdapterError: it is neither, such as a dictionary of strengths.
    """
    if isinstance(names, str):
        return [names]
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise AdapterError(
            f"adapter names {names!r} are not usable",
            expected="a name, or a list of names",
            fix='pass names and strengths apart: ["mug", "cat"], [0.8, 0.5]',
        )
    return list(names)


def check_adapter_name(name: str) -> None:
    """Refuse names that files, modules or command lines could not hold.

    Raises:
        AdapterError: the name is not made of letters, digits, '-' and '_'.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_\-]+", name) or hasattr(nn.ParameterDict, name):
        raise AdapterError(
            f"adapter name {name!r} is not usable",
            expected="letters, digits, '-' and '_', and no dictionary method's name",
            fix='choose a plain name such as "mug"',
        )
