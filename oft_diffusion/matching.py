"""Several adapters in memory, layer by layer: which layers are the same, and their rotations in batches.

An adapter is the identity where it lacks a layer. Where its blocks are smaller than another's, consecutive ones are put
together to one larger block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from oft_diffusion.disk import tensor_digest
from oft_diffusion.errors import AdapterError
from oft_diffusion.files import AdapterFile
from oft_diffusion.inject import KEY_SUFFIX, SCALE_SUFFIX
from oft_diffusion.rotation import block_size_of, cayley_delta, power_delta, spectrum, unpack
from oft_diffusion.targets import canonical_name

_BATCH = 2**22  # entries of a delta: 32 MB in float64


@dataclass(frozen=True)
class Source:
    """An adapter, what messages call it, and the power of it that is meant."""

    label: str
    file: AdapterFile
    exponent: float = 1.0

    def delta(self, part: str, packed: Tensor) -> tuple[Tensor, float]:
        """The delta of a power of rotations, float64, and how far they were from rotations: max |log radius|.

        Exact Cayley is a rotation. Of a truncated series it is each block's nearest one, its unitary factor.

        Raises:
            AdapterError: a series of norm 1 or more, which has none that would be unique.
        """
        config, packed = self.file.metadata.components[part], packed.double()
        if config.parametrisation == "cayley" and abs(self.exponent) == 1.0:
            return cayley_delta(self.exponent * unpack(packed)), 0.0
        try:
            planes = spectrum(packed, config)
        except AdapterError as error:
            raise AdapterError(
                f"adapter {self.label}, {part}: {error.problem}",
                expected=error.expected,
                fix="activate it in the pipeline, beside the others, at strength 1",
            ) from error
        turned = planes._replace(log_radius=torch.zeros_like(planes.log_radius))
        return power_delta(turned, self.exponent), float(planes.log_radius.abs().max())


@dataclass(frozen=True)
class Layer:
    """A layer that some adapter has.

    Attributes:
        part: its component.
        name: as the first adapter that has it spells it.
        size: of its blocks, the largest that an adapter has there.
        blocks: how many of that size.
        packed: each adapter's generators, `(r, b(b-1)/2)` with a b of its own, or None.
        key: equal for layers of a component that are equal in every adapter.
    """

    part: str
    name: str
    size: int
    blocks: int
    packed: tuple[Tensor | None, ...]
    key: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Layers of one component and block size, whose n blocks are computed together."""

    layers: Sequence[Layer]
    sources: Sequence[Source]

    @property
    def blocks(self) -> list[int]:
        """How many blocks each layer has."""
        return [layer.blocks for layer in self.layers]

    def layer_of(self, row: int) -> str:
        """The component and layer of a block."""
        layer = next(la for la, end in zip(self.layers, accumulate(self.blocks), strict=True) if row < end)
        return f"{layer.part}.{layer.name}"

    def delta(self, index: int) -> tuple[Tensor, float]:
        """A source's delta, `(n, b, b)` float64, and max |log radius|."""
        part, size = self.layers[0].part, self.layers[0].size
        result, radius = torch.zeros(sum(self.blocks), size, size, dtype=torch.float64), 0.0
        here = [
            (rows, packed)
            for layer, rows in zip(self.layers, result.split(self.blocks), strict=True)
            if (packed := layer.packed[index]) is not None
        ]
        for width in {packed.shape[1] for _, packed in here}:
            places = [(rows, packed) for rows, packed in here if packed.shape[1] == width]
            delta, off = self.sources[index].delta(part, torch.cat([packed for _, packed in places]))
            radius = max(radius, off)
            for (rows, _), own in zip(places, delta.split([len(packed) for _, packed in places]), strict=True):
                _put_together(rows, own)
        return result, radius


def _put_together(rows: Tensor, own: Tensor) -> None:
    """Write deltas `(r k, b, b)` as diagonal blocks into `rows (r, k b, k b)`, k consecutive ones into each."""
    small = own.shape[-1]
    count = rows.shape[-1] // small
    for i in range(count):
        place = slice(i * small, (i + 1) * small)
        rows[:, place, place] = own[i::count]


