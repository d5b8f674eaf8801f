"""Reads the attributes of a picture of the pocket world: the judge behind `oft_diffusion.evaluation`.

A small convolutional network trained on the world's own pictures (`train_scripts/pretrain_pocket.py`), so that what is
in a picture is measured and not guessed. The autoencoder's perceptual loss is a network of the same class, but another
one, of other widths and from another seed: a judge must not have taught what it judges.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from oft_diffusion.pocket.world import ATTRIBUTES

WIDTHS = (24, 48, 96, 192)  # of the shipped one


def classifier_path() -> Path:
    """The file of the shipped classifier, float16 safetensors."""
    return Path(__file__).parent / "classifier.safetensors"


class _Block(nn.Module):
    """Two 3x3 convolutions with group norms and a shortcut; the first may halve the resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.act(self.norm2(h)))


class AttributeClassifier(nn.Module):
    """Pictures to one distribution per attribute of `world.ATTRIBUTES`.

    `forward` takes float `(n, 3, 128, 128)` in [-1, 1] and gives, per attribute, logits `(n, values)` in the order in
    which the world lists the values.
    """

    def __init__(self, widths: tuple[int, int, int, int] = WIDTHS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 2, padding=1)
        levels = []
        for i, width in enumerate(widths):
            first = _Block(widths[max(0, i - 1)], width, 1 if i == 0 else 2)
            levels.append(first if i == 0 else nn.Sequential(first, _Block(width, width, 1)))
        self.levels = nn.ModuleList(levels)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[2:])
        self.hidden = nn.Sequential(nn.Linear(2 * sum(widths[2:]), 256), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in ATTRIBUTES.items()})

    def features(self, x: Tensor) -> list[Tensor]:
        """The feature maps of the four levels, `(n, width, s, s)` with s = 64, 32, 16 and 8."""
        x, maps = self.stem(x), []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = [norm(m) for norm, m in zip(self.norms, self.features(x)[2:], strict=True)]
        pooled = torch.cat([m.flatten(2).mean(2) for m in maps] + [m.flatten(2).amax(2) for m in maps], dim=1)
        hidden = self.hidden(pooled)
        return {name: head(hidden) for name, head in self.heads.items()}


def load_classifier(device: torch.device | str = "cpu") -> AttributeClassifier:
    """The shipped classifier, float32, in evaluation mode."""
    classifier = AttributeClassifier()
    classifier.load_state_dict({k: v.float() for k, v in load_file(classifier_path()).items()})
    return classifier.to(device).eval().requires_grad_(False)
