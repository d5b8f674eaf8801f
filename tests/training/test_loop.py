"""The loop: it learns, however the work is cut, cached or saved; it stops in good order; it says when it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from oft_diffusion.errors import TargetError, TrainingError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.training import TrainConfig, TrainingRun, train
from oft_diffusion.training.batches import Batch, Batches
from oft_diffusion.training.model import ADAPTER
from oft_diffusion.training.watch import SilentLayers
from tests.helpers.tiny_sd import draw_pictures, write_tiny_sd
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    components = load_adapter_file(path).components
    return {f"{part}.{name}": tensor for part, state in components.items() for name, tensor in state.items()}


def test_it_learns_and_leaves_the_base_alone(config: Config) -> None:
    def fresh_loss(run: TrainingRun) -> float:
        assert run.parts is not None
        with torch.no_grad():  # on draws that training does not see
            return sum(float(run._losses(run.parts.batches.at(n + 10**6))[0]) for n in range(20)) / 20

    with train(config(steps=100, learning_rate=1e-2, batch_size=2), progress=False) as run:
        assert run.parts is not None
        base = {k: v.clone() for k, v in run.parts.family.unet.state_dict().items()}
        before = fresh_loss(run)
        for _ in run:
            pass
        assert fresh_loss(run) < 0.88 * before
        assert run.parts.banks["unet"].orthogonality_error(ADAPTER) < 1e-5
        after = run.parts.family.unet.state_dict()
        assert after.keys() == base.keys()
        assert all(after[name].equal(base[name]) for name in base)
    assert run.result.silent_layers == ()


def test_records_and_result(config: Config, run: Run) -> None:
    settings = config(
        steps=4, validation_prompts=["a {trigger} {class_word}", "a dog"], validation_every=2, checkpoint_every=2,
        warmup_steps=2, lr_schedule="linear",
    )  # fmt: skip
    steps, result = run(settings)
    assert [s.step for s in steps] == [1, 2, 3, 4]
    assert [s.learning_rate for s in steps] == pytest.approx([0, 0.5e-3, 1e-3, 0.5e-3])
    assert [s.pictures is not None for s in steps] == [False, True, False, True]
    assert [s.checkpoint is not None for s in steps] == [False, True, False, False]
    assert [p.name for p in result.pictures] == ["step-000000.png", "step-000002.png", "step-000004.png"]
    assert [s.loss for s in steps] == list(result.losses)
    assert all(s.applied and s.prior_loss is None and s.grad_norm > 0 for s in steps)
    assert steps[-1].seconds_left == 0
    assert steps[0].seconds_left == pytest.approx(3 * steps[0].seconds_per_step)
    saved = load_adapter_file(result.adapter).metadata
    assert saved is not None
    assert (saved.trigger, saved.class_word, saved.components["unet"].block_size) == ("sks", "mug", 16)
    assert saved.base["components"] == {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
    assert saved.base["prediction_type"] == "epsilon"
    assert saved.training["steps_done"] == 4
    assert str(settings.output_dir) not in saved.to_json()
    assert TrainConfig.from_toml(Path(settings.output_dir) / "config.toml") == settings


def test_the_seed_decides_everything(config: Config, run: Run, tmp_path: Path) -> None:
    torch.manual_seed(1)
    _, first = run(config(output_dir=str(tmp_path / "a")))
    torch.manual_seed(2)
    _, again = run(config(output_dir=str(tmp_path / "b")))
    _, other = run(config(output_dir=str(tmp_path / "c"), seed=1))
    assert first.losses == again.losses
    assert not set(first.losses) & set(other.losses)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"batch_size": 4}, {"batch_size": 2, "accumulation": 2}),
        ({}, {"gradient_checkpointing": True}),
        ({"text_encoder": True}, {"text_encoder": True, "gradient_checkpointing": True}),
        ({"batch_size": 2}, {"batch_size": 2, "cache_text_embeddings": True}),
    ],
    ids=["accumulation", "checkpointing", "checkpointing-text", "cached-text"],
)
def test_equal_learning(
    one: dict[str, object], other: dict[str, object], config: Config, run: Run, tmp_path: Path
) -> None:
    _, a = run(config(steps=4, output_dir=str(tmp_path / "a"), **one))
    _, b = run(config(steps=4, output_dir=str(tmp_path / "b"), **other))
    assert a.losses == pytest.approx(b.losses, rel=1e-5)
    ours, theirs = tensors(a.adapter), tensors(b.adapter)
    assert max(float(t.abs().max()) for t in ours.values()) > 1e-3
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=2e-4), name


@pytest.mark.parametrize("flip", [False, True])
def test_cached_latents_are_the_fresh_ones_to_the_bit(flip: bool, config: Config, run: Run, tmp_path: Path) -> None:
    same = {"steps": 4, "batch_size": 2, "flip": flip}
    _, a = run(config(output_dir=str(tmp_path / "a"), cache_latents=True, **same))
    _, b = run(config(output_dir=str(tmp_path / "b"), cache_latents=False, **same))
    assert a.losses == b.losses


def test_flip_changes_what_is_seen(config: Config, run: Run, tmp_path: Path) -> None:
    _, a = run(config(output_dir=str(tmp_path / "a"), flip=True, steps=6))
    _, b = run(config(output_dir=str(tmp_path / "b"), steps=6))
    assert a.losses != b.losses


def test_text_encoder_adapter(config: Config, run: Run) -> None:
    _, result = run(config(text_encoder=True, text_encoder_learning_rate=1e-4))
    found = tensors(result.adapter)
    unet = [float(t.abs().max()) for n, t in found.items() if n.startswith("unet.")]
    text = [float(t.abs().max()) for n, t in found.items() if n.startswith("text_encoder.")]
    assert len(text) == 8
    assert len(unet) == 32
    assert 0 < max(text) < max(unet) / 5  # Adam's steps are as long as the learning rate says


def test_prior_preservation_weighs_the_class_images(config: Config, run: Run, tmp_path: Path) -> None:
    class_dir = draw_pictures(tmp_path / "class", count=2)
    steps, _ = run(config(prior_preservation=True, class_dir=str(class_dir), prior_weight=0.25))
    for step in steps:
        assert step.prior_loss is not None
        assert step.loss == pytest.approx(step.instance_loss + 0.25 * step.prior_loss)


def test_bfloat16_base_with_float32_generators(config: Config, run: Run, tmp_path: Path) -> None:
    _, half = run(config(mixed_precision="bf16", output_dir=str(tmp_path / "half"), validation_prompts=["a dog"]))
    _, full = run(config(output_dir=str(tmp_path / "full")))
    assert half.losses == pytest.approx(full.losses, rel=0.05)
    assert half.losses != full.losses
    assert all(t.dtype == torch.float32 for t in tensors(half.adapter).values())


@pytest.mark.parametrize("settings", [{"scaled": True}, {"coft_eps": 1e-3}, {"min_snr_gamma": 5.0},
                                      {"parametrisation": "cayley_neumann"}, {"targets": "attention+mlp"},
                                      {"targets": [r".*attn2\.to_q"]}, {"block_size": "auto"}])  # fmt: skip
def test_adapter_settings_reach_the_file(settings: dict[str, object], config: Config, run: Run) -> None:
    steps, result = run(config(learning_rate=1e-2, **settings))
    assert all(math.isfinite(s.loss) for s in steps)
    found = tensors(result.adapter)
    largest = max(float((2 * t.square().sum(dim=1)).sqrt().max()) for t in found.values())
    assert largest > 0
    if "coft_eps" in settings:
        assert largest <= 1e-3 * (1 + 1e-5)
    if isinstance(settings.get("targets"), list):
        assert len(found) == 4


# -- starting from, and over, what is there ---------------------------------------------------------------------------


def test_continuing_from_an_adapter(config: Config, run: Run, tmp_path: Path) -> None:
    _, first = run(config(output_dir=str(tmp_path / "a")))
    with train(config(output_dir=str(tmp_path / "b"), init_adapter=str(first.adapter)), progress=False) as second:
        assert second.parts is not None
        start = second.parts.banks["unet"].effective_generators(ADAPTER)
        assert all(
            start[n.removeprefix("unet.").removesuffix(".oft_R.weight")].equal(t)
            for n, t in tensors(first.adapter).items()
        )


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


# -- what goes wrong on the way ---------------------------------------------------------------------------------------


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
    with pytest.raises(TargetError, match="block_size=24 does not divide"), train(settings, progress=False):
        pass
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
    assert not list(folder.glob("*.partial"))
    assert not list(folder.glob("checkpoint-*"))


# -- the run as an object ---------------------------------------------------------------------------------------------


def test_misuse_is_explained(config: Config) -> None:
    run = train(config(), progress=False)
    with pytest.raises(TrainingError, match="use `with train"):
        next(iter(run))
    with run, pytest.raises(TrainingError, match="the run has no result yet"):
        _ = run.result


def test_foreign_accelerators_are_not_disturbed(config: Config, run: Run) -> None:
    theirs = Accelerator(mixed_precision="bf16")
    try:
        with pytest.raises(TrainingError, match="accelerate is in use in this process with other settings"):
            run(config())
        run(config(mixed_precision="bf16"))
        assert theirs.mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state()


def test_break_finishes_the_run(config: Config) -> None:
    with train(config(steps=5), progress=False) as run:
        for step in run:
            if step.step == 2:
                break
    assert run.result.steps == 2
    assert run.result.adapter.is_file()


def test_an_error_in_the_loop_body_is_not_swallowed(config: Config) -> None:
    def go() -> None:
        with train(config(), progress=False) as run:
            for _ in run:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        go()
    assert not (Path(config().output_dir) / "oft_adapter.safetensors").exists()


def test_runs_of_different_precision_in_one_process(config: Config, run: Run) -> None:
    run(config(steps=1, mixed_precision="bf16", overwrite=True))
    run(config(steps=1, mixed_precision="no", overwrite=True))


def test_sampling_in_between_changes_nothing(config: Config, run: Run, tmp_path: Path) -> None:
    _, quiet = run(config(output_dir=str(tmp_path / "a"), gradient_checkpointing=True))
    with train(config(output_dir=str(tmp_path / "b"), gradient_checkpointing=True), progress=False) as noisy:
        for _ in noisy:
            assert noisy.sample(["a {trigger} dog"]).is_file()
            assert noisy.save().is_dir()
            torch.rand(3)
    assert noisy.result.losses == quiet.losses


def test_progress_shows_loss_rate_and_time(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with train(config()) as run:
        for _ in run:
            pass
    shown = capsys.readouterr()
    assert "loss=" in shown.err
    assert "lr=1.0e-03" in shown.err
    assert "3/3" in shown.err
    assert "loading" in shown.out
