"""Strength and the company of other adapters, on whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oft_diffusion import OFTConfig, hooks, inject_oft, sharing
from oft_diffusion.bank import OFTBank
from oft_diffusion.errors import AdapterError
from oft_diffusion.kernels import processor_graph
from tests.core.reference import SEEDS, dense_rotation, relative, two_layers, unet_inputs
from tests.library.support import excite, tiny_unet

LINEAR = OFTConfig(block_size=8, targets=".*")


def adapted(seed: int = 0, config: OFTConfig = LINEAR) -> tuple[Any, OFTBank, torch.Tensor]:
    """A float64 model with adapter "a" and "b", and an input."""
    model = two_layers(seed % 5).double()
    for i, name in enumerate("ab"):
        excite(inject_oft(model, config, name), name, seed=seed + i)
    bank = inject_oft(model, config, "unused")
    bank.freeze("a")
    bank.freeze("b")
    x = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return model, bank, x


def with_active(model: Any, bank: OFTBank, x: torch.Tensor, names: Any, *settings: Any) -> torch.Tensor:
    bank.set_adapters(names, *settings)
    with torch.no_grad():
        return model(x)


@given(seed=SEEDS, first=st.floats(-1.5, 1.5), second=st.floats(-1.5, 1.5))
def test_the_first_layer_turns_by_the_sum_of_two_strengths(seed: int, first: float, second: float) -> None:
    model, bank, x = adapted(seed)
    base = with_active(model[0], bank, x, [])
    layer = model[0]
    bank.set_adapters("a", first)
    inner = _rotated_input(layer, bank, x)
    bank.set_adapters("a", second)
    twice = _rotated_input(layer, bank, inner)
    bank.set_adapters("a", first + second)
    assert (twice - _rotated_input(layer, bank, x)).abs().max() < 1e-5
    bank.set_adapters("a", 1.0)
    assert relative(with_active(layer, bank, x, "a"), base) > 0.05


def _rotated_input(layer: Any, bank: OFTBank, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        (hook,) = [h for h in layer._forward_pre_hooks.values() if type(h).__name__ == "LayerHook"]
        return hook(layer, (x,))[0]


@given(seed=SEEDS)
def test_zero_is_the_base_bit_by_bit_one_is_as_trained_and_minus_one_undoes(seed: int) -> None:
    model, bank, x = adapted(seed)
    base = with_active(model, bank, x, [])
    trained = with_active(model, bank, x, "a")
    assert relative(trained, base) > 0.01
    assert torch.equal(with_active(model, bank, x, "a", 0.0), base)
    assert torch.equal(with_active(model, bank, x, "a", 1.0), trained)
    bank.set_adapters("a", 1.0)
    turned = _rotated_input(model[0], bank, x)
    bank.set_adapters("a", -1.0)
    assert (_rotated_input(model[0], bank, turned) - x).abs().max() < 1e-5
    half = with_active(model, bank, x, "a", 0.5)
    assert relative(half, base) > 0.005
    assert relative(half, trained) > 0.005


@given(seed=SEEDS, strength=st.floats(-1, 2).filter(lambda s: abs(s) > 0.01))
def test_linear_mode_is_the_blend_of_other_tools(seed: int, strength: float) -> None:
    model, bank, x = adapted(seed)
    bank.set_adapters("a", strength, "linear")
    expected = (1 - strength) * x + strength * (x @ dense_rotation(bank, "0", "a"))
    assert (_rotated_input(model[0], bank, x) - expected).abs().max() < 1e-5
    assert (expected - x).abs().max() > 0.05 * abs(strength)


@given(seed=SEEDS, sizes=st.sampled_from([(8, 8), (4, 8)]))
def test_adapters_act_in_the_order_of_activation(seed: int, sizes: tuple[int, int]) -> None:
    model = two_layers(seed % 5).double()
    for i, (name, size) in enumerate(zip("ab", sizes, strict=True)):
        excite(inject_oft(model, OFTConfig(block_size=size, targets=".*"), name), name, seed=seed + i)
    bank = inject_oft(model, LINEAR, "unused")
    x = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ra, rb = dense_rotation(bank, "0", "a"), dense_rotation(bank, "0", "b")
    for names, dense in ((["a", "b"], ra @ rb), (["b", "a"], rb @ ra)):
        bank.set_adapters(names)
        with torch.no_grad():
            model(x)  # prepares the deltas
        bank.freeze("a")
        bank.freeze("b")
        assert (_rotated_input(model[0], bank, x) - x @ dense).abs().max() < 1e-5
    assert (ra @ rb - rb @ ra).abs().max() > 1e-2


@pytest.mark.parametrize("config", [OFTConfig(block_size=8), OFTConfig(block_size=8, parametrisation="cayley_neumann")])
def test_a_strength_that_changes_is_seen_by_the_next_forward(config: OFTConfig) -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    with torch.no_grad():
        base = unet(**inputs).sample
        bank = inject_oft(unet, config)
        excite(bank)
        for frozen in (False, True):
            if frozen:
                bank.freeze("default")
            outs = []
            for strength in (0.0, 0.4, 1.0, 0.4):
                bank.set_adapters("default", strength)
                outs.append(unet(**inputs).sample)
            assert torch.equal(outs[0], base)
            assert torch.equal(outs[1], outs[3])
            assert relative(outs[2], base) > relative(outs[1], base) > 1e-3


def test_frozen_deltas_are_rewritten_in_place() -> None:
    unet = tiny_unet()
    bank = inject_oft(unet, OFTConfig(block_size=8))
    excite(bank)
    bank.freeze("default")
    slots = [h.eval_deltas for h in bank.hooks.values()]
    before = [d.clone() for slot in slots if slot for d in slot]
    bank.set_adapters("default", 0.5)
    assert all(h.eval_deltas is slot for h, slot in zip(bank.hooks.values(), slots, strict=True))
    after = [d for slot in slots if slot for d in slot]
    assert len(before) == len(bank.hooks)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


# Refusals


def test_a_trainable_adapter_at_a_fractional_strength_is_refused_under_grad_only() -> None:
    unet = tiny_unet()
    bank = inject_oft(unet, OFTConfig(block_size=8))
    excite(bank)
    bank.set_adapters("default", 0.5)
    with torch.no_grad():
        unet(**unet_inputs(unet))
    with pytest.raises(AdapterError, match=r"trainable and active with strength 0\.5.*Fix: .*linear"):
        unet(**unet_inputs(unet))
    bank.set_adapters("default", 0.5, "linear")
    unet(**unet_inputs(unet)).sample.sum().backward()
    gradient = bank.generators["default"].grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_a_trainable_adapter_at_strength_0_costs_no_rotation_and_is_back_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []

    def noted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            made.append("a rotation")
            return real(*given)

        return call

    rotations = [(hooks, "block_rotate"), (sharing, "block_rotate"), (sharing, "block_rotate_shared")]
    for module, name in (*rotations, (processor_graph, "rotated")):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    with torch.no_grad():
        base = unet(**inputs).sample
    bank = inject_oft(unet, OFTConfig(block_size=8))
    excite(bank)
    with torch.no_grad():
        bank.set_adapters("default", 0.0)
        assert torch.equal(unet(**inputs).sample, base)
        assert made == []
        bank.set_adapters("default")
        assert relative(unet(**inputs).sample, base) > 1e-3
        assert made


@pytest.mark.parametrize(
    ("names", "strengths", "message"),
    [
        (["c"], 1.0, "no adapter 'c'.*one of: a, b, unused"),
        (["a", "a"], 1.0, "'a' is named twice"),
        (["a", "b"], [1.0], "2 adapter.s. but 1 strength"),
        (["a"], float("nan"), "strength nan"),
        (["a"], float("inf"), "strength inf"),
    ],
)
def test_settings_that_make_no_sense_are_refused_and_change_nothing(names: Any, strengths: Any, message: str) -> None:
    _, bank, _ = adapted()
    before = bank.active
    with pytest.raises(AdapterError, match=message):
        bank.set_adapters(names, strengths)
    assert bank.active == before


def test_a_series_past_norm_one_refuses_a_fraction_and_keeps_what_was_active() -> None:
    model = two_layers()
    config = OFTConfig(block_size=8, targets=".*", parametrisation="cayley_neumann")
    bank = inject_oft(model, config)
    excite(bank, norm=1.5)
    bank.freeze("default")
    before = model(torch.ones(1, 24))
    with pytest.raises(AdapterError, match="spectral norm"):
        bank.set_adapters("default", 0.5)
    assert torch.equal(model(torch.ones(1, 24)), before)
    bank.set_adapters("default", 0.5, "linear")
    assert relative(model(torch.ones(1, 24)), before) > 1e-3
