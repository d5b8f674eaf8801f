"""Keys of a few layers as OneTrainer and sd-scripts spell them, in every naming, and the layers that each means.

Spelled out from the tools' sources, not made by this package. A native weight has its layers' rows below one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

SD, XL, SD3, FLUX = (f"{name}Pipeline" for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux"))
FLUX2, QWEN = "Flux2Pipeline", "QwenImagePipeline"
Layers = Mapping[str, tuple[str, tuple[str, ...]]]  # by key: the component, and the layers whose rows its weight has

_CLIP, _T5 = "encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"
_ATTENTION = "attentions.0.transformer_blocks.0.attn1.to_q"
_IN = {SD: f"down_blocks.0.{_ATTENTION}", XL: f"down_blocks.1.{_ATTENTION}"}
_NATIVE_IN = {
    SD: "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    XL: "input_blocks.3.1.transformer_blocks.0.attn1.to_q",
}
_DOWN, _NATIVE_DOWN = "down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"  # 3x3
_POINT = {SD: "down_blocks.0.attentions.0.proj_in", XL: "down_blocks.1.resnets.0.conv_shortcut"}  # 1x1
_NATIVE_POINT = {SD: "input_blocks.1.1.proj_in", XL: "input_blocks.3.0.skip_connection"}


def flat(name: str) -> str:
    return name.replace(".", "_")


def qkv(attention: str, ends: tuple[str, ...] = ("to_q", "to_k", "to_v")) -> tuple[str, ...]:
    return tuple(f"{attention}.{end}" for end in ends)


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE, _SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"
# Native name: the layers whose rows it has.
FLUX_WEIGHTS = {
    "double_blocks.0.img_attn.qkv": qkv(_DOUBLE),
    "double_blocks.0.txt_attn.qkv": qkv(_DOUBLE, _ADDED),
    "double_blocks.0.img_mlp.2": ("transformer_blocks.0.ff.net.2",),
    "single_blocks.0.linear1": (*qkv(f"{_SINGLE}.attn"), f"{_SINGLE}.proj_mlp"),
    "single_blocks.0.linear2": (f"{_SINGLE}.proj_out",),
}
SD3_WEIGHTS = {
    "joint_blocks.0.x_block.attn.qkv": qkv(_DOUBLE),
    "joint_blocks.1.context_block.attn.qkv": qkv("transformer_blocks.1.attn", _ADDED),
    "joint_blocks.0.x_block.attn2.qkv": qkv("transformer_blocks.0.attn2"),
    "joint_blocks.0.x_block.mlp.fc2": ("transformer_blocks.0.ff.net.2",),
}


def _unets(name: str) -> dict[str, Layers]:
    """The namings of Stable Diffusion's UNets."""
    own = {_IN[name]: _IN[name], _DOWN: _DOWN, _POINT[name]: _POINT[name]}
    native = {_NATIVE_IN[name]: _IN[name], _NATIVE_DOWN: _DOWN, _NATIVE_POINT[name]: _POINT[name]}

    def unet(prefix: str, names: Mapping[str, str], spell: Callable[[str], str] = str) -> dict[str, Any]:
        return {prefix + spell(key): ("unet", (layer,)) for key, layer in names.items()}

    def text(*keys: str) -> dict[str, Any]:
        parts = (("text_encoder", _CLIP), ("text_encoder_2", f"text_model.{_CLIP}"))
        return {key: (part, (layer,)) for key, (part, layer) in zip(keys, parts, strict=False)}

    te, parts = (["te"], ["text_encoder"]) if name == SD else (["te1", "te2"], ["text_encoder", "text_encoder_2"])
    clips = ["clip_l", "clip_g"][: len(te)]
    in_te = text(*(f"lora_{t}_text_model_{flat(_CLIP)}" for t in te))
    return {
        "LEGACY": unet("lora_unet_", own, flat) | in_te,
        "KOHYA": unet("lora_unet_", native if name == XL else own, flat) | in_te,
        "DIFFUSERS": unet("unet.", own) | text(*(f"{part}.text_model.{_CLIP}" for part in parts)),
        "COMFY": unet("diffusion_model.", native)
        | text(*(f"text_encoders.{clip}.transformer.text_model.{_CLIP}" for clip in clips)),
        "ORIGINAL": unet("", native),
    }


