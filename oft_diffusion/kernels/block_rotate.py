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
        delta: `(r, b, b)`, x's dtype and device: `D = R - I`; or `(g, r, b, b)`, one for each of g equal parts of x's
            first axis.

    Returns:
        `x + x blockdiag(D)`, x's shape and dtype, contiguous.

    Raises:
        RuntimeError: the shapes, dtypes or devices do not fit.
    """
    return torch.ops.oft_diffusion.block_rotate(x, delta)


def _blocks_first(x: Tensor, groups: int, block_size: int) -> Tensor:
    """`(..., r b)` as `(groups, r, rows, b)`: a view, in which one batched product per group does all blocks."""
    return x.reshape(groups, -1, x.shape[-1] // block_size, block_size).transpose(1, 2)


@torch.library.custom_op("oft_diffusion::block_rotate", mutates_args=())
def _block_rotate(x: Tensor, delta: Tensor) -> Tensor:
    _check(x, delta)
    groups, block_size = delta.shape[0] if delta.dim() == 4 else 1, delta.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    deltas = delta.reshape(groups, -1, block_size, block_size)
    # Read and written where they lie: no permuted copy of x, nor of the product.
    for part, d, written in zip(
        _blocks_first(x, groups, block_size), deltas, _blocks_first(out, groups, block_size), strict=True
    ):
        torch.baddbmm(part, part, d, out=written)
    return out


@torch.library.custom_op("oft_diffusion::block_rotate_delta_grad", mutates_args=())
def _block_rotate_delta_grad(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    """`dD`, in D's shape: per block `x_i^T g_i`, summed over rows."""
    groups, block_size = shape[0] if len(shape) == 4 else 1, shape[-1]
    rows, grads = (_blocks_first(t, groups, block_size) for t in (x, grad))
    out = x.new_empty(shape).view(groups, -1, block_size, block_size)
    for own, grad_of, written in zip(rows, grads, out, strict=True):
        torch.bmm(own.transpose(1, 2), grad_of, out=written)
    return out.view(shape)


@_block_rotate.register_fake
def _(x: Tensor, delta: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_block_rotate_delta_grad.register_fake
def _(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    return x.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, delta = ctx.saved_tensors
    dx = block_rotate(grad, delta.transpose(-1, -2)) if ctx.needs_input_grad[0] else None
    ddelta = None
    if ctx.needs_input_grad[1]:
        ddelta = torch.ops.oft_diffusion.block_rotate_delta_grad(x, grad, list(delta.shape))
    return dx, ddelta


_block_rotate.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, delta: Tensor) -> None:
    fits = delta.dim() in (3, 4) and delta.shape[-1] == delta.shape[-2]
    fits = fits and x.shape[-1] == delta.shape[-3] * delta.shape[-1]
    if not fits or (delta.dim() == 4 and (x.dim() < 2 or x.shape[0] % delta.shape[0])):
        raise RuntimeError(
            f"block_rotate: x {tuple(x.shape)} and delta {tuple(delta.shape)} do not fit: expected (..., r * b) and "
            "(r, b, b), or (g, r, b, b) and a first axis of x that is a multiple of g"
        )
    if x.dtype != delta.dtype:
        raise RuntimeError(f"block_rotate: x is {x.dtype} and delta {delta.dtype}: cast delta to x's dtype first")
