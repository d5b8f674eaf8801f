"""Another adapter for each image of a batch: each image is as in a run of the whole batch with its adapter alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline
from torch import Tensor, nn

from oft_diffusion import (
    OFTConfig,
    inject_oft,
    load_oft_weights,
    oft_adapters_per_image,
    save_oft_weights,
    set_oft_adapters,
)
from oft_diffusion.errors import AdapterError
from tests.helpers.tiny_families import tiny_family
from tests.library.support import assert_one_sentence, copy_pipe, distance, excite

PROMPTS = ["a photo of dog", "a red mug on table", "a mug in room"]
MOVED = 1e-3


def pictures(pipe: Any, prompts: Sequence[str] = PROMPTS, **options: Any) -> Tensor:
    """Latents of all images, always from the same noise."""
    call = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 5.0, "height": 16, "width": 16}
    generator = torch.Generator().manual_seed(0)
    images: Tensor = pipe(list(prompts), generator=generator, **(call | options)).images
    return images


def alone(pipe: Any, name: str | None, strength: float = 1.0, **options: Any) -> Tensor:
    set_oft_adapters(pipe, [name] if name else [], strength)
    return pictures(pipe, **options)


def assert_each_is_its_own(pipe: Any, names: Sequence[str | None], prompts: Sequence[str], **options: Any) -> None:
    """Image i of the mixed batch is image i of a run with names[i] alone, and of no other run."""
    runs = {name: alone(pipe, name, prompts=prompts, **options) for name in {*names, None}}
    set_oft_adapters(pipe, [])
    with oft_adapters_per_image(pipe, names):
        mixed = pictures(pipe, prompts, **options)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], runs[name][i], rtol=0, atol=2e-5)
        others = [other for other in runs if other != name]
        assert all(distance(mixed[i], runs[other][i]) > MOVED for other in others), (i, name)
    assert torch.equal(pictures(pipe, prompts, **options), runs[None])


@pytest.fixture
def both(pipe: Any, mug: Path, style: Path) -> Any:
    """mug adapts the UNet and the text encoder, style the UNet."""
    load_oft_weights(pipe, mug, adapter_name="mug")
    load_oft_weights(pipe, style, adapter_name="style")
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_one_image_per_prompt(both: Any, guidance: float) -> None:
    assert_each_is_its_own(both, ["mug", None, "style"], PROMPTS, guidance_scale=guidance)
    assert_each_is_its_own(both, ["style", "mug", "mug"], PROMPTS, guidance_scale=guidance, negative_prompt=["red"] * 3)


def test_two_images_per_prompt_with_a_text_encoder(both: Any) -> None:
    names = ["mug", "mug", "style", None]
    assert_each_is_its_own(both, names, PROMPTS[:2], num_images_per_prompt=2)
    with (
        oft_adapters_per_image(both, ["mug", "style", None, None]),
        pytest.raises(AdapterError, match="images of one prompt have different adapters") as error,
    ):
        pictures(both, PROMPTS[:2], num_images_per_prompt=2)
    assert_one_sentence(error, "CLIPTextModel")


def test_images_of_one_prompt_may_differ_where_no_text_encoder_is_adapted(pipe: Any, style: Path, make: Any) -> None:
    load_oft_weights(pipe, style, adapter_name="style")
    load_oft_weights(pipe, make("wide", seed=5, parts=("unet",), config=OFTConfig(16)), adapter_name="wide")
    assert_each_is_its_own(pipe, ["style", "wide", None, "style"], PROMPTS[:2], num_images_per_prompt=2)


def test_three_copies_of_the_batch(both: Any) -> None:
    parts = {name: part for name, part in both.components.items() if name != "image_encoder"}
    perturbed = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["mid"])
    perturbed.set_progress_bar_config(disable=True)
    rows: list[int] = []
    hook = perturbed.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    assert_each_is_its_own(perturbed, ["mug", None, "style"], PROMPTS, pag_scale=3.0)
    hook.remove()
    assert set(rows) == {9}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("FluxPipeline", {"true_cfg_scale": 3.0, "negative_prompt": ["a dog"] * 3, "guidance_scale": 1.0}),
        ("StableDiffusion3Pipeline", {}),
        ("ZImagePipeline", {}),
    ],
)
def test_transformers(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    pipe = tiny_family(family, tmp_path)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval()  # T5 has dropout
    pipe.set_progress_bar_config(disable=True)
    for seed, name in enumerate(("mug", "style")):
        other = tiny_family(family, tmp_path)
        for part in ("transformer", "text_encoder") if name == "mug" else ("transformer",):
            excite(inject_oft(getattr(other, part), OFTConfig(block_size=8), "a"), "a", seed=seed)
        load_oft_weights(pipe, save_oft_weights(other, tmp_path / name, "a"), adapter_name=name)
    assert_each_is_its_own(pipe, ["mug", None, "style"], PROMPTS, **options)


def test_each_image_may_have_its_own_strength(both: Any) -> None:
    wanted = [alone(both, "style", s)[i] for i, s in enumerate((0.3, 1.0, -0.5))]
    with oft_adapters_per_image(both, ["style"] * 3, [0.3, 1.0, -0.5]):
        torch.testing.assert_close(pictures(both), torch.stack(wanted), rtol=0, atol=2e-5)


def test_what_was_active_is_active_again(both: Any) -> None:
    set_oft_adapters(both, ["style", "mug"], [0.4, 0.7])
    before = pictures(both)
    with contextlib.suppress(KeyboardInterrupt), oft_adapters_per_image(both, ["mug", None, None]):
        raise KeyboardInterrupt
    assert torch.equal(pictures(both), before)


def test_mistakes(both: Any) -> None:
    for names, words in (
        (["mug", "cup"], ["no adapter 'cup'"]),
        ([], ["one per image"]),
        ("mug", ["one per image", '["mug", None]']),
    ):
        with pytest.raises(AdapterError) as error, oft_adapters_per_image(both, names):
            pass
        assert_one_sentence(error, *words)
    with oft_adapters_per_image(both, ["mug", "style"]):
        with pytest.raises(AdapterError, match="3 rows while 2 images") as error:
            pictures(both)
        assert_one_sentence(error)
        with pytest.raises(AdapterError, match="image by image"):
            set_oft_adapters(both, ["mug"])
    fresh = copy_pipe(both)
    inject_oft(fresh.unet, OFTConfig(block_size=8), "new")
    with pytest.raises(AdapterError, match=r"'new' .* is trainable"), oft_adapters_per_image(fresh, ["new"]):
        pass
