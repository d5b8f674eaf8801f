"""The loop: it learns, however the work is cut, cached or saved; it stops in good order; it says when it cannot."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from oft_diffusion.errors import TrainingError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.text_encoders import HIDDEN_STATES
from oft_diffusion.training import TrainConfig, TrainingRun, train
from oft_diffusion.training.batches import Batches
from oft_diffusion.training.families.kinds import StableDiffusion
from oft_diffusion.training.losses import losses
from oft_diffusion.training.model import ADAPTER
from tests.helpers.tiny_sd import draw_pictures
from tests.training.conftest import Run

Config = Callable[..., TrainConfig]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    components = load_adapter_file(path).components
    return {f"{part}.{name}": tensor for part, state in components.items() for name, tensor in state.items()}


def test_it_learns_and_leaves_the_base_alone(config: Config) -> None:
    def fresh_loss(run: TrainingRun) -> float:
        assert run.parts is not None
        with torch.no_grad():  # on draws that training does not see
            return sum(float(losses(run.parts, run.parts.batches.at(n + 10**6), run.config)[0]) for n in range(20)) / 20

    with train(config(steps=100, learning_rate=1e-2, batch_size=2), progress=False) as run:
        assert run.parts is not None
        base = {k: v.clone() for k, v in run.parts.family.module("unet").state_dict().items()}
        before = fresh_loss(run)
        for _ in run:
            pass
        assert fresh_loss(run) < 0.88 * before
        assert run.parts.banks["unet"].orthogonality_error(ADAPTER) < 1e-5
        after = run.parts.family.module("unet").state_dict()
        assert after.keys() == base.keys()
        assert all(after[name].equal(base[name]) for name in base)
    assert run.result.silent_layers == ()


def test_one_sample_is_learned_by_heart(config: Config, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Batches.at
    monkeypatch.setattr(Batches, "at", lambda self, number, *args: original(self, 0, *args))
    _, result = run(config(steps=50, learning_rate=0.1, targets="attention+mlp"))
    assert result.losses[-1] < 0.4 * result.losses[0]


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


@pytest.mark.thinned(2)
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
    a_steps, a = run(config(steps=4, output_dir=str(tmp_path / "a"), **one))
    b_steps, b = run(config(steps=4, output_dir=str(tmp_path / "b"), **other))
    assert a.losses == pytest.approx(b.losses, rel=1e-5)
    assert [s.grad_norm for s in a_steps] == pytest.approx([s.grad_norm for s in b_steps], rel=1e-3)
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


def test_caches_spare_the_encoders(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*args: object) -> None:
        raise AssertionError("not from the cache")

    with train(config(cache_latents=True, cache_text_embeddings=True), progress=False) as run:
        monkeypatch.setattr(StableDiffusion, "encode_image", called)
        monkeypatch.setattr(StableDiffusion, "encode_text", called)
        assert len(list(run)) == 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_recomputes(checkpointing: bool, config: Config) -> None:
    calls: Counter[str] = Counter()
    settings = config(steps=2, text_encoder=True, gradient_checkpointing=checkpointing)
    with train(settings, progress=False) as run:
        assert run.parts is not None
        family = run.parts.family
        family.module("unet").down_blocks[0].attentions[0].transformer_blocks[0].ff.register_forward_pre_hook(
            lambda *args: calls.update(["unet"])
        )
        [layer] = [m for name, m in family.module("text_encoder").named_modules() if name.endswith("layers.0.mlp")]
        layer.register_forward_pre_hook(lambda *args: calls.update(["text_encoder"]))
        list(run)
    assert calls == dict.fromkeys(("unet", "text_encoder"), 4 if checkpointing else 2)


def test_flip_changes_what_is_seen(config: Config, run: Run, tmp_path: Path) -> None:
    _, a = run(config(output_dir=str(tmp_path / "a"), flip=True, steps=6))
    _, b = run(config(output_dir=str(tmp_path / "b"), steps=6))
    assert a.losses != b.losses


def test_captions_are_trained_on(config: Config, run: Run, tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "p", count=2)
    _, plain = run(config(instance_dir=str(folder), output_dir=str(tmp_path / "a"), steps=2))
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("a photo of sks mug")  # what the pictures have by default
    _, same = run(config(instance_dir=str(folder), output_dir=str(tmp_path / "b"), steps=2))
    assert same.losses == plain.losses
    first = []
    for path in sorted(folder.glob("*.txt")):
        path.write_text("a sks mug on a red table in a room")
        _, other = run(config(instance_dir=str(folder), output_dir=str(tmp_path / path.stem), steps=2))
        assert other.losses != plain.losses
        first.append(other.losses[0] != plain.losses[0])
        path.unlink()
    assert sorted(first) == [False, True]  # one of them is the first step's picture


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, *(0.5 + 0.5 * math.cos(math.pi * i / 4) for i in range(4))]),
    ],
)
def test_schedules(schedule: str, rates: list[float], config: Config, run: Run) -> None:
    steps, _ = run(config(steps=6, warmup_steps=2, lr_schedule=schedule))
    assert [s.learning_rate for s in steps] == pytest.approx([rate * 1e-3 for rate in rates])


def test_a_constant_rate_may_fall_at_the_end(config: Config, run: Run) -> None:
    steps, _ = run(config(steps=6, warmup_steps=1, decay_steps=3))
    falling = [0.5 + 0.5 * math.cos(math.pi * i / 3) for i in range(3)]
    assert [s.learning_rate for s in steps] == pytest.approx([rate * 1e-3 for rate in (0, 1, 1, *falling)])


def test_min_snr_weighs_the_loss(config: Config, run: Run, tmp_path: Path) -> None:
    with train(config(min_snr_gamma=0.004, steps=1), progress=False) as running:
        assert running.parts is not None
        [weight] = running.parts.noise.weight(running.parts.batches.at(0).levels).tolist()
        [step] = list(running)
    [plain], _ = run(config(steps=1, output_dir=str(tmp_path / "plain")))
    assert weight < 0.99  # at every timestep: the tiny base's SNR ends above gamma
    assert step.loss == pytest.approx(weight * plain.loss, rel=1e-5)


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
    heavy, _ = run(config(prior_preservation=True, class_dir=str(class_dir), prior_weight=9.0, overwrite=True))
    assert heavy[0].prior_loss == steps[0].prior_loss
    assert heavy[0].grad_norm > 2 * steps[0].grad_norm  # before clipping
    assert heavy[-1].instance_loss != steps[-1].instance_loss


def test_fewer_class_images_than_instance_images_per_step(config: Config, run: Run, tmp_path: Path) -> None:
    class_dir = draw_pictures(tmp_path / "class", count=2)
    knobs = {"prior_preservation": True, "class_dir": str(class_dir), "batch_size": 2, "overwrite": True, "steps": 2}
    both, _ = run(config(**knobs))
    same, _ = run(config(**knobs, class_batch_size=2))
    fewer, _ = run(config(**knobs, class_batch_size=1))
    assert [s.loss for s in same] == [s.loss for s in both]
    assert fewer[0].instance_loss == pytest.approx(both[0].instance_loss)
    assert fewer[0].prior_loss != both[0].prior_loss
    # two steps of one class image see, together, what one step of two sees
    with train(config(**knobs, class_batch_size=1, learning_rate=1e-12), progress=False) as still:
        apart = [step.prior_loss for step in still]
    assert None not in apart
    assert sum(x for x in apart if x is not None) / 2 == pytest.approx(both[0].prior_loss, rel=1e-4)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_base_itself_as_the_class_images_target(
    config: Config, run: Run, tmp_path: Path, *, text_encoder: bool
) -> None:
    class_dir = draw_pictures(tmp_path / "class", count=2)
    knobs = {"prior_preservation": True, "class_dir": str(class_dir), "text_encoder": text_encoder, "overwrite": True}
    noise, _ = run(config(**knobs, learning_rate=1e-2, steps=3))
    base, _ = run(config(**knobs, learning_rate=1e-2, steps=3, prior_target="base"))
    assert base[0].prior_loss is not None
    assert base[-1].prior_loss is not None
    assert noise[-1].prior_loss is not None
    assert base[0].prior_loss < 1e-10  # the adapter starts as the identity
    assert base[0].instance_loss == noise[0].instance_loss
    assert 0 < base[-1].prior_loss < noise[-1].prior_loss / 10  # what the adapter changed, and no noise
    assert base[-1].instance_loss != noise[-1].instance_loss


def test_a_large_epsilon_slows_what_has_small_gradients_most(config: Config, run: Run, tmp_path: Path) -> None:
    _, usual = run(config(steps=1))
    _, large = run(config(steps=1, adam_epsilon=1e-3, output_dir=str(tmp_path / "large")))
    before, after = ({n: t.abs().flatten() for n, t in tensors(r.adapter).items()} for r in (usual, large))
    moved = {n: b > 0.9e-3 for n, b in before.items()}  # by the whole learning rate, as Adam's first step does
    slowed = torch.cat([after[n][moved[n]] / before[n][moved[n]] for n in before])
    assert len(slowed) > 1000
    assert slowed.max() < 1
    assert slowed.quantile(0.9) > 3 * slowed.quantile(0.1)


def test_bfloat16_base_with_float32_generators(config: Config, run: Run, tmp_path: Path) -> None:
    _, half = run(config(mixed_precision="bf16", output_dir=str(tmp_path / "half"), validation_prompts=["a dog"]))
    _, full = run(config(output_dir=str(tmp_path / "full")))
    assert half.losses == pytest.approx(full.losses, rel=0.05)
    assert half.losses != full.losses
    assert all(t.dtype == torch.float32 for t in tensors(half.adapter).values())


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("settings", "written", "layers"),
    [
        ({}, {"block_size": 16, "targets": "attention", "parametrisation": "cayley", "scaled": False}, 32),
        ({"scaled": True}, {"scaled": True}, 32),
        ({"share_qkv": True}, {"share_qkv": True}, 32),
        ({"coft_eps": 1e-3}, {"coft_eps": 1e-3}, 32),
        ({"parametrisation": "cayley_neumann", "neumann_order": 4},
         {"parametrisation": "cayley_neumann", "neumann_order": 4}, 32),
        ({"targets": "attention+mlp"}, {"targets": "attention+mlp"}, 40),
        ({"targets": [r".*attn2\.to_q"]}, {"targets": [r".*attn2\.to_q"]}, 4),
        ({"block_size": 8}, {"block_size": 8}, 32),
        ({"block_size": "auto"}, {"block_size": 32}, 32),
    ],
    ids=str,
)  # fmt: skip
def test_adapter_settings_reach_the_file(
    settings: dict[str, object], written: dict[str, object], layers: int, config: Config, run: Run
) -> None:
    _, result = run(config(learning_rate=1e-2, **settings))
    file = load_adapter_file(result.adapter)
    assert file.metadata is not None
    assert {key: file.metadata.components["unet"].to_dict()[key] for key in written} == written
    assert {key: file.metadata.training[key] for key in settings} == settings
    found = file.components["unet"]
    assert len(found) == layers
    block_size = file.metadata.components["unet"].block_size
    assert isinstance(block_size, int)
    assert {tensor.shape[1] for tensor in found.values()} == {block_size * (block_size - 1) // 2}
    assert max(float(tensor.abs().max()) for tensor in found.values()) > 0


@pytest.mark.parametrize(("state", "layers"), [(-1, {0, 1}), (-2, {0})])
def test_text_encoder_layers_that_the_pipeline_never_uses_are_not_adapted(
    state: int, layers: set[int], config: Config, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HIDDEN_STATES, "StableDiffusion", {"text_encoder": state})
    _, result = run(config(text_encoder=True))
    names = load_adapter_file(result.adapter).components["text_encoder"]
    assert {int(name.partition("layers.")[2].partition(".")[0]) for name in names} == layers


def test_coft_bounds_what_the_file_holds(config: Config, run: Run, tmp_path: Path) -> None:
    _, bound = run(config(learning_rate=1e-2, coft_eps=1e-3, output_dir=str(tmp_path / "bound")))
    _, free = run(config(learning_rate=1e-2, output_dir=str(tmp_path / "free")))
    largest, unbound = (
        max(float((2 * t.square().sum(dim=1)).sqrt().max()) for t in tensors(result.adapter).values())
        for result in (bound, free)
    )
    assert 0 < largest <= 1e-3 * (1 + 1e-5) < unbound


def test_a_scaled_run_steps_shorter(config: Config, run: Run, tmp_path: Path) -> None:
    # Adam's first step has the learning rate's length, and the file holds what the rotations are made of.
    largest = {}
    for scaled in (False, True):
        _, result = run(config(steps=1, scaled=scaled, output_dir=str(tmp_path / str(scaled))))
        largest[scaled] = max(float(t.abs().max()) for t in tensors(result.adapter).values())
    assert largest[True] == pytest.approx(largest[False] / (2 * math.sqrt(15)), rel=1e-3)


def test_other_settings_reach_the_file(config: Config, run: Run) -> None:
    settings = {"min_snr_gamma": 5.0, "weight_decay": 0.1, "lr_schedule": "cosine", "seed": 4, "flip": True}
    _, result = run(config(**settings))
    metadata = load_adapter_file(result.adapter).metadata
    assert metadata is not None
    assert {key: metadata.training[key] for key in settings} == settings


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


@pytest.mark.thinned(2)
@pytest.mark.parametrize("ending", ["finished", "broken off", "failed"])
def test_the_callers_randomness_goes_on_as_if_nothing_had_been(ending: str, config: Config) -> None:
    torch.manual_seed(5)
    random.seed(5)
    expected = (torch.rand(3), random.random())
    torch.manual_seed(5)
    random.seed(5)
    with suppress(ZeroDivisionError), train(config(steps=2), progress=False) as run:
        for _ in run:
            if ending == "broken off":
                break
            if ending == "failed":
                raise ZeroDivisionError
    assert torch.rand(3).equal(expected[0])
    assert random.random() == expected[1]


def test_runs_of_different_precision_in_one_process(config: Config, run: Run) -> None:
    [half], _ = run(config(steps=1, mixed_precision="bf16", overwrite=True))
    [full], _ = run(config(steps=1, mixed_precision="no", overwrite=True))
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=0.05)


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
