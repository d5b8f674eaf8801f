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
from oft_diffusion.training.families import Family, Posterior
from oft_diffusion.training.families.recording import Conditioning, move
from oft_diffusion.training.noise import density_of, spread

View = tuple[Path, Crop, bool]  # of a picture: which part, and whether mirrored
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Batch:
    """One forward's worth. With prior preservation the class images follow the instance images.

    Attributes:
        latents, noise: float32 `(B, C, h, w)`.
        levels: of noise, int64 `(B,)`.
        prompts: B of them.
        encoded: each prompt's conditioning where text embeddings are cached, else None.
        instances: how many of the B are instance images.
    """

    latents: Tensor
    noise: Tensor
    levels: Tensor
    prompts: tuple[str, ...]
    encoded: tuple[Conditioning, ...] | None
    instances: int


class Batches:
    """All batches of a run, by number.

    Batch m of process p holds the samples `(m P + p) B ... + B - 1` of P processes, where B is the batch size, or the
    class images' own, so that what is learned from does not depend on how it is cut.
    """

    def __init__(
        self,
        config: TrainConfig,
        family: Family,
        pictures: Mapping[str, Sequence[Picture]],
        device: torch.device,
    ) -> None:
        self.config = config
        self.family = family
        self.pictures = {stream: list(found) for stream, found in pictures.items() if found}
        self.device = device
        self._posteriors: dict[View, Posterior] = {}
        self._crops = {p.path: crops(config.seed, p.path, config.min_crop) for p in self.pictures["instance"]}
        self._texts: dict[str, Conditioning] = {}

    def fill_caches(self, progress: Progress) -> None:
        """Encode once what the config says. Afterwards the VAE, or the text encoder, is not needed for batches."""
        if self.config.cache_latents:
            for path, views in progress(list(self.views().items()), "encoding pictures"):
                image = read_picture(path)  # once, however many views it has
                for view in views:
                    self._keep(view, image)
        if self.config.cache_text_embeddings:
            with self.family.reading():
                for prompt in self.prompts():
                    self._text(prompt)

    def views(self) -> dict[Path, list[View]]:
        """All that can be shown of each picture; none of them is read."""
        flips = (False, True) if self.config.flip else (False,)
        paths = dict.fromkeys(p.path for found in self.pictures.values() for p in found)
        return {path: [(path, *view) for view in product(self._crops_of(path), flips)] for path in paths}

    def prompts(self) -> list[str]:
        """All that is told, each once."""
        return sorted({p.prompt for found in self.pictures.values() for p in found})

    def at(self, number: int, process: int = 0, processes: int = 1) -> Batch:
        """Batch `number` of a process. What the config caches is kept, where it was not yet."""
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
        prompts = tuple(self.pictures[stream][d.index].prompt for stream, d in samples)
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack([d.noise for _, d in samples]).to(self.device),
            levels=torch.tensor([self._level(d.time) for _, d in samples], device=self.device),
            prompts=prompts,
            encoded=tuple(map(self._text, prompts)) if self.config.cache_text_embeddings else None,
            instances=self.config.batch_size,
        )

    def _draw(self, stream: str, number: int) -> Draw:
        shape = self.family.latent_shape(self.config.resolution)
        return draw(self.config.seed, stream, number, len(self.pictures[stream]), shape)

    def _level(self, time: float) -> int:
        c = self.config
        levels = range(self.family.base.timesteps)[c.min_timestep : c.max_timestep]
        density = density_of(c.timestep_density, self.family.base.prediction_type)
        place = float(spread(torch.tensor(time, dtype=torch.float64), density, c.logit_mean, c.logit_std, c.mode_scale))
        return levels[min(int(place * len(levels)), len(levels) - 1)]

    def _view(self, stream: str, d: Draw) -> View:
        path = self.pictures[stream][d.index].path
        found = self._crops_of(path)
        return path, found[int(d.crop * len(found))], d.flip and self.config.flip

    def _posterior(self, view: View) -> Posterior:
        if view in self._posteriors:
            return self._posteriors[view]
        image = read_picture(view[0])
        return self._keep(view, image) if self.config.cache_latents else self._encode(view, image)

    def _keep(self, view: View, image: Image.Image) -> Posterior:
        kept = Posterior(*(part.cpu() for part in self._encode(view, image)))
        self._posteriors[view] = kept
        return kept

    def _text(self, prompt: str) -> Conditioning:
        """A prompt's conditioning on the CPU, encoded once."""
        if prompt not in self._texts:
            self.family.stacking(self.config.resolution)  # now, while the text encoders are at hand
            with torch.no_grad():
                self._texts[prompt] = move(self.family.encode_text([prompt], self.config.resolution), "cpu")
        return self._texts[prompt]

    def _crops_of(self, path: Path) -> list[Crop]:
        return self._crops.get(path, [WHOLE])  # class images show enough as they are

    def _encode(self, view: View, image: Image.Image) -> Posterior:
        _, crop, flip = view
        pixels = square_pixels(image, self.config.resolution, crop)
        return self.family.encode_image(normalise(pixels.flip(-1) if flip else pixels))
