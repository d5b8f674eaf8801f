"""A run on every family: it learns, its adapter loads into a fresh pipeline, and without it the base is the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oft_diffusion import fuse_oft, load_oft_weights, unfuse_oft, unload_oft_weights
from oft_diffusion.files import save_adapter_file
from oft_diffusion.training import TrainConfig, train
from oft_diffusion.training.families import Family
from oft_diffusion.training.losses import losses
from oft_diffusion.training.state import adapter_metadata, adapter_tensors
from tests.families.conftest import EVERY_FAMILY
from tests.helpers.tiny_families import side_of

Load = Callable[[str], Family]


@pytest.mark.parametrize("text_encoder", [False, True], ids=["denoiser", "text encoders too"])
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_fixed_batch_is_learned_and_the_adapter_travels(
    name: str, text_encoder: bool, folder_of: Callable[[str], Path], load: Load, instances: Path, tmp_path: Path
) -> None:
    config = TrainConfig.from_dict(
        {"model": str(folder_of(name)), "instance_dir": str(instances), "trigger": "sks", "class_word": "mug",
         "output_dir": str(tmp_path / "run"), "resolution": side_of(name), "block_size": 8, "targets": "all-linear",
         "text_encoder": text_encoder, "text_encoder_learning_rate": 2e-2 if text_encoder else None,
         "learning_rate": 0.1, "steps": 20, "batch_size": 2}
    )  # fmt: skip
    with train(config, progress=False) as run:
        parts = run.parts
        assert parts is not None
        batch = parts.batches.at(0)
        found = []
        for _ in range(20):
            loss, _ = losses(parts, batch, config)
            loss.backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            found.append(float(loss.detach()))
        assert found[-1] < 0.95 * found[0]
        expected = set(parts.family.base.denoisers) | (
            set(parts.family.base.trained_text_encoders) if text_encoder else set()
        )
        assert set(parts.banks) == expected
        for bank in parts.banks.values():
            bank.freeze("default")
        live = _draw(parts.family)
        file = tmp_path / "adapter.safetensors"
        save_adapter_file(file, adapter_tensors(parts), adapter_metadata(parts, config, 20))
    fresh = load(name)
    plain, before = _draw(fresh), _weights(fresh)
    load_oft_weights(fresh.pipe, file)
    loaded = _draw(fresh)
    assert np.array_equal(loaded, live)
    assert np.abs(loaded.astype(float) - plain).mean() >= 1
    assert min(loaded.std(), plain.std()) > 1
    fuse_oft(fresh.pipe)
    assert np.abs(_draw(fresh).astype(float) - loaded).mean() < 0.5
    unfuse_oft(fresh.pipe)
    assert np.array_equal(_draw(fresh), loaded)
    unload_oft_weights(fresh.pipe)
    assert np.array_equal(_draw(fresh), plain)
    assert all(torch.equal(before[key], value) for key, value in _weights(fresh).items())


def _draw(family: Family) -> Any:
    [image] = family.sample(["a sks mug"], [1], side_of(family.base.pipeline), 2, 1.0)
    return np.asarray(image)


def _weights(family: Family) -> dict[str, torch.Tensor]:
    names = (*family.base.denoisers, *family.base.text_encoders)
    return {f"{n}.{k}": v.clone() for n in names for k, v in family.module(n).state_dict().items()}


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_whole_run(name: str, folder_of: Callable[[str], Path], instances: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_dict(
        {"model": str(folder_of(name)), "instance_dir": str(instances), "trigger": "sks", "class_word": "mug",
         "output_dir": str(tmp_path / "run"), "resolution": side_of(name), "block_size": 8, "steps": 4,
         "prior_preservation": True, "prior_target": "base", "num_class_images": 1, "class_prompts": ["a mug"],
         "cache_text_embeddings": True, "gradient_checkpointing": True, "validation_prompts": ["a {trigger} mug"],
         "validation_count": 1, "validation_every": 2, "sampling_steps": 2, "guidance_scale": 3.0}
    )  # fmt: skip
    with train(config, progress=False) as run:
        steps = list(run)
    assert all(step.applied and step.prior_loss is not None for step in steps)
    assert run.result.adapter.is_file()
    assert run.result.report is not None
    assert run.silent_layers == ()
