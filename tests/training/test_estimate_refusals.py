"""The estimate refuses what the run refuses, in its words; and the command line that shows it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from oft_diffusion.errors import OFTError, TrainingError
from oft_diffusion.training import TrainConfig, estimate, memory, train
from oft_diffusion.training.batches import Batch, Batches
from oft_diffusion.training.command import main
from oft_diffusion.training.savings import savings
from oft_diffusion.training.step import Stepper
from tests.helpers.tiny_sd import write_tiny_sd
from tests.training.conftest import Run
from tests.training.test_trouble import zero_layers

Config = Callable[..., TrainConfig]
PRIOR = {"prior_preservation": True, "num_class_images": 5}


# -- what it refuses ---------------------------------------------------------------------------------------------------


def refusal(ask: Callable[[TrainConfig], object], config: TrainConfig) -> str:
    with pytest.raises(OFTError) as caught:
        ask(config)
    return f"{type(caught.value).__name__}: {caught.value}"


def to_the_end(config: TrainConfig) -> None:
    with train(config, progress=False) as run:
        list(run)


@pytest.mark.parametrize(
    "knobs",
    [
        {"steps": 0, "trigger": "dog", "block_size": 24},
        {"resolution": 17},
        {"mixed_precision": "fp16"},
        {"targets": "nothing"},
        {"resume": "latest"},
    ],
    ids=lambda knobs: next(iter(knobs)),
)
def test_what_a_run_refuses(knobs: dict[str, object], config: Config) -> None:
    assert refusal(estimate, config(**knobs)) == refusal(to_the_end, config(**knobs))


def test_what_a_run_finds_in_its_first_steps(config: Config, tmp_path: Path) -> None:
    model = write_tiny_sd(tmp_path)
    zero_layers(model, ".to_out.0.weight")
    settings = config(model=str(model))
    assert refusal(estimate, settings) == refusal(to_the_end, settings)
    other = write_tiny_sd(tmp_path / "other")
    zero_layers(other, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight")
    assert any("4 layers had no gradient" in note for note in estimate(config(model=str(other))).notes)


def test_a_resume_has_the_rest_to_do(config: Config, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(steps=4, validation_prompts=["a dog"], validation_every=2, **PRIOR)
    run(settings)
    longer = replace(settings, steps=10, resume="latest")
    asked: list[int] = []
    original = Batches.at

    def at(self: Batches, number: int, *which: int) -> Batch:
        asked.append(number)
        return original(self, number, *which)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "at", at)
        found = estimate(longer)
    assert found.steps == 6
    assert found.class_images == 0
    assert found.pictures == 3 * 2 + 6 * 2  # grids after 6, 8 and 10, and the report's strengths
    assert min(asked) == 4
    faster = replace(longer, learning_rate=1.0)
    assert refusal(estimate, faster) == refusal(to_the_end, faster)
    picture = next(Path(settings.instance_dir).glob("*.png"))
    other = Path(settings.output_dir).parent / "other"
    other.mkdir()
    for path in Path(settings.instance_dir).glob("*.png"):
        (other / path.name).write_bytes(picture.read_bytes())
    moved = replace(longer, instance_dir=str(other))
    assert "these changed: instance images" in refusal(estimate, moved)
    assert refusal(estimate, moved) == refusal(to_the_end, moved)


def test_what_does_not_fit_is_said_with_what_helps(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(batch_size=2, accumulation=3, **PRIOR)
    found = estimate(settings)
    assert found.fits in (True, None)
    assert "does not fit" not in found.summary()
    held = found.memory.base + found.memory.adapter + found.memory.training
    monkeypatch.setattr(memory, "_free", lambda _: held)
    tight = estimate(settings)
    assert tight.fits is False
    assert "This does not fit" in tight.summary()
    helps = tight.summary().split("What would help")[1]
    for knob in (
        "mixed_precision",
        "gradient_checkpointing",
        "batch_size = 1 with accumulation = 6",
        "class_batch_size",
    ):
        assert knob in helps
    assert "cache" not in helps  # which would free nothing on a processor
    monkeypatch.setattr(memory, "_free", lambda _: held - 1)
    fixes = (
        'mixed_precision = "bf16", or quantization = "nf4", or text_encoder_quantization = "nf4", or '
        'optimizer = "adamw8bit", or a smaller base'
    )
    with pytest.raises(TrainingError, match=f"does not fit.*{fixes}"):
        estimate(settings)
    monkeypatch.setattr(memory, "_free", lambda _: None)
    assert estimate(settings).fits is None


CACHED = {"cache_latents": True, "cache_text_embeddings": True}
DROP, ENCODERS, EIGHT = "drop_encoders = true", 'text_encoder_quantization = "nf4"', 'optimizer = "adamw8bit"'
OFFLOAD = "layer_offload = 1"


@pytest.mark.parametrize(
    ("device", "phase", "knobs", "offered"),
    [
        ("cuda", "loading", CACHED, {DROP, ENCODERS, EIGHT, OFFLOAD}),
        ("cuda", "encoding", CACHED, {DROP, ENCODERS, OFFLOAD}),
        ("cuda", "steps", CACHED, {EIGHT, OFFLOAD}),
        ("cuda", "steps", {}, {ENCODERS, EIGHT, OFFLOAD}),
        ("cuda", "grids", {**CACHED, "layer_offload": 0.5}, {EIGHT, OFFLOAD}),
        ("cuda", "loading", {**CACHED, "drop_encoders": True, "layer_offload": 1.0}, {EIGHT}),
        ("cuda", "encoding", {**CACHED, "drop_encoders": True}, {ENCODERS, OFFLOAD}),
        ("cuda", "loading", {"optimizer": "adamw8bit", "text_encoder_quantization": "int8"}, {OFFLOAD}),
        ("cuda", "loading", {"model": "x.safetensors"}, {EIGHT, OFFLOAD}),
        ("cpu", "loading", CACHED, {ENCODERS, EIGHT}),
        ("cpu", "steps", CACHED, {DROP, ENCODERS, EIGHT}),
        ("cpu", "steps", {**CACHED, "drop_encoders": True}, {EIGHT}),
    ],
)
def test_settings_that_help_are_offered_where_they_do(
    device: str, phase: Any, knobs: dict[str, object], offered: set[str], config: Config
) -> None:
    found = savings(config(**knobs), phase, torch.device(device))
    assert {DROP, ENCODERS, EIGHT, OFFLOAD} & set(found) == offered


def test_running_out_of_memory_is_a_sentence(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Stepper, "learn", full)
    with pytest.raises(TrainingError, match=r"does not fit.*gradient_checkpointing"):
        estimate(config())


def test_a_full_card_is_a_sentence_of_the_command(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    (tmp_path / "c.toml").write_text(config().to_toml())
    loading: Any = importlib.import_module("oft_diffusion.training.families.source").Source
    for place, name in ((Stepper, "learn"), (loading, "_load")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            assert main(["--config", str(tmp_path / "c.toml")]) == 1
        told = capsys.readouterr().err
        assert "the card's memory does not suffice (CUDA out of memory. Tried to allocate 2.00 GiB)" in told
        assert 'layer_offload = 1, or optimizer = "adamw8bit"' in told


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_says_it(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(validation_prompts=["a dog"], neumann_order=3, **PRIOR)
    (tmp_path / "c.toml").write_text(settings.to_toml())
    assert main(["--config", str(tmp_path / "c.toml"), "--estimate"]) == 0
    shown = capsys.readouterr().out
    found = estimate(settings)
    capsys.readouterr()
    assert [note for note in found.notes if note not in shown] == []
    assert f"{found.trained:,} parameters" in shown
    assert "3 steps" in shown
    assert "5 class images" in shown
    assert not Path(settings.output_dir).exists()
    assert main(["--config", str(tmp_path / "c.toml"), "--estimate", "--resolution", "17"]) == 1
    estimated = capsys.readouterr()
    assert main(["--config", str(tmp_path / "c.toml"), "--resolution", "17"]) == 1
    assert capsys.readouterr() == estimated


def test_an_interrupted_estimate_says_so(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "c.toml").write_text(config().to_toml())
    monkeypatch.setattr(Stepper, "learn", interrupted)
    assert main(["--config", str(tmp_path / "c.toml"), "--estimate"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not AcceleratorState._shared_state
