"""Unfinished pictures: latents of any layout, decoded by their pipeline's own decoder."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from oft_diffusion.generate import Step

_SHARE = 0.15  # of the time that they may take


class Previews:
    """Unfinished pictures of one drawing, as often as the decoder is quick enough.

    Args:
        pipe: what draws.
        size: width and height of what it draws.
    """

    def __init__(self, pipe: Any, size: tuple[int, int]) -> None:
        self.pipe, self.size = pipe, size
        self.spent, self.started = 0.0, time.monotonic()

    def of(self, step: Step) -> Image.Image | None:
        """The first picture of the batch as it is now; None where it is too early, or too late, for one."""
        late = step.step == step.steps
        if step.latents is None or late or self.spent > _SHARE * (time.monotonic() - self.started):
            return None
        begun = time.monotonic()
        image = decoded(self.pipe, step.latents, self.size)
        self.spent += time.monotonic() - begun
        return image


@torch.no_grad()
def decoded(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Image.Image | None:
    """The first of a batch of latents as a picture of that width and height; None where a pipeline makes no such."""
    vae = getattr(pipe, "vae", None)
    processor = getattr(pipe, "image_processor", None) or getattr(pipe, "video_processor", None)
    found = _unpacked(pipe, latents[:1], size)
    if vae is None or processor is None or found is None:
        return None
    found = _scaled(vae, found)
    if hasattr(vae, "bn"):  # Flux.2's are of patches up to here
        found = pipe._unpatchify_latents(found)
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast")  # SDXL's would be black
    if upcast:
        vae.to(torch.float32)
    try:
        picture = vae.decode(found.to(vae.dtype)).sample
    finally:
        if upcast:
            vae.to(torch.float16)
    picture = picture[:, :, 0] if picture.dim() == 5 else picture  # a video's of one frame
    [image] = processor.postprocess(picture.float(), output_type="pil")
    return image


def _unpacked(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor | None:
    """As channels of rows of columns; where they are a list of patches, each has two of both."""
    if latents.dim() != 3:
        return latents
    width, height = size
    rows, columns = (int(side) // (2 * pipe.vae_scale_factor) for side in (height, width))
    if latents.shape[1] != rows * columns:  # it draws another size than it was asked for
        return None
    if not hasattr(pipe, "_unpack_latents"):
        return latents.transpose(1, 2).unflatten(2, (rows, columns))
    known = inspect.signature(pipe._unpack_latents).parameters
    factor = {"vae_scale_factor": pipe.vae_scale_factor} if "vae_scale_factor" in known else {}
    unpacked: Tensor = pipe._unpack_latents(latents, height=height, width=width, **factor)
    return unpacked


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    """As the decoder wants them."""
    known, factor = vae.config, vae.config.get("scaling_factor") or 1.0
    mean, std = known.get("latents_mean"), known.get("latents_std")
    if hasattr(vae, "bn"):
        mean, std = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + known.batch_norm_eps)
    if mean is None or std is None:
        return latents / factor + (known.get("shift_factor") or 0.0)
    shape = (1, -1, *[1] * (latents.dim() - 2))
    mean, std = (torch.as_tensor(part).to(latents).view(shape) for part in (mean, std))
    return latents * std / factor + mean
