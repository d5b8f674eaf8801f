"""Models as their configs describe them, on the meta device: every layer, no weights, no memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn

from oft_diffusion.errors import ConfigError, first_line


def pipeline_skeleton(model: str | Path) -> dict[str, nn.Module]:
    """A pipeline's denoisers and text encoders on the meta device, by name. Of a hub repository, configs are fetched.

    Raises:
        ConfigError: there is no such pipeline, or diffusers or transformers cannot build a part of it.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(model), allow_patterns=["*.json"]))
        except Exception as error:  # its client raises those of several libraries
            raise ConfigError(
                f"{model} is no local folder, and its configs could not be had from the hub ({first_line(error)})",
                expected="a pipeline's folder in diffusers' format, or a hub id",
                fix="check the path or the id",
            ) from error
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model} is no diffusers pipeline: its model_index.json cannot be read ({first_line(error)})",
            expected="a folder in diffusers' format",
            fix="check the path",
        ) from error
    found = {}
    for part, told in index.items():
        library, kind = told if isinstance(told, list) and len(told) == 2 else (None, None)
        if kind and library in ("diffusers", "transformers") and part.startswith(_ADAPTED):
            found[part] = component_skeleton(folder / part, str(kind))
    return found


_ADAPTED = ("unet", "transformer", "prior", "text_encoder")


def component_skeleton(folder: Path, kind: str) -> nn.Module:
    """A component on the meta device.

    Args:
        folder: with its config.json.
        kind: its class, of diffusers or transformers.

    Raises:
        ConfigError: it cannot be built.
    """
    try:
        with torch.device("meta"):
            if hasattr(diffusers, kind):
                model: Any = getattr(diffusers, kind)
                built: nn.Module = model.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
                return built
            config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
            encoder: nn.Module = getattr(transformers, kind)(_own(config, kind))
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
            f"no model can be built from {folder / 'config.json'} ({first_line(error)})",
            expected="the config that came with the model",
            fix="download or copy the model again",
        ) from error


def _own(config: Any, kind: str) -> Any:
    """The part of a config that a class takes: a CLIP text model's may lie inside a CLIP's."""
    wanted = getattr(transformers, kind).config_class
    return config if wanted is None or isinstance(config, wanted) else getattr(config, "text_config", config)
