"""Deltas that C builds where it uses them, or that a backward builds again: gradients are those of kept deltas."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from benchmarks.counting import saved_bytes
from benchmarks.methods import kernels_switched
from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.bank import OFTBank
from oft_diffusion.errors import AdapterError
from oft_diffusion.kernels import processor
from tests.core.test_cost import forward, lora, ours
from tests.library.support import excite

pytestmark = pytest.mark.skipif(processor.library() is None, reason="no compiler, or no Linux")
DELTAS = 12 * 8 * 8 * 4  # bytes of all deltas of a `Model`


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
        self.policy: Callable[[], Any] = noop_context_fn

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.turns):
            x = (
                checkpoint(self.attn2, x, use_reentrant=False, context_fn=self.policy)
                if self.checkpointed
                else self.attn2(x)
            )
            x = x if self.skips else torch.tanh(self.out(x))
        return x


def adapted(**config: Any) -> tuple[Model, OFTBank, Tensor]:
    model = Model()
    bank = inject_oft(model, OFTConfig(8, targets=("attn2.to_.*", "out"), **config))
    excite(bank)
    return model, bank, torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()


def parameters(bank: OFTBank) -> list[Tensor]:
    return [parameter for parameter in bank.parameters() if parameter.requires_grad]


IN_PLACE: dict[str, Any] = {}  # C builds each delta where it is used
AT_ONCE: dict[str, Any] = {"parametrisation": "cayley_neumann"}  # all are built before a forward, and in its backward


def alike(call: Callable[[Model, OFTBank, Tensor], Sequence[Tensor]], **config: Any) -> None:
    """What a call finds is what it finds of deltas that the graph keeps, as plain PyTorch has it, in either way."""
    for way in (IN_PLACE, AT_ONCE):
        _alike(call, way | config)


def _alike(call: Callable[[Model, OFTBank, Tensor], Sequence[Tensor]], config: dict[str, Any]) -> None:
    with kernels_switched(on=False):
        expected = call(*adapted(**config))
    model, bank, x = adapted(**config)
    nodes: list[Any] = []
    model.out.register_forward_pre_hook(lambda module, args: nodes.append(args[0].grad_fn))
    found = call(model, bank, x)
    assert "RotateByFlat" in str(nodes[0]), "the graph keeps deltas: the test would prove nothing"
    assert len(found) == len(expected)
    assert max(float(one.abs().max()) for one in expected) > 1e-3
    are_near(found, expected)


def are_near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """To what float32 rounds, of the largest number of each."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * float(other.abs().max()))


def without_gradients(bank: OFTBank, x: Tensor) -> None:
    """As before a step."""
    for tensor in (x, *parameters(bank)):
        tensor.grad = None


def step(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
    model(x).square().sum().backward()
    grads = [tensor.grad for tensor in (x, *parameters(bank))]
    assert all(grad is not None for grad in grads)
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("config", [{}, {"scaled": True}, {"share_qkv": True}], ids=str)
def test_a_step(config: dict[str, Any], checkpointed: bool, turns: int) -> None:
    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        model.checkpointed, model.turns = checkpointed, turns
        return step(model, bank, x)

    alike(call, **config)


@kernels_switched(on=False)
def test_layers_of_one_generator_are_recomputed_as_they_were_computed() -> None:
    """By one delta, rotated once, where the graph keeps it."""
    model, bank, x = adapted(share_qkv=True)
    expected = step(model, bank, x)
    without_gradients(bank, x)
    model.checkpointed = True
    for one, other in zip(step(model, bank, x), expected, strict=True):
        torch.testing.assert_close(one, other)


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


def style(model: Model, seed: int) -> None:
    bank = inject_oft(model, OFTConfig(8, targets=("attn2.to_.*", "out")), "style")
    excite(bank, "style", seed=seed)
    bank.freeze("style")


def replace(model: Model, bank: OFTBank) -> None:
    bank.delete_adapter("style")
    style(model, 5)


CHANGES: dict[str, Callable[[Model, OFTBank], object]] = {
    "nothing": lambda model, bank: None,
    "swapped": lambda model, bank: bank.swap("style", bank.effective_generators("default")),
    "deleted": lambda model, bank: bank.delete_adapter("style"),
    "replaced": replace,
    "frozen": lambda model, bank: bank.freeze("default"),
    "requires no grad": lambda model, bank: parameters(bank)[0].requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_becomes_of_adapters_before_the_backward_does_not_matter(change: str) -> None:
    """One that is trained and one that is frozen, composed: gradients are those of the forward."""

    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        style(model, 3)
        loss, [trained] = model(x).square().sum(), parameters(bank)
        CHANGES[change](model, bank)
        loss.backward()
        return [grad for grad in (x.grad, trained.grad) if grad is not None]

    alike(call)


def test_hooks_of_a_parameter_are_called_once() -> None:
    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        parameters(bank)[0].register_hook(lambda grad: 0.5 * grad)
        return step(model, bank, x)

    alike(call)


def test_selective_checkpointing() -> None:
    """What keeps some results of a region looks at every operation of it."""

    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        model.policy = lambda: create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])
        model.checkpointed = True
        return step(model, bank, x)

    alike(call)


