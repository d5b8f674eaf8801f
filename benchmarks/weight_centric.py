"""OFT as it was first published (arXiv 2306.07280): the rotated weight is built in every forward. A reference.

`R = (I + Q)(I - Q)^-1` by Cayley, `W R^T`, then the linear. What `oft_diffusion` computes without ever building
`W R^T`, so that outputs and gradients are the same up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class RotatedWeight(nn.Module):
    """`W -> W R^T`, for a weight `(out, in)`, R of in / b blocks.

    Attributes:
        generator: `(r, b(b-1)/2)`, zeros at first, packed as PEFT's and ours.
    """

    def __init__(self, weight: Tensor, block_size: int, *, dense: bool) -> None:
        super().__init__()
        self.block_size, self.dense = block_size, dense
        blocks, entries = weight.shape[1] // block_size, block_size * (block_size - 1) // 2
        self.generator = nn.Parameter(torch.zeros(blocks, entries, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        rotation = self.rotation().to(weight.dtype)
        if self.dense:  # as the authors' code does: one (in, in) matrix, nearly all of it zeros
            return weight @ torch.block_diag(*rotation).T
        columns = weight.unflatten(1, rotation.shape[:2])
        return torch.einsum("ork,rck->orc", columns, rotation).flatten(1)

    def rotation(self) -> Tensor:
        """R, `(r, b, b)`, float32."""
        b = self.block_size
        rows, columns = torch.triu_indices(b, b, 1, device=self.generator.device)
        q = self.generator.new_zeros(len(self.generator), b, b)
        q = q.index_put((torch.arange(len(q), device=q.device)[:, None], rows, columns), self.generator)
        q = q - q.mT
        identity = torch.eye(b, device=q.device)
        return (identity + q) @ torch.linalg.inv_ex(identity - q)[0]


def rotate_weight(layer: nn.Module, block_size: int, *, dense: bool) -> nn.Parameter:
    """Give a linear layer the rotated weight, and return its generator."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    rotated = RotatedWeight(weight, block_size, dense=dense)
    parametrize.register_parametrization(layer, "weight", rotated, unsafe=True)  # shapes and dtypes stay, unchecked
    return rotated.generator
