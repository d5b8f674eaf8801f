"""A base's components as their configs describe them, on the meta device: every layer, no weights, no memory."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import ConfigError, first_line
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
    name = base.classes[component]
    try:
        with torch.device("meta"):
            if component in base.denoisers:
                kind: Any = getattr(diffusers, name)
                model: nn.Module = kind.from_config(dict(base.parts[component]))
                return model
            folder = str(base.configs / component)
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            encoder: nn.Module = getattr(transformers, name)(_own(config, name))
            return encoder
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        IndexError,
        ZeroDivisionError,
        AttributeError,
    ) as error:
        raise ConfigError(
            f"no model can be built from {base.configs / component / 'config.json'} ({first_line(error)})",
            expected="the config that came with the model",
            fix="download or copy the model again",
        ) from error


def _own(config: Any, name: str) -> Any:
    """The part of a config that a class takes: a CLIP text model's may lie inside a CLIP's."""
    wanted = getattr(transformers, name).config_class
    return config if wanted is None or isinstance(config, wanted) else getattr(config, "text_config", config)
