"""How the active adapters become deltas: consecutive adapters of one block size are composed into one *stage*.

A layer's input meets the adapters in activation order, `y = W(x R_1 R_2 ...)`. Within a stage the small blocks are
multiplied once, so that n adapters cost a layer as much as one; stages follow one another.

A *site* is what is rotated: a layer's input, or, in some files of other tools, the patches that a convolution
multiplies its kernel with (`patches`), or a layer's output before its bias (`output`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, cast

import torch
from torch import Tensor, nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import AdapterError

StrengthMode = Literal["rotation", "linear"]
STRENGTH_MODES: tuple[StrengthMode, ...] = ("rotation", "linear")


Place = Literal["input", "patches", "output"]
_MARK = "#"  # in no module's name


def site_of(layer: str, place: Place) -> str:
    """Where a rotation acts: a layer's input by the layer's name, `name#patches`, or `name#output`."""
    return layer if place == "input" else f"{layer}{_MARK}{place}"


def layer_of(site: str) -> str:
    """The layer of a site."""
    return site.partition(_MARK)[0]


def place_of(site: str) -> Place:
    """Which of its layer's tensors a site rotates."""
    return cast(Place, site.partition(_MARK)[2] or "input")


@dataclass(frozen=True)
class Part:
    """The sites of an adapter that have one block size, and so one parameter: blocks per site, in the bank's order.

    A tied site has no generator of its own: `tied` says whose it uses (`OFTConfig.share_qkv`).
    """

    key: str
    block_size: int
    blocks: Mapping[str, int]
    tied: Mapping[str, str] = field(default_factory=dict)

    @property
    def generators(self) -> dict[str, int]:
        """Blocks per generator, by the site that keeps it, as the parameter holds them."""
        return {site: count for site, count in self.blocks.items() if site not in self.tied}

    @property
    def total_blocks(self) -> int:
        return sum(self.generators.values())

    def keeper(self, site: str) -> str | None:
        """The site whose generator a site uses, mostly its own; None where it is not adapted."""
        return self.tied.get(site, site) if site in self.blocks else None

    def slices(self) -> dict[str, slice]:
        """Each site's rows of the parameter; those of tied sites coincide."""
        rows, start = {}, 0
        for site, count in self.generators.items():
            rows[site] = slice(start, start + count)
            start += count
        return {site: rows[self.tied.get(site, site)] for site in self.blocks}


@dataclass(frozen=True)
class Adapter:
    """One adapter's settings and layout. Those that are trained here have one part; files may have several sizes."""

    config: OFTConfig
    parts: tuple[Part, ...]

    @property
    def blocks(self) -> dict[str, int]:
        """Blocks per site."""
        return {site: count for part in self.parts for site, count in part.blocks.items()}

    @property
    def tied(self) -> dict[str, str]:
        """Sites without a generator of their own, and whose they use."""
        return {site: keeper for part in self.parts for site, keeper in part.tied.items()}


@dataclass(frozen=True)
class Active:
    """An adapter in use, with its strength s: `R^s` in mode "rotation", `(1-s) I + s R` in mode "linear"."""

    name: str
    strength: float = 1.0
    mode: StrengthMode = "rotation"


@dataclass(frozen=True)
class Member:
    """A part of an active adapter in a stage; `rows` says which of its blocks each of the stage's is, None for all.

    One past its last block stands for the identity.
    """

    active: Active
    part: Part
    rows: Tensor | None
    _there: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def rows_on(self, device: torch.device) -> Tensor | None:
        """`rows` on a device, sent there once: a copy in each step would have the card wait for the processor."""
        if self.rows is None:
            return None
        if torch.compiler.is_compiling():  # a tensor of its graph must not outlive it
            return self.rows.to(device)
        if device not in self._there:
            with torch.inference_mode(False):  # or no later step could take part in a graph
                self._there[device] = self.rows.to(device)
        return self._there[device]


