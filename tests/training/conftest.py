from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from oft_diffusion.training import TrainConfig, TrainResult, TrainStep, train
from tests.helpers.tiny_sd import RESOLUTION, draw_pictures, write_tiny_sd

Run = Callable[..., tuple[list[TrainStep], TrainResult]]


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD 1.x folder; do not write into it."""
    return write_tiny_sd(tmp_path_factory.mktemp("tiny_sd"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three instance images; do not write into it."""
    return draw_pictures(tmp_path_factory.mktemp("instance"))


@pytest.fixture
def config(tiny_sd: Path, pictures: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes configs of small runs on the tiny base; every knob can be replaced."""

    def make(**knobs: object) -> TrainConfig:
        small: dict[str, object] = {
            "model": str(tiny_sd), "instance_dir": str(pictures), "trigger": "sks", "class_word": "mug",
            "output_dir": str(tmp_path / "run"), "resolution": RESOLUTION, "block_size": 16, "steps": 3,
            "learning_rate": 1e-3, "sampling_steps": 2, "validation_prompts": [], "validation_count": 2,
            "checkpoint_every": 0,
        }  # fmt: skip
        return TrainConfig.from_dict(small | knobs)

    return make


@pytest.fixture
def run() -> Run:
    """Trains to the end; gives the steps and the result."""

    def to_the_end(config: TrainConfig) -> tuple[list[TrainStep], TrainResult]:
        with train(config, progress=False) as running:
            steps = list(running)
        return steps, running.result

    return to_the_end
