"""`block_rotate(x, D) = x + x blockdiag(D)`: the input-centric forward of OFTv2 (arXiv 2506.19847, section 3.2).

Registered with `torch.library`, so that autograd saves x once (not a rotated copy) and the compiler sees one op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def block_rotate(x: Tensor, delta: Tensor) -> Tensor:
    """Rotate the last axis of x block by block.

    Args:
        x: `(..., r * b)`, any floating dtype, any strides.
        delta: `(r, b, b)`, x's dtype and device: `D = R - I`.

    Returns:
        `x + x blockdiag(D)`, x's shape and dtype, contiguous.

    Raises:
        RuntimeError: the shapes, dtypes or devices do not fit.
    """
    return torch.ops.oft_diffusion.block_rotate(x, delta)


@torch.library.custom_op("oft_diffusion::block_rotate", mutates_args=())
def _block_rotate(x: Tensor, delta: Tensor) -> Tensor:
    _check(x, delta)
    blocks, block_size, _ = delta.shape
    rows = x.reshape(-1, blocks, block_size)
    # In (blocks, rows, b) order one batched product does all blocks; addition in x's order, so no second permute.
    product = torch.bmm(rows.transpose(0, 1), delta)
    out: Tensor = torch.add(rows, product.transpose(0, 1)).reshape(x.shape)
    return out.contiguous()


@torch.library.custom_op("oft_diffusion::block_rotate_delta_grad", mutates_args=())
def _block_rotate_delta_grad(x: Tensor, grad: Tensor, block_size: int) -> Tensor:
    """`dD (r, b, b)`: per block `x_i^T g_i`, summed over rows."""
    blocks = x.shape[-1] // block_size
    rows = x.reshape(-1, blocks, block_size).transpose(0, 1)
    grads = grad.reshape(-1, blocks, block_size).transpose(0, 1)
    return torch.bmm(rows.transpose(1, 2), grads)


@_block_rotate.register_fake
def _(x: Tensor, delta: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_block_rotate_delta_grad.register_fake
def _(x: Tensor, grad: Tensor, block_size: int) -> Tensor:
    return x.new_empty(x.shape[-1] // block_size, block_size, block_size)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, delta = ctx.saved_tensors
    dx = block_rotate(grad, delta.transpose(1, 2)) if ctx.needs_input_grad[0] else None
    ddelta = None
    if ctx.needs_input_grad[1]:
        ddelta = torch.ops.oft_diffusion.block_rotate_delta_grad(x, grad, delta.shape[-1])
    return dx, ddelta


_block_rotate.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, delta: Tensor) -> None:
    if delta.dim() != 3 or delta.shape[1] != delta.shape[2] or x.shape[-1] != delta.shape[0] * delta.shape[1]:
        raise RuntimeError(
            f"block_rotate: x {tuple(x.shape)} and delta {tuple(delta.shape)} do not fit: "
            "expected (..., r * b) and (r, b, b)"
        )
    if x.dtype != delta.dtype:
        raise RuntimeError(f"block_rotate: x is {x.dtype} and delta {delta.dtype}: cast delta to x's dtype first")
