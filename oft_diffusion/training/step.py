"""One optimizer step, and nothing of what is said, drawn or saved about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from oft_diffusion.errors import TrainingError
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.losses import losses
from oft_diffusion.training.prepare import Parts
from oft_diffusion.training.watch import LossGuard, SilentLayers


class Descent(NamedTuple):
    """What one step came to; as in `TrainStep`, but that prior_loss is 0 without prior preservation."""

    loss: float
    instance_loss: float
    prior_loss: float
    learning_rate: float
    grad_norm: float
    applied: bool


class Stepper:
    """Turns prepared parts: `learn` for each of a step's batches, then `descend`.

    Attributes:
        silent_layers: layers that had no gradient over the first applied steps, as `component.layer`.
    """

    def __init__(
        self, config: TrainConfig, parts: Parts, accelerator: Accelerator, say: Callable[[str], object]
    ) -> None:
        self.config = config
        self.parts = parts
        self.accelerator = accelerator
        self.say = say
        self.silent_layers: tuple[str, ...] = ()
        self._watch = SilentLayers(parts.banks, parts.family.base.experts)
        self._guard = LossGuard(Path(config.output_dir))

    def learn(self, number: int, *, last: bool) -> Tensor:
        """Forward and backward over batch `number`, the last of its step or not.

        Returns:
            Its share of the step's loss, instance loss and prior loss in this process, `(3,)`.
        """
        config, parts, accelerator = self.config, self.parts, self.accelerator
        batch = parts.batches.at(number, accelerator.process_index, accelerator.num_processes)
        with nullcontext() if last else accelerator.no_sync(parts.model):
            instance, prior = losses(parts, batch, config)
            loss = instance + config.prior_weight * prior
            accelerator.backward(loss / config.accumulation)
        return torch.stack([loss, instance, prior]).detach() / config.accumulation

    def descend(self, totals: Tensor, step: int) -> Descent:
        """Clip and apply the gradients, unless they or the loss are not finite.

        Args:
            totals: sum of what `learn` returned.
            step: this step's number, from 1.

        Raises:
            TrainingError: too many steps in a row were bad, or nothing is being trained.
        """
        parts, accelerator = self.parts, self.accelerator
        loss, instance_loss, prior_loss = accelerator.reduce(totals, "mean").tolist()
        rate = parts.adamw.param_groups[0]["lr"]
        parameters = [p for bank in parts.banks.values() for p in bank.parameters()]
        norm = float(accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm))
        usable = math.isfinite(loss) and math.isfinite(norm)
        if usable and self._watch.watching:
            self._watch_gradients()
        if usable or accelerator.scaler is not None:  # a float16 scaler wants to see overflows: it skips by itself
            parts.optimizer.step()
        applied = usable and not parts.optimizer.step_was_skipped
        parts.optimizer.zero_grad()
        if applied:
            for bank in parts.banks.values():
                bank.project_()
            parts.schedule.step()
        if note := self._guard.check(step, loss, applied):
            self.say(note)
        return Descent(loss, instance_loss, prior_loss, rate, norm, applied)

    def _watch_gradients(self) -> None:
        """After the first few applied steps, name the layers that learn nothing."""
        self._watch.watch()
        if self._watch.watching:
            return
        if self._watch.all_silent():
            raise TrainingError(
                f"no layer had a gradient over the first {self._watch.STEPS} steps, so nothing is being trained",
                expected="gradients on the generators",
                fix="check that nothing replaced or bypasses the adapted layers",
            )
        self.silent_layers = tuple(self._watch.found())
        if self.silent_layers:
            shown = ", ".join(self.silent_layers[:5]) + (", ..." if len(self.silent_layers) > 5 else "")
            self.say(f"{len(self.silent_layers)} layers had no gradient so far and do not learn: {shown}")
