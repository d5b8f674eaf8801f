"""From generators to the deltas of the active adapters, and the mark that ties a forward's deltas to its backward."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from oft_diffusion import rotation
from oft_diffusion.autocast import without_autocast
from oft_diffusion.errors import AdapterError
from oft_diffusion.kernels import processor
from oft_diffusion.kernels.processor_graph import Rebuilt
from oft_diffusion.plan import Active, Adapter, Member, Part, Stage

# Where deltas are wanted, and in which dtype.
Placement = tuple[torch.device, torch.dtype]


class DeltaBuilder:
    """Builds deltas; keeps what is costly and constant of frozen adapters (spectra, deltas beside trainable ones)."""

    def __init__(
        self,
        generators: nn.ParameterDict | Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
        adapters: Mapping[str, Adapter],
    ) -> None:
        self._generators = generators
        self._scales = scales
        self._adapters = adapters
        self._spectra: dict[str, rotation.Spectrum] = {}
        self._frozen: dict[tuple[Active, str], Tensor] = {}

    def trainable(self, name: str) -> bool:
        """Whether an adapter is rebuilt in every forward: no cache can see every way to write a parameter."""
        return any(self._generators[part.key].requires_grad for part in self._adapters[name].parts)

    def build(self, stages: Sequence[Stage], device: torch.device) -> list[Tensor]:
        """Flat deltas of every stage, `(blocks, b, b)`, float32. Differentiable in trainable generators."""
        with without_autocast(device):
            return [self._stage(stage, device) for stage in stages]

    def for_c(self, stages: Sequence[Stage], *, in_place: bool) -> Rebuilt | None:
        """What C is to rotate by in a forward, and has again in its backward; None where it takes no part.

        Args:
            stages: all that is active, on a processor.
            in_place: whether it may be generators, `(blocks, b(b-1)/2)`, of which each delta is built where it is used.
                That can be of one adapter as it is trained; else it is deltas, `(blocks, b, b)`, of one stage.
        """
        read = [self._generators[key] for key in _keys(stages)]
        if len(stages) != 1 or not all(processor.fits(generators, stages[0].block_size) for generators in read):
            return None
        [member, *others] = stages[0].members
        config, key = self._adapters[member.active.name].config, member.part.key
        as_trained = member.active.strength == 1.0 and config.parametrisation == "cayley" and key not in self._scales
        if not in_place or others or member.rows is not None or not as_trained:
            return self._again(stages)

        def delta_of(generators: Tensor) -> Tensor:
            with without_autocast(generators.device):
                return rotation.rotation_delta(generators, config)

        return Rebuilt(
            lambda aliases: rotation.effective_generator(aliases[0], config).contiguous(),  # as C reads it
            [self._generators[key]],
            delta_of,
        )

    def _again(self, stages: Sequence[Stage]) -> Rebuilt:
        """The flat deltas of the one stage there is, to be built by C in a forward and again in its backward.

        Whatever becomes of the adapters meanwhile: what is trained is watched, what is frozen is kept.
        """
        read = {key: self._generators[key] for key in _keys(stages)}
        trained = [key for key in read if read[key].requires_grad]
        scales = {key: self._scales[key] for key in read if key in self._scales}
        adapters = {member.active.name: self._adapters[member.active.name] for member in stages[0].members}

        def build(aliases: Sequence[Tensor]) -> Tensor:
            own = DeltaBuilder(read | dict(zip(trained, aliases, strict=True)), scales, adapters)
            own._frozen, own._spectra = frozen, spectra
            return own.build(stages, torch.device("cpu"))[0]

        frozen, spectra = self._frozen, self._spectra
        return Rebuilt(build, [read[key] for key in trained])

    def build_apart(self, stages: Sequence[Stage], device: torch.device) -> list[Tensor]:
        """Flat deltas of every stage, its members not composed but side by side, behind the identity.

        Shapes `(1 + members, blocks, b, b)`, float32.
        """
        with without_autocast(device):
            return [
                torch.stack([torch.zeros_like(rows[0]), *rows])
                for rows in ([self._member(stage, member, device) for member in stage.members] for stage in stages)
            ]

    def part(self, active: Active, part: Part, device: torch.device) -> Tensor:
        """Deltas of a part of an adapter at its strength, `(blocks, b, b)`, float32."""
        if self.trainable(active.name):
            self.forget(active.name)
            return self._compute(active, part, device)
        kept = (active, part.key)
        if kept not in self._frozen:
            with torch.inference_mode(False), torch.no_grad():
                self._frozen[kept] = self._compute(active, part, device)
        return self._frozen[kept].to(device)

    def forget(self, name: str | None = None) -> None:
        """Drop what is kept of one adapter, or of all."""
        if name is None:
            self._spectra, self._frozen = {}, {}
            return
        keys = {part.key for part in self._adapters[name].parts}
        if any(key in keys for key in self._spectra) or any(kept[0].name == name for kept in self._frozen):
            # Anew, since what was kept may still serve a backward (`_again`).
            self._spectra = {key: s for key, s in self._spectra.items() if key not in keys}
            self._frozen = {kept: d for kept, d in self._frozen.items() if kept[0].name != name}

    def forget_deltas(self) -> None:
        """Drop kept deltas, not spectra: constants hold what they were for."""
        self._frozen = {}

    def _stage(self, stage: Stage, device: torch.device) -> Tensor:
        result: Tensor | None = None
        for member in stage.members:
            delta = self._member(stage, member, device)
            result = delta if result is None else rotation.compose_deltas(result, delta)
        assert result is not None
        # Row by row in memory, whatever it was computed as: some BLAS round a transposed matrix otherwise, and a
        # reloaded or unfused adapter would draw another last bit.
        return result.contiguous()

    def _member(self, stage: Stage, member: Member, device: torch.device) -> Tensor:
        delta = self.part(member.active, member.part, device)
        rows = member.rows_on(device)
        if rows is None:
            return delta
        identity = delta.new_zeros(1, stage.block_size, stage.block_size)
        return torch.cat([delta, identity]).index_select(0, rows)

    def _compute(self, active: Active, part: Part, device: torch.device) -> Tensor:
        parameter, config = self._generators[part.key], self._adapters[active.name].config
        scale = self._scales[part.key].to(device) if part.key in self._scales else None
        packed = rotation.effective_generator(parameter, config)
        if active.mode == "linear" or active.strength == 1.0:
            delta = rotation.rotation_delta(packed.to(device), config)
            if scale is not None:
                delta = rotation.scaled_delta(delta, scale)
            return delta if active.strength == 1.0 else active.strength * delta
        if parameter.requires_grad and torch.is_grad_enabled():
            raise AdapterError(
                f"adapter {active.name!r} is trainable and active with strength {active.strength:g}",
                expected="strength 1 while training: a fractional power has no finite gradient at the identity",
                fix='use strength 1 or mode="linear", or evaluate under torch.no_grad()',
            )
        if active.strength == 0.0:  # the base, also for a series that has no other powers
            return packed.new_zeros(len(packed), part.block_size, part.block_size, device=device)
        parts = self._spectra.get(part.key) or rotation.spectrum(packed, config)
        if not parameter.requires_grad:
            self._spectra[part.key] = parts
        delta = rotation.power_delta(parts, active.strength).to(device, parameter.dtype)
        return delta if scale is None else rotation.scaled_delta(delta, _power(scale, active))


def _keys(stages: Sequence[Stage]) -> list[str]:
    """Whose parameters deltas of these stages are made of."""
    return list(dict.fromkeys(member.part.key for stage in stages for member in stage.members))


def _power(scale: Tensor, active: Active) -> Tensor:
    if float(scale.min()) <= 0.0:
        raise AdapterError(
            f"adapter {active.name!r} scales outputs by {float(scale.min()):.3g}",
            expected="positive factors, of which any power can be taken",
            fix='use strength 1, or mode="linear"',
        )
    return scale**active.strength


class ConstantDeltas:
    """Deltas of frozen adapters, per placement: tensors of fixed address, rewritten in place.

    Compiled models and captured graphs read those addresses, and so go on with the new values.
    """

    def __init__(self, builder: DeltaBuilder) -> None:
        self._builder = builder
        self._flats: dict[Placement, list[Tensor]] = {}

    def at(self, stages: Sequence[Stage], placement: Placement) -> list[Tensor]:
        """Flat deltas of every stage in that placement, built on the first call."""
        if placement not in self._flats:
            # Outside inference mode, or the constants could never take part in a graph later.
            with torch.inference_mode(False), torch.no_grad():
                flats = self._builder.build(stages, placement[0])
                self._flats[placement] = [f.to(placement[1], copy=True) for f in flats]
            self._builder.forget_deltas()
        return self._flats[placement]

    def rewrite(self, stages: Sequence[Stage]) -> None:
        """Overwrite every placement's values; the stages have the layout they had in `at`."""
        with torch.inference_mode(False), torch.no_grad():
            for placement, flats in self._flats.items():
                for flat, new in zip(flats, self._builder.build(stages, placement[0]), strict=True):
                    flat.copy_(new)
        self._builder.forget_deltas()

    def clear(self) -> None:
        """Forget all of them."""
        self._flats = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_builder": self._builder, "_flats": {}}


