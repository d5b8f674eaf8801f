"""What fits which model: how it draws at first, and the training settings that come with this package."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from oft_diffusion.quantization import is_installed
from oft_diffusion.training.memory_presets import MEMORIES, packages, row_of


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
_OF_NO_SIZE = ("sd15_text_encoder",)  # which need more than the sizes were counted for: no prompt is cached
_AMPLE = 2 * max(MEMORIES.values())  # bytes in which the recipes train as they are; cards of 24 GiB have 25.8e9
_SLOW, _ENOUGH = 50, 25  # diffusers' steps of old, and what today's schedulers need of them
_FEW = 4  # of models that were distilled


def fitting(pipeline: str, memory: float, layers: int = 0, *, single_file: bool = False) -> dict[str, Preset]:
    """Presets for a pipeline, by name, the one that fits that many bytes of memory best first.

    Args:
        pipeline: its class.
        memory: in bytes.
        layers: of its denoiser, where that says it.
        single_file: whether the model is one checkpoint file, of which nothing is quantized.
    """
    sizes = offered(pipeline, layers, single_file)
    best = max((size for size in sizes if MEMORIES[size] <= memory), key=MEMORIES.__getitem__, default=None)
    sized: list[str | None] = [size for size in sizes if size == best]
    sized += [size for size in sizes if size != best]
    told = {size: f", for {size} of memory" + " or more" * (size == sizes[-1]) for size in sizes}
    presets = {}
    for size in [None, *sized] if memory >= _AMPLE else [*sized, None]:
        for recipe, about in RECIPES.get(pipeline, _OTHERS).items():
            if size is None:
                alone = not sizes or recipe in _OF_NO_SIZE
                presets[recipe] = Preset(about + ", however much memory that takes" * (not alone), recipe)
            elif recipe not in _OF_NO_SIZE:
                presets[f"{recipe} {size}"] = Preset(about + told[size], recipe, size)
    return presets


def offered(pipeline: str, layers: int, single_file: bool = False) -> list[str]:
    """Sizes of memory whose settings for a pipeline differ from those for less, and whose libraries are installed."""
    found: dict[str, Any] = {}
    for size, settings in row_of(pipeline, layers).possible(single_file).items():
        if settings not in found.values() and all(map(is_installed, packages(settings))):
            found[size] = settings
    return list(found)


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
