"""The node ComfyUI-OFTv2 (29bdbae, 2026-06): what it makes of a layer, and the files that only it reads."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tests.peers.algebra import (
    Metadata,
    Shapes,
    Tensors,
    Written,
    blend,
    block_size_of,
    generator,
    neumann,
    skew,
    times,
)
from tests.peers.onetrainer import write_onetrainer

Variant = Literal["clipped_oft", "cans_oft", "dora_scale", "dora_scale_only", "dora_log_multiplier"]
VARIANTS: tuple[Variant, ...] = ("clipped_oft", "cans_oft", "dora_scale", "dora_scale_only", "dora_log_multiplier")


def write_comfy_node_only(
    layers: Shapes,
    variant: Variant,
    *,
    block_size: int = 32,
    scaled: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Written:
    """What OneTrainer's open pull requests save, beside `oft_R.weight`; to be refused by who cannot compute it.

    `<layer>.oft_R.clipped_oft` (a limit of |Q|_2), `<layer>.oft_R.cans_oft` (a marker: another map from Q to R),
    `<layer>.dora_scale` with or without `<layer>.initial_norm`, `<layer>.dora_log_multiplier`, one number a row.
    """
    written = write_onetrainer(layers, block_size=block_size, scaled=scaled, dtype=dtype, seed=seed)
    draw = generator(seed + 1)
    for layer, shape in layers.items():
        column = (shape[0], *(1 for _ in shape[1:]))
        extra = {
            "clipped_oft": {"oft_R.clipped_oft": torch.tensor(0.25)},
            "cans_oft": {"oft_R.cans_oft": torch.tensor(True)},
            "dora_scale": {
                "dora_scale": 1 + 0.1 * torch.randn(column, generator=draw),
                "initial_norm": torch.ones(column),
            },
            "dora_scale_only": {"dora_scale": 1 + 0.1 * torch.randn(column, generator=draw)},
            "dora_log_multiplier": {"dora_log_multiplier": 0.1 * torch.randn(shape[0], generator=draw)},
        }[variant]
        written.tensors.update({f"{layer}.{name}": tensor.to(dtype) for name, tensor in extra.items()})
    return written


def merged_weight_comfy_node(
    weight: Tensor, tensors: Tensors, metadata: Metadata | None = None, strength: float = 1.0
) -> Tensor:
    """A matrix: `W R^T`; a 4-D weight: `W R`. `R = N5(Q)`, `v / (2 sqrt(b - 1))` if marked; then rows scaled, if asked.

    Rows: times `exp(dora_log_multiplier)`, or times `dora_scale / |row|`, the norm being `initial_norm` where that is
    there, else the row's. `W + s (W' - W)`. The header is not looked at.
    """
    del metadata
    if "oft_R.clipped_oft" in tensors or "oft_R.cans_oft" in tensors:
        raise NotImplementedError("clipped OFT and CANS are to be refused")
    packed = tensors["oft_R.weight"].double()
    if "oft_R.scaled_oft" in tensors:
        packed = packed / (2 * math.sqrt(block_size_of(packed) - 1))
    rotation = neumann(skew(packed))
    rotated = times(weight, rotation if weight.dim() == 4 else rotation.mT)
    column = (weight.shape[0], *(1 for _ in weight.shape[1:]))
    if "dora_scale" in tensors:
        norms = tensors.get("initial_norm", weight.double().flatten(1).norm(dim=1)).double()
        rotated = rotated * (tensors["dora_scale"].double().reshape(column) / norms.reshape(column))
    elif "dora_log_multiplier" in tensors:
        rotated = rotated * torch.exp(tensors["dora_log_multiplier"].double()).reshape(column)
    return blend(weight, rotated, strength)
