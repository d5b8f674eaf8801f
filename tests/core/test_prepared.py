"""What C is told of the rotations: put together once, and after every change anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from benchmarks.methods import kernels_switched
from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.hooks import bank_of, hooked_layers
from oft_diffusion.kernels import processor
from tests.core.reference import relative
from tests.core.test_rebuilt import Model, Pair, adapted, step
from tests.library.support import excite

pytestmark = pytest.mark.skipif(processor.library() is None, reason="no compiler, or no Linux")


class Divided(Pair):
    """Two layers that by their names read one input, and do not."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_k(x) * self.to_v(2 * x)
        return out


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each plan is for that has been made."""
    noted: list[int] = []

    def noting(real: Callable[..., processor.Plan]) -> Callable[..., processor.Plan]:
        def note(*arguments: Any, **options: Any) -> processor.Plan:
            plan = real(*arguments, **options)
            noted.append(plan.layers)
            return plan

        return note

    for name in ("plan_for", "plan_in"):
        monkeypatch.setattr(processor, name, noting(getattr(processor, name)))
    return noted


def test_in_training_once_and_again_where_what_is_active_changes(made: list[int]) -> None:
    model, bank, x = adapted()
    for _ in range(3):
        step(model, bank, x)
        with torch.no_grad():
            model(x)
    assert sorted(made) == [1, 2]
    made.clear()
    bank.set_adapters("default", 0.5, "linear")
    for _ in range(2):
        step(model, bank, x)
    assert sorted(made) == [1, 2]
    made.clear()
    other = copy.deepcopy(model)
    own = bank_of(other)
    assert own is not None
    for _ in range(2):
        step(other, own, x)
    assert sorted(made) == [1, 2]
    other(x).sum().backward()
    torch.testing.assert_close(other(x), model(x))


def test_of_a_frozen_adapter_at_every_change_and_never_in_a_forward(made: list[int]) -> None:
    model, bank, x = adapted()
    x = x.detach()
    bank.freeze("default")

    def expected() -> Tensor:
        with kernels_switched(on=False):
            return cast(Tensor, model(x))

    for change in (
        lambda: None,
        lambda: bank.swap("default", {site: 2 * t for site, t in bank.effective_generators("default").items()}),
        lambda: bank.activate("default", 0.5),
        lambda: bank.activate("default"),
    ):
        change()
        made.clear()
        torch.testing.assert_close(model(x), expected())
        model(x)
        assert made == []
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), expected(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(model(x), expected())
    assert model.double()(x.double()).dtype == torch.float64
    before = model.float()(x)
    assert all(hook.prepared is not None for hook in bank.hooks.values())
    torch.testing.assert_close(before, expected())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_that_do_not_read_one_input_are_planned_for_apart(checkpointed: bool, made: list[int]) -> None:
    """In the very step that finds it out, which a recomputation repeats knowing it."""

    def call(*, checkpointed: bool) -> list[Tensor]:
        model = Model()
        model.attn2, model.checkpointed = Divided(), checkpointed
        bank = inject_oft(model, OFTConfig(8, targets=("attn2.to_.*", "out")))
        excite(bank)
        torch.manual_seed(3)
        for layer in hooked_layers(model).values():
            torch.nn.init.normal_(cast(Tensor, layer.weight), std=0.2)
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        first = step(model, bank, x)
        twice = list(made)
        step(model, bank, x)
        assert made == twice
        return first

    with kernels_switched(on=False):
        expected = call(checkpointed=False)
    made.clear()
    found = call(checkpointed=checkpointed)
    assert made.count(1) == 3, "nothing was given up: the test would prove nothing"
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 3e-6


def test_layers_of_one_generator_are_rotated_once() -> None:
    model, bank, x = adapted(share_qkv=True)
    step(model, bank, x)
    assert [hook.prepared.plan.layers for hook in bank.hooks.values() if hook.prepared is not None] == [1, 1, 1]
    with kernels_switched(on=False):
        expected = step(*adapted(share_qkv=True))
    for one, other in zip(step(*adapted(share_qkv=True)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
