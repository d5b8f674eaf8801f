"""The pocket base: a real Stable Diffusion pipeline of about 18M parameters, shipped with the package.

`pocket_pipeline()` loads it. It draws 128 x 128 pixels; about 25 steps and a guidance scale of 4 suit it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from oft_diffusion.pocket.vocabulary import MAX_LENGTH
from oft_diffusion.pocket.world import SIZE

STEPS, GUIDANCE = 25, 4.0  # of drawing
LATENT_CHANNELS = 6
DOWNSCALE = 8


def pocket_path() -> Path:
    """The folder of the shipped weights, as `from_pretrained` takes it."""
    return Path(__file__).parent / "weights"


def pocket_pipeline(torch_dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The pretrained pocket base, on the CPU. The files hold float16, the text encoder float32."""
    return StableDiffusionPipeline.from_pretrained(pocket_path(), dtype=torch_dtype)


def build_vae(latent_channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """An untrained autoencoder: (n, 3, 128, 128) in [-1, 1] to and from (n, latent_channels, 16, 16)."""
    channels = (32, 64, 96, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=16,
        sample_size=SIZE,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder: token ids (n, 32) to (n, 32, 128)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="gelu",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """An untrained denoiser of latents (n, 6, 16, 16), with attention at 16 x 16 and 8 x 8."""
    return UNet2DConditionModel(
        sample_size=SIZE // DOWNSCALE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(128, 224),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=32,
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction down to zero signal, so that the brightness of a picture is learnt and not leaked."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
