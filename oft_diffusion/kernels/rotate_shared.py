"""`block_rotate_shared(x, [D_1, D_2, ...])`: one input for several layers (q, k and v), each with its own rotation.

What `block_rotate` gives for each, without gradients to the bit. With them one product makes all dD, and another dx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from oft_diffusion.kernels import processor, processor_graph
from oft_diffusion.kernels.block_rotate import (
    OPS,
    TAGS,
    block_rotate,
    blocks_first,
    by_processor,
    check,
    is_for_processor,
    is_small,
    is_wide,
    kernel_form,
    lies_apart,
    triton_kernels,
    uncast,
    with_identity,
)

OPS.define('block_rotate_shared(Tensor x, Tensor[] deltas, *, str form="") -> Tensor[]', tags=TAGS)
OPS.define(
    "block_rotate_shared_grads(Tensor x, Tensor[] deltas, Tensor[] grads, bool dx, bool ddelta) -> Tensor[]", tags=TAGS
)


def block_rotate_shared(x: Tensor, deltas: Sequence[Tensor]) -> list[Tensor]:
    """Rotate the last axis of x once for each of several layers that read it.

    Args:
        x: `(..., r * b)`, any floating dtype, any strides.
        deltas: `(r, b, b)` each, x's dtype and device.

    Returns:
        `x + x blockdiag(D)` for each D, as `block_rotate` gives it.

    Raises:
        RuntimeError: the shapes, dtypes or devices do not fit.
    """
    if (plan := by_processor(x, deltas)) is not None:
        return list(processor_graph.rotated(x, plan))
    small = is_small(x)
    if torch.compiler.is_compiling() and not small:
        return torch.ops.oft_diffusion.block_rotate_shared.default(x, list(deltas), form=kernel_form())
    if torch.is_grad_enabled() and (x.requires_grad or any(delta.requires_grad for delta in deltas)):
        return _in_one_product(x, deltas) if small else list(_RotateShared.apply(x, *deltas))
    return rotate_each(x, list(deltas))


def _in_one_product(x: Tensor, deltas: Sequence[Tensor]) -> list[Tensor]:
    """In torch's own operations: one product for all, and in backward two."""
    for delta in deltas:
        check(x, delta)
    shape, (count, size, _) = x.shape, deltas[0].shape
    blocks = x.reshape(-1, count, size)
    turned = torch.bmm(blocks.transpose(0, 1), torch.cat(list(deltas), dim=2)).transpose(0, 1).split(size, dim=2)
    return [(blocks + own).view(shape) for own in turned]


class _RotateShared(torch.autograd.Function):
    """The op in eager code: its gradient, without its dispatch (`block_rotate`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *deltas: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        _setup_context(ctx, (x, list(deltas)), {}, [])
        return tuple(rotate_each(x, list(deltas)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *deltas = ctx.saved_tensors
        # Where it is to be derived once more, the op says that it cannot be.
        form = torch.ops.oft_diffusion.block_rotate_shared_grads.default if torch.is_grad_enabled() else _grads
        dx, each = _gradients(form, x, deltas, grads, ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:]))
        return (dx, *each)


@torch.library.impl(OPS, "block_rotate_shared", "CompositeExplicitAutograd")
def rotate_each(x: Tensor, deltas: list[Tensor], *, form: str = "") -> list[Tensor]:
    """The op: one kernel for all layers where there is one, else one after another."""
    kernels = kernels_for(x, deltas)
    if kernels is None:
        return [block_rotate(x, delta) for delta in deltas]
    for delta in deltas:
        check(x, delta)
    return kernels.rotate(x, deltas)


@torch.library.impl(OPS, "block_rotate_shared_grads", "CompositeExplicitAutograd")
def separate_grads(x: Tensor, deltas: list[Tensor], grads: list[Tensor], dx: bool, ddelta: bool) -> list[Tensor]:
    """As a registered op has to answer: with tensors that share no memory."""
    return [found.contiguous() for found in _grads(x, deltas, grads, dx, ddelta)]


def _grads(x: Tensor, deltas: list[Tensor], grads: list[Tensor], dx: bool, ddelta: bool) -> list[Tensor]:
    """dx, and every dD, `(r, b, b)`: what is asked for of these."""
    if is_for_processor(x, deltas) and processor.fits_gradients(x, grads):
        own, each = processor.gradients(x, deltas, grads, of_x=dx, of_deltas=ddelta)
        return [*([] if own is None else [own]), *(each or [])]
    kernels = kernels_for(x, deltas)
    if kernels is None:
        return grads_in_torch(x, deltas, grads, dx, ddelta)
    found = [kernels.input_grad(x, deltas, grads)] if dx else []
    if ddelta:
        blocks, size = deltas[0].shape[:2]
        found += kernels.delta_grads(x, grads, blocks, size)
    return found


def kernels_for(x: Tensor, deltas: Sequence[Tensor]) -> ModuleType | None:
    """`oft_diffusion.kernels.triton_shared` where there is Triton and it takes what is there."""
    kernels = triton_kernels() if x.is_cuda else None
    if kernels is None or not kernels.fits(x, deltas[0].shape[-1]):
        return None
    from oft_diffusion.kernels import triton_shared

    return triton_shared if len(deltas) in triton_shared.COUNTS else None


@uncast
def grads_in_torch(x: Tensor, deltas: list[Tensor], grads: list[Tensor], dx: bool, ddelta: bool) -> list[Tensor]:
    """Of many rows, products that read and write where the tensors lie; else one product for dx, one for every dD."""
    blocks, size = deltas[0].shape[:2]
    own, others = blocks_first(x, blocks, size).transpose(1, 2), [blocks_first(grad, blocks, size) for grad in grads]
    if is_wide(x) and lies_apart(x):
        found = [_input_grad_in_place(x, deltas, others)] if dx else []
        return found + [torch.bmm(own, other) for other in others] if ddelta else found
    gathered = torch.cat(others, dim=2)  # (r, rows, layers b)
    found = [_input_grad(x, deltas, grads, gathered)] if dx else []
    return [*found, *torch.bmm(own, gathered).split(size, dim=2)] if ddelta else found


def _input_grad_in_place(x: Tensor, deltas: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """The sum of `g R^T` over the layers, block by block into its place."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    written = blocks_first(total, *deltas[0].shape[:2])
    (first, *others), turns = grads, [with_identity(delta).transpose(1, 2) for delta in deltas]
    torch.bmm(first, turns[0], out=written)
    for grad, turn in zip(others, turns[1:], strict=True):
        written.baddbmm_(grad, turn)
    return total


