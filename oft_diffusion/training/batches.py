"""From pictures to what the denoiser takes: batches by number, the latents and text embeddings cached or made fresh."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from oft_diffusion.images import read_picture
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.data import WHOLE, Crop, Draw, Picture, crops, draw, normalise, square_pixels
from oft_diffusion.training.family import Posterior, StableDiffusion, Text

View = tuple[Path, Crop, bool]  # of a picture: which part, and whether mirrored
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Batch:
    """One forward's worth. With prior preservation the class images follow the instance images.

    Attributes:
        latents, noise: float32 `(B, C, h, w)`.
        timesteps: int64 `(B,)`.
        text: tokens, or conditioning where text embeddings are cached.
        instances: how many of the B are instance images.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: Text
    instances: int


class Batches:
    """All batches of a run, by number.

    Batch m of process p holds the samples `(m P + p) B ... + B - 1` of P processes, where B is the batch size, or the
    class images' own, so that what is learned from does not depend on how it is cut.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: StableDiffusion,
        pictures: Mapping[str, Sequence[Picture]],
        device: torch.device,
    ) -> None:
        self.config = config
        self.family = family
        self.pictures = {stream: list(found) for stream, found in pictures.items() if found}
        self.device = device
        self._posteriors: dict[View, Posterior] = {}
        self._crops = {p.path: crops(config.seed, p.path, config.min_crop) for p in self.pictures["instance"]}
        self._texts: dict[str, Text] = {}

    def fill_caches(self, progress: Progress) -> None:
        """Encode once what the config says. Afterwards the VAE, or the text encoder, is not needed for batches."""
        if self.config.cache_latents:
            flips = (False, True) if self.config.flip else (False,)
            paths = dict.fromkeys(p.path for found in self.pictures.values() for p in found)
            for path in progress(list(paths), "encoding pictures"):
                image = read_picture(path)  # once, however many views it has
                for crop, flip in product(self._crops_of(path), flips):
                    posterior = self._encode(image, crop, flip=flip)
                    self._posteriors[path, crop, flip] = Posterior(*(part.cpu() for part in posterior))
        if self.config.cache_text_embeddings:
            with torch.no_grad():
                for prompt in sorted({p.prompt for found in self.pictures.values() for p in found}):
                    encoded = self.family.encode_text(self.family.tokenize([prompt]))
                    self._texts[prompt] = {name: tensor.cpu() for name, tensor in encoded.items()}

    def at(self, number: int, process: int = 0, processes: int = 1) -> Batch:
        """Batch `number` of a process."""
        sizes = {"instance": self.config.batch_size, "class": self.config.class_batch_size or self.config.batch_size}
        place = number * processes + process
        samples = [
            (stream, self._draw(stream, n))
            for stream in self.pictures
            for n in range(place * sizes[stream], (place + 1) * sizes[stream])
        ]
        latents = [
            self.family.latents(self._posterior(self._view(stream, d)), d.posterior_noise).to(self.device)
            for stream, d in samples
        ]
        texts = [self._text(self.pictures[stream][d.index].prompt) for stream, d in samples]
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack([d.noise for _, d in samples]).to(self.device),
            timesteps=torch.stack([d.timestep for _, d in samples]).to(self.device),
            text={name: torch.cat([text[name] for text in texts]).to(self.device) for name in texts[0]},
            instances=self.config.batch_size,
        )

    def _draw(self, stream: str, number: int) -> Draw:
        shape = self.family.latent_shape(self.config.resolution)
        timesteps = range(self.family.timesteps)[self.config.min_timestep : self.config.max_timestep]
        return draw(self.config.seed, stream, number, len(self.pictures[stream]), shape, timesteps)

    def _view(self, stream: str, d: Draw) -> View:
        path = self.pictures[stream][d.index].path
        found = self._crops_of(path)
        return path, found[int(d.crop * len(found))], d.flip and self.config.flip

    def _posterior(self, view: View) -> Posterior:
        if view in self._posteriors:
            return self._posteriors[view]
        path, crop, flip = view
        return self._encode(read_picture(path), crop, flip=flip)

    def _crops_of(self, path: Path) -> list[Crop]:
        return self._crops.get(path, [WHOLE])  # class images show enough as they are

    def _encode(self, image: Image.Image, crop: Crop, *, flip: bool) -> Posterior:
        pixels = square_pixels(image, self.config.resolution, crop)
        return self.family.encode_image(normalise(pixels.flip(-1) if flip else pixels))

    def _text(self, prompt: str) -> Text:
        if prompt not in self._texts:  # token ids are cached always: they are small, and never change
            self._texts[prompt] = self.family.tokenize([prompt])
        return self._texts[prompt]
