"""Stock ComfyUI (a125cd84, 2025-10): what it makes of the tensors of one layer, its faults included.

Every function returns the weight that would be used, float64. It knows no `oft_R.weight`: nothing is applied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.peers.algebra import Tensors


def comfy_weight(weight: Tensor, tensors: Tensors, strength: float = 1.0) -> Tensor:
    """Of everything under one key the last in this order counts: LoRA, GLoRA, `diff`, `set_weight`."""
    if "set_weight" in tensors:
        return comfy_set_weight(weight, tensors, strength)
    if "diff" in tensors:
        return comfy_diff(weight, tensors, strength)
    if "a1.weight" in tensors:
        return comfy_glora(weight, tensors, strength)
    if "lora_up.weight" in tensors or "lora_B.weight" in tensors:
        return comfy_lora(weight, tensors, strength)
    return weight.double()


def comfy_diff(weight: Tensor, tensors: Tensors, strength: float = 1.0) -> Tensor:
    """`W + s diff`; a diff of another shape is left out with a warning."""
    if tensors["diff"].shape != weight.shape:
        return weight.double()
    return weight.double() + strength * tensors["diff"].double()


def comfy_set_weight(weight: Tensor, tensors: Tensors, strength: float = 1.0) -> Tensor:
    """`set_weight`, whatever the strength."""
    del strength
    return tensors["set_weight"].double().expand(weight.shape).clone()


def comfy_lora(weight: Tensor, tensors: Tensors, strength: float = 1.0) -> Tensor:
    """`W + s (alpha / rank) up down`, kernels flattened; the factor is 1 without `alpha`. No `lora_mid`."""
    up, down = lora_matrices(tensors)
    scale = float(tensors["alpha"]) / down.shape[0] if "alpha" in tensors else 1.0
    return weight.double() + strength * scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def lora_matrices(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """`lora_up` and `lora_down`, or `lora_B` and `lora_A`."""
    if "lora_mid.weight" in tensors:
        raise NotImplementedError("no reference for three factors")
    names = ("lora_up.weight", "lora_down.weight")
    if names[0] not in tensors:
        names = ("lora_B.weight", "lora_A.weight")
    return tensors[names[0]].double(), tensors[names[1]].double()


def comfy_glora(weight: Tensor, tensors: Tensors, strength: float = 1.0) -> Tensor:
    """`W + s (alpha / rank)(W a1 a2 + b1 b2)`; the factor is 1 without `alpha`.

    Where the sizes suit LyCORIS' older layout (b1's rows = b2's columns = a1's rows = a2's columns) and not the newer
    one, it is `W a2 a1 + b2 b1`: so with a square weight. Where they suit neither, an `alpha` ends in an unbound rank.
    """
    a1, a2, b1, b2 = (tensors[f"{name}.weight"].double().flatten(1) for name in ("a1", "a2", "b1", "b2"))
    flat = weight.double().flatten(1)
    rank: int | None = None
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    if old:
        rank = a1.shape[0]
    square = weight.shape[0] == weight.shape[1] == a2.shape[0]
    if b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0] and not (old and square):
        old, rank = False, a2.shape[0]
    scale = 1.0
    if "alpha" in tensors:
        if rank is None:
            raise ValueError("ComfyUI stops here: no rank")
        scale = float(tensors["alpha"]) / rank
    if old:
        delta = b2 @ b1 + flat @ a2 @ a1
    else:
        channels = weight.double() if weight.dim() > 2 else flat
        delta = torch.einsum("oi...,ij,jk->ok...", channels, a1, a2) + (b1 @ b2).reshape(weight.shape)
    return weight.double() + strength * scale * delta.reshape(weight.shape)
