"""Unfinished pictures while a model draws."""

from __future__ import annotations

import time
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from oft_diffusion.generate import Step

_SHARE = 0.15  # share of the time that they may take


class Previews:
    """Unfinished pictures by the pipeline's own decoder, as often as it is quick enough.

    Of decoders that scale their latents by one number: those of SD, SD 3, Flux and their like.

    Args:
        pipe: what draws.
        size: width and height of the pictures, in pixels.
    """

    def __init__(self, pipe: Any, size: tuple[int, int]) -> None:
        self.pipe, self.size = pipe, size
        vae = getattr(pipe, "vae", None)
        known = vae is not None and "scaling_factor" in getattr(vae, "config", {}) and vae.config.get("latent_channels")
        self.vae = vae if known else None
        self.processor = getattr(pipe, "image_processor", None)
        self.spent, self.started = 0.0, time.monotonic()

    @torch.no_grad()
    def of(self, step: Step) -> Image.Image | None:
        """The first picture of the batch as it is now, or None."""
        latents, vae = step.latents, self.vae
        if latents is None or vae is None or self.processor is None or step.step == step.steps:
            return None
        latents = self._unpacked(latents[:1])
        if latents.dim() != 4 or latents.shape[1] != vae.config.latent_channels:
            return None  # of a video, or packed in a way of its own
        if self.spent > _SHARE * (time.monotonic() - self.started):
            return None
        begun = time.monotonic()
        shift = vae.config.get("shift_factor") or 0.0
        decoded = self._decoded(latents / vae.config.scaling_factor + shift)
        [image] = self.processor.postprocess(decoded.float(), output_type="pil")
        self.spent += time.monotonic() - begun
        return image

    def _unpacked(self, latents: Tensor) -> Tensor:
        """`(1, channels, height, width)` of what Flux and its like have as a sequence of patches."""
        if latents.dim() != 3 or not hasattr(self.pipe, "_unpack_latents"):
            return latents
        width, height = self.size
        unpacked: Tensor = self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor)
        return unpacked

    def _decoded(self, latents: Tensor) -> Tensor:
        """Pixels; in float32 where the decoder overflows in float16, as SDXL's does and its pipeline knows."""
        assert self.vae is not None
        own = self.vae.dtype
        upcast = own == torch.float16 and self.vae.config.get("force_upcast", False)
        if upcast:
            self.vae.to(torch.float32)
        try:
            pixels: Tensor = self.vae.decode(latents.to(self.vae.dtype)).sample
        finally:
            if upcast:
                self.vae.to(own)
        return pixels
