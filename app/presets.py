"""What fits which model: how it draws at first, and the training settings that come with this package."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from oft_diffusion.training.memory_presets import MEMORIES, row_of


class Preset(NamedTuple):
    """Training settings.

    Attributes:
        about: for whom they are, in words.
        recipe: `<recipe>.toml`.
        memory: of the card, as `memory_presets` has it; the recipe alone if None.
    """

    about: str
    recipe: str
    memory: str | None = None


# By pipeline. None was tuned on a GPU yet.
RECIPES: Mapping[str, Mapping[str, str]] = {
    "StableDiffusionPipeline": {
        "sd15": "Stable Diffusion",
        "sd15_text_encoder": "Stable Diffusion with its text encoder",
    },
    "StableDiffusionXLPipeline": {"sdxl": "SDXL"},
    "StableDiffusion3Pipeline": {"sd35": "Stable Diffusion 3.5"},
    "FluxPipeline": {"flux": "Flux.1"},
}
POCKET = {"pocket": Preset("the pocket base", "pocket")}
_OTHERS = {"sd35": "large models"}  # with the guidance, steps and size of the model itself
_SLOW, _ENOUGH = 50, 25  # diffusers' steps of old, and what today's schedulers need of them
_FEW = 4  # of models that were distilled


def fitting(pipeline: str, memory: float, layers: int = 0) -> dict[str, Preset]:
    """Presets for a pipeline, by name, the one that fits that many bytes of memory best first.

    Args:
        pipeline: its class.
        memory: in bytes.
        layers: of its denoiser, where that says it.
    """
    known = RECIPES.get(pipeline)
    sizes = offered(pipeline, layers)
    best = max((size for size in sizes if MEMORIES[size] <= memory), key=MEMORIES.__getitem__, default=sizes[0])
    if known is not None:
        chosen: list[str | None] = [best, *(size for size in sizes if size != best)]
    else:  # nobody knows how large it is
        chosen = [None, best] if memory > max(MEMORIES.values()) else [best, None]
    told: dict[str | None, str] = {size: f", for {size} of memory" + " or more" * (size == sizes[-1]) for size in sizes}
    return {
        f"{recipe} {size}" if size else recipe: Preset(about + told.get(size, ""), recipe, size)
        for size in chosen
        for recipe, about in (known or _OTHERS).items()
    }


def offered(pipeline: str, layers: int) -> list[str]:
    """Sizes of memory whose settings for a pipeline differ from those for less."""
    settings = row_of(pipeline, layers).settings
    sizes = list(settings)
    return [size for i, size in enumerate(sizes) if i == 0 or settings[size] != settings[sizes[i - 1]]]


def beginning(pipe: Any) -> tuple[int, float]:
    """Steps and guidance that a pipeline has by itself; of a distilled one, few and none."""
    known = inspect.signature(type(pipe).__call__).parameters
    own = {name: parameter.default for name, parameter in known.items()}
    guidance = own.get("guidance_scale")
    if guidance is None:
        guidance = own.get("true_cfg_scale", 1.0)
    if pipe.config.get("is_distilled") or _schnell(pipe):
        return _FEW, 0.0 if type(pipe).__name__ == "Krea2Pipeline" else 1.0  # which counts from 0
    steps = int(own.get("num_inference_steps") or _ENOUGH)
    return _ENOUGH if steps >= _SLOW else steps, float(guidance)


def _schnell(pipe: Any) -> bool:
    """Whether it is a Flux.1 that was taught no guidance."""
    return type(pipe).__name__ == "FluxPipeline" and not pipe.transformer.config.guidance_embeds
