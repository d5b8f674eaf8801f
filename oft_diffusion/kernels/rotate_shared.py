"""`block_rotate_shared(x, [D_1, D_2, ...])`: one input for several layers (q, k and v), each with its own rotation.

What `block_rotate` gives for each, to the bit; but backward gathers the layers' gradients, makes all dD with one
product and dx with another, and autograd adds up no gradients of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oft_diffusion.kernels.block_rotate import OPS, TAGS, block_rotate

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
    return torch.ops.oft_diffusion.block_rotate_shared.default(x, list(deltas))


@torch.library.impl(OPS, "block_rotate_shared", "CompositeExplicitAutograd")
def _rotate(x: Tensor, deltas: list[Tensor]) -> list[Tensor]:
    return [block_rotate(x, delta) for delta in deltas]


@torch.library.impl(OPS, "block_rotate_shared_grads", "CompositeExplicitAutograd")
def _grads(x: Tensor, deltas: list[Tensor], grads: list[Tensor], dx: bool, ddelta: bool) -> list[Tensor]:
    """dx, and every dD side by side, `(r, b, layers b)`: what is asked for of these."""
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
    ctx.layers = len(deltas)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, list[Tensor | None]]:
    x, *deltas = ctx.saved_tensors
    dx, ddelta = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])
    known = [torch.zeros_like(x) if grad is None else grad for grad in grads]
    found = torch.ops.oft_diffusion.block_rotate_shared_grads.default(x, deltas, known, dx, ddelta)
    each: list[Tensor | None] = list(found[-1].split(x.shape[-1] // deltas[0].shape[0], dim=2)) if ddelta else []
    return (found[0] if dx else None), (each or [None] * ctx.layers)


def _no_second_derivative(ctx: Any, grads: Any) -> None:
    raise RuntimeError("block_rotate_shared: its gradients have no derivatives of their own")


torch.library.register_fake("oft_diffusion::block_rotate_shared", _like_rotated, lib=OPS)
torch.library.register_fake("oft_diffusion::block_rotate_shared_grads", _like_grads, lib=OPS)
torch.library.register_autograd("oft_diffusion::block_rotate_shared", _backward, setup_context=_setup_context, lib=OPS)
torch.library.register_autograd("oft_diffusion::block_rotate_shared_grads", _no_second_derivative, lib=OPS)
