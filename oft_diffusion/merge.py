"""Writing adapters into the weights, block by block, and taking them out again bit by bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from oft_diffusion.audit import refuse_fused_lora
from oft_diffusion.bank import OFTBank
from oft_diffusion.base_copy import BaseCopy, Kept, Weight, write
from oft_diffusion.errors import AdapterError, TargetError
from oft_diffusion.hooks import bank_of, hooked_layers, unwrap
from oft_diffusion.inject import require_bank
from oft_diffusion.offload import is_on_disk, stored
from oft_diffusion.plan import Active, Stage, as_names, layer_of, make_stages, place_of, split_by_site
from oft_diffusion.quantized import QuantizedWeight, quantized_weight

KeepBase = Literal["cpu", "disk", False]


def merge_oft(
    model: nn.Module, adapter_names: Sequence[str] | None = None, *, keep_base: KeepBase = "cpu"
) -> dict[str, float]:
    """Replace each target's weight by the rotated one, `W_i R_i^T` per block of columns, and stop rotating its input.

    A convolution's columns are its input channels, at every tap. A rotation of outputs turns rows, `R_i^T W_i`.

    Merged equals live up to rounding in the weight's dtype; the product is taken in float32. A quantized weight is
    dequantized, rotated and quantized anew as it was, layer by layer; what that loses is returned. Each time it loses
    as much again: rather unmerge than merge on top.

    Args:
        model: an adapted model.
        adapter_names: active adapters to merge, all of them if None. They must be the last in activation order,
            since only what is next to W can move into it; of those that rotate outputs, the first.
        keep_base: keep a copy of the base for a bit-exact `unmerge_oft`, in memory or in a temporary file, or False
            to save that memory and give up unmerging.

    Returns:
        By name of each quantized layer, the error of quantizing it anew: `|W' - Q(W')| / |W'|`, Frobenius norms.

    Raises:
        AdapterError: nothing is active, something is merged already, a LoRA is fused there, the order would change,
            `keep_base` is none of the three, or the disk cannot take the copy.
        TargetError: a target's weight is not in memory, or neither a floating matrix nor of a kind of quantization
            that its library can write.

    After any error, Ctrl-C included, the weights are as before; but not where it struck amid the rotations with
    `keep_base=False`: load the base again then.
    """
    check_keep_base(keep_base)
    bank, staying, merging = _check(model, adapter_names)
    stages = make_stages(merging, bank.adapters)
    weights = _merge_targets(model, stages)
    with torch.no_grad():
        rotations = _by_layer(split_by_site(stages, bank.build_deltas(stages, _device_of(weights))))
        copy = BaseCopy(weights, keep_base) if keep_base else None
        try:
            errors = {name: _merge(weights[name], sites) for name, sites in rotations.items()}
            if copy is not None:
                copy.note(weights)
            bank.set_merged(staying, merging, copy)
        except BaseException:
            if copy is not None:
                put_back(model, copy.read())
            raise
    return {name: error for name, error in errors.items() if error is not None}


def _merge(weight: Weight, sites: Mapping[str, tuple[Tensor, ...]]) -> float | None:
    """Rotate one layer's weight in place, and say what quantizing it anew has lost, where it is quantized."""
    wide = weight.dequantized() if isinstance(weight, QuantizedWeight) else weight
    for site, deltas in sites.items():
        _rotate_(wide, site, deltas)
    if not isinstance(weight, QuantizedWeight):
        return None
    weight.quantize(wide)
    norm = wide.norm()
    return float(wide.sub_(weight.dequantized()).norm() / norm)


def _by_layer(found: Mapping[str, tuple[Tensor, ...]]) -> dict[str, dict[str, tuple[Tensor, ...]]]:
    """Deltas by layer and site, in the order in which a weight takes them."""
    layers: dict[str, dict[str, tuple[Tensor, ...]]] = {}
    # x meets the rotations of its channels before those of patches, so W takes them the other way round.
    for site in sorted(found, key=lambda site: place_of(site) != "patches"):
        layers.setdefault(layer_of(site), {})[site] = found[site]
    return layers


def check_keep_base(keep_base: KeepBase) -> None:
    """Refuse what is no place, before anything is merged.

    Raises:
        AdapterError: it is none of "cpu", "disk" and False.
    """
    if keep_base is not False and keep_base not in ("cpu", "disk"):
        raise AdapterError(
            f"keep_base is {keep_base!r}",
            expected='"cpu" or "disk", where the base\'s weights wait for unmerging, or False to give that up',
            fix='leave keep_base out for "cpu"',
        )


