"""The real sizes of what has native names, on the meta device: public configs, no weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from oft_diffusion.formats.names import ComponentLayers, Components


def _unet(**settings: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(**settings)


def _sdxl_unet(**settings: Any) -> nn.Module:
    shape: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10), "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return _unet(
        sample_size=128, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        **{**shape, **settings},
    )  # fmt: skip


def _refiner_unet() -> nn.Module:
    return _sdxl_unet(
        block_out_channels=(384, 768, 1536, 1536), cross_attention_dim=1280, attention_head_dim=(6, 12, 24, 24),
        transformer_layers_per_block=4, projection_class_embeddings_input_dim=2560,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _sd3(layers: int, dual: int = 0, norm: str | None = "rms_norm") -> nn.Module:
    heads = layers
    return diffusers.SD3Transformer2DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=64, caption_projection_dim=64 * heads,
        joint_attention_dim=4096, pooled_projection_dim=2048, in_channels=16, out_channels=16, sample_size=128,
        pos_embed_max_size=192, dual_attention_layers=tuple(range(dual)), qk_norm=norm,
    )  # fmt: skip


def _clip(width: int, layers: int, act: str, *, projected: bool) -> nn.Module:
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        projection_dim=width, hidden_act=act,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def _t5() -> nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
        )
    )


Parts = dict[str, Callable[[], nn.Module]]
_CLIP_L = partial(_clip, 768, 12, "quick_gelu", projected=False)
_CLIP_L_PROJECTED = partial(_clip, 768, 12, "quick_gelu", projected=True)
_CLIP_G = partial(_clip, 1280, 32, "gelu", projected=True)
_CLIP_H = partial(_clip, 1024, 23, "gelu", projected=False)
_SD3_ENCODERS: Parts = {"text_encoder": _CLIP_L_PROJECTED, "text_encoder_2": _CLIP_G, "text_encoder_3": _t5}

BUILDERS: dict[str, Parts] = {
    "SD 1.5": {"unet": partial(_unet, cross_attention_dim=768, attention_head_dim=8), "text_encoder": _CLIP_L},
    "SD 2.1": {
        "unet": partial(
            _unet, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        ),
        "text_encoder": _CLIP_H,
    },
    "SDXL": {"unet": _sdxl_unet, "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G},
    "SDXL refiner": {"unet": _refiner_unet, "text_encoder_2": _CLIP_G},
    "SD 3 Medium": {"transformer": partial(_sd3, 24, norm=None), **_SD3_ENCODERS},
    "SD 3.5 Medium": {"transformer": partial(_sd3, 24, dual=13), **_SD3_ENCODERS},
    "SD 3.5 Large": {"transformer": partial(_sd3, 38), **_SD3_ENCODERS},
    "Flux.1 dev": {
        "transformer": partial(diffusers.FluxTransformer2DModel, guidance_embeds=True),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _t5,
    },
    "Flux.1 schnell": {"transformer": diffusers.FluxTransformer2DModel, "text_encoder": _CLIP_L, "text_encoder_2": _t5},
    "Chroma": {"transformer": diffusers.ChromaTransformer2DModel, "text_encoder": _t5},
    "Flux.2": {"transformer": diffusers.Flux2Transformer2DModel},
    "Z-Image": {"transformer": diffusers.ZImageTransformer2DModel},
    "Qwen-Image": {"transformer": diffusers.QwenImageTransformer2DModel},
    "Sana": {"transformer": diffusers.SanaTransformer2DModel},
    "Lumina 2": {"transformer": diffusers.Lumina2Transformer2DModel},
    "Wan 2.1": {"transformer": diffusers.WanTransformer3DModel},
    "Wan 2.1 I2V": {
        "transformer": partial(diffusers.WanTransformer3DModel, image_dim=1280, added_kv_proj_dim=5120, in_channels=36)
    },
    "Wan 2.1 VACE": {"transformer": diffusers.WanVACETransformer3DModel},
    "SkyReels 2": {"transformer": diffusers.SkyReelsV2Transformer3DModel},
    "ChronoEdit": {"transformer": diffusers.ChronoEditTransformer3DModel},
}


@cache
def real_model(name: str, component: str) -> Any:
    with torch.device("meta"):
        return BUILDERS[name][component]()


@cache
def real_components(name: str) -> Components:
    return {part: ComponentLayers.from_model(real_model(name, part)) for part in BUILDERS[name]}


def denoiser_of(name: str) -> str:
    return next(iter(BUILDERS[name]))
