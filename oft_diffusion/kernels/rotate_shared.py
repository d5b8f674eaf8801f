"""`block_rotate_shared(x, [D_1, D_2, ...])`: one input for several layers (q, k and v), each with its own rotation.

What `block_rotate` gives for each, to the bit; but backward gathers the layers' gradients, makes all dD with one
product and dx with another, and autograd adds up no gradients of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from oft_diffusion.kernels.block_rotate import OPS, TAGS, block_rotate, check, triton_kernels, uncast

OPS.define("block_rotate_shared(Tensor x, Tensor[] deltas) -> Tensor[]", tags=TAGS)
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
    if torch.compiler.is_compiling():
        return torch.ops.oft_diffusion.block_rotate_shared.default(x, list(deltas))
    if torch.is_grad_enabled() and (x.requires_grad or any(delta.requires_grad for delta in deltas)):
        return list(_RotateShared.apply(x, *deltas))
    return _rotate(x, list(deltas))


class _RotateShared(torch.autograd.Function):
    """The op in eager code: its gradient, without its dispatch (`block_rotate`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *deltas: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        _setup_context(ctx, (x, list(deltas)), [])
        return tuple(_rotate(x, list(deltas)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *deltas = ctx.saved_tensors
        # Where it is to be derived once more, the op says that it cannot be.
        form = torch.ops.oft_diffusion.block_rotate_shared_grads.default if torch.is_grad_enabled() else _grads
        dx, each = _gradients(form, x, deltas, grads, ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:]))
        return (dx, *each)


@torch.library.impl(OPS, "block_rotate_shared", "CompositeExplicitAutograd")
def _rotate(x: Tensor, deltas: list[Tensor]) -> list[Tensor]:
    kernels = _kernels(x, deltas)
    if kernels is None:
        return [block_rotate(x, delta) for delta in deltas]
    for delta in deltas:
        check(x, delta)
    return kernels.rotate(x, deltas)


@torch.library.impl(OPS, "block_rotate_shared_grads", "CompositeExplicitAutograd")
def _grads(x: Tensor, deltas: list[Tensor], grads: list[Tensor], dx: bool, ddelta: bool) -> list[Tensor]:
    """dx, and every dD side by side, `(r, b, layers b)`: what is asked for of these."""
    kernels = _kernels(x, deltas)
    if kernels is None:
        return grads_in_torch(x, deltas, grads, dx, ddelta)
    found = [kernels.input_grad(x, deltas, grads)] if dx else []
    return [*found, kernels.delta_grads(x, grads, *deltas[0].shape[:2])] if ddelta else found


def _kernels(x: Tensor, deltas: Sequence[Tensor]) -> ModuleType | None:
    """`oft_diffusion.kernels.triton_shared` where there is Triton and it takes what is there."""
    kernels = triton_kernels() if x.is_cuda else None
    if kernels is None or not kernels.fits(x, deltas[0].shape[-1]):
        return None
    from oft_diffusion.kernels import triton_shared

    return triton_shared if len(deltas) in triton_shared.COUNTS else None


@uncast
def grads_in_torch(x: Tensor, deltas: list[Tensor], grads: list[Tensor], dx: bool, ddelta: bool) -> list[Tensor]:
    """One product makes dx, another every dD."""
    blocks, size = deltas[0].shape[:2]
    views = [grad.reshape(-1, blocks, size) for grad in grads]
    gathered = torch.cat([view.transpose(0, 1) for view in views], dim=2)  # (r, rows, layers b)
    found: list[Tensor] = []
    if dx:
        turned = torch.bmm(gathered, torch.cat([delta.transpose(1, 2) for delta in deltas], dim=1)).transpose(0, 1)
        for view in views[:-1]:
            turned = turned + view
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.add(turned, views[-1], out=total.view_as(turned))
        found.append(total)
    if ddelta:
        found.append(torch.bmm(x.reshape(-1, blocks, size).permute(1, 2, 0), gathered))
    return found


def _like_rotated(x: Tensor, deltas: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in deltas]


def _like_grads(x: Tensor, deltas: list[Tensor], grads: list[Tensor], dx: bool, ddelta: bool) -> list[Tensor]:
    blocks, size = deltas[0].shape[:2]
    first = [torch.empty_like(x, memory_format=torch.contiguous_format)] if dx else []
    return [*first, x.new_empty(blocks, size, len(deltas) * size)] if ddelta else first


def _setup_context(ctx: Any, inputs: tuple[Tensor, list[Tensor]], output: list[Tensor]) -> None:
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
    each: list[Tensor | None] = list(found[-1].split(x.shape[-1] // deltas[0].shape[0], dim=2)) if ddelta else []
    return (found[0] if dx else None), (each or [None] * len(deltas))


def _no_second_derivative(ctx: Any, grads: Any) -> None:
    raise RuntimeError("block_rotate_shared: its gradients have no derivatives of their own")


torch.library.register_fake("oft_diffusion::block_rotate_shared", _like_rotated, lib=OPS)
torch.library.register_fake("oft_diffusion::block_rotate_shared_grads", _like_grads, lib=OPS)
torch.library.register_autograd("oft_diffusion::block_rotate_shared", _backward, setup_context=_setup_context, lib=OPS)
torch.library.register_autograd("oft_diffusion::block_rotate_shared_grads", _no_second_derivative, lib=OPS)
