"""Nothing is a silent no-op: what a forward goes around is noticed, whenever it begins, and nothing else is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from oft_diffusion import OFTConfig, inject_oft
from oft_diffusion.errors import TargetError
from tests.core.reference import two_layers, unet_inputs
from tests.library.support import assert_one_sentence, excite, tiny_unet


def test_fused_projections_are_refused_before_and_noticed_after() -> None:
    unet = tiny_unet()
    unet.fuse_qkv_projections()
    with pytest.raises(TargetError) as error:
        inject_oft(unet, OFTConfig(block_size=8))
    assert_one_sentence(error, "fused QKV projections", "unfuse_qkv_projections()")
    unet.unfuse_qkv_projections()
    excite(inject_oft(unet, OFTConfig(block_size=8)))
    unet.fuse_qkv_projections()
    with torch.no_grad(), pytest.raises(TargetError) as error:
        unet(**unet_inputs(unet))
    assert_one_sentence(error, "were bypassed", "attn1.to_k")


def _fuse(unet: Any) -> None:
    unet.fuse_qkv_projections()


def _replace_a_layer(unet: Any) -> None:
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_k = copy.deepcopy(attention.to_k)
    attention.to_k._forward_pre_hooks.clear()


def _replace_a_block(unet: Any) -> None:
    blocks = unet.down_blocks[0].attentions[0].transformer_blocks
    blocks[0] = copy.deepcopy(blocks[0])
    for module in blocks[0].modules():
        module._forward_pre_hooks.clear()


@pytest.mark.parametrize("change", [_fuse, _replace_a_layer, _replace_a_block])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_bypass_is_noticed_after_forwards_that_had_none(change: Any, frozen: bool) -> None:
    unet = tiny_unet()
    bank = inject_oft(unet, OFTConfig(block_size=8))
    excite(bank)
    if frozen:
        bank.freeze("default")
    with torch.no_grad():
        for _ in range(2):
            unet(**unet_inputs(unet))
        change(unet)
        for _ in range(2):
            with pytest.raises(TargetError) as error:
                unet(**unet_inputs(unet))
            assert_one_sentence(error, "were bypassed", "attn1.to_k")


def test_a_block_that_is_skipped_as_a_whole_is_none() -> None:
    """As diffusers' skip-layer guidance and caches of features do."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(two_layers(seed, outside=24) for seed in range(3))

        def forward(self, x: torch.Tensor, skip: tuple[int, ...] = ()) -> Any:
            for number, block in enumerate(self.blocks):
                x = x if number in skip else block(x)
            return x

    model = Blocks()
    excite(inject_oft(model, OFTConfig(block_size=8, targets=r".*\.\d+\.\d+")))
    x = torch.randn(2, 24)
    with pytest.raises(TargetError, match="2 of 6 adapted layers"):
        model(x, skip=(1,))
    whole = model(x)
    assert not torch.equal(model(x, skip=(1,)), whole)
    assert torch.equal(model(x), whole)


def test_adapters_that_rest_are_not_looked_for() -> None:
    unet = tiny_unet()
    bank = inject_oft(unet, OFTConfig(block_size=8))
    bank.set_adapters([])
    unet.fuse_qkv_projections()
    with torch.no_grad():
        unet(**unet_inputs(unet))
        bank.set_adapters("default")
        with pytest.raises(TargetError, match="were bypassed"):
            unet(**unet_inputs(unet))


def test_a_forward_that_raised_leaves_no_trace() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = two_layers()

        def forward(self, x: torch.Tensor, fail: bool = False) -> Any:
            x = self.inner[0](x)
            if fail:
                raise RuntimeError("out of memory")
            return self.inner[2](x)

    model = Breaks()
    excite(inject_oft(model, OFTConfig(block_size=8, targets=r"inner\.\d+")))
    x = torch.randn(2, 24)
    with torch.no_grad():
        layer, whole = model.inner[0](x), model(x)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(x, fail=True)
    with torch.no_grad():
        assert torch.equal(model.inner[0](x), layer)
    loss = model(x)
    torch.testing.assert_close(loss, whole)  # rotated otherwise where gradients are wanted, up to rounding
    loss.sum().backward()


def test_a_layer_that_is_never_called_is_no_silent_no_op() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> Any:
            return self.used(x)

    model = Half()
    excite(inject_oft(model, OFTConfig(block_size=8, targets=".*")))
    with pytest.raises(TargetError) as error:
        model(torch.randn(2, 16))
    assert_one_sentence(error, "1 of 2 adapted layers of Half were bypassed: unused")
