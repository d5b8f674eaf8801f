"""Any text-to-image pipeline, from a folder, a single checkpoint file or the hub; safetensors only."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from torch import nn

from oft_diffusion.autocast import computes_in_bfloat16
from oft_diffusion.errors import ConfigError, first_line
from oft_diffusion.gguf_file import load_gguf, one_denoiser, refuse_two
from oft_diffusion.quantization import Library, Quantizing, check_saved, scheme, whole_only
from oft_diffusion.text_encoders import most_clip_skip

_DENOISERS = ("unet", "transformer", "prior")
# Parts that a pipeline does without, whole models each.
_OPTIONAL = {"StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3")}


def usual_dtype(device: str) -> torch.dtype:
    """The dtype to draw in on a device: bfloat16 where it computes in that, float16 on older cards, else float32."""
    if computes_in_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.startswith("cuda") else torch.float32


def load_pipeline(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    config_dir: str | Path | None = None,
    quantization: str | None = None,
    text_encoder_quantization: str | None = None,
    denoiser_file: str | Path | None = None,
    offload: bool = False,
) -> DiffusionPipeline:
    """A pipeline in that precision on that device.

    Args:
        model: a folder in diffusers' format, a `.safetensors` checkpoint, or a hub id. Of a folder that holds float16
            files only (`*.fp16.safetensors`), those are taken.
        dtype: of all components.
        device: as torch spells it.
        config_dir: for a checkpoint file alone, a folder in diffusers' format of the same architecture, whose configs
            and tokenizer are taken; diffusers would fetch them from the hub.
        quantization: of the denoiser, a name of `quantization.SCHEMES`; of a folder or a hub id only.
        text_encoder_quantization: of the text encoders, likewise.
        denoiser_file: a GGUF file with the denoiser's weights, in place of the model's; likewise.
        offload: keep components in the processor's memory, and each on the device while it works (diffusers'
            `enable_model_cpu_offload`).

    Raises:
        ConfigError: there is no such folder, it is no pipeline that draws from a prompt alone, it holds pickled weights
            only, a file lacks `config_dir` or some of the weights, or there is no such device; a library for
            quantization is missing, or has no code for the device.
    """
    local = Path(model)
    refuse_two(quantization, denoiser_file)
    if offload and device.partition(":")[0] == "cpu":
        raise ConfigError(
            f"offload keeps what does not work off a card, and this is {device!r}",
            expected="a card, such as 'cuda'",
            fix="leave offload out",
        )
    try:
        if local.suffix == ".safetensors" and local.is_file():
            if any(asked is not None for asked in (quantization, text_encoder_quantization, denoiser_file)):
                raise whole_only(str(local))
            pipe = _from_file(local, dtype, config_dir)
            refuse_hollow(pipe, str(model))
        else:
            pipe = _from_folder(model, dtype, device, (quantization, text_encoder_quantization), denoiser_file)
    except ConfigError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors each have their own
        if (kept_back := no_access(str(model), error)) is not None:
            raise kept_back from error
        raise ConfigError(
            f"{model} cannot be loaded as a pipeline ({first_line(error)})",
            expected="a text-to-image pipeline in diffusers' format with safetensors weights",
            fix="check the path or the hub id",
        ) from error
    _refuse_missing_encoders(pipe, str(model))
    pipe.set_progress_bar_config(disable=True)
    try:
        if not offload:
            return pipe.to(device)
        pipe.enable_model_cpu_offload(device=device)
        return pipe
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


def left_out(pipeline: str, index: Mapping[str, Any]) -> dict[str, None]:
    """What a pipeline does without and its model_index.json leaves empty, as arguments: diffusers wants to be told."""
    return {part: None for part in _OPTIONAL.get(pipeline, ()) if not (index.get(part) or [None])[0]}


@contextmanager
def clip_skip_mended(pipe: Any) -> Iterator[None]:
    """Let SD 1.x and 2.x skip layers: diffusers looks for a level in CLIPTextModel that transformers 5.6 dropped."""
    encoder = getattr(pipe, "text_encoder", None)
    if type(encoder).__name__ != "CLIPTextModel" or hasattr(encoder, "text_model"):
        yield
        return
    vars(encoder)["text_model"] = encoder  # a name for itself, and no submodule
    try:
        yield
    finally:
        del vars(encoder)["text_model"]  # by it diffusers tells how a LoRA's keys are to be read


def check_clip_skip(pipeline_class: Any, clip_skip: int, layers: int) -> None:
    """Refuse a clip skip where the pipeline knows none, or that leaves no layer of a CLIP with so many.

    Raises:
        ConfigError: with what there is.
    """
    if "clip_skip" not in inspect.signature(pipeline_class.__call__).parameters:
        raise ConfigError(
            f"clip_skip = {clip_skip}, but a {pipeline_class.__name__} knows none",
            expected="a pipeline of Stable Diffusion 1 to 3 or SDXL",
            fix="leave clip_skip out",
        )
    most = most_clip_skip(pipeline_class.__name__, layers)
    if not 1 <= clip_skip <= most:
        raise ConfigError(
            f"clip_skip = {clip_skip}, but CLIP has {layers} layers",
            expected=f"1 to {most}, as diffusers counts",
            fix="use 1, which most models that want one want",
        )


def no_access(model: str, error: BaseException) -> ConfigError | None:
    """What to say where the hub keeps a model back, or has none of that name; None where the error is another."""
    if not any(isinstance(cause, RepositoryNotFoundError) for cause in (error, error.__cause__)):  # gated ones, too
        return None
    return ConfigError(
        f"the hub gives no access to the model {model}",
        expected="a public repository, or a gated or private one that your account may read",
        fix="check the name, accept its licence on its page, and log in with `hf auth login` or set HF_TOKEN",
    )


def refuse_hollow(pipe: Any, name: str, given: Collection[str] = ()) -> None:
    """Raise where a tensor got no values: of a single file, diffusers loads what it recognises, and says nothing.

    Args:
        pipe: a pipeline that was just loaded.
        name: the model's.
        given: components that were not loaded with it.

    Raises:
        ConfigError: there is such a tensor.
    """
    loaded = {part: module for part, module in pipe.components.items() if part not in given}
    modules = {part: module for part, module in loaded.items() if isinstance(module, nn.Module)}
    hollow = [f"{part}.{key}" for part, module in modules.items() for key, p in module.named_parameters() if p.is_meta]
    if hollow:
        raise ConfigError(
            f"{name} holds no weights for {len(hollow)} tensors, such as {hollow[0]}",
            expected=f"a whole {type(pipe).__name__}",
            fix="get the checkpoint that has its text encoders and VAE, or a folder in diffusers' format",
        )


def _refuse_picture_models(pipeline_class: Any, model: str) -> None:
    """Raise where a pipeline starts from something else than a prompt."""
    known = inspect.signature(pipeline_class.__call__).parameters if pipeline_class else {}
    wanted = [p.name for p in known.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if wanted := [name for name in wanted if name not in ("self", "prompt")]:
        raise ConfigError(
            f"{model} is a {pipeline_class.__name__}, which starts from {' and '.join(wanted)}",
            expected="a model that draws from a prompt alone",
            fix="choose the text-to-image model of the same family",
        )


def _refuse_missing_encoders(pipe: Any, model: str) -> None:
    """Raise where a text encoder is left empty without which no prompt can be read."""
    optional = _OPTIONAL.get(type(pipe).__name__, ())
    encoders = {n: c for n, c in pipe.components.items() if n.startswith("text_encoder") and n not in optional}
    if missing := [name for name, component in encoders.items() if component is None]:
        raise ConfigError(
            f"{model} is without {', '.join(missing)}",
            expected=f"a {type(pipe).__name__} with all of its text encoders",
            fix="download the model again, whole",
        )


def _from_folder(
    model: str | Path,
    dtype: torch.dtype,
    device: str,
    quantization: tuple[str | None, str | None],
    denoiser_file: str | Path | None,
) -> Any:
    local = Path(model)
    folder = local if local.exists() else _configs_of(str(model))
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"{model} is no diffusers pipeline: it has no model_index.json",
            expected="a folder in diffusers' format, a .safetensors checkpoint, or a hub id",
            fix="check the path",
        )
    variant = "fp16" if local.is_dir() and any(has_only_fp16(folder) for folder in local.iterdir()) else None
    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "variant": variant}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kind = str(index.get("_class_name"))
    _refuse_picture_models(getattr(diffusers, kind, None), str(model))
    how |= left_out(kind, index)
    configs = _configs(folder, index, without_denoisers=denoiser_file is not None)
    check_saved(str(model), configs, _wanted(index, quantization), device)
    quantizing = None
    if any(quantization) or denoiser_file is not None:
        quantizing = _quantizing(index, quantization, dtype, device)
        how |= quantizing.options() if quantizing is not None else {}
        if denoiser_file is not None:
            part, *others = (name for name in index if name.startswith(_DENOISERS) and index[name][0] == "diffusers")
            if others:
                raise one_denoiser(str(model), 1 + len(others))
            how[part] = load_gguf(Path(denoiser_file), index[part][1], model, part, dtype)
    try:
        pipe = AutoPipelineForText2Image.from_pretrained(model, **how)
    except ValueError as error:  # it does not know all: not Wan, HiDream or Krea 2
        if "can't find a pipeline" not in str(error):
            raise
        pipe = DiffusionPipeline.from_pretrained(model, **how)
    if quantizing is not None:
        quantizing.finish(pipe)
    return pipe


def _configs_of(hub_id: str) -> Path:
    """A folder with what a model on the hub says of itself, without its weights."""
    return Path(snapshot_download(hub_id, allow_patterns=["model_index.json", "*/config.json"]))


def _configs(folder: Path, index: Mapping[str, Any], *, without_denoisers: bool) -> dict[str, dict[str, Any]]:
    """What the components that are loaded from a folder say of themselves, by name; others may lie beside them."""
    files = {path.parent.name: path for path in folder.glob("*/config.json") if path.parent.name in index}
    return {
        part: json.loads(path.read_text(encoding="utf-8"))
        for part, path in files.items()
        if not (without_denoisers and part.startswith(_DENOISERS))
    }


def _quantizing(
    index: Mapping[str, Any], names: tuple[str | None, str | None], dtype: torch.dtype, device: str
) -> Quantizing | None:
    """By a pipeline's model_index.json: of diffusers' models the denoisers, of transformers' the text encoders."""
    wanted = _wanted(index, names)
    libraries: dict[str, Library] = {part: index[part][0] for part in wanted}
    ways = {part: scheme(name) for part, name in wanted.items()}
    return Quantizing(ways, libraries, dtype, device) if ways else None


def _wanted(index: Mapping[str, Any], names: tuple[str | None, str | None]) -> dict[str, str]:
    """How each component is to be quantized, by name; those that are to be."""
    found = {}
    for part, told in index.items():
        library, kind = told if isinstance(told, list) and len(told) == 2 else (None, None)
        name = None
        if library == "diffusers" and part.startswith(_DENOISERS):
            name = names[0]
        elif library == "transformers" and part.startswith("text_encoder"):
            name = names[1]
        if kind and name is not None:
            found[part] = name
    return found


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
