"""kohya-ss/sd-scripts `networks.oft` and `networks.oft_flux` (48d368fa, 2026-02): the output-side OFT."""

from __future__ import annotations

from collections.abc import Sequence

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


def write_kohya_oft(
    layers: Shapes,
    *,
    num_blocks: int = 4,
    alpha: float = 1e-3,
    base: str = "sdxl_base_v1-0",
    dtype: torch.dtype = torch.float32,
    norm: float = 0.5,
    seed: int = 0,
) -> Written:
    """`oft_unet_<name>.oft_blocks (num, out/num, out/num)`, full matrices, and `.alpha`, the constraint (not a scale).

    The default alpha binds. `ss_network_dim` is the number of blocks.
    """
    draw = generator(seed)
    tensors: dict[str, Tensor] = {}
    for layer, shape in layers.items():
        if shape[0] % num_blocks:
            raise ValueError(f"{num_blocks} blocks do not cover the {shape[0]} rows of {layer}")
        blocks = draw_square(draw, num_blocks, shape[0] // num_blocks, norm)
        tensors |= {f"{layer}.oft_blocks": blocks.to(dtype), f"{layer}.alpha": torch.tensor(alpha).to(dtype)}
    return Written(tensors, kohya_metadata(tensors, "networks.oft", num_blocks, alpha, {}, base))


def flux_splits(layer: str, shape: Sequence[int]) -> list[int]:
    """The rows of q, k, v (and MLP) of a fused Flux layer: 3 x 3072, or 3 x 3072 + 12288; the whole of any other."""
    if "double" in layer and "qkv" in layer:
        return [shape[0] // 3] * 3
    if "single" in layer and "linear1" in layer:
        return [shape[1]] * 3 + [shape[0] - 3 * shape[1]]
    return [shape[0]]


def write_kohya_oft_flux(
    layers: Shapes,
    *,
    num_blocks: int = 4,
    alpha: float = 1e-3,
    dtype: torch.dtype = torch.float32,
    norm: float = 0.5,
    seed: int = 0,
) -> Written:
    """`oft_unet_<name>.oft_blocks.0`, `.1`, ... of a fused layer's splits, `.oft_blocks.0` of any other; `.alpha`."""
    draw = generator(seed)
    tensors: dict[str, Tensor] = {}
    for layer, shape in layers.items():
        for index, rows in enumerate(flux_splits(layer, shape)):
            if rows % num_blocks:
                raise ValueError(f"{num_blocks} blocks do not cover the {rows} rows of {layer}")
            blocks = draw_square(draw, num_blocks, rows // num_blocks, norm)
            tensors[f"{layer}.oft_blocks.{index}"] = blocks.to(dtype)
        tensors[f"{layer}.alpha"] = torch.tensor(alpha).to(dtype)
    return Written(tensors, kohya_metadata(tensors, "networks.oft_flux", num_blocks, alpha, {}, "flux1"))


def kohya_blocks(blocks: Tensor, alpha: float, out: int) -> Tensor:
    """`R = C(Q)`, `Q = B - B^T` (no 1/2) shrunk until `|Q|_F` of ALL the blocks together is `alpha * out`."""
    q = blocks.double() - blocks.double().mT
    norm = float(q.norm())
    return cayley(q * ((min(norm, alpha * out) + 1e-8) / (norm + 1e-8)))


def merged_weight_kohya_oft(
    weight: Tensor, tensors: Tensors, metadata: Metadata | None = None, strength: float = 1.0
) -> Tensor:
    """`R^T W` on blocks of output rows, a convolution's too; linear in the strength. The bias stays."""
    del metadata
    blocks = kohya_blocks(tensors["oft_blocks"], float(tensors["alpha"]), weight.shape[0])
    return blend(weight, transposed_times(blocks, weight), strength)


def merged_weight_kohya_oft_flux(
    weight: Tensor, tensors: Tensors, metadata: Metadata | None = None, strength: float = 1.0
) -> Tensor:
    """Each split of the rows as a layer of its own, constraint `alpha * rows of the split`; as its forward has it.

    (Its own merge crashes.)
    """
    del metadata
    names = sorted((name for name in tensors if name.startswith("oft_blocks.")), key=lambda name: int(name[11:]))
    rows = [tensors[name].shape[0] * tensors[name].shape[1] for name in names]
    parts = [
        merged_weight_kohya_oft(part, {"oft_blocks": tensors[name], "alpha": tensors["alpha"]}, None, strength)
        for name, part in zip(names, weight.split(rows), strict=True)
    ]
    return torch.cat(parts)
