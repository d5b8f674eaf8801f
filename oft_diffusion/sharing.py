"""Layers that read one tensor (q, k and v of an attention): the first that is called has it rotated for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from oft_diffusion.autocast import as_computed, compute_dtype
from oft_diffusion.kernels import block_rotate, block_rotate_shared

if TYPE_CHECKING:
    from oft_diffusion.hooks import LayerHook


class Ready(NamedTuple):
    """A rotated input: of which tensor, by which delta, in which grad mode, and at which version of that tensor."""

    made_of: Tensor
    by: Tensor
    rotated: Tensor
    grad: bool
    version: int


class SharedInput:
    """The hooks of such layers. What is ready for those that are still to be called lies with these.

    Which layers these are is known by their names (`targets.projections_of_one_input`); what is ready is used only for
    the very tensor that it was made of, and a group that turns out to read several is given up.
    """

    def __init__(self, hooks: Iterable[LayerHook]) -> None:
        self.hooks = list(hooks)
        for hook in self.hooks:
            if hook.shared is not None:
                hook.shared.give_up()
            hook.shared = self
        self._renew_plans()

    def rotate(self, hook: LayerHook, x: Tensor, delta: Tensor) -> Tensor:
        """What `block_rotate(x, delta)` gives, for one of the layers."""
        if hook.ready is None:
            return self._for_all(hook, x, delta)
        if (rotated := self.ready_for(hook, x, delta)) is not None:
            return rotated
        hook.ready = None
        return block_rotate(as_computed(x), delta)

    def given_up(self, hook: LayerHook, x: Tensor) -> bool:
        """Whether one of the layers turns out to read another input than the first that was called."""
        ready = hook.ready
        if ready is None or (ready.made_of is x and ready.version == _version(x)):
            return False
        self.give_up()
        return True

    def ready_for(self, hook: LayerHook, x: Tensor, delta: Tensor) -> Tensor | None:
        """What is ready, handed out once; None where it is of another input, delta, dtype or grad mode."""
        ready = hook.ready
        if ready is None or ready.made_of is not x or ready.by is not delta or ready.version != _version(x):
            return None
        if ready.grad != torch.is_grad_enabled():
            return None
        if ready.rotated.dtype != (compute_dtype(x.device, x.dtype) or x.dtype):
            return None
        hook.ready = None
        return ready.rotated

    def give_up(self) -> None:
        """Let each of the layers rotate its input by itself from now on."""
        for hook in self.hooks:
            hook.shared = hook.ready = None
        self._renew_plans()

    def _renew_plans(self) -> None:
        if self.hooks and not torch.compiler.is_compiling():
            self.hooks[0].bank.plans.renew(self.hooks)

    def _for_all(self, hook: LayerHook, x: Tensor, delta: Tensor) -> Tensor:
        waiting = [
            (other, own) for other in self.hooks if other is not hook and (own := _alike(other, delta)) is not None
        ]
        unlike = [delta]  # layers that share a generator have one delta
        for _, own in waiting:
            if not any(own is known for known in unlike):
                unlike.append(own)
        computed = as_computed(x)  # once for all of them
        made = [block_rotate(computed, delta)] if len(unlike) == 1 else block_rotate_shared(computed, unlike)
        for other, own in waiting:
            [rotated] = [y for y, known in zip(made, unlike, strict=True) if known is own]
            other.ready = Ready(x, own, rotated, torch.is_grad_enabled(), _version(x))
        return made[0]


def _alike(hook: LayerHook, delta: Tensor) -> Tensor | None:
    """Another layer's delta, where it has one, and one of the same shape, dtype and device."""
    deltas = hook.grad_deltas if torch.is_grad_enabled() else hook.eval_deltas
    if deltas is None or len(deltas) != 1 or deltas[0].shape != delta.shape:
        return None
    [own] = deltas
    return own if own.dtype == delta.dtype and own.device == delta.device else None


_ready: Callable[..., Ready] = tuple.__new__  # what `Ready(...)` does, without a Python function of its own


def hand_out(others: Iterable[tuple[LayerHook, int]], x: Tensor, rotated: Sequence[Tensor], *, grad: bool) -> None:
    """Lay what was rotated for them beside the other layers."""
    version = 0 if x.is_inference() else x._version
    for other, which in others:
        slot = other.grad_deltas if grad else other.eval_deltas
        if slot:
            other.ready = _ready(Ready, (x, slot[0], rotated[which], grad, version))


def _version(x: Tensor) -> int:
    """Changes with what is written into x, as far as torch tells."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
