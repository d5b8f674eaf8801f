"""Small random Stable Diffusion pipelines from the real classes, as folders in diffusers' format.

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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

RESOLUTION = 16
MAX_TOKENS = 77
WORDS = ("a", "photo", "of", "dog", "mug", "on", "table", "red", "in", "room")


def tiny_pipeline(
    folder: Path, *, prediction_type: str = "epsilon", zero_snr: bool = False, seed: int = 0, width: int = 32
) -> Any:
    """A random pipeline; its tokenizer's files are written below `folder`. The narrowest layers have that width."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "tokenizer_files")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(width, 2 * width), layers_per_block=1, cross_attention_dim=width,
        attention_head_dim=4, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
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
