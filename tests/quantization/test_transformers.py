"""Transformers and T5, as the presets by memory combine them: a denoiser in 4 bits, text encoders in 8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oft_diffusion import fuse_oft, load_oft_weights, unfuse_oft
from oft_diffusion.training import TrainConfig, train
from oft_diffusion.training.count import count
from oft_diffusion.training.families import Family
from oft_diffusion.training.find import find_base
from oft_diffusion.training.prepare import load_family
from tests.helpers.tiny_families import side_of, write_tiny_family
from tests.quantization.backends import bytes_held, contents, quantized_layers

NAMES = ("StableDiffusion3Pipeline", "FluxPipeline")
WAYS = {"nf4": "int8", "torchao-int8": "quanto-int8", "quanto-int8": "nf4"}  # of the denoiser, of text encoders


@pytest.fixture(scope="module", params=NAMES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_family(request.param, tmp_path_factory.mktemp("base"))


def settings(base: Path, pictures: Path, folder: Path, denoiser: str) -> TrainConfig:
    own: dict[str, Any] = {
        "model": str(base), "instance_dir": str(pictures), "trigger": "sks", "class_word": "mug",
        "output_dir": str(folder / "run"), "resolution": side_of(base.name), "block_size": 8, "steps": 3,
        "learning_rate": 0.1, "validation_prompts": [], "mixed_precision": "bf16",
        "quantization": denoiser, "text_encoder_quantization": WAYS[denoiser],
    }  # fmt: skip
    return TrainConfig.from_dict(own)


def family_of(config: TrainConfig) -> Family:
    return load_family(config, find_base(config.model, None), torch.device("cpu"))


def drawn(family: Family) -> Any:
    [image] = family.sample(["a sks mug"], [1], side_of(family.base.pipeline), 2, 1.0)
    return np.asarray(image).astype(float)


def test_it_trains_loads_onto_another_and_merges(base: Path, pictures: Path, tmp_path: Path) -> None:
    config = settings(base, pictures, tmp_path, "nf4")
    with train(config, progress=False) as run:
        assert run.parts is not None
        denoiser = run.parts.family.module("transformer")
        before = contents(denoiser)
        assert quantized_layers(denoiser)
        for _ in run:
            pass
        after = contents(denoiser)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "training changed the base"
    assert run.result.silent_layers == ()
    for way in ("nf4", "torchao-int8"):  # onto the same, and another quantization of it
        family = family_of(settings(base, pictures, tmp_path, way))
        plain = drawn(family)
        load_oft_weights(family.pipe, run.result.adapter)
        live, own = drawn(family), contents(family.module("transformer"))
        assert not np.array_equal(live, plain)
        assert any(errors for errors in fuse_oft(family.pipe).values())
        merged = drawn(family)
        assert np.abs(merged - live).mean() < np.abs(merged - plain).mean(), "nearer to the base than to the adapter"
        unfuse_oft(family.pipe)
        back = contents(family.module("transformer"))
        assert all(torch.equal(own[name], back[name]) for name in own)
        assert np.array_equal(drawn(family), live)


@pytest.mark.parametrize("denoiser", WAYS)
def test_bytes_are_counted_as_they_are_loaded(denoiser: str, base: Path, pictures: Path, tmp_path: Path) -> None:
    """T5 keeps a layer of each block as it is, however it is quantized."""
    config = settings(base, pictures, tmp_path, denoiser)
    family = family_of(config)
    counted = count(config, family.base).base_bytes
    assert counted == pytest.approx(sum(bytes_held(family.module(name)) for name in family.base.modules), rel=0.01)