def test_reentrant_checkpointing_is_refused_for_two_stages_too() -> None:
    model, _, x = adapted()
    inject_oft(model, OFTConfig(16, targets=("attn2.to_.*", "out")), "other")
    inner = model.attn2.forward
    model.attn2.forward = lambda x: checkpoint(inner, x, use_reentrant=True)  # type: ignore[method-assign]
    with pytest.raises(AdapterError, match="reentrant gradient checkpointing"):
        model(x)


def test_a_look_at_the_model_inside_a_backward() -> None:
    """Between two recomputed parts: the second finds its deltas all the same."""

    def call(model: Model, bank: OFTBank, x: Tensor) -> list[Tensor]:
        model.checkpointed, model.turns = True, 2

        def look(grad: Tensor) -> None:
            with torch.no_grad():
                model(x)

        def watch(module: torch.nn.Module, args: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(look)

        model.out.register_forward_hook(watch)
        return step(model, bank, x)

    alike(call)


def test_after_a_backward_that_failed() -> None:
    def fail(grad: Tensor) -> None:
        raise ValueError("on purpose")

    model, bank, x = adapted()
    model.checkpointed = True
    expected = step(model, bank, x)
    without_gradients(bank, x)
    handle = x.register_hook(fail)
    loss = model(x).square().sum()
    with pytest.raises(ValueError, match="on purpose"):
        loss.backward(retain_graph=True)
    handle.remove()
    pickle.dumps(bank)
    copy.deepcopy(model)
    with torch.no_grad():
        model(x)
    parameters(bank)[0].grad = x.grad = None
    loss.backward()
    for found, one in zip((x.grad, *(p.grad for p in parameters(bank))), expected, strict=True):
        assert found is not None
        torch.testing.assert_close(found, one)


def test_layers_that_are_called_in_another_order_keep_none_either() -> None:
    """As CLIP's attention has it, which declares k, v, q and calls q first."""
    model, bank, x = adapted()
    attention = model.attn2

    def saved() -> int:
        return saved_bytes(lambda: model(x).sum(), [*model.parameters(), *parameters(bank)])

    expected = saved()
    attention.forward = lambda x: attention.to_v(x) * attention.to_k(x)  # type: ignore[method-assign]
    assert saved() == expected


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


def living() -> int:
    """Tensors that hold memory of the size of all deltas of a `Model`."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, torch.nn.Parameter)]
    return sum(one.untyped_storage().nbytes() == DELTAS for one in tensors if one.layout is torch.strided)


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("way", [IN_PLACE, AT_ONCE], ids=str)
def test_no_deltas_outlive_a_forward_or_its_backward(way: dict[str, Any], checkpointed: bool, skips: bool) -> None:
    """Built in place, there never are any; of the other way that is the proof that the count sees them."""
    model, bank, x = adapted(**way)
    model(x)
    model.checkpointed, model.skips = checkpointed, skips
    alive, before = [], living()  # other tests may have left some
    model.attn2.register_forward_hook(lambda *_: alive.append(living()))
    loss = model(x).square().sum()
    assert (alive[0] > before) == (way == AT_ONCE)
    assert living() == before
    x.register_hook(lambda _: alive.append(living()))
    loss.backward(retain_graph=True)
    assert (alive[-1] > before) == (way == AT_ONCE)
    assert living() == before
    hooks = bank.hooks.values()
    assert all(hook.ready is None and not hook.grad_deltas for hook in hooks)
    assert {hook.prepared.plan.flat.tensor for hook in hooks if hook.prepared} == {None}


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
