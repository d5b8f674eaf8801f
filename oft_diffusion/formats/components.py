"""What names of layers depend on: a pipeline's components, and what other tools call its text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from oft_diffusion.errors import AdapterError, TargetError
from oft_diffusion.hooks import unwrap
from oft_diffusion.targets import ARCHITECTURES, canonical_name, normalise_name
from oft_diffusion.text_encoders import TEXT_ENCODERS

UNET = "UNet2DConditionModel"
_ADAPTED = ("unet", "transformer", "prior", "text_encoder")  # components of classes that no table of ours knows


@dataclass(frozen=True)
class ComponentLayers:
    """What names depend on, of one component of a pipeline.

    Attributes:
        class_name: the component's class, `UNet2DConditionModel`.
        config: its settings, as `model.config` has them.
        layers: its linear layers and convolutions by name, each with the number of its outputs.
    """

    class_name: str
    config: Mapping[str, Any]
    layers: Mapping[str, int]

    @classmethod
    def from_model(cls, model: nn.Module) -> ComponentLayers:
        """Describe a module, on any device; adapters inside it are looked through.

        Raises:
            TargetError: it is no module.
        """
        model = unwrap(model)
        known = (base.__name__ for base in type(model).__mro__ if base.__name__ in ARCHITECTURES)
        config = getattr(model, "config", {})
        wrappers = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
        layers: dict[str, int] = {}
        for raw_name, module in model.named_modules():
            name = normalise_name(raw_name)
            if getattr(module, "weight", None) is None or name.startswith(wrappers):
                continue  # blocks of UNets tell their channels, too
            outputs = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
            if isinstance(outputs, int):
                layers[name] = outputs
        return cls(
            class_name=next(known, type(model).__name__),
            config=dict(config.to_dict() if hasattr(config, "to_dict") else config),
            layers=layers,
        )

    @property
    def is_xl(self) -> bool:
        """Whether a UNet is one of SDXL's kind."""
        return self.class_name == UNET and self.config.get("addition_embed_type") == "text_time"

    def file_name(self, layer: str) -> str:
        """A layer as transformers 4 named it, and all files do: CLIP's, but for the projection, in `text_model`."""
        inside = self.class_name.startswith("CLIPText") and layer != "text_projection"
        return f"text_model.{canonical_name(layer)}" if inside else layer

    def comfy_name(self, layer: str) -> str:
        """A text encoder's layer as in ComfyUI, whose names are those of the checkpoints that it reads."""
        if self.class_name.startswith("Qwen2_5_VL"):  # saved before transformers 4.52 put both halves into `model`
            return layer.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
        return self.file_name(layer)


Components = Mapping[str, ComponentLayers]  # a pipeline: its denoisers and text encoders by their names in it


@dataclass(frozen=True)
class Encoder:
    """What other tools call a text encoder.

    Attributes:
        te: in flat names, `lora_te1_`: "te1".
        comfy: in ComfyUI's files, `text_encoders.clip_l.transformer.`: "clip_l". Empty where they have none.
        kohya: what KOHYA files write instead of `te`.
        also: what is read besides.
        projection: what flat names of its projection have instead of `te`.
        single_file: prefixes of its tensors in single-file checkpoints, with the naming behind them: "clip", as
            transformers 4 has it, "bare", without `text_model.`, or "open_clip".
    """

    te: str
    comfy: str = ""
    kohya: str = ""
    also: tuple[str, ...] = ()
    projection: str = ""
    single_file: tuple[tuple[str, str], ...] = ()

    @property
    def flat(self) -> tuple[str, ...]:
        """All that it is called in flat names."""
        return tuple(dict.fromkeys((self.te, self.kohya or self.te, *self.also)))


