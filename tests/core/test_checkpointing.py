"""Gradient checkpointing: the recomputed rotations are those of the forward, or the call is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.bank import OFTBank
from oft_diffusion.errors import AdapterError
from tests.core.reference import relative, unet_inputs
from tests.library.support import excite, tiny_unet


def adapted(checkpointed: bool = True) -> tuple[Any, OFTBank, dict[str, Any]]:
    """A UNet in training mode, with one excited adapter and asserted to move what the base says."""
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    with torch.no_grad():
        base = unet(**inputs).sample
    bank = inject_oft(unet, OFTConfig(block_size=8))
    excite(bank)
    with torch.no_grad():
        assert relative(unet(**inputs).sample, base) > 1e-2
    if checkpointed:
        unet.train().enable_gradient_checkpointing()
    return unet, bank, inputs


def gradient_of(bank: OFTBank) -> torch.Tensor:
    gradient = bank.generators["default"].grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    return gradient.clone()


def loss_of(unet: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return unet(**inputs).sample.square().mean()


def plain_gradient(forwards: int = 1) -> torch.Tensor:
    unet, bank, inputs = adapted(checkpointed=False)
    for _ in range(forwards):
        unet(**inputs).sample.square().mean().backward()
    return gradient_of(bank)


def whole(unet: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The loss of a component that is checkpointed as a whole."""
    given = [inputs[name] for name in ("sample", "timestep", "encoder_hidden_states")]
    drawn: torch.Tensor = checkpoint(lambda *args: unet(*args).sample, *given, use_reentrant=False)
    return drawn.square().mean()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_component_that_is_checkpointed_whole(at_once: bool) -> None:
    """Twice: the second forward meets what the first one left, with its backward before it or still to come."""
    unet, bank, inputs = adapted(checkpointed=False)
    calls = count_calls(unet)
    if at_once:
        (whole(unet, inputs) + whole(unet, inputs)).backward()
    else:
        whole(unet, inputs).backward()
        whole(unet, inputs).backward()
    assert relative(gradient_of(bank), plain_gradient(2)) < 1e-6
    assert set(calls.values()) == {4}


def test_a_component_checkpointed_whole_is_not_recomputed_with_another_strength() -> None:
    unet, bank, inputs = adapted(checkpointed=False)
    loss = whole(unet, inputs)
    bank.set_adapters("default", 0.5, "linear")
    with pytest.raises(AdapterError, match="other adapters or strengths"):
        loss.backward()


def test_loss_and_gradients_are_those_of_a_plain_forward() -> None:
    plain, _, inputs = adapted(checkpointed=False)
    unet, bank, inputs = adapted()
    calls = count_calls(unet)
    loss = loss_of(unet, inputs)
    assert relative(loss, loss_of(plain, inputs)) < 1e-6
    loss.backward()
    assert relative(gradient_of(bank), plain_gradient()) < 1e-6
    assert max(calls.values()) == 2, "nothing was recomputed: the test would prove nothing"


def count_calls(unet: nn.Module) -> dict[str, int]:
    """How often each attention projection runs."""
    calls: dict[str, int] = {}

    def counter(name: str) -> Any:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return count

    for name, module in unet.named_modules():
        if name.endswith("to_q"):
            module.register_forward_hook(counter(name))
    return calls


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_a_no_grad_forward_of_another_strength_between_forward_and_backward(strength: float) -> None:
    unet, bank, inputs = adapted()
    loss = unet(**inputs).sample.square().mean()
    with torch.no_grad():
        bank.set_adapters("default", strength)
        other = unet(**inputs).sample
        bank.set_adapters("default", 1.0)
        assert relative(other, unet(**inputs).sample) > 1e-3
    loss.backward()
    assert relative(gradient_of(bank), plain_gradient()) < 1e-6


def test_a_no_grad_forward_that_never_returned_to_the_old_strength() -> None:
    unet, bank, inputs = adapted()
    loss = unet(**inputs).sample.square().mean()
    bank.set_adapters("default", 0.3)
    with torch.no_grad():
        unet(**inputs)
    loss.backward()
    assert relative(gradient_of(bank), plain_gradient()) < 1e-6


