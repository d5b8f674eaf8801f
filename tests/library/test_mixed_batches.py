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
    fuse_oft,
    inject_oft,
    list_oft_adapters,
    load_oft_weights,
    merge_oft,
    oft_adapters_per_image,
    save_oft_weights,
    set_oft_adapters,
    unload_oft_weights,
)
from oft_diffusion.errors import AdapterError
from oft_diffusion.plan import StrengthMode
from tests.helpers.tiny_families import tiny_family
from tests.library.support import assert_one_sentence, assert_unchanged, copy_pipe, distance, excite, fingerprint
from tests.peers import peft_oft

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
        pytest.raises(AdapterError, match="images with different adapters") as error,
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
    fresh = copy_pipe(both)
    inject_oft(fresh.unet, OFTConfig(block_size=8), "new")
    with pytest.raises(AdapterError, match=r"'new' .* is trainable"), oft_adapters_per_image(fresh, ["new"]):
        pass


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_call_that_makes_another_number_of_images(pipe: Any, style: Path, make: Any, guidance: float) -> None:
    """Rows alone do not tell: two names for one image with guidance are as many rows as adapters."""
    load_oft_weights(pipe, style, adapter_name="style")
    wide = make("wide", seed=5, parts=("unet",), config=OFTConfig(16))
    load_oft_weights(pipe, wide, adapter_name="wide")
    for names, images in ((["style", "wide"], 1), (["style", "wide"], 4), (["style"], 3), (["style"] * 4, 2)):
        before = pictures(pipe, PROMPTS[:1])
        with oft_adapters_per_image(pipe, names), pytest.raises(AdapterError) as error:
            pictures(pipe, PROMPTS[:1], num_images_per_prompt=images, guidance_scale=guidance)
        assert_one_sentence(error, f"{images} images while {len(names)} have")
        assert torch.equal(pictures(pipe, PROMPTS[:1]), before)


def test_nothing_else_changes_adapters_meanwhile(both: Any, plain: Path) -> None:
    before, listed = fingerprint(both), list_oft_adapters(both)

    def nested() -> None:
        with oft_adapters_per_image(both, ["style", None, None]):
            pass

    with oft_adapters_per_image(both, ["mug", "style", None]):
        mixed = pictures(both)
        for change in (
            lambda: set_oft_adapters(both, ["mug"]),
            lambda: load_oft_weights(both, plain, adapter_name="new"),
            lambda: load_oft_weights(both, plain, adapter_name="mug", hotswap=True),
            lambda: fuse_oft(both, keep_base=False),
            lambda: merge_oft(both.unet, keep_base=False),
            lambda: unload_oft_weights(both),
            lambda: unload_oft_weights(both, "style"),
            nested,
        ):
            with pytest.raises(AdapterError) as error:
                change()
            assert_one_sentence(error, "image by image", "`with` block")
        assert torch.equal(pictures(both), mixed)
    assert_unchanged(both, before)
    assert list_oft_adapters(both) == listed
    load_oft_weights(both, plain, adapter_name="new")  # the name is free


def test_a_compiled_text_encoder_is_one(both: Any) -> None:
    names = ["mug", "mug", "style", None]
    wanted = pictures_of_names(both, names)
    torch.compiler.reset()
    both.text_encoder = torch.compile(both.text_encoder, backend="eager")
    torch.testing.assert_close(pictures_of_names(both, names), wanted, rtol=0, atol=2e-5)
    torch.compiler.reset()


def pictures_of_names(pipe: Any, names: Sequence[str | None]) -> Tensor:
    with oft_adapters_per_image(pipe, names):
        return pictures(pipe, PROMPTS[:2], num_images_per_prompt=2)


def test_images_have_their_own_mode(pipe: Any, mug: Path, tmp_path: Path) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    shape = tuple(pipe.unet.get_submodule(layer).weight.shape)
    theirs = peft_oft.write_peft(tmp_path / "peft", {layer: shape}, block_size=8, norm=0.9)
    load_oft_weights(pipe, theirs, adapter_name="theirs", component="unet")
    modes: tuple[StrengthMode, ...] = ("linear", "rotation")
    runs = {}
    for mode in modes:
        set_oft_adapters(pipe, "theirs", 0.5, mode)
        runs[mode] = pictures(pipe)
    assert distance(runs["linear"], runs["rotation"]) > 1e-4
    for asked, wanted in ((None, "linear"), *zip(modes, modes, strict=True)):
        with oft_adapters_per_image(pipe, ["theirs"] * 3, 0.5, asked):
            torch.testing.assert_close(pictures(pipe), runs[wanted], rtol=0, atol=2e-5)
