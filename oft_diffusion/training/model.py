"""What accelerate prepares: the adapted components together with their banks; and a watch on whether they learn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from oft_diffusion.bank import OFTBank
from oft_diffusion.training.family import StableDiffusion, Text

ADAPTER = "default"


class AdaptedModel(nn.Module):
    """Components that carry adapters, and their banks, in one module.

    A bank is not registered on its component, so a wrapper such as DistributedDataParallel sees the generators only
    through this container, as ordinary parameters.
    """

    def __init__(self, family: StableDiffusion, banks: Mapping[str, OFTBank], *, text_is_encoded: bool) -> None:
        super().__init__()
        self.components = nn.ModuleDict({name: getattr(family, name) for name in banks})
        self.banks = nn.ModuleDict(banks)
        self.text_is_encoded = text_is_encoded
        self.family = family  # no module, hence not registered

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        """The denoiser's answer `(B, C, h, w)` to noisy latents, at timesteps `(B,)`, on tokens or conditioning."""
        conditioning = text if self.text_is_encoded else self.family.encode_text(text)
        return self.family.predict(noisy, timesteps, conditioning)


class SilentLayers:
    """Finds layers whose generator gets no gradient, over the first few applied steps.

    Not after one step alone: a self-attention over a single token gives exactly zero for q and k.
    """

    STEPS = 3

    def __init__(self, banks: Mapping[str, OFTBank]) -> None:
        self.banks = banks
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
                # rows with at least one entry that is neither zero nor infinite nor NaN
                self._moved[name] |= (grad.isfinite() & (grad != 0)).any(dim=1).cpu()

    def found(self) -> list[str]:
        """`component.layer` of every layer none of whose blocks has had a usable gradient."""
        return [
            f"{name}.{layer}"
            for name, bank in self.banks.items()
            for layer, rows in bank.layer_slices(ADAPTER).items()
            if not self._moved[name][rows].any()
        ]

    def all_silent(self) -> bool:
        """Whether nothing at all is learning."""
        return not any(moved.any() for moved in self._moved.values())
