"""A quantized component that is moved leaves nothing behind: parking frees all of its bytes, and it still answers."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oft_diffusion.quantization import quantize_with_bitsandbytes, scheme
from oft_diffusion.quantized import send

ONES = torch.ones(2, 64)


def component(backend: str) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    quantize_with_bitsandbytes(made, scheme(backend), torch.float32)
    return made


def kept(layer: Any) -> list[Tensor]:
    """All tensors of a layer of bitsandbytes' with 8 bits."""
    beside = [getattr(holder, name) for holder in (layer.weight, layer.state) for name in ("CB", "SCB")]
    return [layer.weight.data, layer.bias.data, *(tensor for tensor in beside if tensor is not None)]


@pytest.mark.parametrize("called", [False, True])
def test_what_eight_bits_keep_beside_their_parameter_moves_with_it(
    called: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = component("int8")
    before = module(ONES) if called else None
    held = [tensor.detach() for layer in module for tensor in kept(layer)]  # so that no address is used again
    old = {tensor.data_ptr() for tensor in held}
    with monkeypatch.context() as patch:  # as if there were another device: what moves is copied
        patch.setattr(torch.Tensor, "to", lambda self, *_, **__: self.clone(), raising=False)
        send(module, "cpu")
    for layer in module:
        tensors = kept(layer)
        assert len(tensors) == 4  # the first call moves the two from the weight to the state
        assert not old & {tensor.data_ptr() for tensor in tensors}
        assert len({tensor.data_ptr() for tensor in tensors}) == 3  # codes are there once
    if before is not None:
        assert module(ONES).equal(before)


@pytest.mark.gpu
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("backend", ["nf4", "int8"])
def test_a_card_is_empty_of_what_has_gone(backend: str, called: bool) -> None:
    x = ONES.cuda()
    first = component(backend)
    send(first, "cuda")
    first(x)  # libraries take memory for themselves at a first call
    del first
    gc.collect()
    module, free = component(backend), torch.cuda.memory_allocated()
    send(module, "cuda")
    assert torch.cuda.memory_allocated() > free
    before = module(x).cpu() if called else None
    for _ in range(2):
        send(module, "cpu")
        gc.collect()
        assert torch.cuda.memory_allocated() <= free
        send(module, "cuda")
        if before is not None:
            assert module(x).cpu().equal(before)
