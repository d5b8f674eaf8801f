"""Finds a base model on this disk, or fetches it, and says whether it can be trained, without loading it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from oft_diffusion.errors import ConfigError
from oft_diffusion.files import PICKLES
from oft_diffusion.load import has_only_fp16, no_access
from oft_diffusion.training.base import Base
from oft_diffusion.training.families import FAMILIES

_PREDICTIONS = {False: ("epsilon", "v_prediction", "sample"), True: ("flow",)}  # by whether a family flows


def is_hub_id(model: str) -> bool:
    """Whether this names a repository on the hub: `owner/name`, and nothing of that name on this disk."""
    return not Path(model).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) is not None and (
        Path(model).suffix not in (".safetensors", *PICKLES) and not Path(model).parent.is_dir()
    )  # fmt: skip


def download_base(hub_id: str) -> str:
    """Fetch a repository's safetensors weights and configs into the hub's cache, or find them there.

    Returns:
        The folder.

    Raises:
        ConfigError: it does not exist, is private or gated, or the hub cannot be reached.
    """
    try:
        return str(diffusers.DiffusionPipeline.download(hub_id, use_safetensors=True, safety_checker=None))
    except (OSError, ValueError, HfHubHTTPError) as error:
        if (kept_back := no_access(hub_id, error)) is not None:
            raise kept_back from error
        raise ConfigError(
            f"the model {hub_id} cannot be fetched from the hub ({str(error).splitlines()[0][:160]})",
            expected="a folder on this disk, or a public repository in diffusers' format, owner/name",
            fix="check the name and the network, or download the model and pass its folder",
        ) from error


def find_base(model: str, config_dir: str | None = None, name: str | None = None) -> Base:
    """Look at a model on this disk without loading it. `name` is what messages and metadata call it.

    Raises:
        ConfigError: it is missing, empty, pickled, incomplete, truncated, or of a kind that cannot be trained.
    """
    weights = Path(model)
    if weights.is_dir():
        configs, variant = weights, _folder_variant(weights)
    else:
        configs, variant = _single_file_configs(weights, config_dir), None
    base = _read_base(name or model, weights, configs, variant)
    if base.single_file and not hasattr(getattr(diffusers, base.pipeline), "from_single_file"):
        raise ConfigError(
            f"diffusers loads no {base.pipeline} from a single file such as {weights.name}",
            expected="a folder in diffusers' format for this family",
            fix="download or convert the model to that format, and pass the folder",
        )
    for path in base.weight_files():
        _check_header(path)
    _check_kind(base)
    return base


def _folder_variant(folder: Path) -> str | None:
    """Check that a folder is a diffusers model of a kind that we train; "fp16" if it has only such weights."""
    if not (folder / "model_index.json").is_file():
        names = sorted(p.name for p in folder.iterdir())
        found = f"holds {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "") if names else "is empty"
        single = [name for name in names if name.endswith(".safetensors")]
        raise ConfigError(
            f"the model folder {folder} has no model_index.json; it {found}",
            expected="a model in diffusers' format",
            fix=f"pass {folder / single[0]}, with config_dir" if single else "pass the folder above vae/",
        )
    weighted = _weighted(*_classes(folder))
    for component in weighted:
        if not any((folder / component).glob("*.safetensors")):
            pickled = [p.name for p in (folder / component).glob("*") if p.suffix in PICKLES]
            found = f"; {pickled[0]} is a pickle, which can run code and is never loaded" if pickled else ""
            raise ConfigError(
                f"{folder / component} holds no .safetensors weights{found}",
                expected="a whole model in diffusers' format with safetensors weights",
                fix="download the model again with its .safetensors files",
            )
    halves = [has_only_fp16(folder / component) for component in weighted]
    if all(halves) or not any(halves):
        return "fp16" if all(halves) else None
    raise ConfigError(
        f"{folder} has only fp16 weights for some components and only full ones for others",
        expected=f"one kind for {', '.join(weighted)}",
        fix="download the model again, whole",
    )


def _single_file_configs(weights: Path, config_dir: str | None) -> Path:
    if weights.suffix in PICKLES:
        raise ConfigError(
            f"{weights.name} is a pickled checkpoint, which can run code and is never loaded",
            expected="a .safetensors checkpoint, or a folder in diffusers' format",
            fix="get the .safetensors version of this model",
        )
    if not weights.is_file():
        raise ConfigError(
            f"there is no model {weights}",
            expected="a folder in diffusers' format, a .safetensors checkpoint, or a hub id such as owner/name",
            fix="check the path; relative ones start at the working directory",
        )
    if weights.suffix != ".safetensors":
        raise ConfigError(
            f"{weights.name} is no model file",
            expected="a .safetensors checkpoint, or a folder in diffusers' format",
            fix="check the path",
        )
    if config_dir is None:
        raise ConfigError(
            f"the single-file model {weights.name} needs configs, which diffusers would fetch from the hub",
            expected="config_dir, a folder with model_index.json, the component configs and the tokenizer",
            fix="pass --config-dir FOLDER, for example any folder of the same architecture in diffusers' format",
        )
    configs = Path(config_dir)
    if not (configs / "model_index.json").is_file():
        raise ConfigError(
            f"config_dir = {config_dir!r} has no model_index.json",
            expected="a folder in diffusers' format; its weights are not needed",
            fix="correct config_dir",
        )
    return configs


def _classes(configs: Path) -> tuple[str, dict[str, str]]:
    """The pipeline's class and its components', as model_index.json names them; those that are left empty are not in.

    Raises:
        ConfigError: it is of no kind that can be trained.
    """
    index = _read_json(configs / "model_index.json")
    kind = str(index.get("_class_name"))
    if kind not in FAMILIES:
        known = ", ".join(sorted(name.removesuffix("Pipeline") for name in FAMILIES))
        raise ConfigError(f"{configs} is a {kind}", expected=f"a text-to-image model: {known}", fix=_instead(kind))
    named = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2}
    return kind, {part: v[1] for part, v in named.items() if all(isinstance(word, str) for word in v)}


def _instead(kind: str) -> str:
    """What to do about a pipeline that cannot be trained: its text-to-image sibling's name, where it has one."""
    stems = [name for name in FAMILIES if kind.startswith(name.removesuffix("Pipeline"))]
    sibling = max(stems, key=len, default=None)
    return f"choose a model whose pipeline is {sibling}" if sibling else "choose a model of one of those families"


