"""What accelerate prepares: the adapted components together with their banks."""

from __future__ import annotations

from collections.abc import Mapping

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
