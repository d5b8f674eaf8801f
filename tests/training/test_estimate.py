"""The estimate counts and measures the run itself, and changes nothing."""

from __future__ import annotations

import importlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from oft_diffusion.training import Estimate, TrainConfig, estimate, timing, train
from oft_diffusion.training.batches import Batch, Batches
from oft_diffusion.training.count import bytes_of
from oft_diffusion.training.estimate import Memory
from oft_diffusion.training.families import Family
from oft_diffusion.training.memory import Meter, tensor_bytes
from oft_diffusion.training.step import Stepper
from tests.library.support import folder_bytes
from tests.training.conftest import Run
from tests.training.test_loop import tensors

Config = Callable[..., TrainConfig]
CPU = torch.device("cpu")
PRIOR = {"prior_preservation": True, "num_class_images": 5}


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "knobs",
    [{}, {"text_encoder": True, "targets": "attention+mlp"}, {"share_qkv": True, "block_size": 8}],
    ids=["denoiser", "text encoder too", "shared"],
)
def test_the_adapter_is_the_runs(knobs: dict[str, object], config: Config) -> None:
    found = estimate(config(**knobs))
    with train(config(**knobs), progress=False) as run:
        assert run.parts is not None
        trained = sum(p.numel() for bank in run.parts.banks.values() for p in bank.parameters())
        list(run)
    file = run.result.adapter
    assert found.trained == trained
    assert found.memory.adapter == 4 * trained
    assert found.memory.training == 3 * 4 * trained
    assert found.file_bytes == 4 * sum(tensor.numel() for tensor in tensors(file).values())
    assert found.file_bytes == file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    assert (found.trained * 4 == found.file_bytes) is not knobs.get("share_qkv", False)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_base_is_the_runs(precision: str, config: Config) -> None:
    settings = config(mixed_precision=precision)
    found = estimate(settings)
    with train(settings, progress=False) as run:
        assert run.parts is not None
        modules = [m for m in run.parts.family.pipe.components.values() if isinstance(m, nn.Module)]
        assert found.memory.base == bytes_of(modules)
        assert found.total == sum(p.numel() for m in modules for p in m.parameters())
    assert found.memory.parked == 0  # a processor's memory has them all


@pytest.mark.thinned(3)
@pytest.mark.parametrize("knobs", [{"min_crop": 0.5, "flip": True}, {"cache_latents": False}], ids=["many", "none"])
@pytest.mark.parametrize("texts", [True, False])
def test_caches_are_the_runs(knobs: dict[str, object], texts: bool, config: Config) -> None:
    settings = config(**knobs, **PRIOR, cache_text_embeddings=texts)
    found = estimate(settings)
    with train(settings, progress=False) as run:
        assert run.parts is not None
        batches = run.parts.batches
        assert found.memory.caches == tensor_bytes((list(batches._posteriors.values()), list(batches._texts.values())))
    assert (found.memory.caches > 0) is (texts or "min_crop" in knobs)


