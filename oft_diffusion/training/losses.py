"""What a step descends: the loss of the instance images, and that of the class images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oft_diffusion.training.batches import Batch
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.prepare import Parts


def losses(parts: Parts, batch: Batch, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Mean loss over the instance images and over the class images (zero where there are none), both scalars."""
    family, instances = parts.family, batch.instances
    noisy = family.add_noise(batch.latents, batch.noise, batch.timesteps)
    target = family.target(batch.latents, batch.noise, batch.timesteps)
    if config.prior_target == "base" and len(target) > instances:
        target = torch.cat([target[:instances], _base_answers(parts, noisy, batch).to(target)])
    prediction = parts.model(noisy, batch.timesteps, batch.text)
    per_sample = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    per_sample = per_sample * family.loss_weight(batch.timesteps, config.min_snr_gamma)
    instance, prior = per_sample[:instances], per_sample[instances:]
    return instance.mean(), prior.mean() if len(prior) else torch.zeros_like(instance[0])


@torch.no_grad()
def _base_answers(parts: Parts, noisy: Tensor, batch: Batch) -> Tensor:
    """What the base without its adapter answers to the class images of a batch."""
    own = slice(batch.instances, None)
    text = {name: tensor[own] for name, tensor in batch.text.items()}
    with parts.without_adapters():
        answers: Tensor = parts.model(noisy[own], batch.timesteps[own], text)
    return answers
