"""What each family noises, asks and wants agrees with its pipeline and that pipeline's own sampler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oft_diffusion.training import TrainConfig
from oft_diffusion.training.families import Family
from oft_diffusion.training.families.recording import inputs
from oft_diffusion.training.model import AdaptedModel
from oft_diffusion.training.noise import Diffusion, Flow
from oft_diffusion.training.prepare import make_noise
from tests.families.conftest import EVERY_FAMILY
from tests.helpers.tiny_families import side_of

Load = Callable[[str], Family]


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_family_asks_its_denoiser_as_the_pipeline_does(name: str, load: Load) -> None:
    family = load(name)
    asked: list[dict[str, Any]] = []
    stepped: list[tuple[Tensor, Tensor]] = []
    step = family.pipe.scheduler.step

    asking: list[Any] = []

    def note_call(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents, timestep = inputs(family.denoiser)
        asking.append(denoiser)
        asked.append(dict(zip((latents, timestep), args, strict=False)) | kwargs)

    def note_step(answer: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        stepped.append((answer, t))
        return step(answer, t, *args, **kwargs)

    denoisers = [family.module(part) for part in family.base.denoisers]
    hooks = [denoiser.register_forward_pre_hook(note_call, with_kwargs=True) for denoiser in denoisers]
    family.pipe.scheduler.step = note_step
    with torch.no_grad():
        family.pipe(
            prompt=["a red dog"], height=side_of(name), width=side_of(name), num_inference_steps=2,
            output_type="latent", generator=torch.Generator().manual_seed(0), **family.CALL, **family.guided(1.0),
        )  # fmt: skip
        for hook in hooks:
            hook.remove()
        assert set(asking) == set(denoisers)  # of two experts each has its step
        conditioning = family.encode_text(["a red dog"], side_of(name))
        first, second = stepped[:2]
        assert first[1] > second[1]
        for told, (answer, t) in zip(asked, (first, second), strict=True):
            packed = told[inputs(family.denoiser)[0]]
            packed = torch.stack(packed).squeeze(2) if isinstance(packed, list) else packed
            ours = family.ask(family.denoiser, packed, t.expand(1).float(), conditioning)
            assert answer.std() > 1e-4  # or agreement would be cheap
            assert torch.allclose(ours.float(), answer.float(), atol=1e-5 * float(answer.abs().max()))


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_perfect_answer_is_stepped_to_the_clean_latents(name: str, load: Load) -> None:
    family = load(name)
    noise = make_noise(_config(), family)
    scheduler = type(family.pipe.scheduler).from_config(family.pipe.scheduler.config, set_alpha_to_one=True)
    dynamic = {"mu": 0.6} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(6, **dynamic)
    clean, drawn = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    if isinstance(noise, Flow):
        z = scheduler.sigmas[0] * drawn + (1 - scheduler.sigmas[0]) * clean
    else:
        z = scheduler.add_noise(clean, drawn, scheduler.timesteps[:1])
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
        level = (t.round().long() if isinstance(noise, Diffusion) else torch.tensor(0)).expand(2)
        if isinstance(noise, Diffusion):
            alpha = noise.schedule.alphas_cumprod[level[0]]
            left = (seen - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        else:
            sigma = scheduler.sigmas[i]  # of which some schedulers round their timesteps
            assert abs(1000 * sigma - t) < 1
            left = (seen - (1 - sigma) * clean) / sigma
        z = scheduler.step(noise.target(clean, left, level), t, z, return_dict=False)[0]
    assert torch.allclose(z, clean, atol=1e-4)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_noise_levels_are_those_of_the_pipelines_sampler(name: str, load: Load) -> None:
    family = load(name)
    noise, scheduler = make_noise(_config(resolution=side_of(name)), family), family.pipe.scheduler
    with torch.no_grad():
        family.pipe(
            prompt=["a dog"], height=side_of(name), width=side_of(name), output_type="latent",
            num_inference_steps=_default_steps(family) if name.startswith("Flux2") else 8,
            **family.CALL, **family.guided(1.0),
        )  # fmt: skip
    if isinstance(noise, Diffusion):
        clean, drawn = torch.randn(2, 3, 4, 8, 8)
        t = scheduler.timesteps[[0, 3, 7]].round().long()
        alpha = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1).float()
        expected = alpha.sqrt() * clean + (1 - alpha).sqrt() * drawn
        assert torch.allclose(noise.add(clean, drawn, t), expected, atol=1e-5)
        return
    assert isinstance(noise, Flow)
    # The sampler's levels are evenly spaced before they are shifted: by our shift they must be so again.
    sampled = np.asarray(scheduler.sigmas)[:-1]
    places = np.interp(sampled, noise.sigmas.numpy(), np.arange(1, 1001) / 1000)
    assert len(places) >= 4
    assert places[0] > 0.99
    assert np.ptp(np.diff(places)) < 2e-3
    assert torch.equal(noise.time(torch.tensor([999])), torch.tensor([1000.0]))


def _default_steps(family: Family) -> int:
    """Some samplers shift by the number of steps."""
    steps: int = inspect.signature(type(family.pipe).__call__).parameters["num_inference_steps"].default
    return steps


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_encoded_prompts_joined_are_what_the_pipeline_makes_of_all_at_once(name: str, load: Load) -> None:
    family = load(name)
    model = AdaptedModel(family, {}, side_of(name))
    prompts = ["a dog", "a photo of a red mug on a table", "a dog"]
    noisy = torch.randn(3, *family.latent_shape(side_of(name)), generator=torch.Generator().manual_seed(0))
    times = torch.tensor([800.0, 300.0, 20.0])
    if not family.FLOW:
        times = times.long()
    with torch.no_grad():
        encoded = [family.encode_text([prompt], side_of(name)) for prompt in prompts]
        joined = model(noisy, times, prompts, encoded)
        at_once = model(noisy, times, prompts, None)
        swapped = model(noisy, times, prompts[::-1], encoded[::-1])
    assert torch.allclose(joined, at_once, atol=1e-4 * float(at_once.abs().max()))
    assert torch.allclose(swapped, joined, atol=1e-4 * float(joined.abs().max()))  # the first and last prompt are one


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_pictures_become_latents_and_come_back(name: str, load: Load) -> None:
    # What the denoiser sees, taken through the pipeline's own end, must be what the VAE makes of its own latents.
    family = load(name)
    pixels = torch.rand(3, side_of(name), side_of(name), generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = family.encode_image(pixels)
    latents = family.latents(posterior, torch.zeros(posterior.mean.numel()))
    assert latents.shape == family.latent_shape(side_of(name))
    mean = posterior.mean[None]
    with torch.no_grad():
        decoded = family.vae.decode(mean[:, :, None] if family.base.video_vae else mean).sample
    expected = decoded[:, :, 0] if family.base.video_vae else decoded
    finished = _finish(family, family.pack(latents[None]), side_of(name))
    assert expected.std() > 1e-3
    assert (finished - (expected[0] / 2 + 0.5).clamp(0, 1)).abs().max() < 2 / 255


def _finish(family: Family, packed: Tensor, side: int) -> Tensor:
    """The picture `(3, H, W)` in [0, 1] that the pipeline makes of final latents."""
    scheduler = family.pipe.scheduler
    step = scheduler.step
    scheduler.step = lambda *args, **kwargs: (packed, packed)
    try:
        with torch.no_grad():
            output = family.pipe(
                prompt=["a dog"], height=side, width=side, num_inference_steps=1, output_type="np",
                **family.CALL, **family.guided(1.0),
            )  # fmt: skip
    finally:
        scheduler.step = step
    found = torch.from_numpy(output.frames[0] if hasattr(output, "frames") else output.images)[0]
    return found.permute(2, 0, 1)


def _config(**knobs: Any) -> TrainConfig:
    return TrainConfig.from_dict(
        {"model": "m", "instance_dir": "i", "trigger": "sks", "class_word": "dog", "output_dir": "o",
         "resolution": 16} | knobs
    )  # fmt: skip
