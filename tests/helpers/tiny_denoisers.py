"""Small random denoisers of many kinds, each with arguments for one forward."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    EasyAnimateTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    JoyImageEditTransformer3DModel,
    MochiTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)

TEXT = torch.randn(1, 5, 32)


def sd3() -> tuple[Any, dict[str, Any]]:
    model = SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=8, in_channels=4, out_channels=4,
        dual_attention_layers=(0,),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": TEXT,
        "pooled_projections": TEXT[:, 0],
        "timestep": torch.tensor([500.0]),
    }


def qwen_image() -> tuple[Any, dict[str, Any]]:
    model = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": TEXT,
        "encoder_hidden_states_mask": torch.ones(1, 5),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, 4, 4)],
    }


def mochi() -> tuple[Any, dict[str, Any]]:
    model = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, pooled_projection_dim=48, in_channels=4,
        text_embed_dim=32, time_embed_dim=4, max_sequence_length=5,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": TEXT,
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
    }


def easy_animate() -> tuple[Any, dict[str, Any]]:
    model = EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=2,
        mmdit_layers=2, time_embed_dim=4, text_embed_dim=32, sample_width=8, sample_height=8,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": TEXT,
        "timestep": torch.tensor([500.0]),
    }


def hunyuan_video_15() -> tuple[Any, dict[str, Any]]:
    model = HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, text_embed_dim=32, text_embed_2_dim=32, image_embed_dim=32, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "encoder_hidden_states": TEXT,
        "encoder_attention_mask": torch.ones(1, 5),
        "encoder_hidden_states_2": TEXT,
        "encoder_attention_mask_2": torch.ones(1, 5),
        "image_embeds": TEXT,
        "timestep": torch.tensor([500.0]),
    }


def joy_image() -> tuple[Any, dict[str, Any]]:
    model = JoyImageEditTransformer3DModel(
        in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=32, num_layers=2, rope_dim_list=[4, 6, 6]
    )
    return model, {
        "hidden_states": torch.randn(1, 1, 4, 1, 4, 4),
        "encoder_hidden_states": TEXT,
        "timestep": torch.tensor([500.0]),
    }


def flux() -> tuple[Any, dict[str, Any]]:
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": TEXT,
        "pooled_projections": TEXT[:, 0],
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def wan() -> tuple[Any, dict[str, Any]]:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=16, ffn_dim=64, num_layers=2, image_dim=32, added_kv_proj_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(1, 512, 32),  # it splits off the pictures' tokens by that number
        "encoder_hidden_states_image": torch.randn(1, 3, 32),
        "timestep": torch.tensor([500.0]),
    }


def pixart() -> tuple[Any, dict[str, Any]]:
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=32, caption_channels=32, patch_size=2, norm_num_groups=1,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": TEXT,
        "timestep": torch.tensor([500.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def unet() -> tuple[Any, dict[str, Any]]:
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": TEXT,
        "timestep": torch.tensor(500),
    }
