"""Dense references that build what the library never builds, and the strategies that the property tests share."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from oft_diffusion.bank import OFTBank
from oft_diffusion.rotation import packed_size, unpack

BLOCK_SIZES = st.sampled_from([2, 3, 4, 7, 8, 16, 32])
SEEDS = st.integers(0, 2**20)


def random_packed(
    blocks: int, block_size: int, seed: int, norm: float = 0.5, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Packed generators `(blocks, b(b-1)/2)`; each block's Q has that spectral norm."""
    draw = torch.Generator().manual_seed(seed)
    packed = torch.randn(blocks, packed_size(block_size), generator=draw, dtype=torch.float64)
    norms = torch.linalg.matrix_norm(unpack(packed), 2).clamp_min(1e-9)
    return (packed * (norm / norms).unsqueeze(1)).to(dtype)


def dense_cayley(packed: Tensor) -> Tensor:
    """`R (r, b, b)` by the definition, `(I + Q)(I - Q)^-1`, in float64."""
    q = unpack(packed.double())
    identity = torch.eye(q.shape[-1], dtype=q.dtype)
    return (identity + q) @ torch.linalg.inv(identity - q)


def dense_series(packed: Tensor, order: int) -> Tensor:
    """`R_m = (I + Q)(I + Q + ... + Q^(m-1))`, in float64."""
    q = unpack(packed.double())
    identity = torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q)
    power, total = identity, torch.zeros_like(q)
    for _ in range(order):
        total = total + power
        power = power @ q
    return (identity + q) @ total


def dense_rotation(bank: OFTBank, layer: str, name: str = "default") -> Tensor:
    """A layer's whole rotation `(in, in)` at strength 1, float64."""
    return torch.block_diag(*dense_cayley(bank.effective_generators(name)[layer]))


def two_layers(seed: int = 0, width: int = 24, outside: int = 10) -> nn.Sequential:
    """Linear, ReLU, linear: small enough for dense references."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outside))


def unet_inputs(model: Any, seed: int = 0, dtype: torch.dtype = torch.float32, tokens: int = 5) -> dict[str, Any]:
    """Arguments of a UNet's forward: two samples, another timestep each."""
    draw = torch.Generator().manual_seed(seed)
    size, width = model.config.sample_size, model.config.cross_attention_dim
    return {
        "sample": torch.randn(2, model.config.in_channels, size, size, generator=draw).to(dtype),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, tokens, width, generator=draw).to(dtype),
    }


def relative(a: Tensor, b: Tensor) -> float:
    """`‖a - b‖ / ‖b‖`."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())
