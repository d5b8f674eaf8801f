"""The maths that the tools share, written out densely in float64, and drawing of what they store.

Nothing here or beside it uses this package: these files are the other opinion that its reader and writer are held to.
Notation: `v` is a packed vector, `Q` its skew matrix, `C(Q) = (I + Q)(I - Q)^-1`; a rotation is block diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""The tensors of one layer by what follows its key, for example `oft_R.weight` or `alpha`."""
Metadata = Mapping[str, str]
Shapes = Mapping[str, Sequence[int]]
"""A tool's own key of each layer, and the shape of its weight: `(out, in)` or `(out, in, kh, kw)`."""


class Written(NamedTuple):
    """What a tool saves as one safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def save(written: Written, path: Path) -> Path:
    """The file itself; there is no metadata block where the tool writes none."""
    tensors = {key: tensor.contiguous().clone() for key, tensor in written.tensors.items()}
    save_file(tensors, path, metadata=dict(written.metadata) or None)
    return path


def of_layer(tensors: Tensors, key: str) -> dict[str, Tensor]:
    """What belongs to the layer `key`, by what follows `key.`"""
    return {name[len(key) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}


# From a packed vector to a rotation


def block_size_of(packed: Tensor) -> int:
    """`b` from `n = b (b - 1) / 2`, the length of a row."""
    n = packed.shape[-1]
    b = (1 + math.isqrt(1 + 8 * n)) // 2
    if b * (b - 1) // 2 != n:
        raise ValueError(f"{n} is no b (b - 1) / 2")
    return b


def skew(packed: Tensor) -> Tensor:
    """`Q = U - U^T`, the row-major entries above the diagonal of `U` being `v`; no factor 1/2."""
    b = block_size_of(packed)
    q = torch.zeros(packed.shape[0], b, b, dtype=torch.float64)
    at = 0
    for i in range(b):
        q[:, i, i + 1 :] = packed[:, at : at + b - 1 - i].double()
        at += b - 1 - i
    return q - q.mT


def identity(q: Tensor) -> Tensor:
    return torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q)


def cayley(q: Tensor) -> Tensor:
    """`C(Q) = (I + Q)(I - Q)^-1`."""
    return (identity(q) + q) @ torch.linalg.inv(identity(q) - q)


def neumann(q: Tensor, terms: int = 5) -> Tensor:
    """`I + 2Q + ... + 2Q^(n-2) + Q^(n-1)` for n >= 4; n = 3 is the same as n = 4, n = 2 is `I + 2Q`, n = 1 is `I`."""
    if terms == 1:
        return identity(q).clone()
    if terms == 2:
        return identity(q) + 2 * q
    last = max(terms, 4) - 1
    middle = sum((2 * torch.linalg.matrix_power(q, k) for k in range(1, last)), identity(q))
    return middle + torch.linalg.matrix_power(q, last)


def old_neumann(q: Tensor, terms: int = 5) -> Tensor:
    """`I + 2Q + ... + 2Q^(n-1)`: the series when the last term still had the weight 2."""
    return sum((2 * torch.linalg.matrix_power(q, k) for k in range(1, terms)), identity(q).clone())


def project(packed: Tensor, eps: float) -> Tensor:
    """COFT: each stored row is shrunk until `|Q|_F = sqrt(2) |v| <= eps / sqrt(rows)`; `packed` itself stays."""
    limit = eps / math.sqrt(packed.shape[0])
    frobenius = math.sqrt(2) * packed.double().norm(dim=1, keepdim=True)
    return packed.double() * torch.where(frobenius <= limit, 1.0, limit / frobenius)


# From a rotation to a weight


def times(weight: Tensor, blocks: Tensor) -> Tensor:
    """`W D`: `W` flattened to `(out, in * kh * kw)` in torch's order, `D` of the blocks; one block serves for all."""
    flat = weight.double().flatten(1)
    b = blocks.shape[-1]
    count = flat.shape[1] // b
    if blocks.shape[0] not in (1, count) or count * b != flat.shape[1]:
        raise ValueError(f"{blocks.shape[0]} blocks of {b} do not cover {flat.shape[1]}")
    cut = flat.reshape(flat.shape[0], count, b)
    return torch.einsum("ork,rkc->orc", cut, blocks.double().expand(count, b, b)).reshape(weight.shape)


def transposed_times(blocks: Tensor, weight: Tensor) -> Tensor:
    """`D^T W`: block k of `(num, size, size)` takes the k-th `size` rows."""
    num, size = blocks.shape[:2]
    cut = weight.double().flatten(1).reshape(num, size, -1)
    return torch.einsum("knm,knp->kmp", blocks.double(), cut).reshape(weight.shape)


def blend(weight: Tensor, rotated: Tensor, strength: float) -> Tensor:
    """`W + s (W' - W)`, the linear strength of nearly every tool."""
    return weight.double() + strength * (rotated - weight.double())


# Drawing


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def input_size(shape: Sequence[int]) -> int:
    """`in`, or `in * kh * kw`."""
    return math.prod(shape[1:])


def adjusted_block_size(size: int, wanted: int) -> int:
    """The nearest divisor of `size`, the smaller one of two equally near: PEFT, OneTrainer and sd-scripts alike."""
    if wanted >= size:
        return size
    lower = next(b for b in range(wanted, 0, -1) if size % b == 0)
    higher = next(b for b in range(wanted, size + 1) if size % b == 0)
    return lower if wanted - lower <= higher - wanted else higher


def draw_packed(
    draw: torch.Generator, shape: Sequence[int], block_size: int, share: bool = False, norm: float = 0.5
) -> Tensor:
    """Random `v (r or 1, b (b - 1) / 2)` in float64 for a weight of that shape; |Q|_2 between a quarter and `norm`."""
    size = input_size(shape)
    b = adjusted_block_size(size, block_size)
    packed = torch.randn(1 if share else size // b, b * (b - 1) // 2, generator=draw, dtype=torch.float64)
    wanted = norm * (0.25 + 0.75 * torch.rand(len(packed), 1, generator=draw, dtype=torch.float64))
    return packed * (wanted / torch.linalg.matrix_norm(skew(packed), 2).clamp_min(1e-9).unsqueeze(1))


def draw_square(draw: torch.Generator, num: int, size: int, norm: float = 0.5) -> Tensor:
    """Random full blocks `B (num, size, size)`, |B - B^T|_2 up to `norm`; the symmetric half is to be ignored."""
    blocks = torch.randn(num, size, size, generator=draw, dtype=torch.float64)
    wanted = norm * (0.25 + 0.75 * torch.rand(num, 1, 1, generator=draw, dtype=torch.float64))
    return blocks * (wanted / torch.linalg.matrix_norm(blocks - blocks.mT, 2).clamp_min(1e-9).reshape(-1, 1, 1))