class GraphMark:
    """Knows whether a backward of earlier forwards with grad is still to come, and under which adapters they ran."""

    def __init__(self) -> None:
        self._active: tuple[Active, ...] = ()
        self._nodes: list[weakref.ref[Any]] = []  # in the graphs of forwards under `_active`

    def tie(self, flats: list[Tensor], active: tuple[Active, ...], component: str) -> list[Tensor]:
        """Mark a new forward's graph.

        Raises:
            AdapterError: an earlier forward under other settings awaits its backward: checkpointed parts of it would
                be recomputed with the new deltas, and its gradients silently wrong.
        """
        self._nodes = [node for node in self._nodes if _awaits_backward(node)]
        if self._nodes and self._active != active:
            raise AdapterError(
                f"{component} is called with other adapters or strengths before the backward of an earlier call",
                expected="one setting for all calls of a backward, as checkpointing recomputes with the last",
                fix="call backward() first, drop the earlier result, or run one of the calls under torch.no_grad()",
            )
        self._active = active
        # What a tie saves is its own: a component that is checkpointed whole would be recomputed to look at it.
        with saved_tensors_hooks(_as_it_is, _as_it_is):
            tied = [_Tie.apply(flat) if flat.requires_grad else flat for flat in flats]
        self._nodes += [weakref.ref(flat.grad_fn) for flat in tied if flat.requires_grad]
        return tied

    def __getstate__(self) -> dict[str, Any]:
        return {"_active": (), "_nodes": []}


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _awaits_backward(node: weakref.ref[Any]) -> bool:
    """Whether the graph of a `_Tie` is still held, and no backward has freed it (`retain_graph` does not)."""
    ctx = node()
    if ctx is None:
        return False
    try:
        return len(ctx.saved_tensors) > 0
    except RuntimeError:  # freed
        return False


class _Tie(torch.autograd.Function):
    """Identity whose node lives as long as the graph, and saves something, so that it can tell when that is freed."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(torch.empty(0))
        return flat.view_as(flat)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]
