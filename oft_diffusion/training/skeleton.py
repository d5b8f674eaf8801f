"""A base's components as their configs describe them, on the meta device: every layer, no weights, no memory."""

from __future__ import annotations

from torch import nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.skeleton import component_skeleton
from oft_diffusion.training.base import Base
from oft_diffusion.training.config import TrainConfig


def adapted(config: TrainConfig, base: Base) -> dict[str, OFTConfig]:
    """The components of a base that are to carry an adapter, each with the adapter's settings.

    Regular expressions are the denoiser's; text encoders have the set "attention" then.
    """
    found = dict.fromkeys(base.denoisers, config.oft)
    if config.text_encoder:
        found |= dict.fromkeys(base.trained_text_encoders, config.text_encoder_oft)
    return found


def skeleton(base: Base, component: str) -> nn.Module:
    """A denoiser or text encoder on the meta device.

    Raises:
        ConfigError: diffusers or transformers cannot build it.
    """
    return component_skeleton(base.configs / component, base.classes[component])
