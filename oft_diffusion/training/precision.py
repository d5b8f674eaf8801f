"""In which dtypes, and in how many bits, a run loads its base."""

from __future__ import annotations

import torch

from oft_diffusion.quantization import Library, Quantizing, scheme
from oft_diffusion.training.base import Base
from oft_diffusion.training.config import TrainConfig

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quantizing(config: TrainConfig, base: Base, device: str | None = None) -> Quantizing | None:
    """Which components of the base are quantized, None where none is. On this machine's card, if no device is named.

    Raises:
        ConfigError: a library is missing, or has no code for the device.
    """
    libraries: dict[str, Library] = dict.fromkeys(base.denoisers, "diffusers")
    libraries |= dict.fromkeys(base.text_encoders, "transformers")
    names = {"diffusers": config.quantization, "transformers": config.text_encoder_quantization}
    wanted = {part: names[library] for part, library in libraries.items()}
    ways = {part: scheme(name) for part, name in wanted.items() if name is not None}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Quantizing(ways, libraries, DTYPES[config.mixed_precision], device) if ways else None
