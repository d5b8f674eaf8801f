"""Deltas that a backward builds again: gradients are those of deltas that the graph keeps, and none is kept."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.counting import saved_bytes
from benchmarks.methods import kernels_switched
from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.bank import OFTBank
from oft_diffusion.errors import AdapterError
from oft_diffusion.kernels import processor
from tests.core.test_cost import forward, lora, ours
from tests.library.support import excite

pytestmark = pytest.mark.skipif(processor.library() is None, reason="no compiler, or no Linux")
DELTAS = [12, 8, 8]  # shape of all deltas of a `Model`


class Pair(torch.nn.Module):
    """Two layers of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k, self.to_v = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_k(x) * self.to_v(x)
        return out


class Model(torch.nn.Module):
    """Three adapted layers; `skips` leaves the last out, `turns` calls all so many times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn2, self.out = Pair(), torch.nn.Linear(32, 32)
        self.skips, self.turns, self.checkpointed = False, 1, False

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.turns):
            x = checkpoint(self.attn2, x, use_reentrant=False) if self.checkpointed else self.attn2(x)
            x = x if self.skips else torch.tanh(self.out(x))
        return x


def adapted(**config: Any) -> tuple[Model, OFTBank, Tensor]:
    model = Model()
    bank = inject_oft(model, OFTConfig(8, targets=("attn2.to_.*", "out"), **config))
    excite(bank)
    return model, bank, torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()


def parameters(bank: OFTBank) -> list[Tensor]:
    return [parameter for parameter in bank.parameters() if parameter.requires_grad]


def alike(call: Callable[[Model, OFTBank, Tensor], Sequence[Tensor]], **config: Any) -> None:
    """What a call finds is what it finds of deltas that the graph keeps, as plain PyTorch has it."""
    with kernels_switched(on=False):
        expected = call(*adapted(**config))
    model, bank, x = adapted(**config)
    found = call(model, bank, x)
    assert bank._rebuilt is not None, "nothing was rebuilt: the test would prove nothing"
    assert len(found) == len(expected)
    assert max(float(one.abs().max()) for one in expected) > 1e-3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def step(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
    model(x).square().sum().backward()
    grads = [tensor.grad for tensor in (x, *parameters(bank))]
    assert all(grad is not None for grad in grads)
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("config", [{}, {"scaled": True}, {"parametrisation": "cayley_neumann"}], ids=str)
def test_a_step(config: dict[str, Any], checkpointed: bool, turns: int) -> None:
    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        model.checkpointed, model.turns = checkpointed, turns
        return step(model, bank, x)

    alike(call, **config)


def test_a_layer_that_is_not_called_has_no_gradient() -> None:
    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        model(x)  # as a first forward has to call all
        model.skips = True
        return step(model, bank, x)

    alike(call)


def test_nothing_of_one_backward_enters_the_next() -> None:
    """One that wants x's gradient alone leaves dD behind, which nobody comes for."""

    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        loss = model(x).square().sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        return [first, *(p.grad for p in parameters(bank) if p.grad is not None)]

    alike(call)


def test_one_backward_inside_another() -> None:
    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        loss = model(x).square().sum()
        inner: list[Tensor] = []

        def look(grad: Tensor) -> None:
            inner.extend(torch.autograd.grad(loss, parameters(bank), retain_graph=True))

        handle = x.register_hook(look)
        loss.backward(retain_graph=True)
        handle.remove()
        return [*inner, *(p.grad for p in parameters(bank) if p.grad is not None)]

    alike(call)


def test_second_derivatives() -> None:
    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        wanted = [x, *parameters(bank)]
        first = torch.autograd.grad(model(x).square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)  # type: ignore[arg-type]
        return [*first, *second]

    alike(call)


def test_gradients_of_many_losses_at_once() -> None:
    def call(model: Model, bank: OFTBank, x: Tensor) -> Sequence[Tensor]:
        out = model(x)
        losses = torch.randn(4, *out.shape, generator=torch.Generator().manual_seed(2))
        return torch.autograd.grad(out, [x, *parameters(bank)], losses, is_grads_batched=True)

    alike(call)


def test_two_forwards_and_one_backward() -> None:
    """Each has deltas of its own; checkpointed parts recompute with the last's, which are the same."""

    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        model.checkpointed = True
        (model(x).square().sum() + model(2 * x).sum()).backward()
        return [p.grad for p in parameters(bank) if p.grad is not None]

    alike(call)


def test_what_was_overwritten_before_the_backward_is_refused() -> None:
    model, bank, x = adapted()
    loss = model(x).sum()
    with torch.no_grad():
        parameters(bank)[0].mul_(2.0)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*backward\(\) before the optimizer"):
        loss.backward()
    model(x).sum().backward()


def test_a_frozen_adapter_beside_it() -> None:
    """It is read, too, and to load another into its place before the backward is refused."""

    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        inject_oft(model, OFTConfig(8, targets=("attn2.to_.*", "out")), "style")
        excite(bank, "style", seed=3)
        bank.freeze("style")
        return step(model, bank, x)

    alike(call)
    model, bank, x = adapted()
    call(model, bank, x)
    loss = model(x).sum()
    bank.swap("style", {site: 2 * t for site, t in bank.effective_generators("style").items()})
    with pytest.raises(RuntimeError, match=r"another adapter is loaded in place"):
        loss.backward()


def test_a_fractional_strength_is_refused_before_the_forward() -> None:
    model, bank, x = adapted()
    bank.set_adapters("default", 0.5)
    with pytest.raises(AdapterError, match="no finite gradient at the identity"):
        model(x)


def test_several_sizes_of_blocks_are_kept() -> None:
    """Two stages, whose deltas are two tensors, or a size that the C does not know."""
    for size in (4, 16):
        model, bank, x = adapted()
        inject_oft(model, OFTConfig(size, targets=("attn2.to_.*",)), "other")
        excite(bank, "other", seed=3)
        step(model, bank, x)
        assert bank._rebuilt is None


def living(shape: list[int]) -> int:
    """Tensors of that shape that anything holds."""
    gc.collect()
    return sum(isinstance(one, Tensor) and list(one.shape) == shape for one in gc.get_objects())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_no_deltas_outlive_a_forward_or_its_backward(checkpointed: bool) -> None:
    model, bank, x = adapted()
    model.checkpointed = checkpointed
    alive = []
    model.out.register_forward_hook(lambda *_: alive.append(living(DELTAS)))
    loss = model(x).square().sum()
    assert alive[0] > 0, "the count sees none: the test would prove nothing"
    assert living(DELTAS) == 0
    loss.backward(retain_graph=True)
    assert living(DELTAS) == 0
    assert all(hook.prepared is None and hook.ready is None and not hook.grad_deltas for hook in bank.hooks.values())
    assert saved_bytes(lambda: model(x).sum(), [*model.parameters(), *parameters(bank)]) > 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_less_is_saved_than_for_lora(checkpointed: bool) -> None:
    found = []
    for build in (ours, lora):
        model, trained = build()
        if checkpointed:
            model.train().enable_gradient_checkpointing()
        call = forward(model, of_inputs=False)
        call().backward()
        found.append(saved_bytes(call, [*model.parameters(), *trained]))
    assert found[0] <= found[1]
    with kernels_switched(on=False):
        model, trained = ours()
        assert saved_bytes(forward(model, of_inputs=False), [*model.parameters(), *trained]) > found[0]
