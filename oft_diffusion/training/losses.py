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
    noise, instances = parts.noise, batch.instances
    noisy = noise.add(batch.latents, batch.noise, batch.levels)
    target = parts.family.pack(noise.target(batch.latents, batch.noise, batch.levels))
    times = noise.time(batch.levels)
    if config.prior_target == "base" and len(target) > instances:
        target = torch.cat([target[:instances], _base_answers(parts, noisy, times, batch).to(target)])
    prediction = parts.model(noisy, times, batch.prompts, batch.encoded)
    per_sample = F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
    per_sample = per_sample * noise.weight(batch.levels)
    instance, prior = per_sample[:instances], per_sample[instances:]
    return instance.mean(), prior.mean() if len(prior) else torch.zeros_like(instance[0])


@torch.no_grad()
def _base_answers(parts: Parts, noisy: Tensor, times: Tensor, batch: Batch) -> Tensor:
    """What the base without its adapter answers to the class images of a batch."""
    own = slice(batch.instances, None)
    with parts.without_adapters():
        encoded = batch.encoded and batch.encoded[own]
        answers: Tensor = parts.model(noisy[own], times[own], batch.prompts[own], encoded)
    return answers