def _input_grad(x: Tensor, deltas: Sequence[Tensor], grads: Sequence[Tensor], gathered: Tensor) -> Tensor:
    """The sum of `g R^T` over the layers, by one product."""
    turns = torch.cat([delta.transpose(1, 2) for delta in deltas], dim=1)
    if is_wide(x):
        return torch.bmm(gathered, with_identity(turns)).transpose(0, 1).reshape(x.shape)
    turned = torch.bmm(gathered, turns).transpose(0, 1)
    for grad in grads:
        turned = turned + grad.reshape(turned.shape)
    return turned.reshape(x.shape)


def _like_rotated(x: Tensor, deltas: list[Tensor], *, form: str = "") -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in deltas]


def _like_grads(x: Tensor, deltas: list[Tensor], grads: list[Tensor], dx: bool, ddelta: bool) -> list[Tensor]:
    first = [torch.empty_like(x, memory_format=torch.contiguous_format)] if dx else []
    return [*first, *(x.new_empty(delta.shape) for delta in (deltas if ddelta else []))]


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, list[Tensor]], keyword_only_inputs: Any, output: Sequence[Tensor]
) -> None:
    x, deltas = inputs
    ctx.save_for_backward(x, *deltas)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, list[Tensor | None]]:
    x, *deltas = ctx.saved_tensors
    form = torch.ops.oft_diffusion.block_rotate_shared_grads.default
    return _gradients(form, x, deltas, grads, ctx.needs_input_grad[0], any(ctx.needs_input_grad[1]))


def _gradients(
    form: Callable[..., list[Tensor]],
    x: Tensor,
    deltas: list[Tensor],
    grads: Sequence[Tensor | None],
    dx: bool,
    ddelta: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and the gradient of each delta."""
    found = form(x, deltas, [torch.zeros_like(x) if grad is None else grad for grad in grads], dx, ddelta)
    each: list[Tensor | None] = list(found[dx:])
    return (found[0] if dx else None), (each or [None] * len(deltas))


def _no_second_derivative(ctx: Any, grads: Any) -> None:
    raise RuntimeError("block_rotate_shared: its gradients have no derivatives of their own")


torch.library.register_fake("oft_diffusion::block_rotate_shared", _like_rotated, lib=OPS)
torch.library.register_fake("oft_diffusion::block_rotate_shared_grads", _like_grads, lib=OPS)
torch.library.register_autograd("oft_diffusion::block_rotate_shared", _backward, setup_context=_setup_context, lib=OPS)
torch.library.register_autograd("oft_diffusion::block_rotate_shared_grads", _no_second_derivative, lib=OPS)
