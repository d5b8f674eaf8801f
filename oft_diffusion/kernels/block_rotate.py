"""`block_rotate(x, D) = x + x blockdiag(D)`: the input-centric forward of OFTv2 (arXiv 2506.19847, section 3.2).

Autograd saves x once, not a rotated copy. It runs as batched products, on CUDA tensors as Triton kernels where there
is Triton (`triton_rotate.py`). The compiler sees one op, registered with `torch.library`; eager code
runs the same functions without it, since an op in Python costs more to call than a small rotation to compute.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from oft_diffusion.autocast import compute_dtype, without_autocast

T = TypeVar("T")
OPS = torch.library.Library("oft_diffusion", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)
OPS.define("block_rotate(Tensor x, Tensor delta) -> Tensor", tags=TAGS)
OPS.define("block_rotate_delta_grad(Tensor x, Tensor grad, SymInt[] shape) -> Tensor", tags=TAGS)

# torch multiplies into strided memory block by block, which saves a pass over x, and costs a call per block.
_MANY_ROWS = 2048


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
    if torch.compiler.is_compiling():
        return torch.ops.oft_diffusion.block_rotate.default(x, delta)
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad):
        rotated: Tensor = _Rotate.apply(x, delta)
        return rotated
    return _rotated(x, delta)


class _Rotate(torch.autograd.Function):
    """The op in eager code: its gradient, without its dispatch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta)
        return _rotated(x, delta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if torch.is_grad_enabled():  # to be derived once more: the ops know what of it can be
            return _backward(ctx, grad)
        x, delta = ctx.saved_tensors
        dx = _rotated(grad, delta.transpose(-1, -2)) if ctx.needs_input_grad[0] else None
        return dx, _delta_grad(x, grad, list(delta.shape)) if ctx.needs_input_grad[1] else None


def _rotated(x: Tensor, delta: Tensor) -> Tensor:
    return rotate_on_gpu(x, delta) if x.is_cuda else rotate_in_torch(x, delta)


def _delta_grad(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    return delta_grad_on_gpu(x, grad, shape) if x.is_cuda else delta_grad_in_torch(x, grad, shape)


def uncast(form: Callable[..., T]) -> Callable[..., T]:
    """Keep autocast out of a form's products: x and D come in the dtype that they are to be multiplied in."""

    @functools.wraps(form)
    def call(x: Tensor, *others: Any) -> T:
        if compute_dtype(x.device, x.dtype) == x.dtype:
            return form(x, *others)
        with without_autocast(x.device):
            return form(x, *others)

    return call


@torch.library.impl(OPS, "block_rotate", "CompositeExplicitAutograd")
@uncast
def rotate_in_torch(x: Tensor, delta: Tensor) -> Tensor:
    """The op as batched products: the reference, and the form for every device, dtype and size."""
    check(x, delta)
    rows = x.numel() // x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if delta.dim() == 3 and rows < _MANY_ROWS:
        blocks = x.reshape(rows, *delta.shape[:2])
        torch.add(blocks, torch.bmm(blocks.transpose(0, 1), delta).transpose(0, 1), out=out.view_as(blocks))
        return out
    groups, block_size = delta.shape[0] if delta.dim() == 4 else 1, delta.shape[-1]
    deltas = delta.reshape(groups, -1, block_size, block_size)
    # Read and written where they lie: no permuted copy of x, nor of the product.
    for part, d, written in zip(
        _blocks_first(x, groups, block_size), deltas, _blocks_first(out, groups, block_size), strict=True
    ):
        torch.baddbmm(part, part, d, out=written)
    return out


@torch.library.impl(OPS, "block_rotate_delta_grad", "CompositeExplicitAutograd")
@uncast
def delta_grad_in_torch(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    """`dD`, in D's shape: per block `x_i^T g_i`, summed over rows."""
    groups, block_size = shape[0] if len(shape) == 4 else 1, shape[-1]
    rows, grads = (_blocks_first(t, groups, block_size) for t in (x, grad))
    out = torch.empty(shape, dtype=x.dtype, device=x.device).view(groups, -1, block_size, block_size)
    # oneDNN, which multiplies 16-bit numbers, is the faster for a copy (1.7 times, bfloat16); float32 is the slower.
    copied = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    for own, grad_of, written in zip(rows, grads, out, strict=True):
        if copied:
            own, grad_of = own.contiguous(), grad_of.contiguous()
        torch.bmm(own.transpose(1, 2), grad_of, out=written)
    return out.view(shape)


def _blocks_first(x: Tensor, groups: int, block_size: int) -> Tensor:
    """`(..., r b)` as `(groups, r, rows, b)`: a view, in which one batched product per group does all blocks."""
    return x.reshape(groups, -1, x.shape[-1] // block_size, block_size).transpose(1, 2)


@torch.library.impl(OPS, "block_rotate", "CUDA")
def rotate_on_gpu(x: Tensor, delta: Tensor) -> Tensor:
    """The op on CUDA tensors: the kernel where it fits."""
    check(x, delta)
    kernels = triton_kernels()
    if kernels is None or not kernels.fits(x, delta.shape[-1]):
        return rotate_in_torch(x, delta)
    return kernels.rotate(x, delta)


@torch.library.impl(OPS, "block_rotate_delta_grad", "CUDA")
def delta_grad_on_gpu(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    """`dD` on CUDA tensors: the kernel where it fits."""
    kernels = triton_kernels()
    if kernels is None or not kernels.fits(x, shape[-1]):
        return delta_grad_in_torch(x, grad, shape)
    return kernels.delta_grad(x, grad, shape)


@functools.cache
def triton_kernels() -> ModuleType | None:
    """`oft_diffusion.kernels.triton_rotate`; None without Triton, or where `OFT_DIFFUSION_TRITON=0` is set.

    Triton compiles a launcher in C at a kernel's first use, and raises where there is no compiler; a GPU's owner who
    only draws pictures often has none, and the pure-torch form serves.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    refused = os.environ.get("OFT_DIFFUSION_TRITON") == "0"
    if refused or not compiler or importlib.util.find_spec("triton") is None:
        return None
    from oft_diffusion.kernels import triton_rotate

    return triton_rotate


def _like_rotated(x: Tensor, delta: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_delta(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    return x.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, delta = ctx.saved_tensors
    ops, dx, ddelta = torch.ops.oft_diffusion, None, None
    if ctx.needs_input_grad[0]:
        dx = ops.block_rotate.default(grad, delta.transpose(-1, -2))
    if ctx.needs_input_grad[1]:
        ddelta = ops.block_rotate_delta_grad.default(x, grad, list(delta.shape))
    return dx, ddelta


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("block_rotate: its delta's gradient has no derivative of its own; its input's has")


torch.library.register_fake("oft_diffusion::block_rotate", _like_rotated, lib=OPS)
torch.library.register_fake("oft_diffusion::block_rotate_delta_grad", _like_delta, lib=OPS)
torch.library.register_autograd("oft_diffusion::block_rotate", _backward, setup_context=_setup_context, lib=OPS)
# Without a formula here torch would drop second derivatives with a warning.
torch.library.register_autograd("oft_diffusion::block_rotate_delta_grad", _no_second_derivative, lib=OPS)


def check(x: Tensor, delta: Tensor) -> None:
    """Raise a RuntimeError where shapes, dtypes or devices do not fit."""
    fits = delta.dim() in (3, 4) and delta.shape[-1] == delta.shape[-2]
    fits = fits and x.shape[-1] == delta.shape[-3] * delta.shape[-1]
    if not fits or (delta.dim() == 4 and (x.dim() < 2 or x.shape[0] % delta.shape[0])):
        raise RuntimeError(
            f"block_rotate: x {tuple(x.shape)} and delta {tuple(delta.shape)} do not fit: expected (..., r * b) and "
            "(r, b, b), or (g, r, b, b) and a first axis of x that is a multiple of g"
        )
    if x.dtype != delta.dtype:
        raise RuntimeError(f"block_rotate: x is {x.dtype} and delta {delta.dtype}: cast delta to x's dtype first")
    if x.device != delta.device:
        # A kernel given a pointer of another device would read whatever lies there.
        raise RuntimeError(f"block_rotate: x is on {x.device} and delta on {delta.device}: move delta to x's device")
