"""LyCORIS 4.1.3: files of diag-oft in its two spellings (and SimpleTuner's), of BOFT, and the old `.oft_diag`."""

from __future__ import annotations

import json
from typing import Literal

import torch
from torch import Tensor

from tests.peers.algebra import (
    Metadata,
    Shapes,
    Tensors,
    Written,
    blend,
    cayley,
    draw_square,
    generator,
    transposed_times,
)
from tests.peers.sd_scripts import kohya_metadata


def factors(size: int, wanted: int) -> tuple[int, int]:
    """(block size, number of blocks) of that many rows: `wanted` and its cofactor if it divides, the smaller first.

    Else the largest divisor that is below it and no larger than its own cofactor.
    """
    first = wanted if size % wanted == 0 else max(d for d in range(1, wanted) if size % d == 0 and d * d <= size)
    return min(first, size // first), max(first, size // first)


def write_lycoris(
    layers: Shapes,
    *,
    lora_dim: int = 8,
    constraint: float = 0.0,
    rescaled: bool = False,
    wrapper: Literal["kohya", "plain", "simpletuner"] = "kohya",
    dtype: torch.dtype | None = None,
    norm: float = 0.5,
    seed: int = 0,
) -> Written:
    """`<layer>.oft_blocks (num, size, size)`, `.alpha` (the constraint), and `.rescale (out, 1, ...)` if rescaled.

    The layers' keys are `lora_unet_...`, `lora_te_...` (kohya) or `lycoris_...` (the others). Without a constraint
    alpha is 0.0; give an int, and it is an int64, as of modules that were made without a wrapper. `dtype=None` saves
    all as it is, any other casts every tensor.
    """
    draw = generator(seed)
    tensors: dict[str, Tensor] = {}
    for layer, shape in layers.items():
        size, num = factors(shape[0], lora_dim)
        tensors[f"{layer}.oft_blocks"] = draw_square(draw, num, size, norm).float()
        tensors[f"{layer}.alpha"] = torch.tensor(constraint)
        if rescaled:
            tensors[f"{layer}.rescale"] = 1 + 0.1 * torch.randn(shape[0], *(1 for _ in shape[1:]), generator=draw)
    if dtype is not None:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    return Written(tensors, _header(tensors, wrapper, "diag-oft", lora_dim, constraint, rescaled))


def _header(
    tensors: Tensors, wrapper: str, algorithm: str, lora_dim: int, constraint: float, rescaled: bool
) -> dict[str, str]:
    arguments = {"algo": algorithm}
    if wrapper == "simpletuner":
        config = arguments | {"linear_dim": lora_dim, "constraint": constraint, "rescaled": rescaled}
        return {"lycoris_config": json.dumps(config)}
    if wrapper == "plain":
        return {}
    arguments |= {"constraint": str(constraint)} if constraint else {}
    arguments |= {"rescaled": "True"} if rescaled else {}
    return kohya_metadata(tensors, "lycoris.kohya", lora_dim, 1.0, arguments, "sd_v1")


def merged_weight_lycoris(
    weight: Tensor, tensors: Tensors, metadata: Metadata | None = None, strength: float = 1.0
) -> Tensor:
    """`rescale * (W + s (R^T W - W))` on blocks of output rows: the rotation is blended, the row scales are not.

    `R = C(Q)`, `Q = B - B^T`; with a constraint `c = alpha * out > 0`, `Q c / |Q|_F` where `|Q|_F` of all the blocks
    together exceeds it. The bias stays. So in its forward and merge; its difference weight of a rescaled layer exists
    at strength 1 only, where it raises elsewhere.
    """
    del metadata
    blocks = lycoris_blocks(tensors["oft_blocks"], float(tensors.get("alpha", 0.0)) * weight.shape[0])
    blended = blend(weight, transposed_times(blocks, weight), strength)
    if "rescale" in tensors:
        blended = blended * tensors["rescale"].double().reshape(-1, *(1 for _ in weight.shape[1:]))
    return blended


def lycoris_blocks(blocks: Tensor, limit: float) -> Tensor:
    """`C(Q)`, `Q = B - B^T`, shrunk to the joint Frobenius norm `limit` unless that is 0."""
    q = blocks.double() - blocks.double().mT
    norm = float(q.norm()) + 1e-8
    return cayley(q * limit / norm if 0 < limit < norm else q)


# The old form


def write_lycoris_oft_diag(
    layers: Shapes,
    *,
    lora_dim: int = 8,
    offset: bool = False,
    rescaled: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Written:
    """LyCORIS 2.0.0 (2023-11..): `<layer>.oft_diag (num, size, size)` is the rotation `R` itself.

    `rescaled`: with `.rescale` beside it, as A1111 takes it.
    `offset`: the first builds (2.0.0.dev2, 2023-10) stored `R - I` under that name, and not of a rotation.
    """
    draw = generator(seed)
    tensors: dict[str, Tensor] = {}
    for layer, shape in layers.items():
        size, num = factors(shape[0], lora_dim)
        blocks = draw_square(draw, num, size)
        stored = 0.1 * blocks if offset else cayley(blocks - blocks.mT)
        tensors[f"{layer}.oft_diag"] = stored.to(dtype)
        if rescaled:
            factors_of_rows = 1 + 0.1 * torch.randn(shape[0], *(1 for _ in shape[1:]), generator=draw)
            tensors[f"{layer}.rescale"] = factors_of_rows.to(dtype)
    return Written(tensors, kohya_metadata(tensors, "lycoris.kohya", lora_dim, 1.0, {"algo": "diag-oft"}, "sd_v1"))


def merged_weight_oft_diag(
    weight: Tensor, tensors: Tensors, metadata: Metadata | None = None, strength: float = 1.0
) -> Tensor:
    """`T^T W`, `T` being the stored tensor; linear in the strength."""
    del metadata
    return blend(weight, transposed_times(tensors["oft_diag"], weight), strength)


# What must be refused


def write_lycoris_boft(layers: Shapes, *, lora_dim: int = 4, constraint: float = 0.0, seed: int = 0) -> Written:
    """BOFT: `<layer>.oft_blocks (m, num, size, size)`, a product of m block rotations with shuffles between."""
    draw = generator(seed)
    tensors: dict[str, Tensor] = {}
    for layer, shape in layers.items():
        size, num = factors(shape[0], lora_dim)
        stages = num.bit_length()
        blocks = draw_square(draw, stages * num, size).reshape(stages, num, size, size)
        tensors |= {f"{layer}.oft_blocks": blocks.float(), f"{layer}.alpha": torch.tensor(constraint)}
    return Written(tensors, _header(tensors, "kohya", "boft", lora_dim, constraint, False))
