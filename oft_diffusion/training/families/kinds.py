"""The architectures that can be trained: what each does otherwise than `Family`, and by which pipeline it is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from oft_diffusion.training.families.family import Family
from oft_diffusion.training.families.recording import Conditioning, inputs

_ONE_ENCODER: tuple[str, ...] = ("text_encoder",)
_TWO_ENCODERS: tuple[str, ...] = ("text_encoder", "text_encoder_2")
_FEW_TOKENS = 1024  # 256 pixels: attention maps of more would be memory that flash attention saves
_NO_BINS = {"use_resolution_binning": False}  # pictures have the size that was asked for


class _GuidedFromZero(Family):
    """The pipeline takes 0 for no guidance, not 1."""

    def guided(self, scale: float) -> dict[str, Any]:
        return {"guidance_scale": max(scale - 1.0, 0.0)}


class _Negated(Family):
    """The answer points from noise to picture."""

    def ask(self, denoiser: nn.Module, packed: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        return -super().ask(denoiser, packed, times, conditioning)


class _Backwards(_Negated):
    """Time runs from noise to picture, too."""

    def timestep(self, times: Tensor) -> Tensor:
        return 1 - times / 1000


class StableDiffusion(Family):
    """SD 1.x and 2.x: latents as the VAE makes them."""

    DENOISERS = ("unet",)
    FLOW = False

    def quicken_backward(self, resolution: int) -> None:
        tokens = (resolution // self.pipe.vae_scale_factor) ** 2
        processors = self.denoiser.attn_processors.values()
        if tokens <= _FEW_TOKENS and all(type(p) is AttnProcessor2_0 for p in processors):
            self.denoiser.set_attn_processor(AttnProcessor())


class StableDiffusionXL(StableDiffusion):
    """SDXL, whose sizes and crops the pipeline tells its UNet."""

    NEEDED = _TWO_ENCODERS


class StableDiffusion3(Family):
    """SD 3 and 3.5, with or without T5."""

    NEEDED = _TWO_ENCODERS


class Flux(Family):
    """Flux.1: squares of four latents are one token. Where guidance is embedded, it is 1 in training."""

    NEEDED = _TWO_ENCODERS
    PACKED = 2

    def pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = self.pipe._pack_latents(latents, *latents.shape)
        return packed

    def timestep(self, times: Tensor) -> Tensor:
        return times / 1000


class Chroma(Flux):
    """Flux without guidance embedding, with a mask."""

    NEEDED = _ONE_ENCODER


class QwenImage(Flux):
    """Qwen-Image: as Flux, with the VAE of a video model."""

    NEEDED = _ONE_ENCODER

    def guided(self, scale: float) -> dict[str, Any]:
        # Guidance needs a negative prompt here, and the empty one is refused.
        return {"true_cfg_scale": scale, **({"negative_prompt": " "} if scale > 1 else {})}


class Krea2(_GuidedFromZero, Flux):
    """Krea 2: as Flux, with the VAE of a video model."""

    NEEDED = _ONE_ENCODER


class Flux2(Flux):
    """Flux.2 and Klein: squares of four latents become channels, which are normalised by the VAE's batch norm."""

    NEEDED = _ONE_ENCODER

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        channels, height, width = super().latent_shape(resolution)
        return 4 * channels, height // 2, width // 2

    def normalise(self, latents: Tensor) -> Tensor:
        squares: Tensor = self.pipe._patchify_latents(latents)
        norm = self.vae.bn
        mean, variance = (values.view(1, -1, 1, 1).to(squares) for values in (norm.running_mean, norm.running_var))
        return (squares - mean) / torch.sqrt(variance + self.vae.config.batch_norm_eps)

    def pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = self.pipe._pack_latents(latents)
        return packed


class Lumina2(_Backwards):
    """Lumina Image 2."""


class ZImage(_GuidedFromZero, _Backwards):
    """Z-Image: lists of single samples, each a video of one frame."""

    def ask(self, denoiser: nn.Module, packed: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        latents, timestep = inputs(denoiser)
        own = {latents: list(packed.unsqueeze(2).unbind()), timestep: self.timestep(times)}
        return -torch.stack(list(denoiser(**{**conditioning, **own})[0])).squeeze(2)


class HiDream(_Negated):
    """HiDream. Its pipeline draws in one size alone."""

    NEEDED = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    GET_NEEDED = (
        "HiDream's repository is without its Llama: pass Llama 3.1 8B Instruct as text_encoder_4 and tokenizer_4 to "
        "from_pretrained, and save the whole pipeline with save_pretrained"
    )


class PixArt(Family):
    """PixArt alpha and sigma: epsilon; the second half of the answer's channels is a variance, which nobody reads."""

    FLOW = False
    CALL = _NO_BINS

    def ask(self, denoiser: nn.Module, packed: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        return super().ask(denoiser, packed, times, conditioning)[:, : packed.shape[1]]


class Sana(Family):
    """Sana: an autoencoder that makes 32 x 32 pixels one latent."""

    CALL = _NO_BINS

    def timestep(self, times: Tensor) -> Tensor:
        scaled: Tensor = times * self.denoiser.config.timestep_scale
        return scaled


class Wan(Family):
    """Wan, on single frames. Wan 2.2 has an expert for high noise and one for low, and each learns its own levels."""

    DENOISERS = ("transformer", "transformer_2")
    CALL: ClassVar[Mapping[str, Any]] = {"num_frames": 1}

    def pack(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2)

    def ask(self, denoiser: nn.Module, packed: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        if not self.base.experts:
            return self._ask_one(denoiser, packed, times, conditioning)
        boundary = self.pipe.config.boundary_ratio * self.pipe.scheduler.config.num_train_timesteps
        answers = packed.new_empty(packed.shape)
        for name, own in (("transformer", times >= boundary), ("transformer_2", times < boundary)):
            if own.any():
                told = {k: v[own] if isinstance(v, Tensor) else v for k, v in conditioning.items()}
                found = self._ask_one(self.module(name), packed[own], times[own], told)
                answers = answers.index_put((own.nonzero()[:, 0],), found.to(answers))
        return answers

    def _ask_one(self, denoiser: nn.Module, packed: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        if self.pipe.config.expand_timesteps:  # a time per token
            _, _, frames, height, width = packed.shape
            _, rows, columns = self.denoiser.config.patch_size
            times = times[:, None].expand(-1, frames * (height // rows) * (width // columns))
        return super().ask(denoiser, packed, times, conditioning)


FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2,
    "ChromaPipeline": Chroma,
    "QwenImagePipeline": QwenImage,
    "Krea2Pipeline": Krea2,
    "ZImagePipeline": ZImage,
    "Lumina2Pipeline": Lumina2,
    "HiDreamImagePipeline": HiDream,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "SanaPipeline": Sana,
    "WanPipeline": Wan,
}
