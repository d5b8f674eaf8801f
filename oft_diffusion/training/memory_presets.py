"""Settings by the memory of a card: `memory = "12 GB"` stands for a row of this table, as far as nothing else is said.

What a row holds was chosen by counting bytes on the device: the base under each quantization, the adapter with its
gradients and moments, and an estimate of what comes and goes, at the resolution that the base was made for, with one
instance image at once (of Stable Diffusion 1 to 2 and SDXL with a class image). `tests/training/test_memory_presets.py`
counts it again on bases of full size. None of it has been measured on a card yet, for which
`benchmarks/card_memory.py` is there. A GB is 1e9 bytes of tensors: on a card of so many GiB, what CUDA itself takes has
room beside them.
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
from oft_diffusion.quantization import SCHEMES

Settings = Mapping[str, Any]
MEMORIES: Mapping[str, float] = {"8 GB": 8e9, "12 GB": 12e9, "16 GB": 16e9, "24 GB": 24e9}  # in bytes


@dataclass(frozen=True)
class Row:
    """What a kind of base is trained with.

    Attributes:
        about: which bases, in words.
        pipelines: their diffusers classes; any where there are none.
        layers: the most that such a base's denoiser has, of those that say; larger ones are of the next row.
        settings: by memory.
        unquantized: the least memory in which the base as it is trains with all of its layers streamed.
    """

    about: str
    pipelines: tuple[str, ...]
    settings: Mapping[str, Settings]
    layers: float = float("inf")
    unquantized: str | None = None

    def possible(self, single_file: bool) -> Mapping[str, Settings]:
        """Settings by memory, from the least on; of a single file, those that quantize nothing."""
        if not single_file:
            return self.settings
        found = {memory: _STREAMED if own.keys() & _QUANTIZED else own for memory, own in self.settings.items()}
        least = MEMORIES[self.unquantized] if self.unquantized is not None else float("inf")
        return {memory: own for memory, own in found.items() if own is not _STREAMED or MEMORIES[memory] >= least}


_QUANTIZED = {"quantization", "text_encoder_quantization"}
_CACHED: Settings = {"mixed_precision": "bf16", "cache_latents": True, "cache_text_embeddings": True}
_CHECKPOINTED: Settings = {**_CACHED, "gradient_checkpointing": True}
_FRUGAL: Settings = {**_CHECKPOINTED, "drop_encoders": True, "optimizer": "adamw8bit", "validation_count": 1}


def _in_bits(denoiser: str | None, text_encoders: str | None) -> Settings:
    """With these quantizations, and all else that saves memory."""
    chosen = {"quantization": denoiser, "text_encoder_quantization": text_encoders}
    return {**_FRUGAL, **{knob: name for knob, name in chosen.items() if name is not None}}


_STREAMED: Settings = {**_FRUGAL, "layer_offload": 1.0}
_LEAST: Settings = {**_in_bits("nf4", "nf4"), **_STREAMED}


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
        unquantized="8 GB",
    ),
    Row(
        "Stable Diffusion 3 or 3.5 Medium",
        ("StableDiffusion3Pipeline",),
        {
            "8 GB": _in_bits("nf4", "nf4"),
            "12 GB": _in_bits("int8", "int8"),
            "16 GB": _in_bits(None, "int8"),
            "24 GB": _CHECKPOINTED,
        },
        layers=24,
        unquantized="16 GB",
    ),
    Row(
        "Stable Diffusion 3.5 Large",
        ("StableDiffusion3Pipeline",),
        {
            "8 GB": _LEAST,
            "12 GB": _in_bits("nf4", "nf4"),
            "16 GB": _in_bits("int8", "int8"),
            "24 GB": _in_bits(None, "int8"),
        },
        unquantized="16 GB",
    ),
    Row(
        "Flux.1",
        ("FluxPipeline",),
        {
            "8 GB": _LEAST,
            "12 GB": _in_bits("nf4", "nf4"),
            "16 GB": _in_bits("nf4", "int8"),
            "24 GB": _in_bits("int8", "int8"),
        },
        unquantized="12 GB",
    ),
    Row("other bases, not counted", (), dict.fromkeys(MEMORIES, _in_bits("nf4", "nf4")) | {"8 GB": _LEAST}),
)


def packages(settings: Settings) -> set[str]:
    """Libraries of oft-diffusion[quant] that settings need, as Python imports them."""
    found = {SCHEMES[settings[knob]].package for knob in _QUANTIZED & settings.keys()}
    return found | ({"bitsandbytes"} if settings.get("optimizer") == "adamw8bit" else set())


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
    memory = _spelled(memory)
    if settings.get("resume") is not None:
        raise ConfigError(
            f"memory = {memory!r} is given with resume, but a run goes on with the settings that it began with",
            expected="memory where a run begins; config.toml of the run has what it stood for",
            fix="leave memory out, and give the config.toml in output_dir",
        )
    model, configs = settings.get("model"), settings.get("config_dir")
    if not isinstance(model, (str, Path)) or not isinstance(configs, (str, Path, type(None))):
        return settings  # which are refused for that
    single_file = is_single_file(model)
    row = row_for(Path(configs or model))
    possible = row.possible(single_file)
    if memory not in possible:
        raise _too_little_for_a_file(memory, row, str(model))
    excluded = {knob for other, knobs in _EXCLUDED.items() if settings.get(other) for knob in knobs}
    if False in (settings.get("cache_latents"), settings.get("cache_text_embeddings")):
        excluded.add("drop_encoders")
    return {knob: value for knob, value in possible[memory].items() if knob not in excluded} | settings


def _spelled(memory: Any) -> str:
    """As the table has it: "8gb" is "8 GB".

    Raises:
        ConfigError: it is none of the table's.
    """
    found = {name.replace(" ", ""): name for name in MEMORIES}.get("".join(str(memory).split()).upper())
    if found is None or not isinstance(memory, str):
        raise ConfigError(f"memory = {memory!r} is none that is known", expected=", ".join(MEMORIES), fix="use one")
    return found


def is_single_file(model: str | Path) -> bool:
    """Whether a model is one checkpoint file, by its name."""
    return Path(model).suffix == ".safetensors"


def _too_little_for_a_file(memory: str, row: Row, model: str) -> ConfigError:
    least = next(iter(row.possible(single_file=True)), None)
    return ConfigError(
        f"memory = {memory!r} is too little to train {row.about} unquantized, and {model} is a single file, of which "
        "no part is quantized while it is loaded",
        expected="a folder in diffusers' format" + (f", or at least {least}" if least else ""),
        fix="load the file once with diffusers, save_pretrained it and pass that folder, or "
        + (f'use memory = "{least}" or more' if least else "leave memory out"),
    )


def row_for(model: Path) -> Row:
    """The row of a base: a folder in diffusers' format, or a hub id, of which configs are fetched.

    Raises:
        ConfigError: it has no readable model_index.json.
    """
    folder = model
    try:
        if not folder.exists():
            folder = _configs(model.as_posix())
        pipeline = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["_class_name"]
        config = folder / _DENOISER
        layers = json.loads(config.read_text(encoding="utf-8")).get("num_layers", 0) if config.is_file() else 0
        if not isinstance(layers, int):
            raise TypeError(f"{_DENOISER} says num_layers = {json.dumps(layers)}")
    except Exception as error:  # the hub's client raises those of several libraries
        raise ConfigError(
            f"what to set for memory depends on the base, and {model} does not tell which it is ({first_line(error)})",
            expected="a folder in diffusers' format, a hub id, or a checkpoint file with config_dir",
            fix="correct model, or leave memory out",
        ) from error
    return row_of(str(pipeline), layers)


_INDEX, _DENOISER = "model_index.json", "transformer/config.json"


def _configs(hub_id: str) -> Path:
    """A folder with the configs that tell, from the hub's cache where all of them are there."""
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[_INDEX, _DENOISER], local_files_only=True))
        if not _lacks_configs(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    return Path(snapshot_download(hub_id, allow_patterns=[_INDEX, _DENOISER]))


def _lacks_configs(folder: Path) -> bool:
    """Whether something else of the model was fetched, but not what tells which it is."""
    index = folder / _INDEX
    if not index.is_file():
        return True
    return "transformer" in json.loads(index.read_text(encoding="utf-8")) and not (folder / _DENOISER).is_file()


def row_of(pipeline: str, layers: int = 0) -> Row:
    """The row of a pipeline's class and the layers of its denoiser; of the smallest base if they are not told."""
    return next(row for row in ROWS if (not row.pipelines or pipeline in row.pipelines) and layers <= row.layers)
