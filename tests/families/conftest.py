from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oft_diffusion.training.families import FAMILIES, Family
from oft_diffusion.training.find import find_base
from tests.helpers.tiny_families import BUILDERS, kind_of, write_tiny_family
from tests.helpers.tiny_sd import draw_pictures

# A sample of what families differ in: UNet and DiT, epsilon and flow, CLIP and language model, packed, backwards.
QUICK = ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "ZImagePipeline")

EVERY_FAMILY = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name.replace("Pipeline", ""))
    for name in BUILDERS
]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random base of a family, written once; do not write into it."""
    root = tmp_path_factory.mktemp("families")

    def find(name: str) -> Path:
        folder = root / name
        return folder if folder.is_dir() else write_tiny_family(name, root)

    return find


@pytest.fixture(scope="session")
def load(folder_of: Callable[[str], Path]) -> Callable[[str], Family]:
    """A fresh family, loaded as training does."""

    def fresh(name: str) -> Family:
        return FAMILIES[kind_of(name)].load(find_base(str(folder_of(name))), torch.float32)

    return fresh


@pytest.fixture(scope="session")
def instances(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("instances"))
