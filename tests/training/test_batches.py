"""What batches show: views of the pictures, at which timesteps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oft_diffusion.training import TrainConfig, train
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("cached", [True, False])
def test_crops_of_instance_images(cached: bool, config: Config, run: Run, tmp_path: Path) -> None:
    settings = {"steps": 2, "batch_size": 4, "prior_preservation": True, "num_class_images": 2}
    with train(config(min_crop=0.5, cache_latents=cached, **settings), progress=False) as running:
        assert running.parts is not None
        batches = running.parts.batches
        drawn = [(stream, batches._draw(stream, n)) for stream in ("instance", "class") for n in range(200)]
        views = {batches._view(stream, d)[:2] for stream, d in drawn}
        losses = [step.loss for step in running]
    per_picture = Counter(path for path, _ in views)
    assert sorted(per_picture.values()) == [1, 1, 8, 8, 8]
    other = config(min_crop=0.5, cache_latents=not cached, output_dir=str(tmp_path / "other"), **settings)
    assert losses == [step.loss for step in run(other)[0]]
    assert losses != [step.loss for step in run(config(output_dir=str(tmp_path / "whole"), **settings))[0]]


def test_timesteps_stay_in_their_range(config: Config) -> None:
    settings = {"prior_preservation": True, "prior_target": "base", "batch_size": 4, "num_class_images": 4}
    with train(config(min_timestep=100, max_timestep=200, **settings), progress=False) as running:
        assert running.parts is not None
        drawn = torch.stack([running.parts.batches.at(i).levels for i in range(12)])
    assert drawn.shape == (12, 8)
    assert 100 <= int(drawn.min()) < 110
    assert 190 < int(drawn.max()) < 200