def _weighted(kind: str, classes: Iterable[str]) -> list[str]:
    """Names of the components whose weights are needed: denoisers, text encoders, VAE."""
    return [n for n in classes if n in FAMILIES[kind].DENOISERS or n == "vae" or n.startswith("text_encoder")]


def _read_base(name: str, weights: Path, configs: Path, variant: str | None) -> Base:
    kind, classes = _classes(configs)
    family = FAMILIES[kind]
    files = dict.fromkeys(_weighted(kind, classes), "config.json") | {"scheduler": "scheduler_config.json"}
    missing = [f"{part}/{file}" for part, file in files.items() if not (configs / part / file).is_file()]
    missing += [part for part in ("vae", family.DENOISERS[0], *family.NEEDED) if part not in files]
    missing += [] if any(part.startswith("tokenizer") for part in classes) else ["tokenizer"]
    missing += [
        f"the files of {part}" for part in classes if part.startswith("tokenizer")
        if not any((configs / part).glob("*.json")) and not any((configs / part).glob("*.model"))
    ]  # fmt: skip
    if missing:
        raise ConfigError(
            f"{configs} lacks {', '.join(missing)}",
            expected="a whole folder in diffusers' format",
            fix=family.GET_NEEDED,
        )
    parts = {part: _read_json(configs / part / file) for part, file in files.items()}
    parts["scheduler"] = {"_class_name": classes.get("scheduler")} | parts["scheduler"]
    denoisers = tuple(part for part in family.DENOISERS if part in parts)
    base = Base(name, weights, configs, variant, kind, denoisers, family.PACKED, classes, parts)
    if base.experts and _read_json(configs / "model_index.json").get("boundary_ratio") is None:
        raise ConfigError(
            f"{configs} has {' and '.join(base.experts)}, but no boundary_ratio between them",
            expected="boundary_ratio in model_index.json, as Wan 2.2 has it",
            fix="download or copy the model again",
        )
    return base


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error})", expected="a JSON config", fix="download or copy the model again"
        ) from error
    return dict(data) if isinstance(data, dict) else {}


def _check_header(path: Path) -> None:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            empty = not file.keys()
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"the weights {path} are truncated or corrupt ({str(error)[:120]})",
            expected="a whole .safetensors file",
            fix="download or copy the model again",
        ) from error
    if empty:
        raise ConfigError(f"the weights {path} hold no tensors", expected="a model", fix="download the model again")


def _check_kind(base: Base) -> None:
    _check_widths(base)
    channels, latents = base.denoiser.get("in_channels"), base.latent_channels * base.packed**2
    if channels is not None and channels != latents:
        raise ConfigError(
            f"the denoiser of {base.name} takes {channels} channels, but its VAE makes {latents}",
            expected="a text-to-image model (inpainting, depth and image-to-video models take more channels)",
            fix="choose the text-to-image model of the same family",
        )
    possible = _PREDICTIONS[FAMILIES[base.pipeline].FLOW]
    if base.prediction_type not in possible:
        raise ConfigError(
            f"the scheduler of {base.name} has prediction_type {base.prediction_type!r}",
            expected=f"{' or '.join(possible)}, as a {base.pipeline} is trained",
            fix="correct scheduler/scheduler_config.json",
        )


def _check_widths(base: Base) -> None:
    """The fields of configs by which sizes are told."""
    wanted: dict[str, tuple[str, ...]] = {
        "vae": ("temperal_downsample", "encoder_block_out_channels", "block_out_channels")
    }
    if "unet" in base.parts:
        wanted["unet"] = ("block_out_channels",)
    for component, fields in wanted.items():
        config = base.parts[component]
        if not any(isinstance(config.get(name), list) and config[name] for name in fields):
            raise ConfigError(
                f"{base.configs / component / 'config.json'} has no list {fields[-1]}",
                expected="the config that came with the model",
                fix="download or copy the model again",
            )
