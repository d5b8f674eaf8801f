"""The base model on disk, as its configs and file headers describe it. `find.py` finds and checks it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from oft_diffusion.errors import ConfigError
from oft_diffusion.load import check_clip_skip
from oft_diffusion.prediction import prediction_type

_PROBES, _PROBE_BYTES = 4, 256  # places in each tensor, and how much is read there
# Entries of configs that say who wrote them, not what the model is.
_BOOKKEEPING = ("_diffusers_version", "_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Base:
    """A base model that can be trained.

    Attributes:
        name: as the user named it.
        weights: the folder in diffusers' format, or the single .safetensors file.
        configs: the folder with model_index.json, component configs and the tokenizers.
        variant: "fp16" where the folder holds only such files, else None.
        pipeline: the diffusers class that model_index.json names.
        denoisers: names of the components that denoise.
        packed: latents per side that the denoiser takes as one.
        classes: component name to class name.
        parts: component name to config: of denoisers, text encoders, VAE and scheduler.
    """

    name: str
    weights: Path
    configs: Path
    variant: str | None
    pipeline: str
    denoisers: tuple[str, ...]
    packed: int
    classes: Mapping[str, str]
    parts: Mapping[str, Mapping[str, Any]]

    @property
    def single_file(self) -> bool:
        """Whether the weights are one checkpoint file."""
        return self.weights.is_file()

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the components that read prompts."""
        return tuple(name for name in self.parts if name.startswith("text_encoder"))

    @property
    def trained_text_encoders(self) -> tuple[str, ...]:
        """Those that learn where text encoders are to: the CLIPs, and where there is none, all."""
        clips = tuple(name for name in self.text_encoders if self.classes[name].startswith("CLIP"))
        return clips or self.text_encoders

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all components with weights."""
        return tuple(name for name in self.parts if name != "scheduler")

    @property
    def denoiser(self) -> Mapping[str, Any]:
        """The config of the component that denoises, the first where there are several."""
        return self.parts[self.denoisers[0]]

    @property
    def experts(self) -> tuple[str, ...]:
        """The denoisers where there are several, each for its own noise levels; none else."""
        return self.denoisers if len(self.denoisers) > 1 else ()

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's config."""
        return self.parts["scheduler"]

    @property
    def video_vae(self) -> bool:
        """Whether the VAE takes videos, of which a picture is one frame."""
        return "temperal_downsample" in self.parts["vae"]

    @property
    def vae_factor(self) -> int:
        """Pixels per latent and side."""
        vae = self.parts["vae"]
        if factor := vae.get("scale_factor_spatial"):
            return int(factor)
        if self.video_vae:
            return int(2 ** len(vae["temperal_downsample"]))
        widths = vae.get("encoder_block_out_channels") or vae["block_out_channels"]
        return int(2 ** (len(widths) - 1))

    @property
    def latent_channels(self) -> int:
        """Of the VAE's latents."""
        vae = self.parts["vae"]
        return int(vae.get("latent_channels") or vae.get("z_dim") or 4)

    @property
    def timesteps(self) -> int:
        """How many noise levels the scheduler knows."""
        return int(self.scheduler.get("num_train_timesteps", 1000))

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts, by the scheduler: epsilon, v_prediction, sample or flow."""
        return prediction_type(self.scheduler) or "epsilon"

    @property
    def sides(self) -> int:
        """What a picture's sides must be multiples of: the VAE's factor times the denoiser's patches."""
        patch = self.denoiser.get("patch_size") or self.denoiser.get("all_patch_size") or 1
        # What is packed is the patch, where a family has both.
        return self.vae_factor * max(self.packed, max(patch) if isinstance(patch, (list, tuple)) else int(patch))

    def check_resolution(self, resolution: int) -> None:
        """Refuse sides that the VAE and the denoiser's patches cannot divide.

        Raises:
            ConfigError: with the nearest sides that fit.
        """
        if resolution % self.sides:
            below = resolution // self.sides * self.sides
            by = "its VAE" if self.sides == self.vae_factor else "its VAE and its patches"
            raise ConfigError(
                f"resolution = {resolution} is no multiple of {self.sides}, by which this model divides it ({by})",
                expected=f"a multiple of {self.sides}",
                fix=f"use {below or below + self.sides} or {below + self.sides}",
            )

    def check_clip_skip(self, clip_skip: int | None) -> None:
        """Refuse a clip skip where the pipeline knows none, or that leaves no layer.

        Raises:
            ConfigError: with what there is.
        """
        if clip_skip is not None:
            clips = (self.parts[name] for name in self.trained_text_encoders)  # CLIPs, where clip skip is known
            layers = min((int(clip.get("num_hidden_layers", 12)) for clip in clips), default=0)
            check_clip_skip(getattr(diffusers, self.pipeline), clip_skip, layers)

    def check_timesteps(self, lowest: int, end: int | None) -> None:
        """Refuse a range of timesteps, `end` excluded, that reaches beyond the model's.

        Raises:
            ConfigError: with how many there are.
        """
        if lowest >= self.timesteps or (end or 0) > self.timesteps:
            raise ConfigError(
                f"timesteps from {lowest} to below {self.timesteps if end is None else end} are asked for, but "
                f"{self.name} has {self.timesteps}",
                expected=f"min_timestep below {self.timesteps}, and max_timestep of at most {self.timesteps}",
                fix="correct them, or leave them out",
            )

    def fingerprint(self) -> str:
        """SHA-256 over the configs, the tokenizers, and every tensor's name, type, shape and bytes from all over it.

        Equal for copies, and told in milliseconds. Two bases that differ in single entries may share it; any
        training changes the probed entries of what it trained.
        """
        told = {n: {k: v for k, v in c.items() if k not in _BOOKKEEPING} for n, c in sorted(self.parts.items())}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for path in sorted(self.configs.glob("tokenizer*/*")):
            if path.suffix in (".json", ".txt", ".model"):
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        for path in sorted(self.weight_files()):
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

    def weight_files(self) -> Iterator[Path]:
        """All files with weights."""
        if self.single_file:
            yield self.weights
        else:
            for component in self.modules:
                yield from (self.weights / component).glob("*.safetensors")
