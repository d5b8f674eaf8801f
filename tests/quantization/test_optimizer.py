"""AdamW with moments in 8 bits: it learns, goes on to the bit, is counted, and asked for by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from oft_diffusion.errors import ConfigError, TrainingError
from oft_diffusion.quantization import INSTALL
from oft_diffusion.training import TrainConfig, TrainResult, train
from oft_diffusion.training.checkpoint import load_checkpoint
from oft_diffusion.training.count import count
from oft_diffusion.training.find import find_base
from oft_diffusion.training.preflight import preflight
from tests.library.support import assert_one_sentence
from tests.quantization.backends import settings


def config(model: Path, pictures: Path, folder: Path, **knobs: Any) -> TrainConfig:
    small = {"optimizer": "adamw8bit", "validation_prompts": [], "block_size": 32, "learning_rate": 1e-2}
    return settings("nf4", model, pictures, folder, **(small | knobs))


def trained(wanted: TrainConfig) -> TrainResult:
    with train(wanted, progress=False) as run:
        for _ in run:
            pass
        assert run.parts is not None
        states = list(run.parts.adamw.state.values())
    assert {state["state1"].dtype for state in states} == {torch.uint8}
    return run.result


def test_n_and_n_steps_are_2n_steps(model: Path, pictures: Path, tmp_path: Path) -> None:
    whole = trained(config(model, pictures, tmp_path / "straight", steps=6))
    trained(config(model, pictures, tmp_path / "halves", steps=3))
    resumed = trained(config(model, pictures, tmp_path / "halves", steps=6, resume="latest"))
    assert resumed.losses == whole.losses
    ours, theirs = (load_checkpoint(Path(str(r.checkpoint))) for r in (resumed, whole))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert "unet/optimizer/absmax1" in theirs.tensors
    assert all(ours.tensors[k].equal(t) for k, t in theirs.tensors.items() if not k.startswith("rng/"))


def test_it_goes_where_adamw_goes(model: Path, pictures: Path, tmp_path: Path) -> None:
    eight = trained(config(model, pictures, tmp_path / "eight", steps=6))
    with train(config(model, pictures, tmp_path / "full", steps=6, optimizer="adamw"), progress=False) as run:
        for _ in run:
            pass
    assert eight.losses == pytest.approx(run.result.losses, rel=0.02)
    assert eight.losses != run.result.losses


def test_another_optimizers_checkpoint_is_refused(model: Path, pictures: Path, tmp_path: Path) -> None:
    trained(config(model, pictures, tmp_path, steps=2))
    other = config(model, pictures, tmp_path, steps=3, resume="latest", optimizer="adamw")
    with pytest.raises(TrainingError, match="optimizer"):
        preflight(other)


def test_its_moments_are_counted(model: Path, pictures: Path, tmp_path: Path) -> None:
    wanted = config(model, pictures, tmp_path)
    counted = count(wanted, find_base(wanted.model, None))
    with train(wanted, progress=False) as run:
        for _ in run:
            pass
        assert run.parts is not None
        states = run.parts.adamw.state.values()
        names = ("state1", "state2", "absmax1", "absmax2")
        held = sum(state[name].nbytes for state in states for name in names)
    assert counted.moment_bytes == held < 0.3 * 2 * counted.gradient_bytes


def test_without_bitsandbytes(model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    knobs = {"quantization": None, "text_encoder_quantization": None}
    with pytest.raises(ConfigError) as error:
        preflight(config(model, pictures, tmp_path, **knobs))
    assert_one_sentence(error, "adamw8bit", "bitsandbytes", INSTALL)