@dataclass(frozen=True)
class Stage:
    """Rotations of one block size that follow one another, over the union of their sites.

    `sites` says which entry of `blocks` each site uses: sites that are tied in every member have one in common.
    """

    block_size: int
    blocks: Mapping[str, int]
    sites: Mapping[str, str]
    members: tuple[Member, ...]

    @property
    def total_blocks(self) -> int:
        return sum(self.blocks.values())

    def begins(self) -> dict[str, int]:
        """At which of the stage's blocks each entry's begin."""
        return dict(zip(self.blocks, accumulate(self.blocks.values(), initial=0), strict=False))

    def split(self, flat: Tensor, dim: int) -> dict[str, Tensor]:
        """Each entry's part of a tensor of all blocks, by one split: slicing costs many times as much in backward.

        Args:
            flat: the blocks' deltas or generators.
            dim: of the blocks.
        """
        return dict(zip(self.blocks, flat.split(list(self.blocks.values()), dim=dim), strict=True))

    def structure(self) -> tuple[object, ...]:
        """What fixes the shapes of a stage's deltas; strengths and generators may change under it."""
        return self.block_size, tuple(self.blocks.items()), tuple(self.sites.items())


def make_stages(active: Sequence[Active], adapters: Mapping[str, Adapter]) -> tuple[Stage, ...]:
    """Group the active adapters' parts, in order, into stages.

    Raises:
        AdapterError: one turns the channels of a convolution whose patches an earlier one has turned.
    """
    _check_places(active, adapters)
    groups: list[list[tuple[Active, Part]]] = []
    for item in active:
        for part in adapters[item.name].parts:
            group = _group_for(part, groups)
            if group is None:
                groups.append([(item, part)])
            else:
                group.append((item, part))
    return tuple(_make_stage(group) for group in groups)


def _check_places(active: Sequence[Active], adapters: Mapping[str, Adapter]) -> None:
    # A layer's input comes before its patches, whatever the order of activation.
    patched: dict[str, str] = {}
    for item in active:
        sites = adapters[item.name].blocks
        for site in sites.keys() & patched.keys():
            raise AdapterError(
                f"adapter {item.name!r} turns the channels of {site} after {patched[site]!r} turned its patches",
                expected="channels before patches",
                fix=f"activate {item.name!r} before {patched[site]!r}",
            )
        patched |= {layer_of(site): item.name for site in sites if place_of(site) == "patches"}


def _group_for(part: Part, groups: Sequence[list[tuple[Active, Part]]]) -> list[tuple[Active, Part]] | None:
    """The last group of this block size, if no group behind it has a site of the part, whose order would change."""
    for group in reversed(groups):
        if group[0][1].block_size == part.block_size:
            return group
        if any(not part.blocks.keys().isdisjoint(other.blocks) for _, other in group):
            return None
    return None


def _make_stage(group: Sequence[tuple[Active, Part]]) -> Stage:
    counts = {site: count for _, part in group for site, count in part.blocks.items()}
    entries: dict[tuple[str | None, ...], str] = {}
    sites = {site: entries.setdefault(tuple(part.keeper(site) for _, part in group), site) for site in counts}
    blocks = {site: counts[site] for site in entries.values()}
    members = tuple(Member(item, part, rows_in(part, blocks)) for item, part in group)
    return Stage(group[0][1].block_size, blocks, sites, members)


def rows_in(part: Part, blocks: Mapping[str, int]) -> Tensor | None:
    """`Member.rows` of a part among a stage's blocks."""
    if tuple(part.generators) == tuple(blocks):
        return None
    rows, identity = part.slices(), part.total_blocks
    found = [
        torch.arange(rows[site].start, rows[site].stop) if site in rows else torch.full((count,), identity)
        for site, count in blocks.items()
    ]
    return torch.cat(found)


def split_by_site(stages: Sequence[Stage], flats: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Per site, its deltas of every stage that has it, as views of the stages' flat deltas.

    Flat deltas are `(blocks, b, b)`, or `(images, blocks, b, b)` for a mixed batch. Generators, `(blocks, b(b-1)/2)`,
    of which deltas are to be built where they are used, each site is given whole.
    """
    result: dict[str, tuple[Tensor, ...]] = {}
    for stage, flat in zip(stages, flats, strict=True):
        if flat.dim() == 2:
            return dict.fromkeys(stage.sites, (flat,))
        views = stage.split(flat, -3)
        for site, entry in stage.sites.items():
            result[site] = (*result.get(site, ()), views[entry])
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
