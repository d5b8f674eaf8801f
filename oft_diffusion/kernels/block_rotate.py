"""`block_rotate(x, D) = x + x blockdiag(D)`: the input-centric forward of OFTv2 (arXiv 2506.19847, section 3.2).

Autograd saves x once, not a rotated copy. It runs as batched products, on CUDA tensors as Triton kernels where there
is Triton (`triton_rotate.py`). The compiler sees one op, registered with `torch.library`; eager code runs the same
functions without it, since an op in Python costs more to call than a small rotation to compute. For the same reason
small rotations on a processor are left to torch's own backward, in which there is no Python; the compiler fuses the sum
with what is beside it. In 16 bits, eager, the sum and the product of a layer's rotation are one call, which rounds once
and takes less time than two (`benchmarks.rotate_forms`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from oft_diffusion.autocast import compute_dtype, without_autocast
from oft_diffusion.kernels import processor, processor_graph

T = TypeVar("T")
OPS = torch.library.Library("oft_diffusion", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)
# `form` is for the compiler's caches on disk, which know no more of an op than what stands in the graph.
OPS.define('block_rotate(Tensor x, Tensor delta, *, str form="") -> Tensor', tags=TAGS)
OPS.define("block_rotate_delta_grad(Tensor x, Tensor grad, SymInt[] shape) -> Tensor", tags=TAGS)

_MANY_ROWS = 1024  # of `lies_apart`
_SMALL = 2**19  # of `is_small`: numbers in x
_WRITES_VIEWS = ("cpu", "cuda", "meta")  # devices known to write a product where a strided `out` lies, not into a copy


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
    if (plan := by_processor(x, (delta,))) is not None:
        return processor_graph.rotated(x, plan)[0]
    if delta.dim() == 3 and is_small(x):
        check(x, delta)
        return _small(x, delta)
    if torch.compiler.is_compiling():
        return torch.ops.oft_diffusion.block_rotate.default(x, delta, form=kernel_form())
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad):
        rotated: Tensor = _Rotate.apply(x, delta)
        return rotated
    return _rotated(x, delta)


def is_small(x: Tensor) -> bool:
    """Whether more Python, in backward too, would cost more than tuned products save (`benchmarks.rotate_forms`)."""
    if x.is_cuda or x.numel() >= _SMALL or (is_wide(x) and x.numel() >= 2 * _MANY_ROWS * x.shape[-1]):
        return False
    return compute_dtype(x.device, x.dtype) == x.dtype


def _small(x: Tensor, delta: Tensor) -> Tensor:
    """In torch's own operations, with its own backward."""
    blocks = x.reshape(-1, *delta.shape[:2])
    first = blocks.transpose(0, 1)
    if is_wide(x) or torch.compiler.is_compiling():
        return (blocks + torch.bmm(first, delta).transpose(0, 1)).view(x.shape)
    return torch.baddbmm(first, first, delta).transpose(0, 1).reshape(x.shape)


def by_processor(x: Tensor, deltas: Sequence[Tensor]) -> processor.Plan | None:
    """How eager code has this done by `processor.c`; compiled code fuses small rotations with what is beside them.

    Raises:
        RuntimeError: what it would be given does not fit.
    """
    return processor.plan_for(deltas) if is_for_processor(x, deltas) else None


def is_for_processor(x: Tensor, deltas: Sequence[Tensor]) -> bool:
    """Whether it is; raises as `by_processor` does."""
    if torch.compiler.is_compiling() or not processor.fits(x, deltas[0].shape[-1]):
        return False
    for delta in deltas:
        check(x, delta)
    return processor.takes(deltas)


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


def uncast(function: Callable[..., T]) -> Callable[..., T]:
    """Keep autocast out of a form's products: x and D come in the dtype that they are to be multiplied in."""

    @functools.wraps(function)
    def call(x: Tensor, *others: Any, **options: Any) -> T:
        if compute_dtype(x.device, x.dtype) == x.dtype:
            return function(x, *others, **options)
        with without_autocast(x.device):
            return function(x, *others, **options)

    return call


@torch.library.impl(OPS, "block_rotate", "CompositeExplicitAutograd")
@uncast
def rotate_in_torch(x: Tensor, delta: Tensor, *, form: str = "") -> Tensor:
    """The op as batched products: the reference, and the form for every device, dtype and size."""
    check(x, delta)
    if delta.dim() == 4:
        parts = x.reshape(delta.shape[0], -1, x.shape[-1])
        return torch.stack([_turned(part, d) for part, d in zip(parts, delta, strict=True)]).view(x.shape)
    return _turned(x, delta)


def _turned(x: Tensor, delta: Tensor) -> Tensor:
    count, size = delta.shape[:2]
    first = blocks_first(x, count, size)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    written = blocks_first(out, count, size)
    if x.device.type not in _WRITES_VIEWS or (is_wide(x) and not lies_apart(x)):
        torch.add(first.transpose(0, 1), torch.bmm(first, delta).transpose(0, 1), out=out.view(-1, count, size))
    elif is_wide(x):
        torch.bmm(first, with_identity(delta), out=written)
    else:
        torch.baddbmm(first, first, delta, out=written)
    return out


