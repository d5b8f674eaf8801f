"""A base whose denoiser is loaded first, and streamed from then on, draws what it draws otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from oft_diffusion.streaming import stream_weights, streamed_bytes, streamed_layers
from oft_diffusion.training.families import FAMILIES, Family
from oft_diffusion.training.find import find_base
from tests.families.conftest import EVERY_FAMILY
from tests.helpers.tiny_families import kind_of, side_of
from tests.helpers.two_devices import pretend_two_devices

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_pictures_are_those_without(
    name: str,
    load: Callable[[str], Family],
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, seen = find_base(str(folder_of(name))), list[nn.Module]()

    def stream(denoiser: nn.Module) -> None:
        assert not any(p.requires_grad for p in denoiser.parameters())
        seen.append(denoiser)
        stream_weights(denoiser, 1.0, CPU)

    pretend_two_devices(monkeypatch)
    own = FAMILIES[kind_of(name)].load(base, torch.float32, on_denoiser=stream)
    assert seen == [own.module(part) for part in base.denoisers]
    for denoiser in seen:
        layers = list(streamed_layers(denoiser, 1.0))
        assert layers
        assert all(layer.weight.is_meta for layer in layers)
        sizes = [layer.weight.numel() * 4 for layer in layers]
        assert streamed_bytes(denoiser) == max(0, sum(sizes) - 2 * max(sizes))
    plain, streamed = (
        np.asarray(family.sample(["a mug"], [0], side_of(name), 2, 3.0)[0]) for family in (load(name), own)
    )
    assert np.array_equal(plain, streamed)
