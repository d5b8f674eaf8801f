"""The rotations of `processor.c` in autograd's graph: what it keeps of them, and their gradients.

It keeps x, and D only where nothing can build it again (`Rebuilt`). In a small model D is as large as what LoRA keeps;
under gradient checkpointing it would be most of what is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.nn.functional import pad

from oft_diffusion.kernels import processor
from oft_diffusion.kernels.processor import Plan, derived_by_torch


def rotated(x: Tensor, plan: Plan) -> Sequence[Tensor]:
    """`x + x blockdiag(D)` for each D, differentiable.

    Args:
        x: `(..., r * b)`, which `processor.fits`; read where it lies, where its rows are equally far apart.
        plan: of the deltas.

    Returns:
        x's shape each, contiguous.
    """
    if not (plan.requires_grad or x.requires_grad) or not torch.is_grad_enabled():
        return processor.rotate(x, plan)
    made: Sequence[Tensor]
    made = _Rotate.apply(x, plan, *plan.deltas) if plan.flat is None else _RotateOnce.apply(x, plan.flat, plan)
    return made


class _Rotate(torch.autograd.Function):
    """By deltas that the graph keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *deltas: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *deltas)
        return (*processor.rotate(x, plan),)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *deltas = ctx.saved_tensors
        given = [torch.zeros_like(x) if grad is None else grad for grad in grads]
        if derived_by_torch(*given):
            dx, *of_each = _gradients_in_torch(x, deltas, given)
            return (dx, None, *of_each)
        of_x, _, *of_deltas = ctx.needs_input_grad
        own, ddeltas = processor.gradients(x, deltas, given, of_x=of_x, of_deltas=True in of_deltas)
        each: Sequence[Tensor | None] = [None] * len(deltas) if ddeltas is None else ddeltas
        return (own, None, *each)


