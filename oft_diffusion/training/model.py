"""What accelerate prepares: the adapted components together with their banks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oft_diffusion.bank import OFTBank
from oft_diffusion.training.families import Family
from oft_diffusion.training.families.recording import Conditioning

ADAPTER = "default"


class AdaptedModel(nn.Module):
    """Components that carry adapters, and their banks, in one module.

    A bank is not registered on its component, so a wrapper such as DistributedDataParallel sees the generators only
    through this container, as ordinary parameters. What is frozen it leaves alone: each process has read that from the
    same files, buffers would be sent around with every forward, and streamed weights are on no card.
    """

    def __init__(self, family: Family, banks: Mapping[str, OFTBank], resolution: int) -> None:
        super().__init__()
        self.components = nn.ModuleDict({name: family.module(name) for name in banks})
        self.banks = nn.ModuleDict(banks)
        self.resolution = resolution
        self.family = family  # no module, hence not registered
        frozen = (*self.components.named_parameters("components"), *self.components.named_buffers("components"))
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in frozen]

    def forward(
        self, noisy: Tensor, times: Tensor, prompts: Sequence[str], encoded: Sequence[Conditioning] | None
    ) -> Tensor:
        """The denoiser's answer, packed, to noisy latents `(B, C, h, w)` at the scheduler's timesteps `(B,)`.

        `encoded` is the conditioning of each prompt, or None where prompts are to be encoded here.
        """
        if encoded is None:
            return self.family.predict(noisy, times, self.family.encode_text(prompts, self.resolution))
        stacking = self.family.stacking(self.resolution)
        groups: dict[Any, list[int]] = {}  # of prompts that are equally long, where the family does not pad them
        for i, conditioning in enumerate(encoded):
            groups.setdefault(stacking.shape(conditioning), []).append(i)
        answers = [
            self.family.predict(noisy[rows], times[rows], stacking.join([encoded[i] for i in rows]))
            for rows in groups.values()
        ]
        order = torch.tensor([i for rows in groups.values() for i in rows]).argsort()
        return torch.cat(answers)[order.to(noisy.device)]
