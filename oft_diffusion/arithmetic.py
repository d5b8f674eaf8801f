"""Arithmetic on adapters: several in order, between two, the mean of several, one without another, one's power.

All of it happens block by block on the rotation group SO(b), in float64, and the result is again one adapter: exact
Cayley in float32, for `save_adapter_file`, or for more arithmetic.

Exact Cayley holds every rotation but those that turn some plane by 180 degrees: its generator, tan(angle / 2), grows
without bound. Results beyond `MAX_ANGLE` are refused; up to there a generator in float32 keeps R to 1e-5.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oft_diffusion import geodesics
from oft_diffusion.architectures import TARGET_SETS
from oft_diffusion.config import OFTConfig
from oft_diffusion.disk import tensor_digest
from oft_diffusion.errors import AdapterError
from oft_diffusion.files import FILE_NAME, AdapterFile
from oft_diffusion.inject import KEY_SUFFIX
from oft_diffusion.matching import Batch, Layer, Source, batches, match_layers
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.rotation import compose_deltas
from oft_diffusion.targets import canonical_name

MAX_ANGLE = 179.0  # degrees that a plane of a result may turn by, or that two adapters may be apart
MEAN_ANGLE = 90.0  # degrees that one of three or more adapters may be away from their mean
_WEAKEN = "weaken the adapters with power first, or activate them side by side in the pipeline"


@dataclass(frozen=True)
class Combined(AdapterFile):
    """What came out, in memory: `save_adapter_file(path, x.components, x.metadata)` writes it.

    Attributes:
        path: no file, but what messages call this adapter, such as `compose(mug, style)`.
        notes: sentences about what its user should know.
    """

    notes: tuple[str, ...] = ()


def compose(files: Sequence[AdapterFile]) -> Combined:
    """One adapter for several in order: x meets the first one first, `R = R_1 R_2 ...` for row vectors.

    Here as in all that follows, an adapter is the identity on layers that it lacks. The metadata's base is the first
    adapter's; its trigger and class word are those that all who have one agree on, else None; `training` tells what
    was done, and to which digests.

    Args:
        files: at least one adapter, as `load_adapter_file` or these functions return them. A truncated series is no
            rotation: its nearest ones are taken, and a note says how far away they are.

    Raises:
        AdapterError: the adapters do not belong together (base, side, features, block sizes); one scales outputs, or
            is a series of norm 1 or more; a plane of the result turns by more than `MAX_ANGLE`.
    """
    return _combine("compose", _sources(files), _product)


def subtract(first: AdapterFile, second: AdapterFile) -> Combined:
    """What is left of the first when the second, met last, is taken away again: `R_1 R_2^-1`.

    So `compose([subtract(a, b), b])` is a. Trigger and class word are the first's.

    Raises:
        AdapterError: as for `compose`.
    """
    return _combine("subtract", _sources((first, second), (1.0, -1.0)), _product)


def power(file: AdapterFile, exponent: float) -> Combined:
    """An adapter with a strength baked in: `R^s`, every plane's angle times s; 0 is the base, -1 the inverse.

    Of angles that pass 180 degrees whole turns are lost, so that a root of the result is not the adapter.

    Raises:
        AdapterError: as for `compose`, or the exponent is not finite.
    """
    exponent = _number(exponent, "exponent")
    return _combine("power", _sources((file,), (exponent,)), _product, {"exponent": exponent})


def interpolate(first: AdapterFile, second: AdapterFile, t: float) -> Combined:
    """A point of the geodesic through two: `R_1 (R_1^-1 R_2)^t`, the first at t = 0, the second at 1; any t goes.

    Raises:
        AdapterError: as for `compose`; the two are more than `MAX_ANGLE` apart in some plane, where there is soon more
            than one shortest way; t is not finite.
    """
    t = _number(t, "t")
    return _combine("interpolate", _sources((first, second)), partial(_between, t=t), {"t": t})


def average(files: Sequence[AdapterFile], weights: Sequence[float] | None = None) -> Combined:
    """The Karcher mean: per block, the rotation with the least sum of squared distances. Order does not matter.

    Args:
        files: at least one adapter.
        weights: one positive number each, of which the proportions count; equal ones if None.

    Raises:
        AdapterError: as for `compose`; weights are not usable; no unique mean was found, since two adapters are more
            than `MAX_ANGLE` apart, or one of three or more is more than `MEAN_ANGLE` away from the mean.
    """
    shares = _shares(len(files), weights)
    operation = partial(_between, t=shares[1]) if len(shares) == 2 else partial(_mean, weights=shares)
    return _combine("average", _sources(files), operation, {"weights": shares})


def _product(batch: Batch, deltas: Sequence[Tensor]) -> Tensor:
    result = deltas[0]
    for delta in deltas[1:]:
        result = compose_deltas(result, delta)
    return result


def _between(batch: Batch, deltas: Sequence[Tensor], t: float) -> Tensor:
    first, second = deltas
    result, apart = geodesics.between(first, second, t)
    _refuse(
        batch, apart, MAX_ANGLE, "the adapters are {} degrees apart in {}",
        "at most {} degrees: at 180 there is more than one shortest way between them",
    )  # fmt: skip
    return result


def _mean(batch: Batch, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    result, farthest, found = geodesics.mean(deltas, weights)
    _refuse(
        batch, farthest, MEAN_ANGLE, "one of the adapters is {} degrees away from their mean in {}",
        "at most {} degrees: farther apart there may be several means",
    )  # fmt: skip
    if not found.all():
        raise AdapterError(
            f"no mean of the adapters was found in {batch.layer_of(int(found.int().argmin()))}",
            expected="adapters that are nearer to each other",
            fix=_WEAKEN,
        )
    return result


def _combine(
    how: str,
    sources: Sequence[Source],
    operation: Callable[[Batch, Sequence[Tensor]], Tensor],
    settings: Mapping[str, Any] | None = None,
) -> Combined:
    notes = _check_bases(sources)
    layers = match_layers(sources)
    # Layers that are equal in all adapters are computed once: those that share_qkv ties stay equal, bit by bit.
    different = {(layer.part, layer.key): layer for layer in layers}
    found: dict[tuple[str, tuple[str, ...]], Tensor] = {}
    radii = [0.0] * len(sources)
    with torch.no_grad():
        for batch in batches(different.values(), sources):
            deltas, off = zip(*(batch.delta(i) for i in range(len(sources))), strict=True)
            radii = list(map(max, radii, off))
            packed, angle = geodesics.cayley_generators(operation(batch, deltas))
            _refuse(
                batch, angle, MAX_ANGLE, "the result would turn by {} degrees in {}",
                "at most {} degrees: exact Cayley cannot hold half a turn",
            )  # fmt: skip
            for layer, own in zip(batch.layers, packed.float().split(batch.blocks), strict=True):
                found[layer.part, layer.key] = own
    components: dict[str, dict[str, Tensor]] = {}
    for layer in layers:
        components.setdefault(layer.part, {})[layer.name + KEY_SUFFIX] = found[layer.part, layer.key].clone()
    notes += [
        f"{source.label} is a truncated series: its nearest rotations were taken, max |log radius| {radius:.2g}"
        for source, radius in zip(sources, radii, strict=True)
        if radius > 0.0
    ]
    metadata = _metadata(how, sources, layers, settings or {}, notes)
    return Combined(Path(f"{how}({', '.join(s.label for s in sources)})"), components, metadata, tuple(notes))


def _refuse(batch: Batch, angle: Tensor, limit: float, problem: str, expected: str) -> None:
    """Raise where an angle, of `(n,)` radians, is above the limit in degrees; the message names the largest."""
    degrees = math.degrees(float(angle.max()))
    if degrees > limit:
        where = batch.layer_of(int(angle.argmax()))
        raise AdapterError(problem.format(f"{degrees:.2f}", where), expected=expected.format(f"{limit:g}"), fix=_WEAKEN)


# -- what is given -----------------------------------------------------------------------------------------------------


def _sources(files: Sequence[AdapterFile], exponents: Sequence[float] | None = None) -> list[Source]:
    if not files:
        raise AdapterError(
            "there is nothing to combine", expected="at least one adapter", fix="pass a list of adapters"
        )
    names = [_name(file.path) for file in files]
    often = {name for name, count in Counter(names).items() if count > 1}
    labels = [f"{name} ({i})" if name in often else name for i, name in enumerate(names, 1)]
    return [Source(*item) for item in zip(labels, files, exponents or [1.0] * len(files), strict=True)]


def _name(path: Path) -> str:
    if path.name == FILE_NAME:
        return path.absolute().parent.name
    return path.stem if path.suffix == ".safetensors" else path.name


def _number(value: float, what: str) -> float:
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise AdapterError(f"{what} {value!r} is not usable", expected="a finite number", fix="0 to 1 to begin with")
    return number


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * count if weights is None else [_number(w, "weight") for w in weights]
    if len(given) != count or min(given, default=1.0) <= 0.0:
        raise AdapterError(
            f"{count} adapter(s) cannot be averaged with the weights {', '.join(f'{w:g}' for w in given) or '(none)'}",
            expected="one positive number each",
            fix="leave out adapters of weight 0; to go away from one, use interpolate or subtract",
        )
    return [w / sum(given) for w in given]


def _check_bases(sources: Sequence[Source]) -> list[str]:
    """Refuse adapters of different models; a note where they only differ in name."""
    known: dict[str, tuple[str, str]] = {}
    for source in sources:
        base = source.file.metadata.base
        said = {**base.get("components", {}), "prediction type": base.get("prediction_type")}
        for what, value in said.items():
            other, label = known.setdefault(what, (value, source.label)) if value is not None else (None, "")
            if other != value:
                raise AdapterError(
                    f"adapter {label} was trained on a base whose {what} is {other}, and {source.label} on one whose "
                    f"{what} is {value}",
                    expected="adapters of one base",
                    fix="combine adapters that were trained on the same model",
                )
    names = {str(name): source.label for source in reversed(sources) if (name := source.file.metadata.base.get("name"))}
    told = ", ".join(f"{name} ({label})" for name, label in reversed(names.items()))
    return [f"the adapters were trained on bases of different names: {told}"] if len(names) > 1 else []


# -- what is told ------------------------------------------------------------------------------------------------------


def _metadata(
    how: str, sources: Sequence[Source], layers: Sequence[Layer], settings: Mapping[str, Any], notes: list[str]
) -> AdapterMetadata:
    files = [source.file for source in sources]
    speaking = [source.file.metadata for source in sources if source.exponent > 0] or [files[0].metadata]
    classes: dict[str, str] = {}
    for file in reversed(files):
        classes |= file.metadata.base.get("components", {})
    base = dict(files[0].metadata.base)
    return AdapterMetadata(
        components={part: _config(part, sources, layers) for part in dict.fromkeys(la.part for la in layers)},
        base=base | ({"components": classes} if classes else {}),
        trigger=_agreed("triggers", [m.trigger for m in speaking], notes),
        class_word=_agreed("class words", [m.class_word for m in speaking], notes),
        training={
            "combined": how,
            **settings,
            "of": [{"name": source.label, "sha256": _digest(source.file)} for source in sources],
        },
    )


def _agreed(what: str, values: Sequence[str | None], notes: list[str]) -> str | None:
    said = list(dict.fromkeys(value for value in values if value is not None))
    if len(said) > 1:
        notes.append(f"the adapters' {what} differ, so the result has none of its own: {', '.join(said)}")
    return said[0] if len(said) == 1 else None


def _digest(file: AdapterFile) -> str:
    return tensor_digest({f"{part}.{key}": t for part, state in file.components.items() for key, t in state.items()})


def _config(part: str, sources: Sequence[Source], layers: Sequence[Layer]) -> OFTConfig:
    """Of a component: exact Cayley; the widest target set, or the first adapter's patterns, which are a note only."""
    configs = [s.file.metadata.components[part] for s in sources if part in s.file.components]
    sizes = {layer.size for layer in layers if layer.part == part}
    sets = [TARGET_SETS.index(c.targets) for c in configs if c.targets in TARGET_SETS]
    return OFTConfig(
        block_size=sizes.pop() if len(sizes) == 1 else "mixed",
        targets=TARGET_SETS[max(sets)] if len(sets) == len(configs) else configs[0].targets,
        share_qkv=all(c.share_qkv for c in configs) and _stay_tied(part, layers),
        side=configs[0].side,
    )


def _stay_tied(part: str, layers: Sequence[Layer]) -> bool:
    """Whether every adapter has all or none of an attention's layers, so that those tied in one are tied in all."""
    shapes: dict[str, tuple[int | None, ...]] = {}
    for layer in layers:
        if layer.part == part:
            own = tuple(None if packed is None else packed.shape[1] for packed in layer.packed)
            if shapes.setdefault(canonical_name(layer.name).rpartition(".")[0], own) != own:
                return False
    return True
