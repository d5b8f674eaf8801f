"""A PEFT LoRA beside an OFT adapter, as `load_lora_weights` makes them: `W R^T + B A`, whichever came first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from oft_diffusion import fuse_oft, load_oft_weights, set_oft_adapters, unfuse_oft, unload_oft_weights
from oft_diffusion.errors import AdapterError
from oft_diffusion.hooks import hooked_layers
from tests.core.reference import dense_rotation, relative
from tests.library.support import assert_one_sentence, assert_unchanged, draw, fingerprint

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def mug(make: Any) -> Any:
    return make("mug", seed=1, parts=("unet",))


def add_lora(pipe: Any) -> None:
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    torch.manual_seed(7)
    pipe.unet.add_adapter(config, "style")


def lora_share(pipe: Any) -> Tensor:
    layer = pipe.unet.get_submodule(LAYER)
    return layer.lora_B["style"].weight @ layer.lora_A["style"].weight


def test_both_orders_are_the_same_sum(pipe: Any, mug: Any) -> None:
    base = draw(pipe)
    weight = pipe.unet.get_submodule(LAYER).weight.clone()
    load_oft_weights(pipe, mug)
    oft_alone = draw(pipe)
    add_lora(pipe)
    lora_second = draw(pipe)
    layer = pipe.unet.get_submodule(LAYER)
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        [bank] = {hook.bank for hook in _hooks(pipe.unet)}
        expected = x.double() @ dense_rotation(bank, LAYER, "mug") @ weight.double().T + (x @ lora_share(pipe).T)
        assert relative(layer(x), expected) < 1e-6
        assert relative(x @ weight.T, expected) > 0.1
    unload_oft_weights(pipe)
    lora_alone = draw(pipe)
    load_oft_weights(pipe, mug)
    assert torch.equal(draw(pipe), lora_second)
    pipe.unet.delete_adapters("style")
    unload_oft_weights(pipe)
    pictures = [base, oft_alone, lora_alone, lora_second]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(pictures) for b in pictures[:i])


def test_removing_the_oft_adapter_leaves_the_lora_to_the_bit(pipe: Any, mug: Any) -> None:
    add_lora(pipe)
    before = fingerprint(pipe)
    load_oft_weights(pipe, mug)
    draw(pipe)
    unload_oft_weights(pipe)
    assert_unchanged(pipe, before)


def test_a_lora_fused_under_a_live_adapter_is_refused(pipe: Any, mug: Any) -> None:
    load_oft_weights(pipe, mug)
    add_lora(pipe)
    live = draw(pipe)
    pipe.unet.fuse_lora()
    for refused in (lambda: draw(pipe), lambda: fuse_oft(pipe)):
        with pytest.raises(AdapterError) as error:
            refused()
        assert_one_sentence(error, f"a LoRA is fused into {LAYER}", "unfuse_lora", "unload_lora_weights")
    set_oft_adapters(pipe, [])
    draw(pipe)  # the LoRA alone may be fused
    pipe.unet.unfuse_lora()
    set_oft_adapters(pipe, "mug")
    assert relative(draw(pipe), live) < 1e-5


def test_both_are_fused_in_the_order_that_keeps_the_sum(pipe: Any, mug: Any) -> None:
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    load_oft_weights(pipe, mug)
    add_lora(pipe)
    live = draw(pipe)
    fuse_oft(pipe)
    pipe.unet.fuse_lora()
    assert relative(draw(pipe), live) < 1e-5
    with pytest.raises(AdapterError, match="a LoRA is fused into"):
        unfuse_oft(pipe)
    pipe.unet.unfuse_lora()
    unfuse_oft(pipe)
    assert torch.equal(draw(pipe), live)
    pipe.unet.delete_adapters("style")
    unload_oft_weights(pipe)
    after = {name.replace(".base_layer", ""): value for name, value in pipe.unet.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_lora_baked_into_the_base_is_a_base(pipe: Any, mug: Any) -> None:
    add_lora(pipe)
    pipe.unet.fuse_lora()
    pipe.unload_lora_weights()
    baked = draw(pipe)
    load_oft_weights(pipe, mug)
    assert (draw(pipe) - baked).abs().max() > 1e-3


def _hooks(unet: Any) -> list[Any]:
    find: Callable[[Any], dict[str, Any]] = hooked_layers
    return [hook for module in find(unet).values() for hook in module._forward_pre_hooks.values()]
