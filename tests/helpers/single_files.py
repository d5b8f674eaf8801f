"""Tiny pipelines as single-file checkpoints, in the layout of the original implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_VAE = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.1": "mid.block_2", "group_norm": "norm", "to_q": "q",
    "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


_OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc",
    "mlp.fc2": "mlp.c_proj", ".self_attn": ".attn", "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding", "embeddings.position_embedding": "positional_embedding",
}  # fmt: skip


def write_single_file(pipe: Any, path: Path) -> Path:
    """Save a tiny SD 1.x or SDXL pipeline as one .safetensors file with the original implementation's names."""
    state = {f"model.diffusion_model.{unet_name(k, pipe.unet)}": v for k, v in pipe.unet.state_dict().items()}
    blocks = len(pipe.vae.config.block_out_channels)
    state |= {f"first_stage_model.{_vae_name(k, blocks)}": v for k, v in pipe.vae.state_dict().items()}
    xl = hasattr(pipe, "text_encoder_2")
    prefix = "conditioner.embedders.0" if xl else "cond_stage_model"
    clip = pipe.text_encoder.state_dict()
    state |= {f"{prefix}.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in clip.items()}
    if xl:
        state |= {f"conditioner.embedders.1.model.{k}": v for k, v in _open_clip(pipe.text_encoder_2).items()}
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    return path


def _open_clip(encoder: Any) -> dict[str, Tensor]:
    """SDXL's second text encoder as OpenCLIP names it: q, k and v in one, the projection transposed."""
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    renamed = {"text_projection": state.pop("text_projection.weight").T}
    for name, tensor in state.items():
        for theirs, ours in _OPEN_CLIP.items():
            name = name.replace(theirs, ours)
        if "q_proj" in name:
            parts = [state[old] for old in (_swap(name, letter) for letter in "qkv")]
            renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            renamed[name.removesuffix(".weight") if "positional" in name else name] = tensor
    return renamed


def _swap(name: str, letter: str) -> str:
    """The name of the encoder's own q, k or v beside an OpenCLIP name with `q_proj`."""
    for theirs, ours in _OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name.replace("q_proj", f"{letter}_proj")


def unet_name(name: str, unet: Any) -> str:
    per_block = unet.config.layers_per_block + 1
    parts = name.split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        down, block, kind, index = parts[0] == "down_blocks", int(parts[1]), parts[2], int(parts[3])
        prefix, first = ("input_blocks", block * per_block + 1) if down else ("output_blocks", block * per_block)
        if kind == "downsamplers":
            return f"{prefix}.{first + per_block - 1}.0.op.{parts[-1]}"
        if kind == "upsamplers":
            has_attention = hasattr(unet.up_blocks[block], "attentions")
            return f"{prefix}.{first + per_block - 1}.{2 if has_attention else 1}.conv.{parts[-1]}"
        place = 0 if kind == "resnets" else 1
        name = f"{prefix}.{first + index}.{place}." + ".".join(parts[4:])
    for ours, theirs in _UNET.items():
        if name.startswith(ours + "."):
            name = name.replace(ours, theirs, 1)
    if ".attn" not in name and "transformer_blocks" not in name:
        for ours, theirs in _RESNET.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _vae_name(name: str, blocks: int) -> str:
    for ours, theirs in _VAE.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    parts = name.split(".")
    if parts[1] in ("down_blocks", "up_blocks"):
        down, block, kind = parts[1] == "down_blocks", int(parts[2]), parts[3]
        level = block if down else blocks - 1 - block
        inner = {"resnets": f"block.{parts[4]}", "downsamplers": "downsample", "upsamplers": "upsample"}[kind]
        return ".".join([parts[0], "down" if down else "up", str(level), inner, *parts[5:]])
    return name
