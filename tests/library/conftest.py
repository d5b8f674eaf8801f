from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from torch import Tensor

from oft_diffusion import OFTConfig
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import Maker, copy_pipe, draw


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def base_pipe(model_folder: Path) -> StableDiffusionPipeline:
    """One for all tests: copy it, never change it."""
    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(base_pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    return copy_pipe(base_pipe)


@pytest.fixture(scope="session")
def make(base_pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Adapter files for the tiny base, far from the identity; the same arguments give the same file."""
    return Maker(base_pipe, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def mug(make: Maker) -> Path:
    return make("mug", seed=1, trigger="sks", class_word="mug")


@pytest.fixture(scope="session")
def plain(make: Maker) -> Path:
    return make("plain", seed=2)


@pytest.fixture(scope="session")
def series(make: Maker) -> Path:
    """Of the series that all tools have."""
    config = OFTConfig(8, parametrisation="cayley_neumann", neumann_order=4)
    return make("series", seed=6, config=config, trigger="sks")


@pytest.fixture(scope="session")
def style(make: Maker) -> Path:
    return make("style", seed=2, parts=("unet",))


@pytest.fixture(scope="session")
def words(make: Maker) -> Path:
    return make("words", seed=3, parts=("text_encoder",))


@pytest.fixture(scope="session")
def untouched(base_pipe: StableDiffusionPipeline) -> Tensor:
    """What the base draws."""
    return draw(base_pipe)
