"""Layers that read one input: each gets what it would have got alone, and an input that is another one is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from oft_diffusion import OFTConfig, hooks, inject_oft, sharing
from oft_diffusion.bank import OFTBank
from oft_diffusion.kernels import block_rotate, block_rotate_shared
from tests.core.reference import relative
from tests.core.rotate_cases import every_way as every_way  # around every test
from tests.helpers import tiny_denoisers as tiny
from tests.library.support import excite

B = 8
T = TypeVar("T")


class Attention(nn.Module):
    """q, k and v as models have them; what k reads can be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor, before_k: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        q = self.to_q(x)
        k = self.to_k(before_k(x))
        return q * k + self.to_v(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn1 = Attention()

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        out: Tensor = self.attn1(x, **how)
        return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two operations were called by groups, in order."""
    made: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            made.append(name)
            return function(*args, **options)

        return call

    monkeypatch.setattr(hooks, "hand_out", noted("shared", sharing.hand_out))  # prepared for, and done in C
    monkeypatch.setattr(sharing, "block_rotate", noted("alone", block_rotate))
    monkeypatch.setattr(sharing, "block_rotate_shared", noted("shared", block_rotate_shared))
    return made


def adapted(**config: Any) -> tuple[Model, OFTBank]:
    model = Model()
    bank = inject_oft(model, OFTConfig(**{"block_size": B, "targets": (r".*to_[qkv]",), **config}))
    excite(bank)
    return model, bank


def alone(bank: OFTBank, call: Callable[[], T]) -> T:
    """What a call gives with each layer by itself."""
    groups = {id(hook.shared): hook.shared for hook in bank.hooks.values() if hook.shared is not None}
    members = {key: list(group.hooks) for key, group in groups.items()}
    for group in groups.values():
        group.give_up()
    try:
        return call()
    finally:
        for own in members.values():
            sharing.SharedInput(own)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (3000,)])
def test_the_op_is_the_single_one_for_each_layer(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(*leading, 24).to(dtype).requires_grad_()
    deltas = [(0.3 * torch.randn(3, B, B)).to(dtype).requires_grad_() for _ in range(3)]
    grads = [torch.randn(*leading, 24).to(dtype) for _ in range(3)]
    together, single = block_rotate_shared(x, deltas), [block_rotate(x, delta) for delta in deltas]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(together, single, strict=True):
        assert relative(one.detach(), other.detach()) < tolerance
    with torch.no_grad():
        for one, delta in zip(block_rotate_shared(x, deltas), deltas, strict=True):
            assert torch.equal(one, block_rotate(x, delta))
    found = torch.autograd.grad(together, (x, *deltas), grads)
    expected = torch.autograd.grad(single, (x, *deltas), grads)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative(one, other) < tolerance


def test_torch_agrees_that_it_is_an_operator() -> None:
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    deltas = [torch.randn(3, B, B, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(torch.ops.oft_diffusion.block_rotate_shared, (x, deltas))
    assert torch.autograd.gradcheck(lambda x, *d: tuple(block_rotate_shared(x, d)), (x, *deltas))


@pytest.mark.parametrize(("x_needs", "deltas_need"), [(True, False), (False, True)])
def test_gradients_that_nobody_wants_and_layers_that_nobody_used(x_needs: bool, deltas_need: bool) -> None:
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=x_needs)
    deltas = [torch.randn(2, B, B, dtype=torch.float64, requires_grad=deltas_need) for _ in range(3)]
    block_rotate_shared(x, deltas)[1].square().sum().backward()
    wanted_x, wanted = x.detach().requires_grad_(), deltas[1].detach().requires_grad_()
    block_rotate(wanted_x, wanted).square().sum().backward()
    expected = {"x": wanted_x.grad, "0": torch.zeros(2, B, B), "1": wanted.grad, "2": torch.zeros(2, B, B)}
    for name, tensor in {"x": x, **dict(zip("012", deltas, strict=True))}.items():
        assert (tensor.grad is not None) is (x_needs if name == "x" else deltas_need)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected[name], check_dtype=False)


@pytest.mark.parametrize("build", [tiny.unet, tiny.sd3, tiny.flux, tiny.pixart, tiny.wan, tiny.qwen_image])
def test_a_model_answers_as_it_does_with_each_layer_by_itself(build: Any, calls: list[str]) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    bank = inject_oft(model.eval(), OFTConfig(block_size=B))
    excite(bank)

    def gradient() -> tuple[Tensor, Tensor]:
        out = model(**inputs, return_dict=False)[0]
        [grad] = torch.autograd.grad(out.square().mean(), list(bank.parameters()))
        return out.detach(), grad

    out, grad = gradient()
    assert calls.count("shared") > 0
    assert calls.count("alone") == 0, "a group waited in vain"
    assert all(hook.ready is None for hook in bank.hooks.values())
    expected, expected_grad = alone(bank, gradient)
    assert relative(out, expected) < 1e-5
    assert relative(grad, expected_grad) < 1e-5
    with torch.no_grad():
        drawn = model(**inputs, return_dict=False)[0]
        assert torch.equal(drawn, alone(bank, lambda: model(**inputs, return_dict=False)[0]))
    assert relative(drawn, expected) < 1e-5


def test_a_layer_that_reads_something_else_gets_that_and_the_group_is_given_up(calls: list[str]) -> None:
    model, bank = adapted()
    x, doubled = torch.randn(3, 24), {"before_k": lambda x: 2 * x}
    expected = alone(bank, lambda: model(x, **doubled))
    calls.clear()
    assert relative(model(x, **doubled).detach(), expected.detach()) < 1e-5
    assert calls == ["shared"]  # for all three; k's own then is no group's
    assert all(hook.shared is None and hook.ready is None for hook in bank.hooks.values())
    assert torch.equal(model(x, **doubled), expected)
    assert calls == ["shared"]  # each layer by itself now


def test_an_input_that_was_written_to_in_between_is_rotated_anew() -> None:
    model, bank = adapted()
    x = torch.randn(3, 24)
    with torch.no_grad():
        expected = alone(bank, lambda: model(x.clone(), before_k=lambda x: x.mul_(2)))
        assert torch.equal(model(x.clone(), before_k=lambda x: x.mul_(2)), expected)


def test_one_generator_for_three_layers_turns_the_input_once(calls: list[str]) -> None:
    model, bank = adapted(share_qkv=True)
    x = torch.randn(3, 24)
    out = model(x)
    assert len(calls) == 1
    assert torch.equal(out, alone(bank, lambda: model(x)))


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model, bank = adapted()

    def fail(x: Tensor) -> Tensor:
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        model(torch.randn(3, 24), before_k=fail)
    assert all(hook.ready is None for hook in bank.hooks.values())


def test_grad_mode_between_two_layers_is_noticed() -> None:
    model, bank = adapted()
    bank.freeze("default")
    x = torch.randn(3, 24, requires_grad=True)

    def resume(x: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        return x

    with torch.no_grad():
        out = model(x, before_k=resume)
    assert out.requires_grad
    [dx] = torch.autograd.grad(out.sum(), x)
    assert dx.abs().sum() > 0


def test_adapters_that_come_later_share_too(calls: list[str]) -> None:
    model, bank = adapted(targets=(r".*to_(k|v)",))
    model(torch.randn(3, 24))
    assert calls == ["shared"]
    inject_oft(model, OFTConfig(block_size=B, targets=(r".*to_[qkv]",)), "second")
    excite(bank, "second", seed=3)
    calls.clear()
    x = torch.randn(3, 24)
    out = model(x)
    assert calls == ["shared"]
    assert relative(out.detach(), alone(bank, lambda: model(x)).detach()) < 1e-5
