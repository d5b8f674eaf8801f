"""What fits which model: how it draws at first, and the training settings that come with this package."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """Training settings, `<name>.toml`.

    Attributes:
        about: for whom they are, in words.
        memory: bytes of memory from which on they are the better choice.
    """

    about: str
    memory: float = 0.0


# By pipeline, from the one that wants most memory on. None was tuned on a GPU yet.
PRESETS: Mapping[str, Mapping[str, Preset]] = {
    "StableDiffusionPipeline": {
        "sd15": Preset("Stable Diffusion, for 14 GB of memory or more", 14e9),
        "sd15_text_encoder": Preset("the same, with the text encoder", 14e9),
        "sd15_low_memory": Preset("Stable Diffusion, where memory is short"),
    },
    "StableDiffusionXLPipeline": {
        "sdxl": Preset("SDXL, for 22 GB of memory or more", 22e9),
        "sdxl_low_memory": Preset("SDXL, where memory is short"),
    },
    "StableDiffusion3Pipeline": {"sd35": Preset("Stable Diffusion 3.5")},
    "FluxPipeline": {"flux": Preset("Flux.1")},
}
POCKET = {"pocket": Preset("the pocket base")}
_OTHERS = {"sd35": Preset("large models")}  # with the guidance, steps and size of the model itself
_SLOW, _ENOUGH = 50, 25  # diffusers' steps of old, and what today's schedulers need of them
_FEW = 4  # of models that were distilled


def fitting(pipeline: str, memory: float) -> dict[str, Preset]:
    """Presets for a pipeline, by name, the one that fits that many bytes of memory best first."""
    known = PRESETS.get(pipeline, _OTHERS)
    return dict(sorted(known.items(), key=lambda item: item[1].memory > memory))


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
