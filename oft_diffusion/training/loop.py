"""DreamBooth with OFT, from top to bottom: `train(config)` gives a run; entering it loads, iterating it learns.

One step is: take a batch by its number, add noise, ask the adapted denoiser, compare, descend. What is family-specific
is in `family.py`, what is random in `data.py`, what is on disk in `checkpoint.py`.
"""

from __future__ import annotations

import math
import shlex
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from torch import Tensor

from oft_diffusion.bank import OFTBank
from oft_diffusion.errors import TrainingError
from oft_diffusion.files import FILE_NAME, AdapterMetadata, load_adapter_file, save_adapter_file, write_atomically
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.inject import inject_oft, load_oft_state_dict, oft_state_dict
from oft_diffusion.targets import choose_block_size, find_targets
from oft_diffusion.training.batches import Batch, Batches
from oft_diffusion.training.checkpoint import (
    Checkpoint,
    check_identity,
    collect_training,
    list_checkpoints,
    load_checkpoint,
    require_space,
    restore_rng,
    restore_training,
    rng_states,
    save_checkpoint,
)
from oft_diffusion.training.class_images import class_pictures, make_class_images
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.data import pictures_digest
from oft_diffusion.training.family import FAMILIES, StableDiffusion
from oft_diffusion.training.model import ADAPTER, AdaptedModel, SilentLayers
from oft_diffusion.training.preflight import Plan, preflight
from oft_diffusion.training.results import GRIDS, LOSSES, SETTINGS, Console, History, TrainResult, TrainStep

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MAX_BAD_LOSSES = 5  # steps in a row whose loss is not finite
_MAX_OVERFLOWS = 30  # the same for float16 overflow: the scaler needs about a dozen to find its scale
_RATE_WINDOW = 20  # steps over which the rate is averaged


def train(
    config: TrainConfig,
    *,
    progress: bool = True,
    on_note: Callable[[str], None] | None = None,
    program: str = "oft-diffusion train",
) -> TrainingRun:
    """Check everything that can be checked without loading a model, and prepare a run.

    ```python
    with train(TrainConfig.from_toml("mug.toml")) as run:
        for step in run:
            print(step.step, step.loss)
    print(run.result.adapter)
    ```

    Args:
        config: the settings.
        progress: whether to draw bars and print notes on the terminal.
        on_note: called with each note instead of printing it.
        program: how the resume command begins.

    Returns:
        A run, to be used in a `with` statement and iterated.

    Raises:
        OFTError: one problem, or all of them in one message. Nothing has been loaded or written then.
    """
    return TrainingRun(config, preflight(config), Console(progress, on_note), program)


class TrainingRun:
    """A DreamBooth run.

    Enter it to load the base, make class images, fill caches and inject adapters; iterate it to train. `stop()` may be
    called from any thread; `save()` and `sample()` belong into the body of the loop.
    """

    def __init__(self, config: TrainConfig, plan: Plan, console: Console, program: str) -> None:
        self.config = config
        self.plan = plan
        self.console = console
        self.program = program
        self.output_dir = Path(config.output_dir)
        self.step = 0
        self.history = History()
        self.interrupted = False
        self.silent_layers: tuple[str, ...] = ()
        self._pictures: list[Path] = []
        self._stopped = threading.Event()
        self._result: TrainResult | None = None
        self._entered = self._training = False
        self._seconds = 0.0

    # -- preparation: everything up to the first step ----------------------------------------------------------------

    def __enter__(self) -> TrainingRun:
        config = self.config
        self._own_state = not AcceleratorState().initialized if AcceleratorState._shared_state else True
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.console.shown &= self.accelerator.is_main_process
        self._entered = True
        try:
            for note in self.plan.notes:
                self.console.say(note)
            self._prepare_output()
            self.console.say(f"loading {config.model}")
            self.family = self._load_family()
            pictures = self._prepare_pictures()
            self.batches = Batches(config, self.family, pictures, self.accelerator.device)
            self.batches.fill_caches(self.console.track)
            self._park_what_is_cached()
            self.banks = self._inject()
            self._identity = self._describe_identity(pictures)
            self._prepare_optimizer()
            if self.plan.resume_from is not None:
                self._restore(self.plan.resume_from)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        try:
            if kind is None and self._training and self._result is None:
                self._finish()  # the caller left the loop with break: as good as stop()
        finally:
            self._release()

    def _release(self) -> None:
        self.console.stop()
        self.accelerator.free_memory()
        if self._own_state:
            # accelerate keeps the precision of its first use for the whole process; the next run may want another.
            AcceleratorState._reset_state()

    def _prepare_output(self) -> None:
        if not self.accelerator.is_main_process:
            return
        if self.config.overwrite:
            for path in (*list_checkpoints(self.output_dir), self.output_dir / GRIDS):
                shutil.rmtree(path, ignore_errors=True)
            for name in (FILE_NAME, LOSSES, SETTINGS):
                (self.output_dir / name).unlink(missing_ok=True)
        settings = replace(self.config, resume=None, overwrite=False).to_toml()
        write_atomically(self.output_dir / SETTINGS, settings.encode())

    def _load_family(self) -> StableDiffusion:
        family = FAMILIES[self.plan.base.pipeline].load(self.plan.base, _DTYPES[self.config.mixed_precision])
        for prompt in {p.prompt for p in self.plan.pictures}:
            if family.too_long(prompt):
                self.console.say(f"longer than the text encoder reads, and cut: {prompt!r}")
        for name in self._adapted():  # a block size that does not fit shall not wait for the class images
            settings = self._oft_of(name)
            choose_block_size(find_targets(getattr(family, name), settings.targets), settings.block_size)
        for module in (family.unet, family.text_encoder, family.vae):
            module.to(self.accelerator.device)
        return family
