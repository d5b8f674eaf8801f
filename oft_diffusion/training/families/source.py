"""From a base on disk to a pipeline in memory: all of it, or what of it was dropped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from oft_diffusion.errors import TrainingError, first_line
from oft_diffusion.gguf_file import load_gguf
from oft_diffusion.load import left_out, refuse_hollow
from oft_diffusion.quantization import Quantizing
from oft_diffusion.skeleton import component_skeleton
from oft_diffusion.training.base import Base


@dataclass(frozen=True)
class Source:
    """A base and how it is loaded: onto the CPU; what a card's library quantizes, onto that.

    Attributes:
        base: the model on disk.
        dtype: of all components but the VAE.
        quantizing: which components to quantize; of a folder only.
        denoiser_file: a GGUF file with the denoiser's weights; likewise.
    """

    base: Base
    dtype: torch.dtype
    quantizing: Quantizing | None = None
    denoiser_file: Path | None = None

    def pipe(self, on_denoiser: Callable[[nn.Module], object] | None = None) -> Any:
        """The whole pipeline.

        Args:
            on_denoiser: called with each denoiser, frozen, before the rest is loaded; of a single file, after that.

        Raises:
            TrainingError: diffusers cannot load it.
            ConfigError: a single file lacks some of its weights.
        """
        base, pipe = self.base, None
        if self.denoiser_file is not None:
            (part,) = base.denoisers
            denoisers = {part: load_gguf(self.denoiser_file, base.classes[part], base.configs, part, self.dtype)}
        elif on_denoiser is not None and not base.single_file:
            denoisers = self._denoisers()
        else:
            pipe = self._load({})
            denoisers = {name: pipe.components[name] for name in base.denoisers}
        if on_denoiser is not None:
            for denoiser in denoisers.values():
                on_denoiser(denoiser.requires_grad_(False))
        return self._load(denoisers) if pipe is None else pipe

    def _denoisers(self) -> dict[str, nn.Module]:
        """The denoisers alone, with what stands for the others beside them."""
        base = self.base
        others = [name for name in base.modules if name not in base.denoisers]
        pipe = self._load({name: component_skeleton(base.configs / name, base.classes[name]) for name in others})
        return {name: pipe.components[name] for name in base.denoisers}

    def again(self, components: Mapping[str, Any], names: Collection[str]) -> dict[str, nn.Module]:
        """Some components by name, loaded a second time; the others are at hand. No random number is drawn.

        Raises:
            TrainingError: diffusers cannot load them any more.
        """
        with torch.random.fork_rng(devices=[]):
            pipe = self._load(
                {name: part for name, part in components.items() if part is not None and name not in names}
            )
        return {name: pipe.components[name] for name in names}

    def _load(self, given: Mapping[str, Any]) -> Any:
        """The pipeline around components that there are already."""
        base, quantizing = self.base, self.quantizing
        if quantizing is not None:
            left = {name: way for name, way in quantizing.schemes.items() if name not in given}
            quantizing = replace(quantizing, schemes=left) if left else None
        kind = getattr(diffusers, base.pipeline)
        options: dict[str, Any] = {"local_files_only": True}
        if "safety_checker" in inspect.signature(kind).parameters:
            options["safety_checker"] = None
        try:
            if base.single_file:
                pipe = kind.from_single_file(
                    str(base.weights), config=str(base.configs), dtype=self.dtype, **options, **given
                )
                pipe.vae.float()
            else:
                unused = _unused(kind) | left_out(base.pipeline, {name: [name] for name in base.classes})
                pipe = kind.from_pretrained(
                    str(base.weights),
                    use_safetensors=True,
                    variant=base.variant,
                    **options,
                    **unused,
                    **(quantizing.options() if quantizing else {}),
                    **given,
                    dtype={"default": self.dtype, "vae": torch.float32},
                )
                if quantizing is not None:
                    quantizing.finish(pipe)
        except torch.OutOfMemoryError:
            raise  # nothing is wrong with the model
        except Exception as error:  # diffusers, transformers and safetensors each have their own
            raise TrainingError(
                f"diffusers cannot load {base.name} ({first_line(error)})",
                expected=f"weights that fit {'config_dir' if base.single_file else 'the configs beside them'}",
                fix="check that the model is whole, and that a single file's config_dir is of the same architecture",
            ) from error
        refuse_hollow(pipe, base.name, given)
        return pipe


def hollow(base: Base, name: str, module: nn.Module) -> nn.Module:
    """What stands for a component without its weights: config and layers, and its buffers, which are small."""
    made = component_skeleton(base.configs / name, base.classes[name])
    buffers = dict(module.named_buffers())
    for path, buffer in made.named_buffers():
        if path in buffers and buffers[path].shape == buffer.shape:
            owner, _, leaf = path.rpartition(".")
            made.get_submodule(owner)._buffers[leaf] = buffers[path]
    return made.requires_grad_(False).eval()


def _unused(kind: Any) -> dict[str, Any]:
    """Optional parts of a pipeline that training does without."""
    known = inspect.signature(kind).parameters
    parts = {"feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}
    return {name: value for name, value in parts.items() if name in known}
