"""How pictures become noise, and what the denoiser should answer: diffusion (epsilon, v, sample) or flow matching.

Both number their noise levels from 0 (hardly any) to `count - 1`. The scheduler's configuration says which it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from torch import Tensor

TimestepDensity = Literal["uniform", "logit-normal", "sigmoid", "mode"]
FlowWeighting = Literal["none", "sigma_sqrt", "cosmap"]


class Noise(Protocol):
    """A noising process. Levels are int64 `(B,)`, latents and noise float32 `(B, ...)`."""

    count: int

    def add(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Noisy latents."""

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What a denoiser should answer to them."""

    def weight(self, levels: Tensor) -> Tensor:
        """Weight of each sample's loss, float32 `(B,)`."""

    def time(self, levels: Tensor) -> Tensor:
        """The scheduler's timesteps of these levels, `(B,)`."""


class Diffusion:
    """The classic processes, by a schedule of betas.

    Args:
        scheduler: the base's scheduler config.
        gamma: of min-SNR weighting (arXiv 2303.09556), or None for none.
    """

    def __init__(self, scheduler: Mapping[str, Any], gamma: float | None = None) -> None:
        schedule: Any = DDPMScheduler
        known = schedule().config
        self.schedule = schedule(**{k: v for k, v in scheduler.items() if k in known and k[0] != "_"})
        self.prediction = str(self.schedule.config.prediction_type)
        self.count = int(self.schedule.config.num_train_timesteps)
        self.gamma = gamma

    def add(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        noisy: Tensor = self.schedule.add_noise(latents, noise, levels)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        if self.prediction == "v_prediction":
            velocity: Tensor = self.schedule.get_velocity(latents, noise, levels)
            return velocity
        return latents if self.prediction == "sample" else noise

    def weight(self, levels: Tensor) -> Tensor:
        if self.gamma is None:
            return torch.ones_like(levels, dtype=torch.float32)
        snr = compute_snr(self.schedule, levels)
        clipped = snr.clamp(max=self.gamma)
        if self.prediction == "sample":
            return clipped
        if self.prediction == "v_prediction":
            return clipped / (snr + 1)
        # epsilon: clipped / snr, written so that a terminal SNR of zero gives its limit, 1
        tiny = torch.finfo(snr.dtype).tiny
        return torch.where(snr <= self.gamma, torch.ones_like(snr), self.gamma / snr.clamp_min(tiny))

    def time(self, levels: Tensor) -> Tensor:
        return levels


class Flow:
    """Rectified flow: straight lines from pictures to noise, whose velocity is learned (arXiv 2403.03206, eq. 12-13).

    Args:
        count: of noise levels.
        shift: by what factor they are moved towards noise, s in `s sigma / (1 + (s - 1) sigma)`.
        weighting: of the loss.
    """

    def __init__(self, count: int = 1000, shift: float = 1.0, weighting: FlowWeighting = "none") -> None:
        self.count = count
        self.weighting = weighting
        sigmas = torch.arange(1, count + 1, dtype=torch.float32) / count
        self.sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)

    def add(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        sigmas = self._sigmas(levels, latents)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        return noise - latents

    def weight(self, levels: Tensor) -> Tensor:
        weight: Tensor = compute_loss_weighting_for_sd3(self.weighting, self.sigmas.to(levels.device)[levels])
        return weight

    def time(self, levels: Tensor) -> Tensor:
        return self.sigmas.to(levels.device)[levels] * self.count

    def _sigmas(self, levels: Tensor, like: Tensor) -> Tensor:
        return self.sigmas.to(like)[levels].view(-1, *(1 for _ in like.shape[1:]))


def density_of(asked: TimestepDensity | None, prediction: str) -> TimestepDensity:
    """How noise levels are drawn for what a model predicts, unless something else is asked for."""
    return asked or ("logit-normal" if prediction == "flow" else "uniform")


def spread(place: Tensor, density: TimestepDensity, mean: float, std: float, mode_scale: float) -> Tensor:
    """Uniform places in [0, 1) to places of another density (arXiv 2403.03206, section 3.1): 0 is clean, 1 is noise.

    "sigmoid" is what other trainers call a logit-normal density around the middle.
    """
    if density == "sigmoid":
        mean = 0.0
    if density in ("logit-normal", "sigmoid"):
        return torch.sigmoid(mean + std * torch.special.ndtri(place))
    if density == "mode":
        return 1 - place - mode_scale * (torch.cos(math.pi / 2 * place) ** 2 - 1 + place)
    return place
