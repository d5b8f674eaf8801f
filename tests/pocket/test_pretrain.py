"""The script that pretrains the pocket base."""

import argparse
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from oft_diffusion.errors import TrainingError
from oft_diffusion.pocket.captions import training_caption
from oft_diffusion.pocket.latents import condense
from oft_diffusion.pocket.model import SIZE, build_vae
from oft_diffusion.pocket.stage import Stage
from oft_diffusion.pocket.vocabulary import build_tokenizer
from oft_diffusion.pocket.world import render, sample_scene
from train_scripts import pretrain_pocket


def test_nonsense_words_are_put_in_before_the_object_and_in_place_of_nothing():
    rng = random.Random(0)
    known = {word for text in build_tokenizer().get_vocab() for word in [text.removesuffix("</w>")] if len(word) > 2}
    with_nonsense = empty = 0
    for _ in range(2000):
        scene = sample_scene(rng)
        words = training_caption(scene, rng).split()
        empty += not words
        nonsense = [i for i, word in enumerate(words) if word not in known and len(word) > 2]
        assert len(nonsense) <= 1
        if nonsense:
            with_nonsense += 1
            assert nonsense[0] < words.index(scene.object)
    assert 0.07 < empty / 2000 < 0.13
    assert 0.09 < with_nonsense / 2000 < 0.16


def test_condensed_latents_are_the_principal_components_scaled_to_one():
    torch.manual_seed(0)
    wide = build_vae(8).eval()
    pictures = np.stack([np.asarray(render(sample_scene(random.Random(i)), SIZE)) for i in range(8)])
    x = pretrain_pocket.to_model(pictures, torch.device("cpu"))
    with torch.no_grad():
        means = wide.encode(x).latent_dist.mean
        narrow = condense(wide, means, deviation=0.1)
        posterior = narrow.encode(x).latent_dist
        flat = posterior.mean.permute(0, 2, 3, 1).flatten(0, 2)
        torch.testing.assert_close(flat.T @ flat / len(flat), torch.eye(4), rtol=0, atol=1e-3)
        assert torch.allclose(posterior.std, torch.tensor(0.1))

        old = means.permute(0, 2, 3, 1).flatten(0, 2)
        _, _, basis = torch.linalg.svd(old - old.mean(0), full_matrices=False)
        kept = (old - old.mean(0)) @ basis[:4].T @ basis[:4] + old.mean(0)
        kept = kept.view(8, 16, 16, 8).permute(0, 3, 1, 2)
        expected = wide.decoder.conv_in(wide.post_quant_conv(kept))
        entered = narrow.decoder.conv_in(narrow.post_quant_conv(posterior.mean))
        inside = (..., slice(1, -1), slice(1, -1))
        assert (entered[inside] - expected[inside]).abs().max() < 1e-3 * expected.abs().max()
        assert (kept - means).abs().max() > 0.01, "nothing was left out"


@pytest.fixture
def tiny(monkeypatch):
    """The script with models of a few thousand weights, and no pictures to draw for previews."""
    import oft_diffusion.pocket.model as model

    unet, vae = model.build_unet().config, model.build_vae().config
    small_unet = dict(unet) | {
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
    }
    small_vae = dict(vae) | {"block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    monkeypatch.setattr(pretrain_pocket, "build_unet", lambda: UNet2DConditionModel.from_config(small_unet))

    def small_build(latent_channels=model.LATENT_CHANNELS):
        return AutoencoderKL.from_config(small_vae | {"latent_channels": latent_channels})

    monkeypatch.setattr(pretrain_pocket, "build_vae", small_build)
    monkeypatch.setattr("oft_diffusion.pocket.latents.build_vae", small_build)
    monkeypatch.setattr(pretrain_pocket.Denoiser, "snapshot", lambda self: None)
    return pretrain_pocket


def snapshots(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(out / f"{name}.safetensors") for name in ("vae", "decoder", "unet")}


def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, monkeypatch):
    fixed = ["--pictures", "24", "--batch-size", "4", "--snapshot-every", "2"]
    steps = ["--vae-steps", "4", "--decoder-steps", "4", "--unet-steps", "4"]
    rng_pictures = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(tiny, "rendered", lambda out, count, seed: rng_pictures)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny.main(["--out", str(whole), *steps, *fixed])

    class InterruptedRunError(Exception):
        pass

    update = tiny.Stage.update

    def interrupt_at(path: str, step: int):
        def wrapped(self, loss):
            if self.path.name == path and self.step == step:
                raise InterruptedRunError
            update(self, loss)

        monkeypatch.setattr(tiny.Stage, "update", wrapped)

    for name in ("vae.safetensors", "decoder.safetensors", "unet.safetensors"):
        interrupt_at(name, 3)  # one step after a snapshot, so the resumed run has to repeat it
        with pytest.raises(InterruptedRunError):
            tiny.main(["--out", str(parts), *steps, *fixed])
    monkeypatch.setattr(tiny.Stage, "update", update)
    torch.rand(7)  # the global generator must not matter
    tiny.main(["--out", str(parts), *steps, *fixed])
    for stage, tensors in snapshots(whole).items():
        resumed = snapshots(parts)[stage]
        assert tensors.keys() == resumed.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, resumed[name]), f"{stage}: {name}"


def test_exports_are_whole_folders_that_replace_the_last_one(tiny, tmp_path):
    args = argparse.Namespace(out=tmp_path, seed=0, pictures=8, unet_steps=1, batch_size=2, export=tmp_path / "weights")
    denoiser = tiny.Denoiser(args, tiny.build_vae(), torch.device("cpu"))
    before = {k: v.clone() for k, v in denoiser.unet.state_dict().items()}
    for _ in range(2):
        denoiser.export(args.export)
    assert all(torch.equal(v, before[k]) for k, v in denoiser.unet.state_dict().items())
    loaded = StableDiffusionPipeline.from_pretrained(args.export)
    assert loaded.unet.dtype == torch.float32
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_a_snapshot_of_another_run_is_not_gone_on_from(tmp_path):
    layer = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    stage = Stage(tmp_path / "vae.safetensors", layer, 1e-3, 4, {"seed": 0})
    stage.update(layer["layer"](torch.ones(1, 2)).sum())
    stage.save()
    assert Stage(stage.path, layer, 1e-3, 4, {"seed": 0}).step == 1
    for lr, steps, run in ((1e-3, 4, {"seed": 1}), (1e-3, 5, {"seed": 0}), (2e-3, 4, {"seed": 0})):
        with pytest.raises(TrainingError, match="is of another run"):
            Stage(stage.path, layer, lr, steps, run)


def test_an_export_needs_a_place(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain_pocket.main(["--out", str(tmp_path / "run"), "--export-only"])
    assert "--export FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
