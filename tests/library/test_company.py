"""Adapters in company: pipelines that share components, ControlNet, LoRA files, saving, moving, priors.

IP-Adapters are in `test_ip_adapter.py`, LoRA in `test_lora_beside.py`, too, offloading in `test_offload.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn

from oft_diffusion import (
    OFTConfig,
    fuse_oft,
    inject_oft,
    list_oft_adapters,
    load_oft_weights,
    save_oft_weights,
    set_oft_adapters,
    unfuse_oft,
    unload_oft_weights,
)
from oft_diffusion.errors import AdapterError
from tests.helpers.tiny_sd import tiny_tokenizer
from tests.library.support import PROMPT, assert_unchanged, copy_pipe, distance, draw, excite, fingerprint

MOVED = 0.005
PICTURE = Image.new("RGB", (16, 16), (200, 60, 20))
MASK = Image.new("L", (16, 16), 255)


def call(pipe: Any, **more: Any) -> Tensor:
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    images: Tensor = pipe(PROMPT, **{**options, **more}).images
    return images


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def without_checker(pipe: Any) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if name not in ("safety_checker", "image_encoder")}


def image_to_image(pipe: Any) -> tuple[Any, dict[str, Any]]:
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, requires_safety_checker=False)
    return quiet(other), {"image": PICTURE, "strength": 1.0}


def inpainting(pipe: Any) -> tuple[Any, dict[str, Any]]:
    other = diffusers.StableDiffusionInpaintPipeline.from_pipe(pipe, requires_safety_checker=False)
    return quiet(other), {"image": PICTURE, "mask_image": MASK, "height": 16, "width": 16}


def control_net(pipe: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_channels=3).eval()
    for parameter in net.controlnet_down_blocks.parameters():
        nn.init.normal_(parameter, std=0.05)
    net.controlnet_cond_embedding = diffusers.models.controlnets.controlnet.ControlNetConditioningEmbedding(
        pipe.unet.config.block_out_channels[0], 3, block_out_channels=(4, 8)
    )
    parts = without_checker(pipe)
    other = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=net, safety_checker=None, requires_safety_checker=False
    )
    return quiet(other), {"image": PICTURE}


@pytest.mark.parametrize("sharing", [image_to_image, inpainting, control_net])
def test_pipelines_that_share_the_components(
    pipe: Any, mug: Path, sharing: Callable[[Any], tuple[Any, dict[str, Any]]]
) -> None:
    other, options = sharing(pipe)
    base = call(other, **options)
    before = draw(pipe)
    load_oft_weights(other, mug, adapter_name="mug")
    assert [a.name for a in list_oft_adapters(pipe)] == ["mug"]
    live = call(other, **options)
    assert distance(live, base) > MOVED
    assert distance(draw(pipe), before) > MOVED
    fuse_oft(pipe)
    assert distance(call(other, **options), live) < 1e-5
    unfuse_oft(other)
    assert torch.equal(call(other, **options), live)
    unload_oft_weights(pipe)  # from both: the component is one
    assert list_oft_adapters(other) == []
    assert torch.equal(call(other, **options), base)
    assert torch.equal(draw(pipe), before)


def test_a_pipeline_made_after_loading_has_the_adapter(pipe: Any, mug: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug", strength=0.5)
    other, options = image_to_image(pipe)
    (listed,) = list_oft_adapters(other)
    assert (listed.name, listed.strength) == ("mug", 0.5)
    half = call(other, **options)
    set_oft_adapters(other, "mug", 1.0)
    assert list_oft_adapters(pipe)[0].strength == 1.0
    assert distance(call(other, **options), half) > MOVED


def test_a_pipeline_that_shares_one_component_alone(pipe: Any, base_pipe: Any, mug: Path) -> None:
    """Unloading takes the adapter out of what is shared; the rest of the other pipeline keeps it."""
    other = copy_pipe(base_pipe)
    other.text_encoder = pipe.text_encoder
    load_oft_weights(pipe, mug, adapter_name="mug")
    whole = draw(pipe)
    assert [a.components for a in list_oft_adapters(other)] == [("text_encoder",)]
    unload_oft_weights(other)
    assert [a.components for a in list_oft_adapters(pipe)] == [("unet",)]
    assert distance(draw(pipe), whole) > 1e-3
    with pytest.raises(AdapterError, match="already has an adapter 'mug'"):
        load_oft_weights(pipe, mug, adapter_name="mug")
    unload_oft_weights(pipe)
    load_oft_weights(pipe, mug, adapter_name="mug")
    assert torch.equal(draw(pipe), whole)


@pytest.mark.parametrize("lora_first", [False, True])
def test_a_lora_that_diffusers_loads_beside(
    pipe: Any, base_pipe: Any, mug: Path, tmp_path: Path, lora_first: bool
) -> None:
    donor = copy_pipe(base_pipe)
    donor.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    donor.save_lora_weights(tmp_path, unet_lora_layers=_lora_state(donor.unet))
    before = draw(pipe)
    if lora_first:
        pipe.load_lora_weights(tmp_path, adapter_name="lora")
    load_oft_weights(pipe, mug, adapter_name="mug")
    if not lora_first:
        pipe.load_lora_weights(tmp_path, adapter_name="lora")
    both = draw(pipe)
    pipe.disable_lora()
    only_oft = draw(pipe)
    pipe.enable_lora()
    set_oft_adapters(pipe, [])
    only_lora = draw(pipe)
    assert min(distance(both, one) for one in (only_oft, only_lora, before)) > 1e-3
    set_oft_adapters(pipe, ["mug"])
    assert distance(draw(pipe), both) < 1e-6
    fuse_oft(pipe)
    assert distance(draw(pipe), both) < 1e-5
    unfuse_oft(pipe)
    assert torch.equal(draw(pipe), both)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), only_oft)
    unload_oft_weights(pipe)
    assert torch.equal(draw(pipe), before)


def _lora_state(unet: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = get_peft_model_state_dict(unet)
    return state


def test_saving_a_pipeline_saves_the_base(pipe: Any, mug: Path, tmp_path: Path) -> None:
    before = draw(pipe)
    load_oft_weights(pipe, mug, adapter_name="mug")
    live = draw(pipe)
    pipe.save_pretrained(tmp_path / "live")
    fuse_oft(pipe)
    pipe.save_pretrained(tmp_path / "fused")
    for folder, wanted in (("live", before), ("fused", live)):
        again = quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / folder))
        assert distance(draw(again), wanted) < 1e-5
        assert list_oft_adapters(again) == []


def test_moving_and_casting(pipe: Any, mug: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    live = call(pipe, latents=noise)
    pipe.to(torch.float64)
    assert distance(call(pipe, latents=noise.double()).float(), live) < 1e-5
    pipe.to(torch.float32)
    assert distance(call(pipe, latents=noise), live) < 1e-6


def test_many_times_in_and_out_leaves_nothing(pipe: Any, mug: Path, style: Path) -> None:
    before = fingerprint(pipe)
    for _ in range(50):
        load_oft_weights(pipe, mug, adapter_name="mug")
        load_oft_weights(pipe, style, adapter_name="style")
        unload_oft_weights(pipe, "mug")
        unload_oft_weights(pipe)
    assert_unchanged(pipe, before)


def prior_pipeline(folder: Path) -> Any:
    """Kandinsky's first half: text to an image embedding, by a transformer that the pipeline calls `prior`."""
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=len(tiny_tokenizer(folder)), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=32, max_position_embeddings=77,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, projection_dim=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    pipe = diffusers.KandinskyV22PriorPipeline(
        prior=diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=32, num_embeddings=77,
            additional_embeddings=4, clip_embed_dim=32,
        ).eval(),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
        text_encoder=transformers.CLIPTextModelWithProjection(text).eval(),
        tokenizer=tiny_tokenizer(folder),
        scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        image_processor=transformers.CLIPImageProcessorPil(size=16, crop_size=16),
    )  # fmt: skip
    nn.init.ones_(pipe.prior.clip_std)  # zeros, which an untrained one has, make every embedding zero
    return quiet(pipe)


def test_a_prior(tmp_path: Path) -> None:
    def embedding(pipe: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        found: Tensor = pipe(PROMPT, num_inference_steps=2, generator=generator).image_embeds
        return found

    donor, pipe = prior_pipeline(tmp_path / "a"), prior_pipeline(tmp_path / "b")
    before = embedding(pipe)
    for seed, part in enumerate(("prior", "text_encoder")):
        excite(inject_oft(getattr(donor, part), OFTConfig(block_size=8), "a"), "a", seed=seed)
    loaded = load_oft_weights(pipe, save_oft_weights(donor, tmp_path / "adapter", "a"), adapter_name="mug")
    assert set(loaded.components) == {"prior", "text_encoder"}
    live = embedding(pipe)
    assert torch.equal(live, embedding(donor))
    assert distance(live, before) > MOVED
    fuse_oft(pipe)
    assert distance(embedding(pipe), live) < 1e-5
    unfuse_oft(pipe)
    unload_oft_weights(pipe)
    assert torch.equal(embedding(pipe), before)