def _gradients_in_torch(x: Tensor, deltas: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    blocks, size = deltas[0].shape[:2]
    own, *others = (t.reshape(-1, blocks, size).transpose(0, 1) for t in (x, *grads))
    dx = grads[0]
    for grad in grads[1:]:
        dx = dx + grad
    for other, delta in zip(others, deltas, strict=True):
        dx = dx + torch.bmm(other, delta.transpose(1, 2)).transpose(0, 1).reshape(x.shape)
    return [dx, *(torch.bmm(own.transpose(1, 2), other) for other in others)]


# -- deltas that are built again ---------------------------------------------------------------------------------------


class Rebuilt:
    """The deltas of one forward, which its backward builds once more, and drops at its end.

    Args:
        build: makes all of them, `(blocks, b, b)`, float32, differentiable, of what it reads.
        read: the tensors that it reads, at least one of which requires grad.
    """

    def __init__(self, build: Callable[[], Tensor], read: Sequence[Tensor]) -> None:
        self.build = build
        self.trained = [tensor for tensor in read if tensor.requires_grad]
        self._read = [(tensor, tensor._version) for tensor in read]
        self._backwards: dict[int, _Backward] = {}  # that are going on: nearly always one

    def for_forward(self) -> Tensor:
        """The deltas, in the graph. What rotates by them through a plan that names this does not keep them."""
        flat: Tensor = _Made.apply(self, *self.trained)
        return flat

    def in_backward(self) -> _Backward:
        """What there is of them in the backward that is going on.

        Raises:
            RuntimeError: what they are made of has changed since the forward.
        """
        task = torch._C._current_graph_task_id()
        found = self._backwards.get(task)
        if found is None:
            self._check_versions()
            found = self._backwards[task] = _Backward(self.build)
            Variable._execution_engine.queue_callback(functools.partial(self._end, task))
        return found

    def _end(self, task: int) -> None:
        del self._backwards[task]

    def _check_versions(self) -> None:
        for tensor, version in self._read:
            if tensor._version != version:
                raise RuntimeError(
                    f"{tuple(tensor.shape)} numbers of an adapter have been modified by an inplace operation between a "
                    "forward and its backward, which builds that forward's rotations again: call backward() before "
                    "the optimizer's step, and before another adapter is loaded in place of this"
                )


class _Backward:
    """Deltas in one backward, built when they are first asked for, and what it has found of their gradients."""

    def __init__(self, build: Callable[[], Tensor]) -> None:
        self.flat = _apart(build)
        self.values = self.flat.detach()
        self._grad: Tensor | None = None
        self._written: dict[int, int] = {}  # where, and how many blocks; elsewhere nothing has been written yet

    def rotate_back(
        self, x: Tensor, starts: Sequence[int], blocks: int, grads: Sequence[Tensor], *, of_x: bool
    ) -> Tensor | None:
        """The dx of a rotation, where it is asked for; its dD are kept.

        Args:
            x: as `rotated` took it.
            starts: at which block each layer's deltas begin.
            blocks: how many they are.
            grads: of what `rotated` returned, x's shape and dtype.
            of_x: whether dx is asked for.
        """
        if self._grad is None:
            self._grad = torch.empty_like(self.values)
        if self._written.keys().isdisjoint(starts):
            self._written.update(dict.fromkeys(starts, blocks))
            size = self.values.shape[-1]
            step = 4 * size * size  # bytes
            deltas, into = ([t.data_ptr() + start * step for start in starts] for t in (self.values, self._grad))
            dx = torch.empty_like(x, memory_format=torch.contiguous_format) if of_x else None
            processor.rotate_back(x, deltas, grads, dx, into, blocks, size)
            return dx
        own = [self.values.narrow(0, start, blocks) for start in starts]  # of a layer that was called twice
        dx, found = processor.gradients(x, own, grads, of_x=of_x)
        for start, more in zip(starts, found or (), strict=True):
            part = self._grad.narrow(0, start, blocks)
            part.copy_(part + more if start in self._written else more)
            self._written[start] = blocks
        return dx

    def gradients(self, trained: Sequence[Tensor], grad: Tensor | None) -> Sequence[Tensor | None]:
        """What has been found, and what came by the graph, as gradients of what the deltas are made of."""
        found = self._found()
        total = found if grad is None else grad if found is None else found + grad
        if total is None:
            return [None] * len(trained)
        return torch.autograd.grad(self.flat, trained, total, create_graph=torch.is_grad_enabled())

    def _found(self) -> Tensor | None:
        if self._grad is not None and sum(self._written.values()) < len(self._grad):
            rest = torch.ones(len(self._grad), dtype=torch.bool)
            for start, blocks in self._written.items():
                rest[start : start + blocks] = False
            self._grad[rest] = 0.0
        return self._grad


def _apart(build: Callable[[], Tensor]) -> Tensor:
    """Build in a graph of its own, of which whoever is keeping count of what is saved (checkpointing) hears nothing."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
        return build()


class _Made(torch.autograd.Function):
    """From what deltas are made of to the deltas. It keeps what autograd can tell the age of, and no deltas."""

    @staticmethod
    def forward(ctx: Any, source: Rebuilt, *trained: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*trained)
        ctx.source = source
        return _apart(source.build).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.source.in_backward().gradients(ctx.saved_tensors, grad))


class _RotateOnce(torch.autograd.Function):
    """By deltas that are built again. `flat`, all of them, stands for them in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flat: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.of = plan.source, plan.starts, plan.blocks
        return (*processor.rotate(x, plan),)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        source, starts, blocks = ctx.of
        given = [torch.zeros_like(x) if grad is None else grad for grad in grads]
        deltas = source.in_backward()
        if not derived_by_torch(*given):
            return deltas.rotate_back(x, starts, blocks, given, of_x=ctx.needs_input_grad[0]), None, None
        flat = deltas.flat if torch.is_grad_enabled() else deltas.values
        dx, *of_each = _gradients_in_torch(x, [flat.narrow(0, start, blocks) for start in starts], given)
        rest = len(flat) - blocks
        spread = [pad(one, (0, 0, 0, 0, at, rest - at)) for one, at in zip(of_each, starts, strict=True)]
        return dx, torch.stack(spread).sum(0), None
