"""Settings by the memory of a card: `memory = "12 GB"` stands for a row of this table, as far as nothing else is said.

What a row holds was chosen by counting bytes on the device: the base under each quantization, the adapter with its
gradients and moments, and an allowance for what comes and goes, at the resolution that the base was made for, with one
instance image at once (of Stable Diffusion 1 to 2 and SDXL with a class image). `tests/training/test_memory_presets.py`
counts it again on bases of full size, and `benchmarks/card_memory.py` measures it. A GB is 1e9 bytes of tensors: on a
card of so many GiB, what CUDA itself takes has room beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from oft_diffusion.errors import ConfigError, first_line

Settings = Mapping[str, Any]
MEMORIES: Mapping[str, float] = {"8 GB": 8e9, "12 GB": 12e9, "16 GB": 16e9, "24 GB": 24e9}  # in bytes


@dataclass(frozen=True)
class Row:
    """What a kind of base is trained with.

    Attributes:
        about: which bases, in words.
        pipelines: their diffusers classes; any where there are none.
        layers: the most that such a base's denoiser has, of those that say; larger ones are of the next row.
        settings: by memory, from the least that suffices on.
    """

    about: str
    pipelines: tuple[str, ...]
    settings: Mapping[str, Settings]
    layers: float = float("inf")


_CACHED: Settings = {"mixed_precision": "bf16", "cache_latents": True, "cache_text_embeddings": True}
_CHECKPOINTED: Settings = {**_CACHED, "gradient_checkpointing": True}
_FRUGAL: Settings = {**_CHECKPOINTED, "drop_encoders": True, "optimizer": "adamw8bit", "validation_count": 1}


def _in_bits(denoiser: str | None, text_encoders: str | None) -> Settings:
    """With these quantizations, and all else that saves memory."""
    chosen = {"quantization": denoiser, "text_encoder_quantization": text_encoders}
    return {**_FRUGAL, **{knob: name for knob, name in chosen.items() if name is not None}}


ROWS: tuple[Row, ...] = (
    Row(
        "Stable Diffusion 1.x, 2.x",
        ("StableDiffusionPipeline",),
        {"8 GB": _CHECKPOINTED, "12 GB": _CACHED, "16 GB": _CACHED, "24 GB": _CACHED},
    ),
    Row(
        "SDXL",
        ("StableDiffusionXLPipeline",),
        {"8 GB": _in_bits("nf4", None), "12 GB": _FRUGAL, "16 GB": _CHECKPOINTED, "24 GB": _CHECKPOINTED},
    ),
    Row(
        "Stable Diffusion 3 or 3.5 Medium",
        ("StableDiffusion3Pipeline",),
        {
            "8 GB": _in_bits("nf4", "nf4"),
            "12 GB": _in_bits(None, "int8"),
            "16 GB": _in_bits(None, "int8"),
            "24 GB": _CHECKPOINTED,
        },
        layers=24,
    ),
    Row(
        "Stable Diffusion 3.5 Large",
        ("StableDiffusion3Pipeline",),
        {"12 GB": _in_bits("nf4", "nf4"), "16 GB": _in_bits("int8", "int8"), "24 GB": _in_bits(None, "int8")},
    ),
    Row(
        "Flux.1",
        ("FluxPipeline",),
        {"12 GB": _in_bits("nf4", "nf4"), "16 GB": _in_bits("nf4", "int8"), "24 GB": _in_bits("int8", "int8")},
    ),
    Row("other bases, of any size", (), dict.fromkeys(MEMORIES, _in_bits("nf4", "nf4"))),
)

# What a preset leaves alone where that is set.
_EXCLUDED: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("cache_text_embeddings", "drop_encoders"),
    "denoiser_file": ("quantization",),
}


def filled(given: Settings) -> dict[str, Any]:
    """Settings without `memory`, with what that stands for where they say nothing themselves.

    Raises:
        ConfigError: there is no such memory, the base needs more, or it cannot be told what base it is.
    """
    settings = dict(given)
    memory = settings.pop("memory", None)
    if memory is None:
        return settings
    if memory not in MEMORIES:
        raise ConfigError(f"memory = {memory!r} is none that is known", expected=", ".join(MEMORIES), fix="use one")
    if not isinstance(settings.get("model"), (str, Path)):
        return settings  # which is refused for that
    row = row_for(Path(settings.get("config_dir") or settings["model"]))
    if memory not in row.settings:
        least = next(iter(row.settings))
        raise ConfigError(
            f"memory = {memory!r} is too little to train {row.about}, quantized, checkpointed and all",
            expected=f"at least {least}",
            fix=f'use memory = "{least}" or more, or a smaller base',
        )
    excluded = {knob for other, knobs in _EXCLUDED.items() if settings.get(other) for knob in knobs}
    if False in (settings.get("cache_latents"), settings.get("cache_text_embeddings")):
        excluded.add("drop_encoders")
    return {knob: value for knob, value in row.settings[memory].items() if knob not in excluded} | settings


def row_for(model: Path) -> Row:
    """The row of a base: a folder in diffusers' format, or a hub id, of which configs are fetched.

    Raises:
        ConfigError: it has no readable model_index.json.
    """
    folder = model
    try:
        if not folder.exists():
            folder = _configs(model.as_posix())
        pipeline = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        config = folder / "transformer" / "config.json"
        layers = json.loads(config.read_text(encoding="utf-8")).get("num_layers", 0) if config.is_file() else 0
    except Exception as error:  # the hub's client raises those of several libraries
        raise ConfigError(
            f"what to set for memory depends on the base, and {model} does not tell which it is ({first_line(error)})",
            expected="a folder in diffusers' format, a hub id, or a checkpoint file with config_dir",
            fix="correct model, or leave memory out",
        ) from error
    return row_of(str(pipeline), int(layers))


def _configs(hub_id: str) -> Path:
    """A folder with the configs that tell, from the hub's cache where they are there."""
    wanted = ["model_index.json", "transformer/config.json"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))


def row_of(pipeline: str, layers: int = 0) -> Row:
    """The row of a pipeline's class and the layers of its denoiser; of the smallest base if they are not told."""
    return next(row for row in ROWS if (not row.pipelines or pipeline in row.pipelines) and layers <= row.layers)
