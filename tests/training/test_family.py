"""Stable Diffusion's part: what the denoiser should answer, how losses are weighted, pictures, single files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from oft_diffusion.errors import ConfigError, TrainingError
from oft_diffusion.training.base import find_base
from oft_diffusion.training.family import StableDiffusion, check_trigger, load_tokenizer, too_long
from tests.helpers.tiny_sd import RESOLUTION, tiny_pipeline, write_single_file, write_tiny_sd


@pytest.fixture(scope="module")
def family(tiny_sd: Path) -> StableDiffusion:
    return StableDiffusion.load(find_base(str(tiny_sd)), torch.float32)


def of_kind(family: StableDiffusion, prediction_type: str, zero_snr: bool = False) -> StableDiffusion:
    """The same family with another schedule."""
    pipe = tiny_pipeline(Path(family.base.weights).parent / prediction_type, prediction_type=prediction_type,
                         zero_snr=zero_snr)  # fmt: skip
    base = type(family.base)(**{**family.base.__dict__, "scheduler": dict(pipe.scheduler.config)})
    return StableDiffusion(pipe, base)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_answer_denoises(prediction_type: str, family: StableDiffusion) -> None:
    # The target, taken as the UNet's answer, must lead the scheduler's own arithmetic back to the latents.
    kind = of_kind(family, prediction_type)
    latents, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    timesteps = torch.tensor([1, 200, 500, 900])
    noisy = kind.add_noise(latents, noise, timesteps)
    answer = kind.target(latents, noise, timesteps)
    schedule: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                  prediction_type=prediction_type)  # fmt: skip
    for i, t in enumerate(timesteps):
        found = schedule.step(answer[i], int(t), noisy[i]).pred_original_sample
        assert torch.allclose(found, latents[i], atol=2e-3)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(prediction_type: str, zero_snr: bool, family: StableDiffusion) -> None:
    kind = of_kind(family, prediction_type, zero_snr)
    timesteps = torch.arange(1000)
    weight = kind.loss_weight(timesteps, 5.0)
    alphas = kind.noise_schedule.alphas_cumprod
    snr = alphas / (1 - alphas)
    # The weight on the error of the latents is min(snr, gamma), whatever is predicted (arXiv 2303.09556, section 3.4).
    of_latents = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    assert weight.isfinite().all()
    assert torch.allclose(weight * of_latents, snr.clamp(max=5.0), rtol=1e-3, atol=1e-6)
    assert (alphas[-1] == 0) == zero_snr
    assert kind.loss_weight(timesteps, None).eq(1).all()


def test_posterior_and_shapes(family: StableDiffusion) -> None:
    pixels = torch.rand(3, RESOLUTION, RESOLUTION) * 2 - 1
    posterior = family.encode_image(pixels)
    assert posterior.mean.shape == posterior.std.shape == family.latent_shape(RESOLUTION) == (4, 8, 8)
    assert not posterior.mean.requires_grad
    assert (posterior.std > 0).all()
    middle = family.latents(posterior, torch.zeros(4, 8, 8))
    assert torch.allclose(middle, posterior.mean * family.vae.config.scaling_factor)


def test_long_prompts_are_recognised(family: StableDiffusion) -> None:
    assert not too_long(family.tokenizer, "a photo of sks dog")
    assert too_long(family.tokenizer, "a red dog " * 20)
    assert family.tokenize(["a red dog " * 20])["input_ids"].shape == (1, 24)


def test_pictures_follow_from_their_seeds(family: StableDiffusion) -> None:
    torch.manual_seed(0)
    first = family.sample(["a dog", "a dog"], [1, 2], RESOLUTION, 2, 5.0)
    torch.manual_seed(1)
    again = family.sample(["a dog"], [2], RESOLUTION, 2, 5.0)
    assert first[1].tobytes() == again[0].tobytes()
    assert first[0].tobytes() != first[1].tobytes()
    assert first[0].size == (RESOLUTION, RESOLUTION)
    family.unet.train()
    family.sample(["a dog"], [2], RESOLUTION, 1, 1.0)
    assert family.unet.training
    family.unet.eval()


def test_many_pictures_are_drawn_a_few_at_a_time(family: StableDiffusion) -> None:
    rows: list[int] = []
    hook = family.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        many = family.sample(["a dog"] * 10, range(10), RESOLUTION, 1, 5.0)
    finally:
        hook.remove()
    assert rows == [8, 8, 4]  # guidance doubles them
    assert len({image.tobytes() for image in many}) == 10
    assert family.sample(["a dog"], [9], RESOLUTION, 1, 5.0)[0].tobytes() == many[9].tobytes()


def test_half_precision_base_keeps_the_vae_in_float32(tiny_sd: Path) -> None:
    half = StableDiffusion.load(find_base(str(tiny_sd)), torch.bfloat16)
    assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32
    assert len(half.sample(["a dog"], [0], RESOLUTION, 2, 5.0)) == 1


def test_single_file_is_the_same_model(tmp_path: Path, family: StableDiffusion) -> None:
    file = write_single_file(tiny_pipeline(tmp_path), tmp_path / "tiny.safetensors")
    single = StableDiffusion.load(find_base(str(file), str(family.base.configs)), torch.float32)
    for component in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(single, component).state_dict(), getattr(family, component).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)
    assert single.describe()["name"] == "tiny.safetensors"


def test_single_file_with_foreign_configs_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    file = write_single_file(pipe, tmp_path / "tiny.safetensors")
    configs = write_tiny_sd(tmp_path)
    text = (configs / "unet" / "config.json").read_text()
    (configs / "unet" / "config.json").write_text(text.replace("32,\n    64", "48,\n    64"))
    with pytest.raises(TrainingError, match="diffusers cannot load"):
        StableDiffusion.load(find_base(str(file), str(configs)), torch.float32)


@pytest.mark.parametrize("trigger", ["dog", "photo", "red mug", "x"])
def test_common_words_are_refused_as_trigger(trigger: str, tiny_sd: Path) -> None:
    with pytest.raises(ConfigError, match="is a common word to this model's tokenizer"):
        check_trigger(load_tokenizer(find_base(str(tiny_sd))), trigger)


@pytest.mark.parametrize("trigger", ["sks", "zwx", "red sks", "<sks>"])
def test_rare_words_are_accepted(trigger: str, tiny_sd: Path) -> None:
    check_trigger(load_tokenizer(find_base(str(tiny_sd))), trigger)
