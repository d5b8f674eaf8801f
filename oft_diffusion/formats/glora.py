"""Rotations as GLoRA, `W + s W A`: the one carrier that fits any base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oft_diffusion.errors import TargetError
from oft_diffusion.formats.carrier import NAMINGS, Carrier, Change, Exported, silent, widest
from oft_diffusion.formats.components import Components
from oft_diffusion.formats.names import Meaning, split_names
from oft_diffusion.merge import LiveWeight
from oft_diffusion.plan import place_of


def export_glora(
    pipe: Any,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    components: Collection[str] | None = None,
    on_layer: Callable[[str], object] = silent,
) -> Exported:
    """Write `R^T - I` of every layer as a GLoRA, which ComfyUI and Forge apply to any base: exact, but dense.

    A file has two matrices `(in, in)` per layer. A fused weight is written as one where all its layers are rotated
    alike (`OFTConfig.share_qkv`), else layer by layer, which ComfyUI understands of SD 3, Flux and Chroma.

    Args:
        pipe: a diffusers pipeline with live adapters.
        path: a `.safetensors` file.
        dtype: of the file.
        components: as for `export_diff`.
        on_layer: likewise.

    Raises:
        AdapterError, TargetError, ConfigError, AdapterFileError: as `export_diff`; or an adapter rotates outputs, or a
            kernel of more than one tap, or layers of a fused weight differently where ComfyUI cannot tell them apart.
    """
    file = Carrier(pipe, path, dtype, None, NAMINGS, components, on_layer)
    for part, layers in file.live.items():
        for layer in layers.values():
            _check_glora(part, layer)
        for key, meaning in _glora_names(file.about, part, layers, file.naming).items():
            file.claim(key, part)
            changes = {name: Change.of(layers[name]) for name in meaning.layers}
            turn = _right_factor(layers[meaning.layers[0]])
            a1 = file.put(f"{key}.a1.weight", turn).to(turn)
            file.put(f"{key}.a2.weight", torch.eye(len(turn)))
            # The second term, b1 b2, may not be absent. An alpha may: without it nothing is scaled.
            file.put(f"{key}.b1.weight", torch.zeros(sum(len(change.weight) for change in changes.values()), 1))
            file.put(f"{key}.b2.weight", torch.zeros(1, len(turn)))
            file.judge(part, changes, {name: (w.flatten(1) @ a1).view(w.shape) for name, (w, _) in changes.items()})
    return file.save("glora")


def _check_glora(part: str, layer: LiveWeight) -> None:
    if any(place_of(site) != "input" for site in layer.deltas) or layer.weight[0].numel() != layer.weight.shape[1]:
        raise TargetError(
            f"{part}.{layer.layer} {tuple(layer.weight.shape)} is no layer that a GLoRA can rotate",
            expected="rotated inputs of linear layers and 1x1 convolutions",
            fix="write a .diff file, or a LoRA of full rank",
        )


def _right_factor(layer: LiveWeight) -> Tensor:
    """`R^T - I` `(in, in)`, by rotating an identity."""
    weight = layer.weight
    identity = torch.eye(weight.shape[1], dtype=widest(weight), device=weight.device)
    return layer.rotated(identity) - identity


def _glora_names(about: Components, part: str, layers: Mapping[str, LiveWeight], naming: str) -> dict[str, Meaning]:
    """Native names, but split ones for the layers of a fused weight that are not all rotated alike."""

    def alike(names: Collection[str]) -> bool:
        first, *others = (layers[name] for name in names)
        return all(_alike(first, other) for other in others)

    found = split_names(about, part, layers, alike, naming)
    for meaning in found.values():
        if meaning.missing or not alike(meaning.layers):
            raise TargetError(
                f"{', '.join(meaning.layers)} of {part} are one weight in ComfyUI, and not all rotated alike",
                expected="one rotation for all of them, as share_qkv gives",
                fix="write a .diff file, or a LoRA of full rank",
            )
    return found


def _alike(one: LiveWeight, other: LiveWeight) -> bool:
    [ours], [theirs] = one.deltas.values(), other.deltas.values()  # each has one site, its input
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
