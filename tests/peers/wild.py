"""Two forks' input-side OFT, seen in the wild: a musubi-tuner fork for LTX-2 (2026), and a trainer for WAN (2026)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.peers.algebra import (
    Metadata,
    Shapes,
    Tensors,
    Written,
    block_size_of,
    cayley,
    draw_packed,
    generator,
    neumann,
    project,
    skew,
    times,
)
from tests.peers.onetrainer import divisor


def write_musubi(
    layers: Shapes,
    *,
    block_size: int = 32,
    block_share: bool = False,
    scaled: bool = True,
    coft: bool = False,
    coft_eps: float = 6e-5,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
    norm: float = 0.5,
    seed: int = 0,
) -> Written:
    """`oft_R.weight`, the marker `oft_R.scaled_oft` (scaled is its default), `alpha` = the BLOCK SIZE, five settings.

    `dora` adds `dora_scale` (absolute) and `initial_norm`: to be refused.
    """
    draw = generator(seed)
    tensors: dict[str, Tensor] = {}
    for layer, shape in layers.items():
        packed = draw_packed(draw, shape, block_size, block_share, norm)
        b = block_size_of(packed)
        own = {
            "oft_R.weight": packed * (divisor(b) if scaled else 1.0),
            "alpha": torch.tensor(float(b)),
            "oft_block_size_metadata": torch.tensor(float(b)),
            "oft_block_share_metadata": torch.tensor(float(block_share)),
            "oft_coft_metadata": torch.tensor(float(coft)),
            "coft_eps_metadata": torch.tensor(coft_eps),
            "scaled_oft_metadata": torch.tensor(float(scaled)),
        }
        if scaled:
            own["oft_R.scaled_oft"] = torch.tensor(1.0)
        if dora:
            column = (shape[0], *(1 for _ in shape[1:]))
            own["dora_scale"] = 1 + 0.1 * torch.randn(column, generator=draw)
            own["initial_norm"] = torch.ones(column)
        tensors |= {f"{layer}.{name}": tensor.to(dtype) for name, tensor in own.items()}
    return Written(tensors, {"ss_network_module": "networks.oft", "ss_network_dim": str(block_size)})


def merged_weight_musubi(
    weight: Tensor, tensors: Tensors, metadata: Metadata | None = None, strength: float = 1.0
) -> Tensor:
    """A linear layer: `W R^T`; a convolution: `W R`. `R = N5(s v / (2 sqrt(b - 1)))`: the strength turns, not blends.

    COFT projects the stored `v`, before scaling. Both are told by the settings beside; `alpha` scales nothing.
    """
    del metadata
    rotation = musubi_rotation(tensors, strength)
    return times(weight, rotation.mT if weight.dim() == 2 else rotation)


def musubi_rotation(tensors: Tensors, strength: float = 1.0) -> Tensor:
    """The blocks of `R`."""
    packed = tensors["oft_R.weight"].double()
    if float(tensors.get("oft_coft_metadata", 0.0)):
        packed = project(packed, float(tensors["coft_eps_metadata"]))
    if float(tensors.get("scaled_oft_metadata", float("oft_R.scaled_oft" in tensors))):
        packed = packed / (2 * math.sqrt(block_size_of(packed) - 1))
    return neumann(skew(strength * packed))


def write_wan(
    layers: Shapes,
    *,
    block_size: int = 32,
    block_share: bool = False,
    coft: bool = False,
    eps: float = 1e-4,
    exact: bool = False,
    terms: int = 5,
    renamed: bool = False,
    dtype: torch.dtype = torch.float32,
    norm: float = 0.5,
    seed: int = 0,
) -> Written:
    """`oftv2_unet_<name>.oft_rotation.weight` and seven buffers; integers stay int64 when the rest is cast.

    `renamed` writes `oft_R.weight`, which it also reads.
    """
    draw = generator(seed)
    tensors: dict[str, Tensor] = {}
    for layer, shape in layers.items():
        packed = draw_packed(draw, shape, block_size, block_share, norm)
        b = block_size_of(packed)
        tensors[f"{layer}.{'oft_R' if renamed else 'oft_rotation'}.weight"] = packed.to(dtype)
        tensors[f"{layer}.oft_coft_eps_buffer"] = torch.tensor(eps).to(dtype)
        whole = {
            "block_size": b,
            "rank": math.prod(shape[1:]) // b,
            "coft": int(coft),
            "block_share": int(block_share),
            "use_cayley_neumann": int(not exact),
            "num_cayley_neumann_terms": terms,
        }
        tensors |= {f"{layer}.oft_{name}_buffer": torch.tensor(value) for name, value in whole.items()}
    return Written(tensors, {"ss_network_module": "networks.oftv2_wan", "ss_network_dim": str(block_size)})


def merged_weight_wan(
    weight: Tensor, tensors: Tensors, metadata: Metadata | None = None, strength: float = 1.0
) -> Tensor:
    """What was trained: `W R^T` in linear layers, `W R` in convolutions; its forward takes no notice of a strength.

    `R = N_n(Q)` as in PEFT, or exactly `C(-Q)`; COFT first; all told by the buffers. Its own merge
    makes `W R` of linear layers, too, the wrong way round.
    """
    del metadata
    if strength != 1.0:
        raise ValueError("its forward has no strength")
    rotation = _wan_rotation(tensors)
    return times(weight, rotation.mT if weight.dim() == 2 else rotation)


def _wan_rotation(tensors: Tensors) -> Tensor:
    name = "oft_rotation.weight" if "oft_rotation.weight" in tensors else "oft_R.weight"
    packed = tensors[name].double()
    if int(tensors["oft_coft_buffer"]):
        packed = project(packed, float(tensors["oft_coft_eps_buffer"]))
    if not int(tensors["oft_use_cayley_neumann_buffer"]):
        return cayley(-skew(packed))
    return neumann(skew(packed), int(tensors["oft_num_cayley_neumann_terms_buffer"]))
