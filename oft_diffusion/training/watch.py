"""Is it learning? Layers that get no gradient, and losses that are not finite."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from oft_diffusion.bank import OFTBank
from oft_diffusion.errors import TrainingError
from oft_diffusion.training.checkpoint import list_checkpoints
from oft_diffusion.training.model import ADAPTER


class SilentLayers:
    """Finds layers whose generator gets no gradient, over the first few applied steps.

    Not after one step alone: a self-attention over a single token gives exactly zero for q and k.
    """

    STEPS = 3

    def __init__(self, banks: Mapping[str, OFTBank], experts: Collection[str] = ()) -> None:
        self.banks = banks
        self.resting = set(experts)  # those that no sample has come to yet; nothing can be said of them
        self.steps = 0
        self._moved = {
            name: torch.zeros(bank.generators[ADAPTER].shape[0], dtype=torch.bool) for name, bank in banks.items()
        }

    @property
    def watching(self) -> bool:
        """Whether more steps are wanted."""
        return self.steps < self.STEPS

    def watch(self) -> None:
        """Look at the gradients of a step that is being applied."""
        self.steps += 1
        for name, bank in self.banks.items():
            grad = bank.generators[ADAPTER].grad
            if grad is not None:
                self.resting.discard(name)
                # rows with at least one entry that is neither zero nor infinite nor NaN
                self._moved[name] |= (grad.isfinite() & (grad != 0)).any(dim=1).cpu()

    def found(self) -> list[str]:
        """`component.layer` of every layer none of whose blocks has had a usable gradient."""
        return [
            f"{name}.{layer}"
            for name, bank in self.banks.items()
            if name not in self.resting
            for layer, rows in bank.layer_slices(ADAPTER).items()
            if not self._moved[name][rows].any()
        ]

    def all_silent(self) -> bool:
        """Whether nothing at all is learning."""
        return not any(moved.any() for moved in self._moved.values())


class LossGuard:
    """Counts steps in a row that could not be applied, and gives up after some."""

    MAX_BAD_LOSSES = 5
    MAX_OVERFLOWS = 30  # of gradients alone: a float16 scaler needs about a dozen to find its scale

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.bad_losses = self.overflows = 0

    def check(self, step: int, loss: float, applied: bool) -> str | None:
        """Note one step; a sentence for the user at the first bad loss.

        Raises:
            TrainingError: too many steps in a row were bad.
        """
        self.bad_losses = 0 if math.isfinite(loss) else self.bad_losses + 1
        self.overflows = 0 if applied else self.overflows + 1
        if self.bad_losses >= self.MAX_BAD_LOSSES or self.overflows >= self.MAX_OVERFLOWS:
            what = f"the loss was {loss}" if self.bad_losses else "gradients were not finite"
            newest = list_checkpoints(self.output_dir)
            raise TrainingError(
                f"{what} on {self.bad_losses or self.overflows} steps in a row, up to step {step}",
                expected="finite numbers",
                fix="lower learning_rate, or use mixed_precision = 'bf16' or 'no'"
                + (f"; {newest[-1]} is the newest checkpoint" if newest else ""),
            )
        return f"step {step}: the loss is {loss}, so the step is skipped" if self.bad_losses == 1 else None
