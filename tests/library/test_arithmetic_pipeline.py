"""Arithmetic on adapter files against the same adapters live in a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from oft_diffusion import OFTConfig, load_oft_weights, set_oft_adapters
from oft_diffusion.arithmetic import Combined, average, compose, interpolate, power, subtract
from oft_diffusion.files import load_adapter_file, save_adapter_file
from tests.library.support import Maker, copy_pipe, distance, draw

MOVED, ROUNDING = 0.01, 1e-5  # of a picture's range


def alone(base_pipe: Any, result: Combined, folder: Path) -> torch.Tensor:
    """What a result draws when it is saved and loaded by itself."""
    pipe = copy_pipe(base_pipe)
    load_oft_weights(
        pipe, save_adapter_file(folder / f"{len(list(folder.iterdir()))}", result.components, result.metadata)
    )
    return draw(pipe)


@pytest.mark.parametrize("size", [8, 4])
def test_a_composed_file_draws_what_its_adapters_draw_live(
    pipe: Any, base_pipe: Any, mug: Path, make: Maker, tmp_path: Path, untouched: torch.Tensor, size: int
) -> None:
    style = make("other", seed=2, parts=("unet",), config=OFTConfig(block_size=size, targets="attention+mlp"))
    for path, name in ((mug, "mug"), (style, "style")):
        load_oft_weights(pipe, path, adapter_name=name)
    files = {"mug": load_adapter_file(mug), "style": load_adapter_file(style)}
    drawn = {}
    for names in (["mug", "style"], ["style", "mug"]):
        set_oft_adapters(pipe, names)
        drawn[names[0]] = draw(pipe)
        composed = compose([files[name] for name in names])
        assert distance(alone(base_pipe, composed, tmp_path), drawn[names[0]]) < ROUNDING
    assert distance(drawn["mug"], drawn["style"]) > 1e-3  # so the order is part of it
    assert distance(drawn["mug"], untouched) > MOVED
    set_oft_adapters(pipe, ["style", "mug"], [1.0, -1.0])
    assert distance(alone(base_pipe, subtract(files["style"], files["mug"]), tmp_path), draw(pipe)) < ROUNDING
    set_oft_adapters(pipe, ["mug", "style"], [0.5, 1.5])
    weighed = compose([power(files["mug"], 0.5), power(files["style"], 1.5)])
    assert distance(alone(base_pipe, weighed, tmp_path), draw(pipe)) < ROUNDING


def test_the_geodesic_begins_at_the_first_and_the_mean_is_its_middle(
    pipe: Any, base_pipe: Any, mug: Path, plain: Path, tmp_path: Path
) -> None:
    first, second = load_adapter_file(mug), load_adapter_file(plain)
    load_oft_weights(pipe, mug)
    assert distance(alone(base_pipe, interpolate(first, second, 0), tmp_path), draw(pipe)) < ROUNDING
    middle = alone(base_pipe, average([first, second]), tmp_path)
    assert distance(middle, draw(pipe)) > MOVED
    assert distance(middle, alone(base_pipe, interpolate(second, first, 0.5), tmp_path)) < ROUNDING


def test_what_shares_a_generator_loads_as_such(pipe: Any, base_pipe: Any, make: Maker, tmp_path: Path) -> None:
    config = OFTConfig(block_size=8, share_qkv=True)
    paths = [make(name, seed=i, config=config) for i, name in enumerate(("one", "two"))]
    for path in paths:
        load_oft_weights(pipe, path)
    result = compose([load_adapter_file(path) for path in paths])
    assert all(settings.share_qkv for settings in result.metadata.components.values())
    assert distance(alone(base_pipe, result, tmp_path), draw(pipe)) < ROUNDING
