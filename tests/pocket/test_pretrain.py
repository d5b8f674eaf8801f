"""The script that pretrains the pocket base, and its stages."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from oft_diffusion.errors import TrainingError
from oft_diffusion.pocket.classifier import AttributeClassifier, load_classifier
from oft_diffusion.pocket.model import LATENT_CHANNELS, build_unet, build_vae
from oft_diffusion.pocket.pretrain import autoencoder, classifiers, denoiser, latents
from oft_diffusion.pocket.pretrain.autoencoder import PictureLoss
from oft_diffusion.pocket.pretrain.captions import NO_CAPTION, NONSENSE, training_caption
from oft_diffusion.pocket.pretrain.classifiers import export_classifier, worn
from oft_diffusion.pocket.pretrain.data import rendered, scene_at, to_model, to_pictures
from oft_diffusion.pocket.pretrain.denoiser import Denoiser
from oft_diffusion.pocket.pretrain.latents import condense
from oft_diffusion.pocket.pretrain.setup import Setup
from oft_diffusion.pocket.pretrain.stage import Stage
from oft_diffusion.pocket.vocabulary import build_tokenizer
from oft_diffusion.pocket.world import CAPTIONED, SIZE, is_held_out, render, sample_scene
from train_scripts import pretrain_pocket

CPU = torch.device("cpu")
SMALL = (16, 16, 16, 16)  # widths of a classifier
PREVIEW = Denoiser.preview  # as it is without the fixture below


def test_nonsense_words_are_put_in_before_the_object_and_in_place_of_nothing():
    rng = random.Random(0)
    known = {word for text in build_tokenizer().get_vocab() for word in [text.removesuffix("</w>")] if len(word) > 2}
    with_nonsense = empty = 0
    for _ in range(3000):
        scene = sample_scene(rng)
        words = training_caption(scene, rng).split()
        empty += not words
        nonsense = [i for i, word in enumerate(words) if word not in known and len(word) > 2]
        assert len(nonsense) <= 1
        if nonsense:
            with_nonsense += 1
            assert nonsense[0] < words.index(scene.object)
    assert empty / 3000 == pytest.approx(NO_CAPTION, abs=0.03)
    assert with_nonsense / 3000 == pytest.approx(NONSENSE * (1 - NO_CAPTION), abs=0.02)


def test_a_twentieth_of_the_combinations_is_held_out_of_every_attribute():
    rng = random.Random(1)
    scenes = [sample_scene(rng) for _ in range(8000)]
    held = [s for s in scenes if is_held_out(s.object, s.colour, s.pattern, s.background)]
    assert 0.035 < len(held) / len(scenes) < 0.065
    for name, values in CAPTIONED.items():
        assert {getattr(s, name) for s in held} == set(values)


def test_pictures_are_rendered_once_and_come_back_through_the_models_form(tmp_path):
    pictures = rendered(tmp_path, 3, seed=5)
    assert [np.array_equal(pictures[i], np.asarray(render(scene_at(5, i)))) for i in range(3)] == [True] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["pictures-3-5.npy"]
    x = to_model(pictures)
    assert x.shape == (3, 3, SIZE, SIZE)
    assert -1 <= x.min() < -0.5 < 0.5 < x.max() <= 1
    assert np.array_equal(np.asarray(to_pictures(x)[2]), pictures[2])


def test_worn_pictures_are_the_same_pictures_a_little_worse():
    x = to_model(np.stack([np.asarray(render(scene_at(0, i))) for i in range(4)]))
    for seed in range(6):
        y = worn(x, torch.Generator().manual_seed(seed))
        assert y.shape == x.shape
        assert 0 < (y - x).abs().mean() < 0.15


def test_the_picture_loss_is_zero_for_equal_pictures_and_sees_a_lost_badge():
    scene = scene_at(0, 3)
    real, bare = (to_model(np.asarray(render(replace(scene, badge=b)))[None]) for b in ("star", "none"))
    loss = PictureLoss(load_classifier())
    assert loss(real, real).item() == pytest.approx(0, abs=1e-5)
    shifted = real + (bare - real).abs().mean()  # as far in pixels, spread over the picture
    assert loss(bare, real) > 2 * loss(shifted, real)


def test_condensed_latents_are_the_principal_components_scaled_to_one():
    torch.manual_seed(0)
    wide = build_vae(8).eval()
    x = to_model(np.stack([np.asarray(render(sample_scene(random.Random(i)))) for i in range(8)]))
    with torch.no_grad():
        means = wide.encode(x).latent_dist.mean
        narrow = condense(wide, means, deviation=0.1)
        posterior = narrow.encode(x).latent_dist
        flat = posterior.mean.permute(0, 2, 3, 1).flatten(0, 2)
        torch.testing.assert_close(flat.T @ flat / len(flat), torch.eye(LATENT_CHANNELS), rtol=0, atol=2e-3)
        assert torch.allclose(posterior.std, torch.tensor(0.1))

        old = means.permute(0, 2, 3, 1).flatten(0, 2)
        _, _, basis = torch.linalg.svd(old - old.mean(0), full_matrices=False)
        kept = (old - old.mean(0)) @ basis[:LATENT_CHANNELS].T @ basis[:LATENT_CHANNELS] + old.mean(0)
        kept = kept.view(8, 16, 16, 8).permute(0, 3, 1, 2)
        expected = wide.decoder.conv_in(wide.post_quant_conv(kept))
        entered = narrow.decoder.conv_in(narrow.post_quant_conv(posterior.mean))
        inside = (..., slice(1, -1), slice(1, -1))
        assert (entered[inside] - expected[inside]).abs().max() < 2e-3 * expected.abs().max()
        assert (kept - means).abs().max() > 1e-3, "nothing was left out"


# The optimizers


def test_matrices_learn_by_muon_and_the_rest_by_adam(tmp_path):
    net = nn.ModuleDict({"conv": nn.Conv2d(16, 32, 3), "embedding": nn.Embedding(40, 32), "last": nn.Conv2d(32, 3, 1)})
    stage = Stage(tmp_path / "s.safetensors", net, 1e-2, 10, {})
    assert set(stage.matrices) == {"conv.weight"}
    before = {k: v.detach().clone() for k, v in stage.parameters.items()}
    stage.update(torch.stack([(torch.randn(p.shape) * p).sum() for p in net.parameters()]).sum())
    moved = {name: (stage.parameters[name] - before[name]).detach() for name in before}
    assert all(change.abs().max() > 0 for change in moved.values())
    # a Muon update is near an orthogonal matrix: its singular values are about equal
    singular = torch.linalg.svdvals(moved["conv.weight"].view(32, -1))
    assert singular.min() > 0.3 * singular.max()


# The whole script


@pytest.fixture
def tiny(monkeypatch):
    """The script with models of a few thousand weights, and no pictures to draw for previews."""
    unet, vae = build_unet().config, build_vae().config
    small_unet = dict(unet) | {"block_out_channels": (16, 16), "norm_num_groups": 4, "attention_head_dim": 2}
    small_vae = dict(vae) | {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 4}

    def small_build(latent_channels=LATENT_CHANNELS):
        return AutoencoderKL.from_config(small_vae | {"latent_channels": latent_channels})

    monkeypatch.setattr(denoiser, "build_unet", lambda: UNet2DConditionModel.from_config(small_unet))
    monkeypatch.setattr(autoencoder, "build_vae", small_build)
    monkeypatch.setattr(latents, "build_vae", small_build)
    monkeypatch.setattr(classifiers, "AttributeClassifier", lambda widths: AttributeClassifier(SMALL))
    monkeypatch.setattr(Denoiser, "preview", lambda self: None)
    return small_build


def snapshots(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(out / f"{name}.safetensors") for name in pretrain_pocket.STAGES}


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, monkeypatch):
    fixed = ["--pictures", "12", "--batch-size", "2", "--snapshot-every", "2", "--no-bf16"]
    monkeypatch.setattr("oft_diffusion.pocket.pretrain.classifiers.BATCH", 2)
    monkeypatch.setattr(autoencoder, "BATCH", 2)
    steps = [word for stage in pretrain_pocket.STAGES for word in (f"--{stage}-steps", "4")]
    whole, parts, exported = tmp_path / "whole", tmp_path / "parts", tmp_path / "not" / "there yet"
    pretrain_pocket.main(["--out", str(whole), *steps, *fixed])

    class InterruptedRunError(Exception):
        pass

    update = Stage.update

    def interrupt_at(path: str, step: int):
        def wrapped(self, loss):
            if self.path.name == path and self.step == step:
                raise InterruptedRunError
            update(self, loss)

        monkeypatch.setattr(Stage, "update", wrapped)

    for stage in pretrain_pocket.STAGES:
        interrupt_at(f"{stage}.safetensors", 3)  # one step after a snapshot, so the resumed run has to repeat it
        with pytest.raises(InterruptedRunError):
            pretrain_pocket.main(["--out", str(parts), *steps, *fixed])
    monkeypatch.setattr(Stage, "update", update)
    torch.rand(7)  # the global generator must not matter
    pretrain_pocket.main(["--out", str(parts), *steps, *fixed, "--export", str(exported)])
    for stage, tensors in snapshots(whole).items():
        resumed = snapshots(parts)[stage]
        assert tensors.keys() == resumed.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, resumed[name]), f"{stage}: {name}"
    # what was exported is what a pipeline and a classifier load
    pipe = StableDiffusionPipeline.from_pretrained(exported / "weights")
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, snapshots(parts)["unet"][f"ema/unet.{name}"].half().float()), name
    AttributeClassifier(SMALL).load_state_dict(load_file(exported / "classifier.safetensors"))
    made = json.loads((exported / "pretraining.json").read_text())
    assert {name: stage["steps"] for name, stage in made["stages"].items()} == dict.fromkeys(pretrain_pocket.STAGES, 4)


def setup(out: Path) -> Setup:
    return Setup(out, np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8), 0, CPU, bf16=False, snapshot_every=2)


def test_a_stage_that_was_never_trained_is_not_gone_past(tiny, tmp_path):
    with pytest.raises(TrainingError, match="perception has no snapshot"):
        pretrain_pocket.main(["--out", str(tmp_path), "--pictures", "4", "--stages", "unet"])
    assert not (tmp_path / "unet.safetensors").exists()


def test_latents_and_what_learns_from_them_belong_to_one_autoencoder(tiny, tmp_path):
    own = replace(setup(tmp_path), pictures=np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8))
    torch.manual_seed(0)
    wide = tiny(8).requires_grad_(False)
    vae, of = autoencoder.condensed(own, wide, "first")
    first = autoencoder.cached_latents(own, vae, of)
    again, same = autoencoder.condensed(own, wide, "first")
    assert same == of
    assert torch.equal(autoencoder.cached_latents(own, again, same), first)
    torch.manual_seed(1)
    other, changed = autoencoder.condensed(own, tiny(8).requires_grad_(False), "second")
    assert changed != of
    assert not torch.equal(autoencoder.cached_latents(own, other, changed), first)
    learner = Denoiser(own, vae, 1, 2, of)
    learner.train(first)
    with pytest.raises(TrainingError, match="is of another run"):
        Denoiser(own, other, 1, 2, changed)


def test_the_denoiser_sees_no_held_out_combination(tiny, tmp_path, monkeypatch):
    seen = []

    def noting(scene, rng):
        seen.append(scene)
        return training_caption(scene, rng)

    monkeypatch.setattr(denoiser, "training_caption", noting)
    count = 60
    assert any(is_held_out(s.object, s.colour, s.pattern, s.background) for s in (scene_at(0, i) for i in range(count)))
    learner = Denoiser(setup(tmp_path), tiny().requires_grad_(False), 20, batch_size=8, of="x")
    learner.train(torch.randn(count, LATENT_CHANNELS, 16, 16))
    assert len(seen) == 160
    assert not [s for s in seen if is_held_out(s.object, s.colour, s.pattern, s.background)]


@pytest.mark.slow
def test_previews_are_of_the_moving_average(tiny, tmp_path):
    learner = Denoiser(setup(tmp_path), tiny(), 1, batch_size=2, of="x")
    unet = {k: v.clone() for k, v in learner.unet.state_dict().items()}

    def preview() -> np.ndarray:
        PREVIEW(learner)
        with Image.open(tmp_path / f"preview-unet-{learner.stage.step:06d}.png") as sheet:
            return np.asarray(sheet.convert("RGB"))

    first = preview()
    assert first.shape == (4 * SIZE, len(denoiser.PREVIEW_PROMPTS) // 4 * SIZE, 3)
    cells = first.reshape(4, SIZE, 4, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)
    assert len({cell.tobytes() for cell in cells}) == len(denoiser.PREVIEW_PROMPTS), "each has a picture of its own"

    with torch.no_grad():
        learner.unet.conv_out.weight.neg_()
    learner.stage.step = 7
    assert np.array_equal(preview(), first), "what is being learnt is not drawn"
    assert torch.equal(learner.unet.conv_out.weight, -unet["conv_out.weight"]), "and is back afterwards"
    learner.stage.ema["unet.conv_out.weight"].neg_()
    assert not np.array_equal(preview(), first)
    assert {p.name for p in tmp_path.iterdir()} == {"preview-unet-000000.png", "preview-unet-000007.png"}


def test_exports_are_whole_folders_that_replace_the_last_one(tiny, tmp_path):
    learner = Denoiser(setup(tmp_path), tiny(), 1, batch_size=2, of="x")
    before = {k: v.clone() for k, v in learner.unet.state_dict().items()}
    for _ in range(2):
        learner.export(tmp_path / "weights")
    assert all(torch.equal(v, before[k]) for k, v in learner.unet.state_dict().items())
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "weights")
    assert loaded.unet.dtype == torch.float32
    assert not any("recall" in name for name in loaded.text_encoder.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_the_classifier_is_exported_in_half_precision(tmp_path):
    export_classifier(AttributeClassifier(), tmp_path / "c.safetensors")
    assert {t.dtype for t in load_file(tmp_path / "c.safetensors").values()} == {torch.float16}
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_snapshot_of_another_run_is_not_gone_on_from(tmp_path):
    layer = nn.ModuleDict({"layer": nn.Linear(16, 16)})
    stage = Stage(tmp_path / "vae.safetensors", layer, 1e-3, 4, {"seed": 0})
    stage.update(layer["layer"](torch.ones(1, 16)).sum())
    stage.save()
    assert Stage(stage.path, layer, 1e-3, 4, {"seed": 0}).step == 1
    assert Stage(stage.path, layer, 1e-3, 9, {"seed": 0}).step == 1, "a run may be prolonged"
    for lr, run in ((1e-3, {"seed": 1}), (2e-3, {"seed": 0})):
        with pytest.raises(TrainingError, match="is of another run"):
            Stage(stage.path, layer, lr, 4, run)
    for _ in range(2):
        stage.update(layer["layer"](torch.ones(1, 16)).sum())
    stage.save()
    assert Stage(stage.path, layer, 1e-3, 4, {"seed": 0}).step == 3
    with pytest.raises(TrainingError, match="where the learning rate falls already"):
        Stage(stage.path, layer, 1e-3, 9, {"seed": 0})