def _transformers(name: str) -> dict[str, Layers]:
    """The namings of SD 3 and Flux: q, k and v on their own in the first and third, else fused."""
    native = FLUX_WEIGHTS if name == FLUX else SD3_WEIGHTS
    own = [layer for layers in native.values() for layer in layers]
    # Two CLIPs with a projection, and T5; Flux has one without, and T5.
    clips = [_CLIP] if name == FLUX else [f"text_model.{_CLIP}"] * 2
    encoders = {f"text_encoder{'' if i == 0 else f'_{i + 1}'}": layer for i, layer in enumerate([*clips, _T5])}

    def text(spell: Callable[[int, str], str]) -> dict[str, Any]:
        spelled = [f"text_model.{_CLIP}"] * len(clips) + [_T5]
        return {
            spell(number, layer): (part, (encoders[part],))
            for number, (part, layer) in enumerate(zip(encoders, spelled, strict=True))
        }

    comfy = ["clip_l", "t5xxl"] if name == FLUX else ["clip_l", "clip_g", "t5xxl"]
    in_te = text(lambda number, layer: f"lora_te{number + 1}_{flat(layer)}")
    fused = {key: ("transformer", layers) for key, layers in native.items()}
    return {
        "LEGACY": {f"lora_transformer_{flat(layer)}": ("transformer", (layer,)) for layer in own} | in_te,
        "KOHYA": {f"lora_unet_{flat(key)}": meant for key, meant in fused.items()} | in_te,
        "DIFFUSERS": {f"transformer.{layer}": ("transformer", (layer,)) for layer in own}
        | text(lambda number, layer: f"{list(encoders)[number]}.{layer}"),
        "COMFY": {f"diffusion_model.{key}": meant for key, meant in fused.items()}
        | text(lambda number, layer: f"text_encoders.{comfy[number]}.transformer.{layer}"),
        "ORIGINAL": fused,
    }


_FLUX2_DOUBLE, _FLUX2_SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
_FLUX2 = {
    "double_blocks.0.img_attn.qkv": qkv(f"{_FLUX2_DOUBLE}.attn"),
    "double_blocks.0.txt_attn.proj": (f"{_FLUX2_DOUBLE}.attn.to_add_out",),
    "double_blocks.0.img_mlp.2": (f"{_FLUX2_DOUBLE}.ff.linear_out",),
    "single_blocks.0.linear1": (f"{_FLUX2_SINGLE}.attn.to_qkv_mlp_proj",),
}
_QWEN = {name: (name,) for name in (*qkv(_DOUBLE), f"{_DOUBLE}.add_k_proj", "transformer_blocks.0.img_mlp.net.2")}


def _late(native: Mapping[str, tuple[str, ...]]) -> dict[str, Layers]:
    """The namings of families that OneTrainer has had since its dotted names, of the denoiser alone."""
    dotted = {f"transformer.{layer}": ("transformer", (layer,)) for layers in native.values() for layer in layers}
    fused = {key: ("transformer", layers) for key, layers in native.items()}
    return {
        "LEGACY": dotted,
        "KOHYA": {f"lora_unet_{flat(key)}": meant for key, meant in fused.items()},
        "DIFFUSERS": dotted,
        "COMFY": {f"diffusion_model.{key}": meant for key, meant in fused.items()},
        "ORIGINAL": fused,
    }


KINDS = {name: _unets(name) for name in (SD, XL)} | {name: _transformers(name) for name in (SD3, FLUX)}
LATE = {FLUX2: _late(_FLUX2), QWEN: _late(_QWEN)}
NAMINGS = ("LEGACY", "KOHYA", "DIFFUSERS", "COMFY", "ORIGINAL")
