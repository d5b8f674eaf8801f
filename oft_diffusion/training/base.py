"""The base model on disk: what it is, and whether it can be trained, from its configs and file headers alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from oft_diffusion.errors import ConfigError
from oft_diffusion.files import PICKLES
from oft_diffusion.load import has_only_fp16

# Pipelines that training/family.py can train, by the _class_name in model_index.json.
PIPELINES = ("StableDiffusionPipeline",)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# component: its config file
_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
_WEIGHTS = ("unet", "vae", "text_encoder")
_PROBES, _PROBE_BYTES = 4, 256  # places in each tensor, and how much is read there
# Entries of configs that say who wrote them, not what the model is.
_BOOKKEEPING = ("_diffusers_version", "_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Base:
    """A base model that can be trained.

    Attributes:
        name: as the user named it.
        weights: the folder in diffusers' format, or the single .safetensors file.
        configs: the folder with model_index.json, component configs and the tokenizer.
        variant: "fp16" where the folder holds only such files, else None.
        pipeline: the diffusers class that model_index.json names.
        unet, vae, scheduler: their configs.
    """

    name: str
    weights: Path
    configs: Path
    variant: str | None
    pipeline: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]

    @property
    def single_file(self) -> bool:
        """Whether the weights are one checkpoint file."""
        return self.weights.is_file()

    @property
    def vae_factor(self) -> int:
        """Pixels per latent."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts, by the scheduler."""
        return str(self.scheduler.get("prediction_type", "epsilon"))

    def check_resolution(self, resolution: int) -> None:
        """Refuse sides that the VAE cannot divide.

        Raises:
            ConfigError: with the nearest sides that fit.
        """
        factor = self.vae_factor
        if resolution % factor:
            below = resolution // factor * factor
            raise ConfigError(
                f"resolution = {resolution} is no multiple of {factor}, by which this model's VAE divides it",
                expected=f"a multiple of {factor}",
                fix=f"use {below or below + factor} or {below + factor}",
            )

    def check_timesteps(self, lowest: int, end: int | None) -> None:
        """Refuse a range of timesteps, `end` excluded, that reaches beyond the model's.

        Raises:
            ConfigError: with how many there are.
        """
        known = int(self.scheduler.get("num_train_timesteps", 1000))
        if lowest >= known or (end or 0) > known:
            raise ConfigError(
                f"timesteps from {lowest} to below {known if end is None else end} are asked for, but {self.name} has "
                f"{known}",
                expected=f"min_timestep below {known}, and max_timestep of at most {known}",
                fix="correct them, or leave them out",
            )

    def fingerprint(self) -> str:
        """SHA-256 over the configs, the tokenizer, and every tensor's name, type, shape and bytes from all over it.

        Equal for copies, and told in milliseconds. Two bases that differ in single entries may share it; any
        training changes the probed entries of what it trained.
        """
        configs = [_read_json(self.configs / component / name) for component, name in _CONFIGS.items()]
        told = [{k: v for k, v in config.items() if k not in _BOOKKEEPING} for config in configs]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for path in sorted((self.configs / "tokenizer").iterdir()):
            if path.suffix in (".json", ".txt"):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        for path in sorted(self._weight_files()):
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                header = file.read(header_bytes)
                digest.update(header)
                for name, entry in sorted(json.loads(header).items()):
                    if name != "__metadata__":
                        start, end = entry["data_offsets"]
                        for i in range(_PROBES):
                            place = start + (end - start) * i // _PROBES
                            file.seek(8 + header_bytes + place)
                            digest.update(file.read(min(_PROBE_BYTES, end - place)))
        return digest.hexdigest()

    def _weight_files(self) -> Iterator[Path]:
        if self.single_file:
            yield self.weights
        else:
            for component in _WEIGHTS:
                yield from (self.weights / component).glob("*.safetensors")


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
        ConfigError: it does not exist, is private, or the hub cannot be reached.
    """
    try:
        return str(StableDiffusionPipeline.download(hub_id, use_safetensors=True, safety_checker=None))
    except (OSError, ValueError, HfHubHTTPError) as error:
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
    loaded = _read_configs(configs)
    pipeline = str(_read_json(configs / "model_index.json")["_class_name"])
    base = Base(name or model, weights, configs, variant, pipeline, loaded["unet"], loaded["vae"], loaded["scheduler"])
    for path in base._weight_files():
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
            fix=f"pass {folder / single[0]}, with config_dir" if single else "pass the folder above unet/ and vae/",
        )
    _check_pipeline(folder)
    for component in _WEIGHTS:
        if not any((folder / component).glob("*.safetensors")):
            pickled = [p.name for p in (folder / component).glob("*") if p.suffix in PICKLES]
            found = f"; {pickled[0]} is a pickle, which can run code and is never loaded" if pickled else ""
            raise ConfigError(
                f"{folder / component} holds no .safetensors weights{found}",
                expected="a whole model in diffusers' format with safetensors weights",
                fix="download the model again with its .safetensors files",
            )
    halves = [has_only_fp16(folder / component) for component in _WEIGHTS]
    if all(halves) or not any(halves):
        return "fp16" if all(halves) else None
    raise ConfigError(
        f"{folder} has only fp16 weights for some components and only full ones for others",
        expected="one kind for unet, vae and text_encoder",
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
    _check_pipeline(configs)
    return configs


def _check_pipeline(configs: Path) -> None:
    kind = _read_json(configs / "model_index.json").get("_class_name")
    if kind not in PIPELINES:
        raise ConfigError(
            f"{configs} is a {kind}", expected=f"Stable Diffusion 1.x or 2.x ({', '.join(PIPELINES)})",
            fix="choose a model of that family",
        )  # fmt: skip


def _read_configs(configs: Path) -> dict[str, dict[str, Any]]:
    missing = [
        f"{component}/{name}" for component, name in _CONFIGS.items() if not (configs / component / name).is_file()
    ]
    if not any((configs / "tokenizer" / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        missing.append("tokenizer/vocab.json")
    if missing:
        raise ConfigError(
            f"{configs} lacks {', '.join(missing)}",
            expected="a whole folder in diffusers' format",
            fix="download or copy the model again",
        )
    return {component: _read_json(configs / component / name) for component, name in _CONFIGS.items()}


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
    for component, config in {"unet": base.unet, "vae": base.vae}.items():
        widths = config.get("block_out_channels")
        if not isinstance(widths, list) or not widths:
            raise ConfigError(
                f"{base.configs / component / 'config.json'} has no list block_out_channels",
                expected="the config that came with the model",
                fix="download or copy the model again",
            )
    channels, latents = base.unet.get("in_channels", 4), base.vae.get("latent_channels", 4)
    if channels != latents:
        raise ConfigError(
            f"the UNet of {base.name} takes {channels} channels, but its VAE makes {latents}",
            expected="a text-to-image model (inpainting and depth models take more channels)",
            fix="choose the text-to-image model of the same family",
        )
    if base.prediction_type not in PREDICTION_TYPES:
        raise ConfigError(
            f"the scheduler of {base.name} has prediction_type {base.prediction_type!r}",
            expected=" or ".join(PREDICTION_TYPES),
            fix="correct scheduler/scheduler_config.json",
        )