def lies_apart(x: Tensor) -> bool:
    """Whether to multiply block by block, reading and writing where x lies: no pass to gather, none to add.

    That costs a call for each block, which many rows pay for (`benchmarks.rotate_forms`).
    """
    return x.numel() >= _MANY_ROWS * x.shape[-1]


def is_wide(x: Tensor) -> bool:
    """Whether x's dtype holds R as exactly as what R rotates; R in 16 bits is no rotation, D in 16 bits is one of D."""
    return x.element_size() >= 4


def with_identity(delta: Tensor) -> Tensor:
    """R of D, in a wide dtype; or of several D below each other, `(r, n b, b)`."""
    rows, size = delta.shape[-2:]
    return delta + _identities(rows // size, size, delta.dtype, delta.device)


@functools.cache
def _identities(count: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.eye(size, dtype=dtype, device=device).repeat(count, 1)


@torch.library.impl(OPS, "block_rotate_delta_grad", "CompositeExplicitAutograd")
@uncast
def delta_grad_in_torch(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    """`dD`, in D's shape: per block `x_i^T g_i`, summed over rows."""
    if grad.shape != x.shape or shape[-1] != shape[-2] or x.shape[-1] != shape[-3] * shape[-1]:
        raise RuntimeError(f"block_rotate: x {tuple(x.shape)}, gradient {tuple(grad.shape)} and D {shape} do not fit")
    if len(shape) == 3:
        return _outer(x, grad, *shape[:2])
    parts = (t.reshape(shape[0], -1, t.shape[-1]) for t in (x, grad))
    return torch.stack([_outer(own, of, *shape[1:3]) for own, of in zip(*parts, strict=True)])


def _outer(x: Tensor, grad: Tensor, count: int, size: int) -> Tensor:
    x, grad = blocks_first(x, count, size), blocks_first(grad, count, size)
    # oneDNN, which multiplies 16-bit numbers, is the faster for a copy (1.7 times, bfloat16); float32 is the slower.
    if x.device.type == "cpu" and not is_wide(x):
        x, grad = x.contiguous(), grad.contiguous()
    return torch.bmm(x.transpose(1, 2), grad)


def blocks_first(x: Tensor, count: int, size: int) -> Tensor:
    """`(..., r b)` as `(r, rows, b)`, in which one batched product does all blocks: a view, where x's strides allow."""
    if x.is_contiguous():
        width = count * size
        return x.as_strided((count, x.numel() // width, size), (size, width, 1))
    return x.reshape(-1, count, size).transpose(0, 1)


@torch.library.impl(OPS, "block_rotate", "CPU")
def rotate_on_processor(x: Tensor, delta: Tensor, *, form: str = "") -> Tensor:
    """The op on a processor: in C where that fits."""
    plan = by_processor(x, (delta,))
    return rotate_in_torch(x, delta) if plan is None else processor.rotate(x, plan)[0]


@torch.library.impl(OPS, "block_rotate_delta_grad", "CPU")
def delta_grad_on_processor(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    """`dD` on a processor: in C where that fits."""
    fits = len(shape) == 3 and shape[1] == shape[2] and x.shape[-1] == shape[0] * shape[1]
    if fits and processor.fits(x, shape[-1]) and processor.fits_gradients(x, (grad,)):
        _, found = processor.gradients(x, (x.new_empty(shape),), (grad,), of_x=False)
        assert found is not None
        return found[0]
    return delta_grad_in_torch(x, grad, shape)


@torch.library.impl(OPS, "block_rotate", "CUDA")
def rotate_on_gpu(x: Tensor, delta: Tensor, *, form: str = "") -> Tensor:
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
    """`oft_diffusion.kernels.triton_rotate`; None without Triton, or where `OFT_DIFFUSION_KERNELS=0` is set.

    Triton compiles a launcher in C at a kernel's first use, and raises where there is no compiler; a GPU's owner who
    only draws pictures often has none, and the pure-torch form serves.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    refused = os.environ.get("OFT_DIFFUSION_KERNELS") == "0"
    if refused or not compiler or importlib.util.find_spec("triton") is None:
        return None
    from oft_diffusion.kernels import triton_rotate

    return triton_rotate


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def kernel_form() -> str:
    """What the ops stand for on cards, by the text of the kernels: code compiled for others is not to be taken."""
    return "torch" if _kernels_here() is None else _digest()


def _kernels_here() -> ModuleType | None:
    return triton_kernels() if torch.cuda.is_available() else None


@functools.cache
def _digest() -> str:
    files = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _like_rotated(x: Tensor, delta: Tensor, *, form: str = "") -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_delta(x: Tensor, grad: Tensor, shape: list[int]) -> Tensor:
    return x.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], keyword_only_inputs: Any, output: Tensor) -> None:
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
