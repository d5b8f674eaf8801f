"""The model that the app draws with and trains on, loaded once."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from torch import nn

from oft_diffusion.autocast import computes_in_bfloat16
from oft_diffusion.formats.components import modules_of
from oft_diffusion.generate import Picture
from oft_diffusion.load import load_pipeline
from oft_diffusion.pocket import GUIDANCE, STEPS, pocket_path
from oft_diffusion.training.memory_presets import is_single_file

from .drawing import Abilities, Request, Studio
from .machine import Job
from .presets import POCKET, Preset, beginning, fitting
from .shelf import Card

_SHIPPED = "pocket"
# What keeps a model in fewer bits, for drawing and for training: knobs of `TrainConfig`, and what they are.
QUANTIZED = {
    "quantization": "keep the denoiser in fewer bits: nf4, int8, ...",
    "text_encoder_quantization": "the same for the text encoders",
    "denoiser_file": "a GGUF file in place of the model's denoiser",
}


@dataclass
class Model:
    """Which model, and how it is held.

    Attributes:
        name: pipeline folder, checkpoint, hub id, or pocket for the shipped one.
        config_dir: of a checkpoint's architecture, in diffusers' format.
        device, dtype: where pictures are drawn, and in what.
        quantized: those of `QUANTIZED` that are set.
    """

    name: str = _SHIPPED
    config_dir: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quantized: Mapping[str, str] = field(default_factory=dict)
    _studio: Studio | None = field(default=None, init=False, repr=False)
    _loading: Any = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def shipped(self) -> bool:
        """Whether it is the pocket base."""
        return self.name == _SHIPPED

    @property
    def source(self) -> str:
        """Where it is loaded from."""
        return str(pocket_path()) if self.shipped else self.name

    def studio(self) -> Studio:
        """The pipeline, loaded at the first call.

        Raises:
            ConfigError: it cannot be loaded.
        """
        with self._loading:  # libraries patch torch while they load: never in two threads
            if self._studio is None:
                # In a thread that ends: where two threads that live have computed, OpenMP counts more helpers than
                # there are processors, and lets them sleep after each operation; a training takes half as long again.
                with ThreadPoolExecutor(1, "load") as once:
                    self._studio = once.submit(self._load).result()
            return self._studio

    def _load(self) -> Studio:
        known: dict[str, Any] = dict(self.quantized)
        pipe = load_pipeline(self.source, self.dtype, self.device, config_dir=self.config_dir, **known)
        steps, guidance = (STEPS, GUIDANCE) if self.shipped else beginning(pipe)
        return Studio(pipe, "the pocket base" if self.shipped else Path(self.name).name, steps, guidance)

    @property
    def abilities(self) -> Abilities:
        """What the model can be asked."""
        return self.studio().abilities

    def portrait(self, card: Card, job: Job) -> Image.Image:
        """What an adapter is for, in one picture, which is drawn in a job's turn.

        Raises:
            Cancelled: the job was cancelled.
            OFTError: the adapter does not fit, or was deleted meanwhile.
        """
        drawn: list[Picture] = []
        self.studio().draw(self.portrayed(card), job, drawn.append)
        return drawn[0].image

    def portrayed(self, card: Card) -> Request:
        """What to draw to show what an adapter is for, in one picture."""
        own, prompt = self.abilities, f"a {card.phrase}" if card.phrase else ""
        return Request(prompt, (0,), steps=own.steps, guidance=own.guidance, adapters=((card, 1.0),))

    def parts(self) -> dict[str, nn.Module]:
        """The components that adapters are for."""
        return dict(modules_of(self.studio().pipe))

    def is_called(self, name: str) -> bool:
        """Whether a picture or an adapter that names its model means this one."""
        own = str(getattr(self.studio().pipe.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2]
        return name in (self.name, own)

    def presets(self) -> dict[str, Preset]:
        """Training settings for this model, by name, those that fit its device best first."""
        if self.shipped:
            return POCKET
        pipe = self.studio().pipe
        denoiser = getattr(pipe, "transformer", None)
        layers = 0 if denoiser is None else int(denoiser.config.get("num_layers") or 0)
        return fitting(type(pipe).__name__, self.memory(), layers, single_file=is_single_file(self.source))

    def precision(self) -> str:
        """In what `mixed_precision` its device trains: bfloat16 only where it computes in that."""
        if computes_in_bfloat16(self.device):
            return "bf16"
        return "fp16" if self.device.startswith("cuda") else "no"

    def memory(self) -> int:
        """Bytes of its device's memory, used or not."""
        if self.device.startswith("cuda"):
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return int(psutil.virtual_memory().total)