def test_as_many_pictures_as_the_run_draws(config: Config, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(steps=5, validation_prompts=["a dog", "a {trigger} mug"], validation_every=2, **PRIOR)
    found = estimate(settings)
    original, drawn = Family.sample, []

    def sample(self: Family, prompts: Sequence[str], *how: Any) -> Any:
        drawn.append(len(prompts))
        return original(self, prompts, *how)

    monkeypatch.setattr(Family, "sample", sample)
    run(settings)
    assert found.class_images == 5
    assert found.class_images + found.pictures == sum(drawn)


def test_narrow_grids_are_what_is_drawn_at_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, seen = timing.drawing, list[int]()

    def noting(settings: TrainConfig, family: Family, prompts: Sequence[str], *rest: Any) -> timing.Cost:
        seen.append(len(prompts))
        return drawing(settings, family, prompts, *rest)

    monkeypatch.setattr(importlib.import_module(Memory.__module__), "drawing", noting)
    for count in (1, 3):
        estimate(config(validation_prompts=["a dog"], validation_count=count))
    assert seen == [0, 1, 0, 3]


def test_text_encoders_that_come_to_read_prompts_are_counted(config: Config) -> None:
    """On a card, as they live on the processor while pictures are encoded."""
    there = list[torch.Tensor]()

    @contextmanager
    def reading() -> Iterator[None]:
        there.append(torch.zeros(1_000_000, dtype=torch.uint8))
        yield
        there.clear()

    family: Any = SimpleNamespace(reading=reading, encode_text=lambda *_: torch.zeros(10))
    batches: Any = SimpleNamespace(family=family, prompts=lambda: ["a dog"])
    settings = config(cache_latents=False, cache_text_embeddings=True)
    assert timing.caching(settings, batches, Meter(CPU)).growth >= 1_000_000


# -- what is measured --------------------------------------------------------------------------------------------------


def test_the_timed_steps_are_the_runs_first_ones(config: Config, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(steps=timing.STEPS, accumulation=2, text_encoder=True, min_crop=0.5, lr_schedule="cosine")
    original, seen = Stepper.descend, []

    def descend(self: Stepper, totals: torch.Tensor, step: int) -> Any:
        seen.append(original(self, totals, step))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "descend", descend)
        estimate(settings)
    steps, _ = run(settings)
    assert [(d.loss, d.grad_norm, d.learning_rate) for d in seen] == [
        (s.loss, s.grad_norm, s.learning_rate) for s in steps
    ]


@pytest.mark.slow
def test_activations_follow_the_settings(config: Config) -> None:
    def measured(**knobs: object) -> int:
        return estimate(config(batch_size=2, resolution=32, **knobs)).memory.activations

    plain, prior = measured(), measured(**PRIOR)
    assert estimate(config(resolution=32)).memory.activations < plain
    assert plain < measured(**PRIOR, class_batch_size=1) < prior
    assert measured(gradient_checkpointing=True) < plain
    assert measured(text_encoder=True) > plain
    # Gradients of the first forward are there in the second one, and no more of anything.
    few = estimate(config(batch_size=2, resolution=32, accumulation=2))
    assert plain <= few.memory.activations <= plain + few.memory.adapter
    assert measured(accumulation=5) == few.memory.activations


def test_a_step_grows_by_gradients_and_activations(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Meter, "growth", lambda _, work: (work(), 10**6)[1])
    found = estimate(config()).memory
    assert found.activations + found.adapter == found.pictures == 10**6  # gradients are as large as what they are of
    assert found.peak >= found.base + found.adapter + found.training + found.caches + 10**6


@pytest.mark.parametrize(
    ("activations", "pictures", "process", "peak", "of_pictures", "beside"),
    [(50, 20, 0, 100 - 30 + 12 + 50, False, 0), (50, 51, 0, 100 - 30 + 12 + 51, True, 0), (50, 20, 140, 140, False, 8)],
)
def test_the_peak_is_a_step_or_a_picture(
    activations: int, pictures: int, process: int, peak: int, of_pictures: bool, beside: int
) -> None:
    found = Memory(100, 30, 3, 4, 5, activations, pictures, process)
    assert (found.peak, found.peak_is_pictures, found.beside) == (peak, of_pictures, beside)


class Clock:
    """Stands still, unless it is told otherwise."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self, _: torch.device = CPU) -> float:
        return self.time

    def forward(self, *seconds: float) -> None:
        self.time += sum(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(timing, "now", stopped)
    return stopped


def test_a_step_is_its_forwards_and_one_descent(config: Config, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    learn, descend = Stepper.learn, Stepper.descend
    descents = iter([90.0, 70.0, 1.0, 1.0, 9.0, 9.0])  # the first warms up, the second is looked at for its memory

    def slow_learn(self: Stepper, number: int, *, last: bool) -> torch.Tensor:
        clock.forward(2.0)
        return learn(self, number, last=last)

    def slow_descend(self: Stepper, totals: torch.Tensor, step: int) -> Any:
        clock.forward(next(descents))
        return descend(self, totals, step)

    monkeypatch.setattr(Stepper, "learn", slow_learn)
    monkeypatch.setattr(Stepper, "descend", slow_descend)
    found = estimate(config(accumulation=7, steps=40))
    assert found.seconds_per_step == 7 * 2 + 5
    assert found.times.steps == 40 * found.seconds_per_step
    assert found.seconds >= found.times.steps


def test_a_drawing_is_its_steps_and_the_rest(config: Config, clock: Clock) -> None:
    denoiser = nn.Identity()

    def sample(prompts: Sequence[str], _seeds: object, _resolution: int, steps: int, _guidance: float) -> None:
        clock.forward(3.0)
        for _ in range(steps):
            clock.forward(2.0)
            denoiser(torch.zeros(1))
        clock.forward(4.0)

    denoiser.register_forward_hook(lambda *_: clock.forward(5.0), prepend=True)
    family: Any = SimpleNamespace(module=lambda _: denoiser, base=SimpleNamespace(denoisers=["unet"]), sample=sample)
    few = timing.drawing(config(sampling_steps=4), family, ["a", "b"], 10, Meter(CPU))
    many = timing.drawing(config(sampling_steps=44), family, ["a", "b"], 10, Meter(CPU))
    assert few.seconds == pytest.approx(10 / 2 * (3 + 4 * 7 + 4))
    # What is between two calls of the denoiser is counted with them, but for the one before the first.
    assert many.seconds == pytest.approx(10 / 2 * (3 + 2 + (4 * 7 - 2) * 44 / 4 + 4))
    assert timing.drawing(config(), family, [], 0, Meter(CPU)) == timing.Cost()


def test_caching_is_an_encoding_times_what_there_is(
    config: Config, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_image, encode_text = Family.encode_image, Family.encode_text

    def slow_image(self: Family, pixels: torch.Tensor) -> Any:
        clock.forward(2.0)
        return encode_image(self, pixels)

    def slow_text(self: Family, *prompts: Any) -> Any:
        clock.forward(3.0)
        return encode_text(self, *prompts)

    monkeypatch.setattr(Family, "encode_image", slow_image)
    monkeypatch.setattr(Family, "encode_text", slow_text)
    settings = config(**PRIOR, min_crop=0.5, flip=True, class_prompts=["", "a dog", "a mug"])
    views, prompts = 3 * 8 * 2 + 5 * 2, 1 + 3
    assert estimate(settings).times.caching == 2 * views
    assert estimate(replace(settings, cache_text_embeddings=True)).times.caching == 2 * views + 3 * prompts


# -- what it leaves ----------------------------------------------------------------------------------------------------


def test_nothing_is_left_on_disk(config: Config, run: Run, tmp_path: Path) -> None:
    settings = config(validation_prompts=["a dog"], **PRIOR, cache_text_embeddings=True, sampling_steps=6)
    estimate(settings)
    assert list(tmp_path.iterdir()) == []
    run(settings)
    before = folder_bytes(tmp_path)
    assert len(before) > 10
    assert estimate(replace(settings, overwrite=True)).class_images == 0
    assert folder_bytes(tmp_path) == before


def test_training_afterwards_is_as_without(config: Config, run: Run, tmp_path: Path) -> None:
    knobs = {**PRIOR, "prior_target": "base", "text_encoder": True, "min_crop": 0.5, "validation_prompts": ["a dog"]}
    _, alone = run(config(output_dir=str(tmp_path / "alone"), **knobs))
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    found: list[Estimate] = []
    settings = config(output_dir=str(tmp_path / "after"), **knobs)
    thread = threading.Thread(target=lambda: found.append(estimate(settings)))  # as the app does
    thread.start()
    thread.join()
    assert torch.get_rng_state().equal(states[0])
    assert random.getstate() == states[1]
    assert not AcceleratorState._shared_state
    estimate(replace(settings, mixed_precision="bf16"))
    _, after = run(settings)
    assert after.losses == alone.losses
    ours, theirs = tensors(after.adapter), tensors(alone.adapter)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert any(tensor.abs().max() > 0 for tensor in ours.values())
    assert found[0].fits is not False


class Enough(Exception):  # noqa: N818
    pass


@pytest.mark.thinned(3)
@pytest.mark.parametrize("part", ["loading", "encoding", "class images", "step 1 ", "step 6 ", "drawing pictures"])
def test_what_is_raised_between_parts_ends_it_without_a_trace(part: str, config: Config, tmp_path: Path) -> None:
    settings = config(validation_prompts=["a dog"], **PRIOR)
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def end(told: str) -> None:
        if part in told:
            raise Enough

    with pytest.raises(Enough):
        estimate(settings, end)
    assert torch.get_rng_state().equal(state)
    assert not AcceleratorState._shared_state
    assert list(tmp_path.iterdir()) == []


def test_missing_class_images_are_stood_for_by_instance_images(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(**PRIOR, batch_size=2, class_prompts=["a dog", "a red mug"])
    original = Batches.at
    told: set[str] = set()

    def at(self: Batches, number: int, *which: int) -> Batch:
        batch = original(self, number, *which)
        told.update(batch.prompts[batch.instances :])
        assert len(batch.prompts) == 4
        return batch

    monkeypatch.setattr(Batches, "at", at)
    estimate(settings)
    assert told == {"a dog", "a red mug"}
