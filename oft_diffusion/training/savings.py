"""What a run that does not fit its device could do without, and the words for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from oft_diffusion.errors import TrainingError
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.memory_presets import is_single_file

Phase = Literal["loading", "encoding", "grids", "steps"]  # by what of them most memory is taken


def savings(config: TrainConfig, phase: Phase, device: torch.device) -> tuple[str, ...]:
    """Settings that take less memory than the config's, where most of it is needed."""
    c, on_gpu, stepping = config, device.type == "cuda", phase == "steps"
    cached, whole = c.cache_latents and c.cache_text_embeddings, not is_single_file(c.model)
    # What is dropped is on no card but for prompts and pictures, and on a processor gone while training alone.
    dropping = phase in ("loading", "encoding") if on_gpu else stepping
    known = {
        'mixed_precision = "bf16"': c.mixed_precision == "no",
        'quantization = "nf4"': whole and not (c.quantization or c.denoiser_file),
        'text_encoder_quantization = "nf4"': (
            whole and not c.text_encoder_quantization and _encoders_are_there(c, phase, on_gpu)
        ),
        "layer_offload = 1": on_gpu and c.layer_offload < 1 and not (phase == "loading" and c.layer_offload),
        'optimizer = "adamw8bit"': c.optimizer == "adamw" and phase != "encoding",
        "gradient_checkpointing = true": stepping and not c.gradient_checkpointing,
        f"batch_size = 1 with accumulation = {c.accumulation * c.batch_size}": stepping and c.batch_size > 1,
        "class_batch_size = 1": stepping and c.prior_preservation and (c.class_batch_size or c.batch_size) > 1,
        "drop_encoders = true": dropping and cached and not c.drop_encoders,
        # A processor's memory is where these park the encoders.
        "cache_latents = true": stepping and on_gpu and not c.cache_latents,
        "cache_text_embeddings = true": stepping and on_gpu and not (c.cache_text_embeddings or c.text_encoder),
        "validation_count = 1": phase == "grids" and bool(c.validation_prompts) and c.validation_count > 1,
        f"a resolution below {c.resolution}": phase != "loading",
        "a smaller base": True,
    }
    return tuple(words for words, possible in known.items() if possible)


def _encoders_are_there(config: TrainConfig, phase: Phase, on_gpu: bool) -> bool:
    """Whether text encoders are on the device when most of it is taken; on a card they may come for prompts alone."""
    if not on_gpu:
        return not (phase == "steps" and config.drop_encoders)
    parked = config.drop_encoders if phase == "loading" else config.cache_text_embeddings
    return phase == "encoding" or not parked


def too_large(needed: str, free: int, savings: Sequence[str]) -> TrainingError:
    """The error for a run that takes more bytes than are free: how many, in words, and what to do."""
    return TrainingError(
        f"the run does not fit: it takes {needed}, and {size(free)} are free",
        expected="a device with memory for base, adapter and activations",
        fix=f"use {', or '.join(savings)}",
    )


def size(count: int) -> str:
    """Bytes, as people say them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