def check_merge(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Raise what `merge_oft` would raise, and change nothing: for callers that merge several models or none."""
    bank, _, merging = _check(model, adapter_names)
    _merge_targets(model, make_stages(merging, bank.adapters))


def unmerge_oft(model: nn.Module) -> None:
    """Put the base's weights back, bit by bit, and let the merged adapters act live again.

    Raises:
        AdapterError: nothing is merged, it was merged with `keep_base=False`, a LoRA has been fused on top of it, also
            one that has been unloaded since, or the copy on disk cannot be read; the weights are as they were then.
        TargetError: weights have been offloaded to disk since; likewise.
    """
    bank, weights = read_base(model)
    put_back(model, weights)
    bank.clear_merged()


def read_base(model: nn.Module) -> tuple[OFTBank, Kept]:
    """All that can fail in unmerging: the kept weights, and the bank whose adapters they are without.

    Raises:
        AdapterError, TargetError: as `unmerge_oft`.
    """
    bank = require_bank(model)
    if not bank.merged:
        raise AdapterError(
            f"no adapter is merged into {bank.component}", expected="a merged adapter", fix="call merge_oft first"
        )
    if bank.base_copy is None:
        raise AdapterError(
            f"the base of {bank.component} was not kept when {', '.join(bank.merged)} was merged",
            expected='a merge with keep_base="cpu" or "disk"',
            fix="load the base model again",
        )
    refuse_fused_lora(unwrap(model))  # its share would go, too, while PEFT goes on counting on it
    kept: Kept = bank.base_copy.read()
    weights = _weights(model, bank.base_copy.layers)
    for name, weight in weights.items():
        if bank.base_copy.has_changed(name, weight):
            raise AdapterError(
                f"layer {name} of {bank.component} is not what merging {', '.join(bank.merged)} made of it: a LoRA was "
                "fused into it since and unloaded, or other weights were loaded, which unmerging would undo",
                expected="the weights that merging left, up to the rounding of a LoRA that was fused and unfused",
                fix="load the base again; a LoRA that is to go first needs unfuse_lora before unload_lora_weights",
            )
    return bank, kept


@torch.no_grad()
def put_back(model: nn.Module, kept: Kept) -> None:
    """Overwrite some layers' weights by what `read_base` returned."""
    for name, weight in _weights(model, kept.layers).items():
        write(weight, name, kept)


@dataclass(frozen=True)
class LiveWeight:
    """A layer's weight and what the active adapters make of it.

    Attributes:
        layer: its name in the component.
        weight: the base's, `(out, in)` or `(out, in, kh, kw)`, as it lies in the model.
        deltas: by site, in the order in which the weight takes them.
    """

    layer: str
    weight: Tensor
    deltas: Mapping[str, tuple[Tensor, ...]]

    @torch.no_grad()
    def rotated(self, weight: Tensor) -> Tensor:
        """What becomes of a weight of this layer, in a tensor of its own, of at least 32 bits."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for site, deltas in self.deltas.items():
            _rotate_(wide, site, deltas)
        return wide


def refuse_quantized(model: nn.Module) -> None:
    """Raise where a live adapter rotates a quantized layer: for callers that write what merging makes.

    Raises:
        TargetError: there is one, or as in `merge_oft`.
    """
    if (bank := bank_of(model)) is not None:
        for name, weight in _merge_targets(model, make_stages(bank.active, bank.adapters)).items():
            _unquantized(name, weight)


def live_weights(model: nn.Module) -> list[LiveWeight]:
    """Every layer that a model's active adapters rotate. The model stays as it is.

    Raises:
        AdapterError: an adapter is merged, or a LoRA is fused into such a layer.
        TargetError: a weight is not a floating matrix in memory (a quantized or offloaded layer).
    """
    bank = bank_of(model)
    if bank is None:
        return []
    bank.refuse_merged(bank.merged)
    refuse_fused_lora(unwrap(model))
    stages = make_stages([item for item in bank.active if item.strength != 0.0], bank.adapters)
    weights = {name: _unquantized(name, weight) for name, weight in _merge_targets(model, stages).items()}
    if not weights:
        return []
    with torch.no_grad():
        found = _by_layer(split_by_site(stages, bank.build_deltas(stages, _device_of(weights))))
    return [LiveWeight(name, weight.detach(), found[name]) for name, weight in weights.items()]


def _check(model: nn.Module, names: Sequence[str] | None) -> tuple[OFTBank, tuple[Active, ...], tuple[Active, ...]]:
    bank = require_bank(model)
    refuse_fused_lora(unwrap(model))
    if bank.images:
        raise AdapterError(
            f"the adapters of {bank.component} are given image by image now, which no weight can be",
            expected="active adapters",
            fix="leave the `with` block first",
        )
    return bank, *_split_active(bank, names)


def _split_active(bank: OFTBank, names: Sequence[str] | None) -> tuple[tuple[Active, ...], tuple[Active, ...]]:
    bank.refuse_merged(bank.merged)
    active = bank.active
    names = [a.name for a in active] if names is None else as_names(names)
    for name in names:
        bank.require(name)
    staying = tuple(a for a in active if a.name not in names)
    merging = tuple(a for a in active if a.name in names)
    if not merging or len(merging) != len(names):
        raise AdapterError(
            f"nothing to merge into {bank.component}: of {', '.join(names) or '(none)'} not all are active",
            expected=f"active adapters; active now: {', '.join(a.name for a in active) or '(none)'}",
            fix="activate them with set_adapters first",
        )
    _refuse_reordering(bank, staying, merging)
    return staying, merging


def _refuse_reordering(bank: OFTBank, staying: tuple[Active, ...], merging: tuple[Active, ...]) -> None:
    """What is merged must be next to W: the last of what rotates inputs, the first of what rotates outputs."""
    for side in ("input", "output"):
        here = [a for a in bank.active if bank.adapters[a.name].config.side == side]
        if side == "output":
            here.reverse()
        stay, merge = [a for a in here if a in staying], [a for a in here if a in merging]
        if here != stay + merge:
            raise AdapterError(
                f"adapter {merge[0].name!r} cannot be merged while {stay[-1].name!r}, which acts "
                f"{'after' if side == 'input' else 'before'} it, stays live",
                expected=f"the last ones of {', '.join(a.name for a in here)}, which are next to the weight",
                fix="merge all active adapters, or change their order with set_adapters",
            )


def _merge_targets(model: nn.Module, stages: Sequence[Stage]) -> dict[str, Weight]:
    """The weights that these stages rotate, by layer name."""
    return _weights(model, {layer_of(site) for stage in stages for site in stage.sites})


def _weights(model: nn.Module, names: Collection[str]) -> dict[str, Weight]:
    """Layers' weights by name, where they lie in memory: what is written to them lasts.

    Raises:
        TargetError: one is not there, or neither a floating matrix nor quantized in a way that is known.
    """
    if is_on_disk(unwrap(model)):
        raise TargetError(
            f"the weights of {type(unwrap(model)).__name__} are offloaded to disk, where nothing can be merged into "
            "them, nor taken out",
            expected="weights in memory",
            fix="merge before offloading, keep the adapter live, or offload to memory",
        )
    layers = {layer_of(site): module for site, module in hooked_layers(model).items()}
    return {name: _weight(name, layer) for name, layer in layers.items() if name in names}


def _weight(name: str, layer: nn.Module) -> Weight:
    quantized = quantized_weight(layer)
    if quantized is not None:
        if quantized.weight.is_meta:
            raise TargetError(
                f"layer {name} ({type(layer).__name__}) is quantized and offloaded, where its weight cannot be written",
                expected="a quantized layer whose weight is in memory",
                fix="merge before offloading, or keep the adapter live",
            )
        return quantized
    weight = stored(layer, "weight")
    if weight is None or not weight.is_floating_point() or weight.dim() not in (2, 4):
        raise TargetError(
            f"layer {name} ({type(layer).__name__}) has no floating weight matrix in memory to merge into, nor one of "
            "a library for quantization that is known",
            expected="a linear layer or a Conv2d whose weight is loaded",
            fix="keep the adapter live, which needs no access to the weights",
        )
    return weight


def _unquantized(name: str, weight: Weight) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        raise TargetError(
            f"layer {name} ({type(weight.layer).__name__}) is quantized, and what is written of it would be no more "
            "exact than that",
            expected="the base as it was before it was quantized",
            fix="load the base without quantization, and the adapter into that",
        )
    return weight


def _device_of(weights: Mapping[str, Weight]) -> torch.device:
    first = next(iter(weights.values()))
    device: torch.device = (first.weight if isinstance(first, QuantizedWeight) else first).device
    return device


def _rotate_(weight: Tensor, site: str, deltas: Sequence[Tensor]) -> None:
    """Rotate a weight `(out, in)` or `(out, in, kh, kw)` by a site's deltas, in the order in which x meets them."""
    place = place_of(site)
    if place == "output":
        for delta in deltas:
            _rotate_columns_(weight.transpose(0, 1), delta.transpose(1, 2))
        return
    # W takes the last one's rotation first.
    for delta in reversed(deltas):
        if place == "patches":
            _rotate_patches_(weight, delta)
        else:
            _rotate_columns_(weight, delta)


def _rotate_columns_(weight: Tensor, delta: Tensor) -> None:
    """`W_i += W_i D_i^T` per block of columns of `(out, in, ...)`, in float32, block by block."""
    block_size = delta.shape[-1]
    for index, block in enumerate(delta):
        columns = weight[:, index * block_size : (index + 1) * block_size].movedim(1, -1)
        columns.copy_(_turned(columns, block))


def _rotate_patches_(weight: Tensor, delta: Tensor) -> None:
    """The same, of columns that are `(in, kh, kw)` flattened, in whichever order they lie in memory."""
    height, width = weight.shape[2:]
    block_size = delta.shape[-1]
    for index, block in enumerate(delta):
        column = torch.arange(index * block_size, (index + 1) * block_size, device=weight.device)
        at = (slice(None), column // (height * width), column // width % height, column % width)
        weight[at] = _turned(weight[at], block).to(weight.dtype)


def _turned(columns: Tensor, block: Tensor) -> Tensor:
    """`W_i + W_i D_i^T` of `(..., b)`, computed in at least 32 bits."""
    wide = columns.to(torch.promote_types(columns.dtype, torch.float32)).reshape(-1, len(block))
    turned = torch.addmm(wide, wide, block.T.to(device=wide.device, dtype=wide.dtype))
    return turned.view(columns.shape)