_SD_FILES = (
    ("cond_stage_model.transformer.", "clip"),
    ("cond_stage_model.transformer.", "bare"),
    ("cond_stage_model.model.", "open_clip"),
)
ENCODERS: Mapping[str, Mapping[str, Encoder]] = {
    "SD 1": {"text_encoder": Encoder("te", "clip_l", also=("te1",), single_file=_SD_FILES)},
    "SD 2": {"text_encoder": Encoder("te", "clip_h", also=("te1",), single_file=_SD_FILES)},
    "SDXL": {
        "text_encoder": Encoder("te1", "clip_l", single_file=(("conditioner.embedders.0.transformer.", "clip"),)),
        "text_encoder_2": Encoder("te2", "clip_g", single_file=(("conditioner.embedders.1.model.", "open_clip"),)),
    },
    "SDXL refiner": {  # whose encoder is the only one; ComfyUI has the number in the projection's name alone
        "text_encoder_2": Encoder(
            "te", "clip_g", also=("te2",), projection="te2",
            single_file=(("conditioner.embedders.0.model.", "open_clip"),),
        ),
    },
    "SD3Transformer2DModel": {
        "text_encoder": Encoder("te1", "clip_l"),
        "text_encoder_2": Encoder("te2", "clip_g"),
        "text_encoder_3": Encoder("te3", "t5xxl"),
    },
    "FluxTransformer2DModel": {
        "text_encoder": Encoder("te1", "clip_l"),
        "text_encoder_2": Encoder("te2", "t5xxl", also=("te3",)),  # sd-scripts writes te3
    },
    "ChromaTransformer2DModel": {"text_encoder": Encoder("te", "t5xxl", kohya="te1")},
    "PixArtTransformer2DModel": {"text_encoder": Encoder("te", "t5xxl", also=("te1",))},
    "QwenImageTransformer2DModel": {"text_encoder": Encoder("te", "qwen25_7b", also=("te1",))},
    "HiDreamImageTransformer2DModel": {
        "text_encoder": Encoder("te1", "clip_l"),
        "text_encoder_2": Encoder("te2", "clip_g"),
        "text_encoder_3": Encoder("te3", "t5xxl"),
        "text_encoder_4": Encoder("te4", "llama"),
    },
}  # fmt: skip
OMI = {"clip_l": "clip_l", "clip_g": "clip_g", "clip_h": "clip_l", "t5xxl": "t5"}  # in OneTrainer's files of 2025


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's components that are modules.

    Raises:
        AdapterError: it is no pipeline.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise AdapterError(
            f"a {type(pipe).__name__} is no pipeline",
            expected="a diffusers pipeline with its components",
            fix="pass the pipeline itself, not one of its components",
        )
    return {part: module for part, module in components.items() if isinstance(module, nn.Module)}


def describe(modules: Mapping[str, nn.Module]) -> dict[str, ComponentLayers]:
    """A pipeline's denoisers and text encoders; what else it has, a VAE or a safety checker, has no names in files.

    Args:
        modules: a pipeline's modules by their names in it.
    """
    about = {part: ComponentLayers.from_model(module) for part, module in modules.items()}
    return {
        part: layers
        for part, layers in about.items()
        if layers.class_name in ARCHITECTURES or part.startswith(_ADAPTED)
    }


def described(pipeline: Components, component: str) -> ComponentLayers:
    """A component by its name.

    Raises:
        TargetError: the pipeline has none of that name.
    """
    if component not in pipeline:
        raise TargetError(
            f"the pipeline has no component {component!r}",
            expected=f"one of {', '.join(pipeline)}",
            fix="use the pipeline that the layers belong to",
        )
    return pipeline[component]


def encoder_of(pipeline: Components, component: str) -> Encoder | None:
    """What a text encoder is called; None for a denoiser."""
    encoders = [part for part, about in pipeline.items() if _is_encoder(part, about)]
    if component not in encoders:
        return None
    family = next((_family(pipeline, part) for part in pipeline if part not in encoders), "")
    if known := ENCODERS.get(family, {}).get(component):
        return known
    number = component.rpartition("_")[2]
    return Encoder("te", also=("te1",)) if len(encoders) == 1 else Encoder(f"te{number if number.isdecimal() else 1}")


def stable_diffusion(pipeline: Components) -> str | None:
    """Which Stable Diffusion of a UNet a pipeline is, "SD 1", "SD 2" or "SDXL"; None for all others."""
    unet = next((part for part, about in pipeline.items() if about.class_name == UNET), None)
    return None if unet is None else _family(pipeline, unet).removesuffix(" refiner")


def _is_encoder(component: str, about: ComponentLayers) -> bool:
    return component.startswith("text_encoder") or about.class_name in TEXT_ENCODERS


def _family(pipeline: Components, denoiser: str) -> str:
    """The row of `ENCODERS` for a pipeline with this denoiser."""
    about = pipeline[denoiser]
    if about.class_name != UNET:
        return about.class_name
    # OpenAI's CLIP, which SD 1.x has, is the only one with the quick kind of GELU.
    clip = pipeline.get("text_encoder")
    is_open_clip = clip is not None and clip.config.get("hidden_act") == "gelu"
    if about.is_xl:
        # The refiner's UNet attends to the second encoder alone, the base's to both side by side.
        second = pipeline.get("text_encoder_2")
        alone = second is not None and second.config.get("hidden_size") == about.config.get("cross_attention_dim")
        return "SDXL refiner" if alone else "SDXL"
    return "SD 2" if is_open_clip else "SD 1"
