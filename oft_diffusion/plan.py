"""How the active adapters become deltas: consecutive adapters of one block size are composed into one *stage*.

A layer's input meets the adapters in activation order, `y = W(x R_1 R_2 ...)`. Within a stage the small blocks are
multiplied once, so that n adapters cost a layer as much as one; stages follow one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterError

StrengthMode = Literal["rotation", "linear"]
STRENGTH_MODES: tuple[StrengthMode, ...] = ("rotation", "linear")


@dataclass(frozen=True)
class Adapter:
    """One adapter's settings (block size resolved to a number) and layout: blocks per layer, in the bank's order.

    A tied layer has no generator of its own: `tied` says whose it uses (`OFTConfig.share_qkv`).
    """

    config: OFTConfig
    block_size: int
    blocks: Mapping[str, int]
    tied: Mapping[str, str] = field(default_factory=dict)

    @property
    def generators(self) -> dict[str, int]:
        """Blocks per generator, by the layer that keeps it, as the parameter holds them."""
        return {name: count for name, count in self.blocks.items() if name not in self.tied}

    @property
    def total_blocks(self) -> int:
        return sum(self.generators.values())

    def keeper(self, layer: str) -> str | None:
        """The layer whose generator a layer uses, mostly its own; None where it is not adapted."""
        return self.tied.get(layer, layer) if layer in self.blocks else None

    def slices(self) -> dict[str, slice]:
        """Each layer's rows of the adapter's parameter; those of tied layers coincide."""
        rows, start = {}, 0
        for name, count in self.generators.items():
            rows[name] = slice(start, start + count)
            start += count
        return {name: rows[self.tied.get(name, name)] for name in self.blocks}


@dataclass(frozen=True)
class Active:
    """An adapter in use, with its strength s: `R^s` in mode "rotation", `(1-s) I + s R` in mode "linear"."""

    name: str
    strength: float = 1.0
    mode: StrengthMode = "rotation"


@dataclass(frozen=True)
class Member:
    """An active adapter in a stage; `rows` says which of its blocks each of the stage's is, None where all are equal.

    One past its last block stands for the identity.
    """

    active: Active
    rows: Tensor | None


@dataclass(frozen=True)
class Stage:
    """Consecutive adapters of one block size, over the union of their layers.

    `layers` says which entry of `blocks` each layer uses: layers that are tied in every member have one in common.
    """

    block_size: int
    blocks: Mapping[str, int]
    layers: Mapping[str, str]
    members: tuple[Member, ...]

    @property
    def total_blocks(self) -> int:
        return sum(self.blocks.values())

    def structure(self) -> tuple[object, ...]:
        """What fixes the shapes of a stage's deltas; strengths and generators may change under it."""
        return self.block_size, tuple(self.blocks.items()), tuple(self.layers.items())


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
    members = [adapters[item.name] for item in group]
    counts = {name: count for member in members for name, count in member.blocks.items()}
    entries: dict[tuple[str | None, ...], str] = {}
    layers = {name: entries.setdefault(tuple(m.keeper(name) for m in members), name) for name in counts}
    blocks = {name: counts[name] for name in entries.values()}
    return Stage(
        members[0].block_size,
        blocks,
        layers,
        tuple(Member(item, _rows_in(adapters[item.name], blocks)) for item in group),
    )


def _rows_in(adapter: Adapter, blocks: Mapping[str, int]) -> Tensor | None:
    if tuple(adapter.generators) == tuple(blocks):
        return None
    rows, identity = adapter.slices(), adapter.total_blocks
    parts = [
        torch.arange(rows[name].start, rows[name].stop) if name in rows else torch.full((count,), identity)
        for name, count in blocks.items()
    ]
    return torch.cat(parts)


def split_by_layer(stages: Sequence[Stage], flats: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Per layer, its deltas `(r, b, b)` of every stage that has it, as views of the stages' flat deltas."""
    result: dict[str, tuple[Tensor, ...]] = {}
    for stage, flat in zip(stages, flats, strict=True):
        # One split: slicing layer by layer costs many times as much in backward.
        views = dict(zip(stage.blocks, flat.split(list(stage.blocks.values())), strict=True))
        for name, entry in stage.layers.items():
            result[name] = (*result.get(name, ()), views[entry])
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
