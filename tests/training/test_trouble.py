"""What goes wrong while a run is going on: losses that are not finite, layers that do not learn, a full disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from oft_diffusion.errors import OFTError, TargetError, TrainingError
from oft_diffusion.training import TrainConfig, train
from oft_diffusion.training.batches import Batch, Batches
from oft_diffusion.training.model import ADAPTER
from oft_diffusion.training.watch import SilentLayers
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import folder_bytes
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]


def poison(monkeypatch: pytest.MonkeyPatch, numbers: set[int]) -> None:
    original = Batches.at

    def at(self: Batches, number: int, *args: int) -> Batch:
        batch = original(self, number, *args)
        if number in numbers:
            batch.latents.fill_(float("nan"))
        return batch

    monkeypatch.setattr(Batches, "at", at)


def test_a_bad_loss_is_skipped(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2})
    notes: list[str] = []
    generators = []
    with train(config(steps=5), progress=False, on_note=notes.append) as run:
        for step in run:
            assert run.parts is not None
            assert step.applied == (step.step != 3)
            generators.append(run.parts.banks["unet"].generators[ADAPTER].detach().clone())
    assert generators[1].equal(generators[2])
    assert not generators[2].equal(generators[3])
    assert generators[-1].isfinite().all()
    assert any("step 3: the loss is nan, so the step is skipped" in note for note in notes)
    assert '"nan"' in (run.output_dir / "losses.json").read_text()


def test_bad_losses_in_a_row_end_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(3, 100)))

    def go() -> None:
        with train(config(steps=50, checkpoint_every=3), progress=False) as run:
            list(run)

    with pytest.raises(TrainingError, match=r"the loss was nan on 5 steps in a row, up to step 8.*checkpoint-000006"):
        go()


def zero_layers(model: Path, pattern: str) -> None:
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in weights:
        if pattern in name:
            weights[name].zero_()
    save_file(weights, file)


def test_layers_without_gradient_are_named(config: Config, run: Run, tmp_path: Path) -> None:
    model = write_tiny_sd(tmp_path)
    zero_layers(model, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.weight")
    _, result = run(config(model=str(model), steps=SilentLayers.STEPS + 1))
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2."
    assert set(result.silent_layers) == {block + n for n in ("to_q", "to_k", "to_v", "to_out.0")}


def test_a_run_that_trains_nothing_stops(config: Config, run: Run, tmp_path: Path) -> None:
    model = write_tiny_sd(tmp_path)
    zero_layers(model, ".to_out.0.weight")
    with pytest.raises(TrainingError, match="no layer had a gradient over the first 3 steps"):
        run(config(model=str(model)))


def test_unfitting_block_size_is_told_before_class_images_are_made(config: Config) -> None:
    settings = config(block_size=24, prior_preservation=True, num_class_images=50)
    with pytest.raises(TargetError, match="block_size=24 does not divide"):
        train(settings, progress=False)
    assert not settings.class_folder.exists()


def test_a_full_disk_at_the_end_is_one_sentence(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    def go() -> None:
        with train(config(), progress=False) as run:
            for _ in run:
                monkeypatch.setattr("os.fsync", full)

    with pytest.raises(TrainingError, match="the disk is full"):
        go()
    folder = Path(config().output_dir)
    assert not list(folder.rglob("*.partial"))
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("what", ["class images", "grid", "losses"])
def test_a_full_disk_on_the_way_leaves_nothing_half_written(
    what: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = {"class images": ".png.", "grid": ".png.", "losses": "losses.json."}[what]
    settings = config(prior_preservation=what == "class images", num_class_images=1, validation_prompts=["a dog"])
    original = tempfile.mkstemp

    def mkstemp(*args: Any, **options: Any) -> tuple[int, str]:
        handle, path = original(*args, **options)
        if suffix in path:
            full.append(handle)
        return handle, path

    def fsync(handle: int) -> None:
        if handle in full:
            raise OSError(28, "No space left on device")

    full: list[int] = []
    monkeypatch.setattr("tempfile.mkstemp", mkstemp)
    monkeypatch.setattr("os.fsync", fsync)

    def go() -> None:
        with train(settings, progress=False) as run:
            list(run)

    with pytest.raises(OFTError, match=r"No space left on device|the disk is full"):
        go()
    folder = Path(settings.output_dir)
    assert not list(folder.rglob("*.partial"))
    assert not list(folder.rglob(f"*{suffix[:-1]}"))


def test_overwriting_must_be_asked_for(config: Config, run: Run) -> None:
    _, first = run(config(validation_prompts=["a dog"]))
    with pytest.raises(
        TrainingError, match=r"holds an earlier run \(checkpoint-000003\).*--resume latest.*--overwrite"
    ):
        train(config())
    _, second = run(config(overwrite=True, steps=2))
    assert not first.pictures[0].exists()
    assert not Path(str(first.checkpoint)).exists()
    assert second.adapter.is_file()


@pytest.mark.parametrize("error", [TrainingError("no", expected="a", fix="b"), KeyboardInterrupt()])
def test_an_overwriting_run_that_cannot_start_leaves_the_earlier_one(
    config: Config, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    def fails(*_: object) -> None:
        raise error

    run(config(validation_prompts=["a dog"]))
    before = folder_bytes(tmp_path / "run")
    assert len(before) > 5
    monkeypatch.setattr("oft_diffusion.training.prepare._inject", fails)
    with pytest.raises(type(error)):
        run(config(overwrite=True, steps=2))
    assert folder_bytes(tmp_path / "run") == before
