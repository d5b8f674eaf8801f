"""Stable Diffusion through its family: posteriors, pictures, half precision, single files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from oft_diffusion.errors import TrainingError
from oft_diffusion.training import TrainConfig, train
from oft_diffusion.training.families import Family
from oft_diffusion.training.families.kinds import StableDiffusion
from oft_diffusion.training.find import find_base
from tests.helpers.single_files import write_single_file
from tests.helpers.tiny_sd import RESOLUTION, tiny_pipeline, write_tiny_sd


@pytest.fixture(scope="module")
def family(tiny_sd: Path) -> Family:
    return StableDiffusion.load(find_base(str(tiny_sd)), torch.float32)


def test_posterior_and_shapes(family: Family) -> None:
    pixels = torch.rand(3, RESOLUTION, RESOLUTION) * 2 - 1
    posterior = family.encode_image(pixels)
    assert posterior.mean.shape == posterior.std.shape == family.latent_shape(RESOLUTION) == (4, 8, 8)
    assert not posterior.mean.requires_grad
    assert (posterior.std > 0).all()
    middle = family.latents(posterior, torch.zeros(4, 8, 8))
    assert torch.allclose(middle, posterior.mean * family.vae.config.scaling_factor)


def test_pictures_follow_from_their_seeds(family: Family) -> None:
    torch.manual_seed(0)
    first = family.sample(["a dog", "a dog"], [1, 2], RESOLUTION, 2, 5.0)
    torch.manual_seed(1)
    again = family.sample(["a dog"], [2], RESOLUTION, 2, 5.0)
    assert first[1].tobytes() == again[0].tobytes()
    assert first[0].tobytes() != first[1].tobytes()
    assert first[0].size == (RESOLUTION, RESOLUTION)
    family.module("unet").train()
    family.sample(["a dog"], [2], RESOLUTION, 1, 1.0)
    assert family.module("unet").training
    family.module("unet").eval()


def test_many_pictures_are_drawn_a_few_at_a_time(family: Family) -> None:
    rows: list[int] = []
    hook = family.module("unet").register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        many = family.sample(["a dog"] * 10, range(10), RESOLUTION, 1, 5.0)
    finally:
        hook.remove()
    assert rows == [8, 8, 4]  # guidance doubles them
    assert len({image.tobytes() for image in many}) == 10
    assert family.sample(["a dog"], [9], RESOLUTION, 1, 5.0)[0].tobytes() == many[9].tobytes()


def test_half_precision_base_keeps_the_vae_in_float32(tiny_sd: Path) -> None:
    half = StableDiffusion.load(find_base(str(tiny_sd)), torch.bfloat16)
    assert half.module("unet").dtype == half.module("text_encoder").dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32
    assert len(half.sample(["a dog"], [0], RESOLUTION, 2, 5.0)) == 1


def test_single_file_is_the_same_model(tmp_path: Path, family: Family) -> None:
    file = write_single_file(tiny_pipeline(tmp_path), tmp_path / "tiny.safetensors")
    single = StableDiffusion.load(find_base(str(file), str(family.base.configs)), torch.float32)
    for component in ("unet", "vae", "text_encoder"):
        ours, theirs = single.module(component).state_dict(), family.module(component).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)
    assert single.describe()["name"] == "tiny.safetensors"
    half = StableDiffusion.load(find_base(str(file), str(family.base.configs)), torch.bfloat16)
    assert half.module("unet").dtype == half.module("text_encoder").dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32


def test_single_file_with_foreign_configs_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    file = write_single_file(pipe, tmp_path / "tiny.safetensors")
    configs = write_tiny_sd(tmp_path)
    text = (configs / "unet" / "config.json").read_text()
    (configs / "unet" / "config.json").write_text(text.replace("32,\n    64", "48,\n    64"))
    with pytest.raises(TrainingError, match="diffusers cannot load"):
        StableDiffusion.load(find_base(str(file), str(configs)), torch.float32)


def test_attention_that_trains_quicker_is_the_same_attention(tiny_sd: Path) -> None:
    own = StableDiffusion.load(find_base(str(tiny_sd)), torch.float32)
    unet, resolution = own.module("unet"), RESOLUTION
    encoded = own.encode_text(["a dog"], resolution)
    noisy, times = torch.randn(1, *own.latent_shape(resolution)), torch.tensor([500])
    with torch.no_grad():
        before = own.predict(noisy, times, encoded)
        own.quicken_backward(1024)  # too many tokens: attention maps would take the memory that flash attention saves
        assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}
        own.quicken_backward(resolution)
        assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor}
        torch.testing.assert_close(own.predict(noisy, times, encoded), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "processor"), [("bf16", AttnProcessor), ("no", AttnProcessor2_0)])
def test_only_half_precision_on_a_processor_wants_it(
    config: Callable[..., TrainConfig], precision: str, processor: type
) -> None:
    with train(config(mixed_precision=precision, steps=1), progress=False) as run:
        next(iter(run))
        assert run.parts is not None
        assert {type(p) for p in run.parts.family.module("unet").attn_processors.values()} == {processor}
