"""Which names the tools of OFTv2 have for the layers of which models: theirs, as their sources have them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from oft_diffusion.errors import ConfigError, TargetError
from oft_diffusion.formats.components import UNET, Components, described, encoder_of
from oft_diffusion.formats.names import APART


@dataclass(frozen=True)
class Known:
    """The namings that a tool reads for one family, each time that to write first.

    Attributes:
        denoiser: for its denoiser.
        encoders: for its text encoders; none where the tool has no adapters of them.
    """

    denoiser: tuple[str, ...]
    encoders: tuple[str, ...] = ()


_ALL = ("flat", "kohya", "diffusers", "comfy", "native")
_DOTTED = ("diffusers", "kohya", "comfy", "native")  # OneTrainer's LEGACY is dotted where it came late
_SPLIT = (APART, "kohya", "comfy")
_CLIP_T5 = ("kohya", "comfy")

# By tool and by the denoiser's class.
TOOLS: Mapping[str, Mapping[str, Known]] = {
    "onetrainer": {
        UNET: Known(_ALL, _ALL),
        "SD3Transformer2DModel": Known(_ALL, _ALL),
        "FluxTransformer2DModel": Known(_ALL, _ALL),
        "ChromaTransformer2DModel": Known(_ALL, _ALL),
        "PixArtTransformer2DModel": Known(("flat", "diffusers"), ("flat", "diffusers")),
        "QwenImageTransformer2DModel": Known(_DOTTED, ("diffusers", "kohya")),
        "Flux2Transformer2DModel": Known(_DOTTED),
        "ZImageTransformer2DModel": Known(_DOTTED),
        "SanaTransformer2DModel": Known(("diffusers", "kohya"), ("diffusers", "kohya")),
        "HiDreamImageTransformer2DModel": Known(("diffusers",), ("diffusers",)),
        "Krea2Transformer2DModel": Known(("diffusers",)),
    },
    "sd-scripts": {UNET: Known(("kohya",), ("kohya",))},
    # The key maps of ComfyUI, with which the node works.
    "comfyui-oftv2": {
        UNET: Known(("flat", *_CLIP_T5), ("flat", *_CLIP_T5)),
        "SD3Transformer2DModel": Known(_SPLIT, _CLIP_T5),
        "FluxTransformer2DModel": Known(_SPLIT, _CLIP_T5),
        "ChromaTransformer2DModel": Known(_SPLIT, _CLIP_T5),
        "QwenImageTransformer2DModel": Known(("kohya", "comfy", "diffusers")),
        "Flux2Transformer2DModel": Known(("kohya", "comfy")),
        "Lumina2Transformer2DModel": Known(("kohya", "comfy")),
        "WanTransformer3DModel": Known(("kohya", "comfy")),
        "HiDreamImageTransformer2DModel": Known(("diffusers",)),
        "PixArtTransformer2DModel": Known(("diffusers",)),
        "ZImageTransformer2DModel": Known(("comfy", "diffusers")),  # since it knows Z-Image, December 2025
    },
}


def names_of(tool: str, pipeline: Components, parts: Collection[str], naming: str | None = None) -> dict[str, str]:
    """By component, the naming that a file for a tool has.

    Args:
        tool: of `TOOLS`.
        pipeline: all denoisers and text encoders of the pipeline.
        parts: those that the adapter adapts.
        naming: one that the user asks for; the tool's usual one if None.

    Raises:
        TargetError: the tool has no such family, or no adapters of one of the components.
        ConfigError: the family has no such names in that tool.
    """
    encoders = {part for part in pipeline if encoder_of(pipeline, part) is not None}
    family = _family(pipeline)
    known = TOOLS[tool].get(family)
    if known is None:
        raise TargetError(
            f"{tool} loads no OFT of a {family}",
            expected=f"a model with {' or '.join(TOOLS[tool])}",
            fix="write another format, such as diff, lora or folder",
        )
    found = {}
    for part in parts:
        usable = known.encoders if part in encoders else known.denoiser
        if not usable:
            raise TargetError(
                f"{tool} loads no OFT of the {part} ({described(pipeline, part).class_name}) of a {family}",
                expected="an adapter of the denoiser alone",
                fix="leave that component out (convert: --only transformer), or write another format",
            )
        if naming is not None and naming not in usable:
            raise ConfigError(
                f"{tool} has no {naming} names for the {part} of a {family}",
                expected=f"{' or '.join(name for name in usable if name != APART)}",
                fix="leave the naming out, or choose one of those",
            )
        found[part] = naming or usable[0]
    return found


def is_loaded_by(tool: str, classes: Mapping[str, str]) -> bool:
    """Whether a tool has adapters of these components, the class of each by its name in the pipeline."""
    denoisers = [kind for part, kind in classes.items() if not part.startswith("text_encoder")]
    known = TOOLS[tool].get(denoisers[0]) if denoisers else None
    return known is not None and (len(denoisers) == len(classes) or known.encoders != ())


def carrier_naming(pipeline: Components, parts: Collection[str]) -> str:
    """The naming by which ComfyUI finds changed weights of these components of a pipeline.

    Raises:
        TargetError: it does not know the family, or by diffusers' names alone, or has no such names of a text encoder.
    """
    family = _family(pipeline)
    known = TOOLS["comfyui-oftv2"].get(family)
    found = [naming for naming in ("kohya", "comfy") if known is not None and naming in known.denoiser]
    if not found:
        raise TargetError(
            f"ComfyUI has no names for changed weights of a {family}",
            expected="a family whose native names it has, such as Stable Diffusion, Flux, Qwen-Image or Wan",
            fix='write a merged folder, or naming="flat" or "diffusers" for tools that have such names',
        )
    encoders = [part for part in parts if encoder_of(pipeline, part) is not None]
    if encoders and known is not None and not known.encoders:
        raise TargetError(
            f"ComfyUI has no such names for changed weights of the {encoders[0]} of a {family}",
            expected="the denoiser alone",
            fix="leave that component out (convert: --only transformer), or write a merged folder",
        )
    return found[0]


def _family(pipeline: Components) -> str:
    """The class of a pipeline's denoiser."""
    denoisers = (about.class_name for part, about in pipeline.items() if encoder_of(pipeline, part) is None)
    return next(denoisers, "pipeline without a denoiser")
