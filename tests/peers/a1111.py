"""AUTOMATIC1111's web UI (1.10, the last form of its network modules): what it makes of the tensors of one layer."""

from __future__ import annotations

from torch import Tensor

from tests.peers.algebra import Tensors, blend, transposed_times
from tests.peers.comfy_core import lora_matrices
from tests.peers.kohya_oft import kohya_blocks


def a1111_diff(weight: Tensor, tensors: Tensors, strength: float = 1.0) -> Tensor:
    """`W + s diff`, reshaped to the weight's shape; an `alpha` changes nothing, there being no rank."""
    return weight.double() + strength * tensors["diff"].double().reshape(weight.shape)


def a1111_lora(weight: Tensor, tensors: Tensors, strength: float = 1.0) -> Tensor:
    """`W + s (alpha / rank) up down`, kernels flattened; the factor is 1 without `alpha`."""
    up, down = lora_matrices(tensors)
    scale = float(tensors["alpha"]) / down.shape[0] if "alpha" in tensors else 1.0
    return weight.double() + strength * scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def a1111_oft(weight: Tensor, tensors: Tensors, strength: float = 1.0) -> Tensor:
    """`R^T W`, rows times `rescale`; linear in the strength. `R = C(B - B^T)`, clamped at `alpha * out`.

    No clamp at alpha 0 or without it. Or `R` is `oft_diag` itself.
    """
    if "oft_diag" in tensors:
        blocks = tensors["oft_diag"].double()
    else:
        alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
        blocks = kohya_blocks(tensors["oft_blocks"], alpha or float("inf"), weight.shape[0])
    rotated = transposed_times(blocks, weight)
    if "rescale" in tensors:
        rotated = rotated * tensors["rescale"].double().reshape(-1, *(1 for _ in weight.shape[1:]))
    return blend(weight, rotated, strength)
