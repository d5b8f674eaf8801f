"""Layers that C does not rotate where it builds deltas in place: each gets its own, or all are built."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.methods import kernels_switched
from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.bank import OFTBank
from oft_diffusion.kernels import processor
from tests.core.test_rebuilt import Model, Pair, adapted, alike, are_near, parameters, step, without_gradients
from tests.library.support import excite

pytestmark = pytest.mark.skipif(processor.library() is None, reason="no compiler, or no Linux")


class Mix(torch.nn.Module):
    """A convolution of rows, as pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.T[None, :, :, None])[0, :, :, 0].T
        return out


def test_an_input_that_c_does_not_take_has_its_delta_built_by_itself() -> None:
    """Where something looks at the operations of some layers, and where a layer computes in another dtype."""

    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        inner = model.attn2.to_v.forward
        model.attn2.to_v.double().forward = lambda x: inner(x).float()  # type: ignore[method-assign, assignment]
        model.attn2.to_v.register_forward_pre_hook(lambda _, args: (args[0].double(),), prepend=True)
        watched = model.attn2.forward

        def watch(x: Tensor) -> Tensor:
            with FlopCounterMode(display=False):
                return watched(x)

        model.attn2.forward = watch  # type: ignore[method-assign]
        model(x).square().sum().backward()
        return [grad for grad in (x.grad, *(p.grad for p in parameters(bank))) if grad is not None]

    alike(call)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_that_are_not_planned_for_build_their_own(checkpointed: bool) -> None:
    """A convolution, and k of a pair whose v is adapted no more: their deltas are parts of one split of generators."""

    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        inner, model.checkpointed = model.attn2.forward, checkpointed
        model.attn2.forward = lambda x: model.get_submodule("mix")(inner(x))  # type: ignore[method-assign]
        return step(model, bank, x)

    def made() -> tuple[Model, OFTBank, Tensor]:
        model = Model()
        model.mix = Mix()
        both = inject_oft(model, OFTConfig(8, targets=("attn2.to_.*", "out")))
        inject_oft(model, OFTConfig(8, targets=("attn2.to_k", "out", "mix.conv")), "second")
        both.delete_adapter("default")
        excite(both, "second")
        return model, both, torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()

    with kernels_switched(on=False):
        expected = call(*made())
    found = call(*made())
    are_near(found, expected)


def test_a_compiled_part_is_given_deltas() -> None:
    """A trace of a build in each layer would take long to compile, and to run."""
    with kernels_switched(on=False):
        expected = step(*adapted())
    model, bank, x = adapted()
    step(model, bank, x)  # eager at first
    without_gradients(bank, x)
    model.attn2.compile(backend="eager", fullgraph=True)
    dims: list[int] = []
    model.out.register_forward_pre_hook(
        lambda *_: dims.extend(delta.dim() for hook in bank.hooks.values() for delta in hook.grad_deltas or ())
    )
    found = step(model, bank, x)
    torch.compiler.reset()
    assert dims == [3, 3, 3]
    are_near(found, expected)


def test_a_compiled_part_that_goes_unnoticed_builds_its_own() -> None:
    """Of two of one class the second alone is compiled."""

    def made() -> tuple[Model, OFTBank, Tensor]:
        model = Model()
        model.other = other = Pair()
        model.out.register_forward_pre_hook(lambda _, args: (args[0] + other(args[0]),))
        bank = inject_oft(model, OFTConfig(8, targets=("attn2.to_.*", "other.to_.*", "out")))
        excite(bank)
        return model, bank, torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()

    with kernels_switched(on=False):
        expected = step(*made())
    model, bank, x = made()
    step(model, bank, x)
    without_gradients(bank, x)
    model.get_submodule("other").compile(backend="eager")
    found = step(model, bank, x)
    torch.compiler.reset()
    are_near(found, expected)
