"""Encoders that are dropped while training: their bytes are gone in steps, and nothing else is different."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from oft_diffusion.errors import ConfigError, TrainingError
from oft_diffusion.training import TrainConfig, estimate, train
from oft_diffusion.training.families.homes import in_turn
from oft_diffusion.training.step import Stepper
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]
CACHED = {"cache_latents": True, "cache_text_embeddings": True}
GRIDS = {"validation_prompts": ["a dog", "a {trigger} mug"], "validation_every": 2, "steps": 4}
KINDS = pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({}, marks=pytest.mark.slow, id="plain"),
        pytest.param({"text_encoder_quantization": "nf4"}, id="quantized"),
        pytest.param({"mixed_precision": "bf16", "prior_preservation": True}, id="prior"),
    ],
)


def alive() -> int:
    """Bytes of all storages that Python knows a tensor of."""
    gc.collect()
    known = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    # Not what a compiler left behind, which has no memory.
    found = [o for o in known if o.device.type == "cpu" and not isinstance(o, (FakeTensor, FunctionalTensor))]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def in_a_step(settings: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes alive before the second step's first forward."""
    learn, seen = Stepper.learn, list[int]()

    def look(self: Stepper, number: int, *, last: bool) -> torch.Tensor:
        if number == 1:
            seen.append(alive())
        return learn(self, number, last=last)

    before = alive()
    with monkeypatch.context() as patch, train(settings, progress=False) as run:
        patch.setattr(Stepper, "learn", look)
        list(run)
    return seen[0] - before