def batches(layers: Iterable[Layer], sources: Sequence[Source]) -> Iterator[Batch]:
    """Layers of one component and size together, up to some tens of megabytes."""
    groups: dict[tuple[str, int], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.part, layer.size), []).append(layer)
    for (_, size), group in groups.items():
        some: list[Layer] = []
        for layer in group:
            if some and (sum(la.blocks for la in some) + layer.blocks) * size**2 > _BATCH:
                yield Batch(some, sources)
                some = []
            some.append(layer)
        yield Batch(some, sources)


def match_layers(sources: Sequence[Source]) -> list[Layer]:
    """The union of the adapters' layers, by name with or without `text_model.`.

    Raises:
        AdapterError: an adapter scales outputs or names a layer twice; two rotate different sides of a component's
            layers; a layer's features differ, or block sizes of which one does not divide the other.
    """
    found: dict[tuple[str, str], dict[int, tuple[str, Tensor]]] = {}
    for i, source in enumerate(sources):
        for part, state in source.file.components.items():
            for key, tensor in state.items():
                name = key.removesuffix(KEY_SUFFIX)
                given = found.setdefault((part, canonical_name(name)), {})
                if key.endswith(SCALE_SUFFIX) or i in given:
                    raise _unusable(source, part, key)
                given[i] = name, tensor
    _check_sides(sources)
    return [_layer(part, given, sources) for (part, _), given in found.items()]


def _layer(part: str, given: dict[int, tuple[str, Tensor]], sources: Sequence[Source]) -> Layer:
    name = next(iter(given.values()))[0]
    shapes = {i: (len(packed), block_size_of(packed.shape[1]) or 0) for i, (_, packed) in given.items()}
    size = max(size for _, size in shapes.values())
    same_features = len({blocks * small for blocks, small in shapes.values()}) == 1
    output = sources[next(iter(given))].file.metadata.components[part].side == "output"
    if not same_features or any(
        small == 0 or size % small or (output and small < size) for _, small in shapes.values()
    ):
        shown = "; ".join(f"{sources[i].label} has {n} blocks of size {small}" for i, (n, small) in shapes.items())
        raise AdapterError(
            f"{part}.{name} differs: {shown}",
            expected="the same features, in blocks of sizes that divide the largest"
            + (", or of one size where outputs are rotated" if output else ""),
            fix="combine adapters of one base and of block sizes such as 16 and 32, or activate them side by side",
        )
    packed = tuple(given[i][1] if i in given else None for i in range(len(sources)))
    key = tuple("" if t is None else tensor_digest({"": t}) for t in packed)
    return Layer(part, name, size, shapes[next(iter(shapes))][0] * shapes[next(iter(shapes))][1] // size, packed, key)


def _unusable(source: Source, part: str, key: str) -> AdapterError:
    if key.endswith(SCALE_SUFFIX):
        return AdapterError(
            f"adapter {source.label} scales the outputs of {part}.{key.removesuffix(SCALE_SUFFIX)}",
            expected="rotations only: a product or mean of scaled ones is none, and no generator holds it",
            fix="activate it in the pipeline, beside the others",
        )
    return AdapterError(
        f"adapter {source.label} names {part}.{key} twice, with and without text_model.",
        expected="one tensor per layer",
        fix="remove one of them, or use another file",
    )


def _check_sides(sources: Sequence[Source]) -> None:
    first: dict[str, Source] = {}
    for source in sources:
        for part in source.file.components:
            other = first.setdefault(part, source)
            here, there = (s.file.metadata.components[part].side for s in (source, other))
            if here != there:
                raise AdapterError(
                    f"adapter {other.label} rotates the {there}s of {part}'s layers, and {source.label} their {here}s",
                    expected="adapters of one side, whose rotations follow one another",
                    fix="activate them side by side in the pipeline",
                )
