"""`OFTBank`: all generators of one component, and the deltas that its layers' hooks read.

The bank is never registered on the component: registered, it would enter the base's state dict and be cast with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from oft_diffusion.audit import BypassAudit, refuse_fused_lora
from oft_diffusion.choice import AdapterChoice
from oft_diffusion.compiling import CompiledParts, in_compiled_call, is_compiled, reset_compiler
from oft_diffusion.deltas import ConstantDeltas, DeltaBuilder, GraphMark, Placement
from oft_diffusion.errors import AdapterError
from oft_diffusion.hooks import Deltas, LayerHook, keep_for_recomputation
from oft_diffusion.kernels.processor_graph import Rebuilt, unseen
from oft_diffusion.mixing import MixedDeltas, Mixture
from oft_diffusion.plan import Active, Adapter, Stage, make_stages, split_by_site
from oft_diffusion.prepared import Plans

_BY_C: Placement = (torch.device("cpu"), torch.float32)  # what `kernels.processor` is for


class OFTBank(AdapterChoice):
    """Adapters of one component, which of them act, and the deltas that its hooks read.

    Attributes, beside those of `AdapterStore` and `AdapterChoice`:
        hooks: the hook of each site (`plan`): for nearly all, of a layer's input, by layer name.
        was_trainable: the component's parameters that required grad before injection froze it.
    """

    def __init__(self, component: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(component)
        self.hooks: dict[str, LayerHook] = {}
        self.was_trainable: frozenset[str] = frozenset()
        self._stages: tuple[Stage, ...] = ()
        self._builder = DeltaBuilder(self.generators, self.scales, self.adapters)
        self._placement: Placement = (device, dtype)
        self._constants = ConstantDeltas(self._builder)  # of frozen adapters
        self._rebuilt: Rebuilt | None = None  # of the last forward with grad that kept no deltas
        self._rebuilds = False  # the last forward with grad was such a one
        self.plans = Plans(self.hooks)
        self._ready = False  # the slots hold constants
        self._mixed: MixedDeltas | None = None
        # Deltas of trainable adapters live from one forward to its backward.
        self._mark = GraphMark()
        self._in_grad_forward = False
        self.between_forwards = False
        self._audit = BypassAudit()
        self._compiled = CompiledParts()
        self.register_load_state_dict_pre_hook(_refuse_load)
        self.register_load_state_dict_post_hook(_refresh_after_load)

    # -- adapters -------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Add an adapter with zero generators (the identity). It is not active yet.

        Raises:
            AdapterError: the name is taken or not usable.
        """
        self.store(name, adapter, self._placement[0] if self._placement[0].type != "meta" else torch.device("cpu"))

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter. Hooks of layers that no other adapter needs stay and do nothing.

        Raises:
            AdapterError: the adapter is unknown or merged.
        """
        self.require(name)
        self.refuse_merged([name])
        self._use(tuple(a for a in self._active if a.name != name))
        self.disabled.pop(name, None)
        self._builder.forget(name)
        self.discard(name)

    def mix(self, mixture: Mixture | None) -> None:
        """Give each image of a batch its own adapter, instead of those that are active; None ends that.

        The component needs `hooks.attach_mixing` for it, and each pipeline call `announce`.

        Raises:
            AdapterError: an adapter is unknown, merged, or trainable, or a strength is not possible for it.
        """
        if mixture is None:
            self._mixed = None
        else:
            for item in mixture.adapters:
                self.require(item.name)
                if self._builder.trainable(item.name):
                    raise AdapterError(
                        f"adapter {item.name!r} of {self.component} is trainable",
                        expected="frozen adapters in a mixed batch, as load_oft_weights leaves them",
                        fix=f"call bank.freeze({item.name!r}) first",
                    )
            self.refuse_merged(self.merged)  # whose rotation every image would have
            mixed = MixedDeltas(mixture, self._builder, self.adapters)
            mixed.check(self._placement)
            self._mixed = mixed
        self._empty()  # graphs guard what is in the slots, so those of before serve again afterwards

    def announce(self, prompts: int | None) -> None:
        """Tell a mixed batch how many prompts the pipeline call has that begins; None when it ends."""
        if self._mixed is not None:
            self._mixed.prompts = prompts

    @property
    def images(self) -> int:
        """How many images a mixed batch has, 0 where there is none."""
        return 0 if self._mixed is None else self._mixed.images

    def build_deltas(self, stages: Sequence[Stage], device: torch.device) -> list[Tensor]:
        """Flat deltas `(blocks, b, b)`, float32, of stages that need not be active."""
        return self._builder.build(stages, device)

    def freeze(self, name: str) -> None:
        """Make an adapter constant: its deltas are built once, and again only when this bank is told of a change."""
        for part in self.require(name).parts:
            self.generators[part.key].requires_grad_(False)
        self._builder.forget(name)  # what was kept of it before it was trained
        self._use(self._active)

    def swap(self, name: str, effective: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None) -> None:
        """Overwrite an adapter in place, deltas included: compiled models go on with the new one (a hot swap)."""
        self.write_generators(name, effective, scales)
        self.refresh()

    def refresh(self) -> None:
        """Rebuild constant deltas in place: call it after writing frozen generators by other means than `swap`."""
        self._builder.forget()
        self._constants.rewrite(self._stages)

    # -- what the hooks call ----------------------------------------------------------------------------------------

    def fill_rows(self, device: torch.device | None, dtype: torch.dtype | None, batch: int) -> None:
        """Put each row's deltas into every hook's slot, where a batch is mixed.

        Args:
            device: as `begin_forward` takes it.
            dtype: likewise.
            batch: how many rows the component's input has.

        Raises:
            AdapterError: nothing tells whose a row is (`Mixture.rows`).
        """
        if self._mixed is not None:
            placement = self._placed(device, dtype)
            self._fill(self._mixed.at(batch, placement, self.component), placement)

    def begin_forward(self, module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Put every layer's deltas into its hook's slot; or all generators, where C builds deltas of them in place.

        Args:
            module: the component.
            device: of the component's first tensor input: with offloading the component itself may be elsewhere.
            dtype: that layers compute in, by that input; None where it does not tell (token ids).
        """
        if self._acting and not in_compiled_call():
            refuse_fused_lora(module)
            self._audit.begin(self.hooks.values())
        if self._mixed is not None:
            return  # `fill_rows` has filled the slots
        if not self._trainable():
            self._place_constants(device, dtype)
            return
        self._ready = self.between_forwards = False
        self._constants.clear()
        self._placement = placement = self._placed(device, dtype)
        self._in_grad_forward, compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
        if self._is_base() and not self._in_grad_forward and not compiling:
            for hook in self.hooks.values():
                hook.eval_deltas = ()  # the base's answers, which training on a prior asks for in every step
            return
        source = None
        if placement == _BY_C and not compiling:
            source = self._builder.for_c(self._stages, in_place=not self._compiled.there_are(module))
        if source is None:
            flats = [flat.to(placement[1]) for flat in self._builder.build(self._stages, placement[0])]
        else:
            flats = [source.for_forward()]
        if self._in_grad_forward:
            if not compiling:
                flats = self._mark.tie(flats, self._active, self.component)
            self._rebuilds, self._rebuilt = source is not None, source or self._rebuilt
        by_site = split_by_site(self._stages, flats)
        for site, hook in self.hooks.items():
            if self._in_grad_forward:
                hook.grad_deltas, hook.eval_deltas = by_site.get(site, ()), None
            else:
                hook.eval_deltas = by_site.get(site, ())
        if source is not None:
            self.plans.for_forward(self._stages[0], flats[0], source, grad=self._in_grad_forward)
        else:
            self._plan_for_slots()

    def end_forward(self, module: nn.Module, *, failed: bool) -> None:
        """Drop what must not outlive the forward, and check that no target was bypassed, unless the forward raised."""
        if self._trainable():
            silent = self._in_grad_forward and not all(hook.fired for hook in self.hooks.values())
            keeping = silent and is_compiled(module)  # such layers do not say that they fire, and need theirs
            for hook in self.hooks.values():
                hook.eval_deltas = None
                if self._in_grad_forward and self._rebuilds and (hook.fired or not keeping):
                    hook.grad_deltas = None
            if self._in_grad_forward:
                keep_for_recomputation(self.hooks.values())
            self._in_grad_forward = False
            self.between_forwards = True
            self.plans.end_forward()
        elif self._mixed is not None:
            self._clear_slots()  # the next rows may be others'
        for hook in self.hooks.values():
            hook.ready = None  # what nobody came for
        if self._acting and not failed and not in_compiled_call():
            self._audit.end(module, self.hooks, self._acting)

    def fresh_deltas(self, name: str) -> Deltas:
        """Deltas for a layer whose slot is empty.

        Raises:
            AdapterError: gradients are wanted outside the component's forward, or the layer runs inside reentrant
                gradient checkpointing; or the batch is mixed, and only that forward tells whose its rows are.
        """
        if self._mixed is not None:
            raise AdapterError(
                f"layer {name} of {self.component} runs outside its component's forward while each image has an "
                "adapter of its own, so that nothing tells which rows are which images",
                expected="calls of the whole component",
                fix="draw with one adapter at a time",
            )
        if not self._trainable():
            self._place(self._placement)
            return self.hooks[name].eval_deltas or ()
        if self._in_grad_forward:
            raise AdapterError(
                f"layer {name} of {self.component} runs without grad inside a forward with grad, as reentrant "
                "gradient checkpointing does, and the adapter's gradients would be lost",
                expected="non-reentrant checkpointing",
                fix='enable it with gradient_checkpointing_kwargs={"use_reentrant": False}',
            )
        if torch.is_grad_enabled():
            self.refuse_lone_call(name)
        flats = self._builder.build(self._stages, self._placement[0])
        return split_by_site(self._stages, flats).get(name, ())

    def fit_deltas(self, hook: LayerHook, deltas: Deltas, placement: Placement) -> Deltas:
        """Deltas in another device and dtype. Constants are converted once for each, and stay in the hook."""
        if self._trainable() or self._mixed is not None:
            return tuple(delta.to(*placement) for delta in deltas)
        fitted = split_by_site(self._stages, self._constants.at(self._stages, placement))[hook.site]
        hook.grad_deltas = hook.eval_deltas = fitted
        return fitted

    def begin_recomputation(self, name: str) -> None:
        """Where a backward recomputes a checkpointed part of the component: have deltas ready again, if they are not.

        Raises:
            AdapterError: as `refuse_lone_call` does.
        """
        self.refuse_lone_call(name)
        if self._rebuilt is None or self.plans.holds(self._rebuilt):
            return
        with unseen():
            flat = self._rebuilt.in_backward().values.detach().requires_grad_()
            by_site = split_by_site(self._stages, [flat])
        empty = [hook for hook in self.hooks.values() if hook.grad_deltas is None]
        for hook in empty:
            hook.grad_deltas = by_site.get(hook.site, ())
        self.plans.for_forward(self._stages[0], flat, self._rebuilt, grad=True)
        Variable._execution_engine.queue_callback(lambda: self._end_recomputation(empty))

    def _end_recomputation(self, hooks: Sequence[LayerHook]) -> None:
        for hook in hooks:
            hook.grad_deltas = hook.ready = None
        self.plans.end_forward()

    def refuse_lone_call(self, name: str) -> None:
        """Raise, unless a backward is recomputing a checkpointed part of the component.

        Raises:
            AdapterError: a layer is called under grad outside its component's forward, with deltas of an earlier step.
        """
        if torch._C._current_graph_task_id() != -1:
            return
        raise AdapterError(
            f"layer {name} of {self.component} was called on its own with gradients enabled",
            expected="a call of the whole component, which prepares the step's rotations",
            fix="call the component, or the layer under torch.no_grad()",
        )

    # -- constants and layouts --------------------------------------------------------------------------------------

    @property
    def _acting(self) -> tuple[Stage, ...]:
        return self._stages if self._mixed is None else self._mixed.stages

    def _trainable(self) -> bool:
        return any(self._builder.trainable(a.name) for a in self._active)

    def _is_base(self) -> bool:
        return all(a.strength == 0.0 for a in self._active)

    def _use(self, active: tuple[Active, ...]) -> None:
        if self._mixed is not None:
            raise AdapterError(
                f"the adapters of {self.component} are given image by image now",
                expected="no other choice of adapters until that is over",
                fix="leave the `with` block first",
            )
        stages = make_stages(active, self.adapters)
        same_layout = [s.structure() for s in stages] == [s.structure() for s in self._stages]
        self._active, self._stages = active, stages
        if same_layout:
            if self._ready:
                self._constants.rewrite(self._stages)
            elif not self._trainable():
                self._place(self._placement)
            return
        self._constants.clear()
        self._empty()
        reset_compiler()

    def _empty(self) -> None:
        """Empty the slots, since sites or shapes of deltas have changed, and fill them where that can be done now."""
        self._audit.restart()
        self._ready = self.between_forwards = False
        self._rebuilt = None
        self._clear_slots()
        if self._mixed is None and not self._trainable():
            self._place(self._placement)

    def _clear_slots(self) -> None:
        self.plans.forget()
        for hook in self.hooks.values():
            hook.grad_deltas = hook.eval_deltas = None

    def _placed(self, device: torch.device | None, dtype: torch.dtype | None) -> Placement:
        """Where a forward is, by its input; where that does not tell, as the last one was."""
        return device or self._placement[0], dtype or self._placement[1]

    def _place_constants(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        placement = self._placed(device, dtype)
        if not self._ready or placement != self._placement:
            self._place(placement)

    # Where a compiler traces, it runs this as it is: traced, constants would be results of its graph, which the next
    # trace does without, and a CUDA graph's results lie in memory that its next run writes over. This is what
    # torch.compiler.assume_constant_result does, which would import the whole compiler.
    _place_constants._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _place(self, placement: Placement) -> None:
        if placement != self._placement:
            self._constants.clear()
        self._fill(split_by_site(self._stages, self._constants.at(self._stages, placement)), placement)
        self._ready = True

    def _fill(self, by_site: Mapping[str, Deltas], placement: Placement) -> None:
        self._placement = placement
        for site, hook in self.hooks.items():
            hook.grad_deltas = hook.eval_deltas = by_site.get(site, ())
        self.between_forwards = False
        self._plan_for_slots()

    def _plan_for_slots(self) -> None:
        if self._placement == _BY_C and not torch.compiler.is_compiling():
            self.plans.for_slots(*((self._in_grad_forward,) if self._trainable() else (False, True)))
        else:
            self.plans.forget()

    # -- what nn.Module would get wrong -------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OFTBank:
        """Follow device moves and refuse casts: a rotation rounded to 16 bits is none."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            probe = fn(tensor.new_empty(0))
            if tensor.is_meta or (probe.dtype == tensor.dtype and probe.device == tensor.device):
                return fn(tensor)
            return tensor.to(probe.device)

        super()._apply(keep_dtype, recurse)
        self._constants.clear()
        self._clear_slots()
        self._ready = False
        self._builder.forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.update(_ready=False, _in_grad_forward=False, between_forwards=False, _mixed=None, _rebuilt=None)
        return state


def _refuse_load(bank: nn.Module, _state: Any, _prefix: str, *_rest: Any) -> None:
    assert isinstance(bank, OFTBank)
    bank.refuse_merged(bank.merged)


def _refresh_after_load(bank: nn.Module, _keys: Any) -> None:
    assert isinstance(bank, OFTBank)
    bank.refresh()