def left(folder: Path) -> dict[str, bytes]:
    """A run's adapter, last checkpoint and grids."""
    files = [*folder.glob("*.safetensors"), *folder.glob("samples/*"), *folder.glob("checkpoint-000004/*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.thinned(2)
@KINDS
def test_what_is_learned_and_drawn_is_the_same_to_the_bit(
    knobs: dict[str, object], config: Config, run: Run, tmp_path: Path
) -> None:
    own = {**CACHED, **GRIDS, "num_class_images": 2, **knobs}
    kept, _ = run(config(**own, output_dir=str(tmp_path / "kept")))
    dropped, _ = run(config(**own, output_dir=str(tmp_path / "dropped"), drop_encoders=True))
    assert [(step.loss, step.grad_norm) for step in kept] == [(step.loss, step.grad_norm) for step in dropped]
    one, other = left(tmp_path / "kept"), left(tmp_path / "dropped")
    assert one.keys() == other.keys()
    assert len([name for name in one if name.startswith("samples")]) == 3
    # Metadata says which settings a file was made with.
    assert [name for name in one if not same(name, one, other)] == []
    assert (tmp_path / "dropped" / "report.html").is_file()


def same(name: str, one: dict[str, bytes], other: dict[str, bytes]) -> bool:
    """Whether two files are the same, of adapters their tensors."""
    if name.endswith("oft_adapter.safetensors"):
        return tensors_of(one[name]) == tensors_of(other[name])
    return one[name] == other[name]


def tensors_of(file: bytes) -> bytes:
    """What follows a safetensors file's header."""
    return file[8 + int.from_bytes(file[:8], "little") :]


@pytest.mark.thinned(2)
@KINDS
def test_their_bytes_are_gone_in_steps_as_the_estimate_says(
    knobs: dict[str, object], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {**CACHED, "num_class_images": 2, **knobs}
    kept = in_a_step(config(**own, output_dir=str(tmp_path / "kept")), monkeypatch)
    settings = config(**own, output_dir=str(tmp_path / "dropped"), drop_encoders=True)
    found = estimate(settings).memory
    dropped = in_a_step(settings, monkeypatch)
    assert found.parked > 0.1 * found.base
    assert kept - dropped == pytest.approx(found.parked, rel=0.01)
    assert estimate(config(**own)).memory.parked == 0


@pytest.mark.slow
def test_a_run_goes_on_as_if_nothing_had_been_dropped(config: Config, run: Run, tmp_path: Path) -> None:
    own = {**CACHED, **GRIDS}
    run(config(**own, output_dir=str(tmp_path / "whole")))
    first = config(**own | {"steps": 2}, output_dir=str(tmp_path / "halves"), drop_encoders=True)
    run(first)
    run(config(**own, output_dir=str(tmp_path / "halves"), drop_encoders=True, resume="latest"))
    one, other = left(tmp_path / "whole"), left(tmp_path / "halves")
    assert all(same(name, one, other) for name in one)


@pytest.mark.parametrize("knobs", [{"cache_latents": False}, {"cache_text_embeddings": False}, {"text_encoder": True}])
def test_what_steps_need_is_not_dropped(knobs: dict[str, object], config: Config) -> None:
    with pytest.raises(ConfigError, match=r"drop_encoders|text_encoder and cache_text_embeddings"):
        train(config(**CACHED | knobs, drop_encoders=True))


def test_a_base_that_is_gone_is_said_and_the_adapter_stays(config: Config, tmp_path: Path, tiny_sd: Path) -> None:
    model = tmp_path / "model"
    model.symlink_to(tiny_sd)
    with train(config(**CACHED, drop_encoders=True, model=str(model), steps=2), progress=False) as run:
        steps = iter(run)
        next(steps)
        model.unlink()
        with pytest.raises(TrainingError, match="cannot load"):
            run.sample()
        list(steps)
        model.symlink_to(tiny_sd)
    assert run.result.adapter.is_file()


def test_grids_that_cannot_be_drawn_on_the_way_are_noted(config: Config, tmp_path: Path, tiny_sd: Path) -> None:
    model, notes = tmp_path / "model", list[str]()
    model.symlink_to(tiny_sd)
    settings = config(**CACHED, **GRIDS, drop_encoders=True, model=str(model))
    with train(settings, progress=False, on_note=notes.append) as run:
        model.unlink()
        assert [step.pictures for step in run] == [None] * 4
    assert run.result.adapter.is_file()
    assert len(run.result.losses) == 4
    for step in (0, 2, 4):
        assert any(note.startswith(f"no pictures after step {step}: diffusers cannot load") for note in notes)
    assert any("its report cannot be written" in note for note in notes)


class Encoder(nn.Module):
    """Says that it is where it was last sent."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log, self.place = log, torch.device("cpu")

    def parameters(self, recurse: bool = True) -> object:  # type: ignore[override]
        return iter([self])

    @property
    def device(self) -> torch.device:
        return self.place

    def to(self, device: torch.device) -> Encoder:  # type: ignore[override]
        self.place = device
        self.log.append(f"to {device.type}")
        return self


class Pipe:
    def __init__(self, encoder: Encoder, denoiser: nn.Module) -> None:
        self.encoder, self.denoiser = encoder, denoiser

    def __call__(self, prompt: str) -> str:
        self.encoder.log.append(f"reads {prompt} on {self.encoder.place.type}")
        for _ in range(2):
            self.denoiser(torch.zeros(1))
            self.encoder.log.append("denoised")
        return prompt


def test_encoders_that_live_elsewhere_are_there_for_the_prompts_alone() -> None:
    log: list[str] = []
    encoder, denoiser = Encoder(log), nn.Identity()
    pipe, card = Pipe(encoder, denoiser), torch.device("meta")
    with in_turn(pipe, card, [encoder], [denoiser]):
        assert [pipe("one"), pipe("two")] == ["one", "two"]
    each = ["to meta", "reads {} on meta", "to cpu", "denoised", "denoised"]
    assert log == [line.format(prompt) for prompt in ("one", "two") for line in each]
    assert not denoiser._forward_pre_hooks
    log.clear()
    at_home = Pipe(encoder, denoiser)
    with in_turn(at_home, torch.device("cpu"), [encoder], [denoiser]):
        at_home("three")
    assert log == ["reads three on cpu", "denoised", "denoised"]
