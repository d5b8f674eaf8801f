"""How losses are weighted and noise levels drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from oft_diffusion.training.noise import Diffusion, Flow, TimestepDensity, spread


def betas(prediction_type: str, zero_snr: bool = False) -> dict[str, Any]:
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
            "prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}  # fmt: skip


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_answer_denoises(prediction_type: str) -> None:
    # The target, taken as the UNet's answer, must lead the scheduler's own arithmetic back to the latents.
    noise_process = Diffusion(betas(prediction_type))
    latents, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    levels = torch.tensor([1, 200, 500, 900])
    noisy = noise_process.add(latents, noise, levels)
    answer = noise_process.target(latents, noise, levels)
    schedule: Any = DDPMScheduler(**betas(prediction_type))
    for i, t in enumerate(levels):
        found = schedule.step(answer[i], int(t), noisy[i]).pred_original_sample
        assert torch.allclose(found, latents[i], atol=2e-3)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(prediction_type: str, zero_snr: bool) -> None:
    noise_process = Diffusion(betas(prediction_type, zero_snr), gamma=5.0)
    levels = torch.arange(1000)
    weight = noise_process.weight(levels)
    alphas = noise_process.schedule.alphas_cumprod
    snr = alphas / (1 - alphas)
    # The weight on the error of the latents is min(snr, gamma), whatever is predicted (arXiv 2303.09556, section 3.4).
    of_latents = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    assert weight.isfinite().all()
    assert torch.allclose(weight * of_latents, snr.clamp(max=5.0), rtol=1e-3, atol=1e-6)
    assert (alphas[-1] == 0) == zero_snr
    assert Diffusion(betas(prediction_type, zero_snr)).weight(levels).eq(1).all()


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"shift": 1.0}, {"use_dynamic_shifting": True}], ids=str)
def test_flow_levels_are_the_schedulers(config: dict[str, Any]) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**config)
    shift = config.get("shift", 1.0)
    if config.get("use_dynamic_shifting"):
        mu = calculate_shift(1024)
        scheduler.set_timesteps(sigmas=(torch.arange(1000, 0, -1) / 1000).tolist(), mu=mu)
        shift = math.exp(mu)
    assert torch.allclose(Flow(shift=shift).sigmas.flip(0), scheduler.sigmas[:1000].float(), atol=1e-6)


def test_flow_weights() -> None:
    levels = torch.tensor([99, 499])
    sigmas = torch.tensor([0.1, 0.5])
    assert Flow().weight(levels).tolist() == [1.0, 1.0]
    assert torch.allclose(Flow(weighting="sigma_sqrt").weight(levels), sigmas**-2)
    cosmap = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    assert torch.allclose(Flow(weighting="cosmap").weight(levels), cosmap)


@pytest.mark.parametrize(
    ("density", "theirs"), [("uniform", "none"), ("logit-normal", "logit_normal"), ("mode", "mode")]
)
def test_densities_are_those_of_diffusers(density: TimestepDensity, theirs: str) -> None:
    places = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    ours = spread(places, density, 0.3, 0.8, 1.29)
    drawn = compute_density_for_timestep_sampling(
        theirs, 20_000, logit_mean=0.3, logit_std=0.8, mode_scale=1.29, generator=torch.Generator().manual_seed(0)
    )
    assert 0 <= float(ours.min()) <= float(ours.max()) <= 1
    assert torch.allclose(quantiles(ours.float()), quantiles(drawn), atol=0.015)


def test_sigmoid_is_logit_normal_around_the_middle() -> None:
    places = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert torch.equal(spread(places, "sigmoid", 2.0, 0.8, 1.29), spread(places, "logit-normal", 0.0, 0.8, 1.29))


def quantiles(values: Tensor) -> Tensor:
    return torch.quantile(values, torch.linspace(0.05, 0.95, 19))
