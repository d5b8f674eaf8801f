"""Small random Stable Diffusion pipelines from the real classes, as folders in diffusers' format or single files.

A step takes milliseconds: 16 px pictures, 8x8 latents, a UNet of two blocks, a text encoder of two layers, and a real
CLIP tokenizer over a byte-level vocabulary with some whole words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

RESOLUTION = 16
MAX_TOKENS = 77
WORDS = ("a", "photo", "of", "dog", "mug", "on", "table", "red", "in", "room")


def tiny_pipeline(folder: Path, *, prediction_type: str = "epsilon", zero_snr: bool = False, seed: int = 0) -> Any:
    """A random pipeline; its tokenizer's files are written below `folder`."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "tokenizer_files")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32), latent_channels=4, norm_num_groups=8, layers_per_block=1, sample_size=RESOLUTION,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr, steps_offset=1,
        timestep_spacing="trailing" if zero_snr else "leading",
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def write_tiny_sd(folder: Path, **options: Any) -> Path:
    """Write `tiny_pipeline` as `folder/model`, in diffusers' format."""
    tiny_pipeline(folder, **options).save_pretrained(folder / "model")
    return folder / "model"


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer over all bytes, in which each of `WORDS` is one token."""
    alphabet = list(_bytes_to_unicode())
    vocabulary = alphabet + [c + "</w>" for c in alphabet]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = f"{pieces[0]} {pieces[1]}"
            pieces[:2] = [pieces[0] + pieces[1]]
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS)


def _bytes_to_unicode() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]


def draw_pictures(folder: Path, count: int = 3, side: int = 24, suffix: str = ".png") -> Path:
    """Instance images: a coloured disc that moves over differing backgrounds."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Image.new("RGB", (side, side), (40 + 60 * i % 200, 90, 200 - 50 * i % 200))
        ImageDraw.Draw(image).ellipse((2 + i, 3, side - 8 + i, side - 4), fill=(220, 40 * i % 255, 30))
        image.save(folder / f"picture_{i}{suffix}")
    return folder


# -- a single-file checkpoint, in the layout of the original implementation -------------------------------------------

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
_VAE = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.1": "mid.block_2", "group_norm": "norm", "to_q": "q",
    "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def write_single_file(pipe: Any, path: Path) -> Path:
    """Save a tiny pipeline as one .safetensors file with the original implementation's names."""
    state = {f"model.diffusion_model.{_unet_name(k, pipe.unet)}": v for k, v in pipe.unet.state_dict().items()}
    blocks = len(pipe.vae.config.block_out_channels)
    state |= {f"first_stage_model.{_vae_name(k, blocks)}": v for k, v in pipe.vae.state_dict().items()}
    prefix = "cond_stage_model.transformer.text_model."
    state |= {prefix + k.removeprefix("text_model."): v for k, v in pipe.text_encoder.state_dict().items()}
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    return path


def _unet_name(name: str, unet: Any) -> str:
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
