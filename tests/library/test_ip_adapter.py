"""An IP-Adapter beside: keys and values of a picture in cross-attention; q, k, v and out go on through the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from oft_diffusion import fuse_oft, load_oft_weights, set_oft_adapters, unfuse_oft, unload_oft_weights
from tests.library.support import PROMPT, assert_unchanged, copy_pipe, distance, draw, fingerprint

MOVED = 1e-3
TOKENS, EMBEDDED = 4, 16
RED, BLUE = (Image.new("RGB", (16, 16), colour) for colour in ((220, 30, 20), (20, 40, 210)))


@pytest.fixture(scope="module")
def ip_adapter(base_pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as h94/IP-Adapter is one: `models/ip-adapter.safetensors` and an image encoder beside it."""
    folder, source = tmp_path_factory.mktemp("ip"), torch.Generator().manual_seed(0)
    unet = base_pipe.unet

    def noise(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=source)

    width = unet.config.cross_attention_dim
    state = {
        "image_proj.proj.weight": noise(TOKENS * width, EMBEDDED), "image_proj.proj.bias": noise(TOKENS * width),
        "image_proj.norm.weight": 1.0 + noise(width), "image_proj.norm.bias": noise(width),
    }  # fmt: skip
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):  # the file counts all, and has those that see the prompt
            inner = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            state |= {f"ip_adapter.{number}.to_{x}_ip.weight": noise(inner, width) for x in "kv"}
    (folder / "models").mkdir()
    save_file(state, folder / "models" / "ip-adapter.safetensors")
    torch.manual_seed(0)
    transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=8, projection_dim=EMBEDDED,
        )
    ).save_pretrained(folder / "models" / "image_encoder")  # fmt: skip
    return folder


def load_ip(pipe: Any, folder: Path) -> None:
    pipe.load_ip_adapter(str(folder), subfolder="models", weight_name="ip-adapter.safetensors")


def seen(pipe: Any, picture: Any) -> Tensor:
    """What the pipeline draws of a prompt and a picture."""
    options = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    images: Tensor = pipe(PROMPT, ip_adapter_image=picture, **options).images
    return images


@pytest.mark.thinned(3)
@pytest.mark.parametrize("first", ["IP-Adapter", "OFT"])
@pytest.mark.parametrize("gone_first", ["IP-Adapter", "OFT"])
def test_both_orders_in_and_out(
    pipe: Any, base_pipe: Any, mug: Path, ip_adapter: Path, untouched: Tensor, first: str, gone_first: str
) -> None:
    alone, rotated = copy_pipe(base_pipe), copy_pipe(base_pipe)
    load_ip(alone, ip_adapter)
    load_oft_weights(rotated, mug, adapter_name="mug")
    only_ip, only_oft = seen(alone, RED), draw(rotated)

    if first == "IP-Adapter":
        load_ip(pipe, ip_adapter)
    load_oft_weights(pipe, mug, adapter_name="mug")
    if first == "OFT":
        assert torch.equal(draw(pipe), only_oft)
        load_ip(pipe, ip_adapter)
    both = seen(pipe, RED)
    assert min(distance(both, other) for other in (only_ip, only_oft, untouched, seen(pipe, BLUE))) > MOVED
    pipe.set_ip_adapter_scale(0.0)
    assert distance(seen(pipe, RED), only_oft) < 1e-5
    pipe.set_ip_adapter_scale(1.0)
    set_oft_adapters(pipe, "mug", 0.0)
    assert torch.equal(seen(pipe, RED), only_ip)
    set_oft_adapters(pipe, "mug")
    fuse_oft(pipe)
    assert distance(seen(pipe, RED), both) < 1e-5
    unfuse_oft(pipe)
    assert torch.equal(seen(pipe, RED), both)

    if gone_first == "OFT":
        unload_oft_weights(pipe)
        assert torch.equal(seen(pipe, RED), only_ip)
        assert _trainable(pipe) == _trainable(alone)
        pipe.unload_ip_adapter()
    else:
        pipe.unload_ip_adapter()
        assert torch.equal(draw(pipe), only_oft)
        unload_oft_weights(pipe)
    assert torch.equal(draw(pipe), untouched)
    assert _trainable(pipe) == _trainable(base_pipe)


def _trainable(pipe: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}


def test_both_orders_draw_the_same(pipe: Any, base_pipe: Any, mug: Path, ip_adapter: Path) -> None:
    other = copy_pipe(base_pipe)
    load_ip(pipe, ip_adapter)
    load_oft_weights(pipe, mug)
    load_oft_weights(other, mug)
    load_ip(other, ip_adapter)
    assert torch.equal(seen(pipe, RED), seen(other, RED))


def test_an_ip_adapter_comes_and_goes_while_oft_is_fused(
    pipe: Any, base_pipe: Any, mug: Path, ip_adapter: Path, untouched: Tensor
) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug")
    live = draw(pipe)
    fuse_oft(pipe)
    fused = draw(pipe)
    load_ip(pipe, ip_adapter)
    both = seen(pipe, RED)
    assert distance(both, fused) > MOVED
    unfuse_oft(pipe)
    assert distance(seen(pipe, RED), both) < 1e-5
    fuse_oft(pipe)
    pipe.unload_ip_adapter()
    assert torch.equal(draw(pipe), fused)
    unfuse_oft(pipe)
    assert torch.equal(draw(pipe), live)
    unload_oft_weights(pipe)
    assert torch.equal(draw(pipe), untouched)


def test_hot_swaps_and_unloading_leave_the_ip_adapter_to_the_bit(
    pipe: Any, mug: Path, plain: Path, ip_adapter: Path
) -> None:
    load_ip(pipe, ip_adapter)
    before, picture = fingerprint(pipe), seen(pipe, RED)
    load_oft_weights(pipe, mug, adapter_name="subject", strength=0.7)
    first = seen(pipe, RED)
    load_oft_weights(pipe, plain, adapter_name="subject", hotswap=True)
    assert min(distance(seen(pipe, RED), other) for other in (first, picture)) > MOVED
    unload_oft_weights(pipe)
    assert torch.equal(seen(pipe, RED), picture)
    assert_unchanged(pipe, before)
