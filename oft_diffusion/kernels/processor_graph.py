"""The rotations of `processor.c` in autograd's graph: what it keeps of them, and their gradients.

It keeps x, and D only where nothing can build it again (`Rebuilt`). In a small model D is as large as what LoRA keeps;
under gradient checkpointing it would be most of what is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import pad
from torch.utils._python_dispatch import _disable_current_modes

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
    if not torch.is_grad_enabled():
        return processor.rotate(x, plan)
    made: Sequence[Tensor]
    if plan.flat.source is not None:
        made = _by_flat(x, plan.flat.tensor, plan)
    elif x.requires_grad or any(delta.requires_grad for delta in plan.deltas):
        made = _Rotate.apply(x, plan, *plan.deltas)
    else:
        made = processor.rotate(x, plan)
    return made


class _Rotate(torch.autograd.Function):
    """By deltas that the graph keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *deltas: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *deltas)
        return processor.rotate(x, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *deltas = ctx.saved_tensors
        if derived_by_torch(x, deltas[0].shape[-1], grads):
            dx, *of_each = _gradients_in_torch(x, deltas, grads)
            return (dx, None, *of_each)
        of_x, _, *of_deltas = ctx.needs_input_grad
        own, ddeltas = processor.gradients(x, deltas, grads, of_x=of_x, of_deltas=True in of_deltas)
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


Build = Callable[[Sequence[Tensor]], Tensor]


class Rebuilt:
    """The deltas of one forward, or the generators they come from, which its backward has again, and drops at its end.

    Args:
        build: makes all of them, float32, of what is trained, differentiable: the same every time.
        trained: the parameters. Their versions are watched, as far as torch counts them (not of writes to `.data`).
        delta_of: deltas of a part of the generators, where `build` makes these, differentiable.
    """

    def __init__(
        self, build: Build, trained: Sequence[Tensor], delta_of: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.build = build
        self.trained = trained
        self.delta_of = delta_of
        self._versions = [parameter._version for parameter in trained] if torch.is_grad_enabled() else []
        self._backwards: dict[int, _Backward] = {}  # that are going on: nearly always one

    def for_forward(self) -> Tensor:
        """Them, in the graph. What rotates by them through a plan that names this does not keep them."""
        if not torch.is_grad_enabled():
            return self.build(self.trained)
        flat: Tensor = _Made.apply(self, *self.trained)
        return flat

    def in_backward(self) -> _Backward:
        """What there is of them in the backward that is going on.

        Raises:
            RuntimeError: a parameter has changed since the forward.
        """
        task = torch._C._current_graph_task_id()
        found = self._backwards.get(task)
        if found is None:
            self._check_versions()
            found = self._backwards[task] = _Backward(self)
            Variable._execution_engine.queue_callback(functools.partial(self._end, task))
        return found

    def _end(self, task: int) -> None:
        del self._backwards[task]

    def _check_versions(self) -> None:
        for parameter, version in zip(self.trained, self._versions, strict=True):
            if parameter._version != version:
                raise RuntimeError(
                    f"generators {tuple(parameter.shape)} of an adapter have been modified by an inplace operation "
                    "between a forward and its backward, which builds that forward's rotations again: call backward() "
                    "before the optimizer's step"
                )


class _Backward:
    """Deltas or generators in one backward, as they are first asked for, and what it has found of their gradients."""

    def __init__(self, source: Rebuilt) -> None:
        self._delta_of = source.delta_of
        self._aliases, self.flat = _apart(source.build, source.trained)
        self.values = self.flat.detach()
        self._grad: Tensor | None = None
        self._written: dict[int, int] = {}  # where, and how many blocks; elsewhere nothing has been written yet

    def rotate_back(self, x: Tensor, plan: Plan, grads: Sequence[Tensor], *, of_x: bool) -> Tensor | None:
        """The dx of a rotation, where it is asked for; its dD, or its generators' gradients, are kept.

        Args:
            x: as `rotated` took it.
            plan: by which it was rotated.
            grads: of what `rotated` returned, x's shape and dtype.
            of_x: whether dx is asked for.
        """
        if self._grad is None:
            self._grad = torch.empty_like(self.values)
        if not self._written.keys().isdisjoint(plan.starts):
            return self._rotate_back_again(x, plan, grads, of_x=of_x)
        self._written.update(dict.fromkeys(plan.starts, plan.blocks))
        place = self._grad.data_ptr()
        return processor.rotate_back(x, plan, self.values.data_ptr(), grads, plan.offsets, place, of_x=of_x)

    def _rotate_back_again(self, x: Tensor, plan: Plan, grads: Sequence[Tensor], *, of_x: bool) -> Tensor | None:
        """The same of a layer that was called twice."""
        found = self.values.new_empty(plan.layers, plan.blocks, *self.values.shape[1:])
        offsets = processor.offsets_of([plan.blocks * i for i in range(plan.layers)], self.values[0].numel())
        dx = processor.rotate_back(x, plan, self.values.data_ptr(), grads, offsets, found.data_ptr(), of_x=of_x)
        assert self._grad is not None
        for start, part, more in zip(plan.starts, parts(self._grad, plan), found, strict=True):
            part.copy_(part + more if start in self._written else more)
            self._written[start] = plan.blocks
        return dx

    def rotate_back_in_torch(self, x: Tensor, plan: Plan, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The dx of a rotation, and the gradient of all that `flat` is, where that may be derived once more."""
        derivable = torch.is_grad_enabled()
        own = parts(self.flat if derivable else self.values, plan)
        if self._delta_of is None:
            dx, *of_each = _gradients_in_torch(x, own, grads)
        else:
            with torch.enable_grad():
                own = [part.view_as(part) if derivable else part.requires_grad_() for part in own]
                deltas = [*map(self._delta_of, own)]
            given = deltas if derivable else [delta.detach() for delta in deltas]
            dx, *of_deltas = _gradients_in_torch(x, given, grads)
            of_each = [
                torch.autograd.grad(delta, part, of_delta, create_graph=derivable)[0]
                for delta, part, of_delta in zip(deltas, own, of_deltas, strict=True)
            ]
        rest, flat_too = len(self.values) - plan.blocks, (0, 0) * (self.values.dim() - 1)
        spread = [pad(one, (*flat_too, at, rest - at)) for one, at in zip(of_each, plan.starts, strict=True)]
        return dx, torch.stack(spread).sum(0)

    def gradients(self, grad: Tensor | None) -> Sequence[Tensor | None]:
        """What has been found, and what came by the graph, as gradients of the parameters."""
        found, self._grad = self._found(), None  # nobody else's from now on: autograd need not copy it
        total = found if grad is None else grad if found is None else found + grad
        if total is None:
            return [None] * len(self._aliases)
        return torch.autograd.grad(self.flat, self._aliases, total, create_graph=torch.is_grad_enabled())

    def _found(self) -> Tensor | None:
        if self._grad is not None and sum(self._written.values()) < len(self._grad):
            rest = torch.ones(len(self._grad), dtype=torch.bool)
            for start, blocks in self._written.items():
                rest[start : start + blocks] = False
            self._grad[rest] = 0.0
        return self._grad


def unseen() -> AbstractContextManager[object]:
    """Inside, modes that look at torch's operations see none, as they would not of a part that is not recomputed."""
    return _disable_current_modes() if processor.is_seen_by_modes() else nullcontext()


def _apart(build: Build, trained: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Build in a graph of its own, of which whoever counts what is saved or computed (checkpointing) hears nothing.

    Returns:
        Aliases of the parameters, whose own hooks are not to be called there, and the deltas.
    """
    with unseen(), torch.enable_grad(), saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
        aliases = [parameter.view_as(parameter) for parameter in trained]
        for alias in aliases:
            if not alias.requires_grad:  # frozen since the forward
                alias.requires_grad_()
        return aliases, build(aliases)


class _Made(torch.autograd.Function):
    """From parameters to deltas, or to generators. It keeps what autograd can tell the age of, and no deltas."""

    @staticmethod
    def forward(ctx: Any, source: Rebuilt, *trained: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*trained)
        ctx.source = source
        return _apart(source.build, trained)[1].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.source.in_backward().gradients(grad))


def parts(flat: Tensor, plan: Plan) -> list[Tensor]:
    """Each layer's part of a tensor of all blocks."""
    return [flat.narrow(0, start, plan.blocks) for start in plan.starts]


class _RotateByFlat(torch.autograd.Function):
    """By deltas built again, or in place. `flat`, all of them or all generators, stands for them in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flat: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.plan, ctx.source = plan, plan.flat.source
        return processor.rotate(x, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), plan = ctx.saved_tensors, ctx.plan
        deltas = ctx.source.in_backward()
        if not derived_by_torch(x, plan.size, grads):
            return deltas.rotate_back(x, plan, grads, of_x=ctx.needs_input_grad[0]), None, None
        return (*deltas.rotate_back_in_torch(x, plan, grads), None)


# What `Function.apply` does beside this is for functorch's transforms, which do not come here.
_by_flat = super(torch.autograd.Function, _RotateByFlat).apply
