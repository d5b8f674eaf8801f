"""What C is told of the layers' rotations (`kernels.processor`), put together before their inputs come.

All at once that takes less time than layer by layer, and where one tensor holds all deltas it is done once for all
forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from oft_diffusion.kernels import processor
from oft_diffusion.plan import Stage

if TYPE_CHECKING:
    from oft_diffusion.hooks import LayerHook
    from oft_diffusion.kernels.processor_graph import Rebuilt


class Prepared(NamedTuple):
    """The rotations of one input, for the layer that is called first: which is its own, and the others'."""

    plan: processor.Plan
    own: int
    others: Sequence[tuple[LayerHook, int]]


class Plans:
    """Those of a component's hooks.

    Args:
        hooks: all of the component, by site; read anew each time.
    """

    def __init__(self, hooks: Mapping[str, LayerHook]) -> None:
        self._hooks = hooks
        self._flat = processor.Flat()  # of the forward that is going on
        self._stage: Stage | None = None  # whose forwards all are planned for
        self._of_generators = False
        self._delta_of: Callable[[Tensor], Tensor] | None = None  # of a part of such generators
        self._pieces: tuple[Tensor, Mapping[str, Tensor]] | None = None  # such generators, and each entry's part
        self._slots = processor.Flat()  # in which grad modes those for slots are of use

    def forget(self) -> None:
        """Have no plans."""
        self._stage = None
        for hook in self._hooks.values():
            hook.prepared = None

    def for_slots(self, *modes: bool) -> None:
        """Plan for the deltas that are in the slots, for as long as they are there.

        Args:
            modes: of `torch.is_grad_enabled()`, whose slots these are: both for constants, which are in both.
        """
        self._stage, self._slots = None, processor.Flat(*modes)
        self.renew(self._hooks.values())

    def for_forward(self, stage: Stage, flat: Tensor, source: Rebuilt, *, grad: bool) -> None:
        """Name the deltas of a forward, which are one stage's, and plan for all its forwards, where that is to be done.

        Args:
            stage: all that is active.
            flat: deltas `(blocks, b, b)`, or generators `(blocks, b(b-1)/2)`, of which each rotation builds its own;
                contiguous, float32; in the graph where there is one.
            source: what made them, and has them again in the backward.
            grad: whether there is to be one.
        """
        of_generators = flat.dim() == 2
        if self._stage is not stage or self._of_generators != of_generators:
            self._stage, self._of_generators = stage, of_generators
            self.renew(self._hooks.values())
        self._flat.hold(flat, source if grad else None)
        self._delta_of = source.delta_of

    def end_forward(self) -> None:
        """Let go of the deltas of a forward."""
        self._flat.drop()
        self._delta_of = self._pieces = None
        if self._stage is None:
            self.forget()

    def delta_of(self, site: str, generators: Tensor) -> Tensor:
        """A site's delta, `(r, b, b)`, by itself.

        Args:
            site: one that is adapted.
            generators: of all sites, as a forward's slots hold them.
        """
        assert self._stage is not None
        assert self._delta_of is not None
        pieces = self._pieces
        if pieces is None or pieces[0] is not generators:
            pieces = generators, self._stage.split(generators, 0)
            if not torch.compiler.is_compiling():  # tensors of its graph must not outlive it
                self._pieces = pieces
        return self._delta_of(pieces[1][self._stage.sites[site]])

    def holds(self, source: Rebuilt) -> bool:
        """Whether it is that source's deltas that are rotated by now."""
        return self._flat.source is source

    def renew(self, hooks: Iterable[LayerHook]) -> None:
        """Plan for these hooks again: which of them read one input may have changed."""
        for hook in hooks:
            group = [hook] if hook.shared is None else hook.shared.hooks
            if group[0] is hook:
                found = self._by_slots(group) if self._stage is None else self._by_stage(group, self._stage)
                for one in group:
                    one.prepared = None
                    if found is not None:
                        plan, which = found
                        others = [pair for pair in zip(group, which, strict=True) if pair[0] is not one]
                        one.prepared = Prepared(plan, which[group.index(one)], others)

    def __getstate__(self) -> dict[str, object]:
        # Copies of hooks have no plans.
        return dict(self.__dict__, _stage=None, _flat=processor.Flat(), _delta_of=None, _pieces=None)

    def _by_slots(self, group: Sequence[LayerHook]) -> tuple[processor.Plan, Sequence[int]] | None:
        slots = [hook.grad_deltas if True in self._slots.modes else hook.eval_deltas for hook in group]
        deltas = [slot[0] for slot in slots if slot and len(slot) == 1]
        unlike = {id(delta): delta for delta in deltas}  # layers that share a generator have one delta
        if len(deltas) < len(group) or not processor.takes([*unlike.values()]):
            return None
        order = [*unlike]
        return processor.plan_for([*unlike.values()], self._slots), [order.index(id(delta)) for delta in deltas]

    def _by_stage(self, group: Sequence[LayerHook], stage: Stage) -> tuple[processor.Plan, Sequence[int]] | None:
        entries = [stage.sites[hook.site] for hook in group if hook.site in stage.sites]
        order, counts = [*dict.fromkeys(entries)], {stage.blocks[entry] for entry in entries}
        if len(entries) < len(group) or len(counts) > 1 or len(order) > processor.MOST_LAYERS:
            return None
        begins, size = stage.begins(), stage.block_size
        starts = [begins[entry] for entry in order]
        plan = processor.plan_in(self._flat, starts, counts.pop(), size, of_generators=self._of_generators)
        return plan, [order.index(entry) for entry in entries]