def test_several_forwards_of_one_setting_accumulate() -> None:
    unet, bank, inputs = adapted()
    losses = [unet(**inputs).sample.square().mean() for _ in range(2)]
    torch.stack(losses).sum().backward()
    assert relative(gradient_of(bank), plain_gradient(2)) < 1e-6


def test_an_optimizer_step_is_seen_by_the_next_forward() -> None:
    gradients = []
    for checkpointed in (False, True):
        unet, bank, inputs = adapted(checkpointed)
        optimizer = torch.optim.SGD(bank.parameters(), lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            unet(**inputs).sample.square().mean().backward()
            optimizer.step()
        gradients.append(gradient_of(bank))
    assert relative(gradients[1], gradients[0]) < 1e-5
    assert relative(gradients[0], plain_gradient()) > 1e-2


def test_two_forwards_with_grad_and_different_settings_are_refused() -> None:
    unet, bank, inputs = adapted()
    first = unet(**inputs).sample
    bank.set_adapters("default", 0.5, "linear")
    with pytest.raises(AdapterError, match=r"before the backward of an earlier call.*Fix: call backward"):
        unet(**inputs)
    bank.set_adapters("default", 1.0)
    first.square().mean().backward()
    assert relative(gradient_of(bank), plain_gradient()) < 1e-6
    bank.set_adapters("default", 0.5, "linear")
    unet(**inputs).sample.sum().backward()


def test_two_losses_of_one_forward() -> None:
    unet, bank, inputs = adapted()
    out = unet(**inputs).sample
    out.square().mean().backward(retain_graph=True)
    assert relative(gradient_of(bank), plain_gradient()) < 1e-6
    out.square().mean().backward()
    assert relative(gradient_of(bank), plain_gradient(2)) < 1e-6


def test_the_backward_of_a_later_forward_does_not_release_an_earlier_one() -> None:
    unet, bank, inputs = adapted()
    first, second = (loss_of(unet, inputs) for _ in range(2))
    second.backward()
    bank.set_adapters("default", 0.5, "linear")
    with pytest.raises(AdapterError, match="before the backward of an earlier call"):
        unet(**inputs)
    first.backward()
    assert relative(gradient_of(bank), plain_gradient(2)) < 1e-6
    loss_of(unet, inputs).backward()


def test_a_graph_that_is_retained_still_awaits_a_backward() -> None:
    unet, bank, inputs = adapted()
    loss = loss_of(unet, inputs)
    loss.backward(retain_graph=True)
    bank.set_adapters("default", 0.5, "linear")
    with pytest.raises(AdapterError, match="before the backward of an earlier call"):
        unet(**inputs)
    loss.backward()
    assert relative(gradient_of(bank), plain_gradient(2)) < 1e-6
    loss_of(unet, inputs).backward()


def test_a_dropped_result_does_not_block_the_next_setting() -> None:
    unet, bank, inputs = adapted()
    result = unet(**inputs)
    del result
    bank.set_adapters("default", 0.5, "linear")
    unet(**inputs).sample.sum().backward()
    gradient_of(bank)


def test_reentrant_checkpointing_is_refused() -> None:
    unet, _, inputs = adapted(checkpointed=False)
    unet.train().enable_gradient_checkpointing(
        gradient_checkpointing_func=lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=True)
    )
    inputs["sample"] = inputs["sample"].requires_grad_()
    with pytest.raises(AdapterError, match=r"reentrant gradient checkpointing.*use_reentrant.: False"):
        unet(**inputs)


def test_a_layer_called_on_its_own_under_grad_is_refused_and_without_grad_it_works() -> None:
    unet, _, inputs = adapted(checkpointed=False)
    unet(**inputs).sample.sum().backward()
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(1, 3, 16)
    with pytest.raises(AdapterError, match="was called on its own with gradients enabled"):
        layer(x)
    with torch.no_grad():
        assert relative(layer(x), torch.nn.functional.linear(x, layer.weight)) > 0.1
