"""Any text-to-image pipeline, from a folder, a single checkpoint file or the hub; safetensors only."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from oft_diffusion.errors import ConfigError, first_line


def load_pipeline(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    config_dir: str | Path | None = None,
) -> DiffusionPipeline:
    """A pipeline in that precision on that device.

    Args:
        model: a folder in diffusers' format, a `.safetensors` checkpoint, or a hub id. Of a folder that holds float16
            files only (`*.fp16.safetensors`), those are taken.
        dtype: of all components.
        device: as torch spells it.
        config_dir: for a checkpoint file alone, a folder in diffusers' format of the same architecture, whose configs
            and tokenizer are taken; diffusers would fetch them from the hub.

    Raises:
        ConfigError: there is no such folder, it is no pipeline, it holds pickled weights only, a file lacks
            `config_dir` or some of the weights, or there is no such device.
    """
    local = Path(model)
    try:
        if local.suffix == ".safetensors" and local.is_file():
            pipe = _from_file(local, dtype, config_dir)
            refuse_hollow(pipe, str(model))
        else:
            pipe = _from_folder(model, dtype)
    except ConfigError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors each have their own
        raise ConfigError(
            f"{model} cannot be loaded as a pipeline ({first_line(error)})",
            expected="a text-to-image pipeline in diffusers' format with safetensors weights",
            fix="check the path or the hub id",
        ) from error
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"the pipeline cannot be moved to {device!r} ({first_line(error)})",
            expected="a device of this machine with enough memory",
            fix='use "cpu", or torch\'s build for your device',
        ) from error


def has_only_fp16(folder: Path) -> bool:
    """Whether a component's folder holds safetensors weights, and all of them are diffusers' variant fp16."""
    names = [path.name for path in folder.glob("*.safetensors")]
    return bool(names) and all(re.search(r"\.fp16[.-]", name) for name in names)


def left_out(pipeline_class: Any, index: Mapping[str, Any]) -> dict[str, None]:
    """Text encoders and tokenizers that a pipeline takes and its model_index.json leaves empty, as arguments for it.

    SD 3 does without T5; diffusers wants to be told so.
    """
    names = inspect.signature(pipeline_class).parameters
    parts = [name for name in names if re.fullmatch(r"(text_encoder|tokenizer)(_\d)?", name)]
    return {part: None for part in parts if not (index.get(part) or [None])[0]}


def mend_clip_skip(pipe: Any) -> None:
    """Let SD 1.x and 2.x skip layers: diffusers looks for a level in CLIPTextModel that transformers 5.6 dropped."""
    encoder = getattr(pipe, "text_encoder", None)
    if type(encoder).__name__ == "CLIPTextModel" and not hasattr(encoder, "text_model"):
        vars(encoder)["text_model"] = encoder  # a name for itself, and no submodule


def refuse_hollow(pipe: Any, name: str) -> None:
    """Raise where a tensor got no values: of a single file, diffusers loads what it recognises, and says nothing.

    Raises:
        ConfigError: there is such a tensor.
    """
    modules = {part: module for part, module in pipe.components.items() if isinstance(module, nn.Module)}
    hollow = [f"{part}.{key}" for part, module in modules.items() for key, p in module.named_parameters() if p.is_meta]
    if hollow:
        raise ConfigError(
            f"{name} holds no weights for {len(hollow)} tensors, such as {hollow[0]}",
            expected=f"a whole {type(pipe).__name__}",
            fix="get the checkpoint that has its text encoders and VAE, or a folder in diffusers' format",
        )


def _from_folder(model: str | Path, dtype: torch.dtype) -> Any:
    local = Path(model)
    if local.exists() and not (local / "model_index.json").is_file():
        raise ConfigError(
            f"{model} is no diffusers pipeline: it has no model_index.json",
            expected="a folder in diffusers' format, a .safetensors checkpoint, or a hub id",
            fix="check the path",
        )
    variant = "fp16" if local.is_dir() and any(has_only_fp16(folder) for folder in local.iterdir()) else None
    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "variant": variant}
    if local.is_dir():
        index = json.loads((local / "model_index.json").read_text(encoding="utf-8"))
        how |= left_out(getattr(diffusers, index.get("_class_name", ""), DiffusionPipeline), index)
    try:
        return AutoPipelineForText2Image.from_pretrained(model, **how)
    except ValueError as error:  # it does not know all: not Wan, HiDream or Krea 2
        if "can't find a pipeline" not in str(error):
            raise
        return DiffusionPipeline.from_pretrained(model, **how)


def _from_file(path: Path, dtype: torch.dtype, config_dir: str | Path | None) -> Any:
    index = None if config_dir is None else Path(config_dir) / "model_index.json"
    if index is None or not index.is_file():
        raise ConfigError(
            f"{path} is a single checkpoint file, and "
            + (f"{config_dir} has no model_index.json" if index else "config_dir is not given"),
            expected="config_dir, a folder in diffusers' format of the same architecture",
            fix="pass --config-dir FOLDER (config_dir in Python); its weights are not needed",
        )
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    pipeline_class: Any = getattr(diffusers, name, None)
    if not hasattr(pipeline_class, "from_single_file"):
        raise ConfigError(
            f"{config_dir} is of a {name or 'nameless class'}, which is no pipeline that diffusers loads from one file",
            expected="the configs of a pipeline such as StableDiffusionPipeline",
            fix="correct config_dir",
        )
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    return pipeline_class.from_single_file(str(path), config=str(config_dir), safety_checker=None, **options)
