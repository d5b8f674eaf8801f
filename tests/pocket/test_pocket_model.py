import argparse
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from oft_diffusion.pocket import pocket_path, pocket_pipeline
from oft_diffusion.pocket.captions import training_caption
from oft_diffusion.pocket.latents import condense
from oft_diffusion.pocket.model import SIZE, build_vae
from oft_diffusion.pocket.vocabulary import COMMON_WORDS, MAX_LENGTH, build_tokenizer
from oft_diffusion.pocket.world import CAPTIONED, caption, render, sample_scene

SCRIPT = Path(__file__).parents[2] / "train_scripts" / "pretrain_pocket.py"


@pytest.fixture(scope="module")
def pretrain():
    spec = importlib.util.spec_from_file_location("pretrain_pocket", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


# The tokenizer


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_tokenises_within_the_length_and_without_unknown_ids(tokenizer, text):
    ids = tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == MAX_LENGTH
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in ids
    assert max(ids) < len(tokenizer)


@given(words=st.lists(st.text("abcdefghijklmnopqrstuvwxyzäßéñøжд猫한", min_size=1, max_size=8), min_size=1, max_size=4))
def test_words_of_any_script_come_back(tokenizer, words):
    text = " ".join(words)
    ids = tokenizer(text).input_ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    # A script without spaces and a Latin letter side by side are still one word, so spaces stay where they were.
    assert decoded == normal


def test_words_of_the_world_and_common_words_are_single_tokens(tokenizer):
    words = {word for values in CAPTIONED.values() for word in values} | set(COMMON_WORDS)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)


def test_no_caption_is_cut_off(tokenizer, pretrain):
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(1000)]
    for text in [*(caption(s, rng) for s in scenes), *(training_caption(s, rng) for s in scenes)]:
        assert len(tokenizer(text).input_ids) <= MAX_LENGTH


# The shipped folder


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(pocket_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_folder_is_small_and_holds_no_pickle():
    files = [file for file in pocket_path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt"}
    for name, dtype in (("unet", torch.float16), ("vae", torch.float16), ("text_encoder", torch.float32)):
        [file] = (pocket_path() / name).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()} == {dtype}


def test_plain_diffusers_loads_it_with_the_real_classes(pipe):
    assert isinstance(pipe.tokenizer, CLIPTokenizer)
    assert isinstance(pipe.text_encoder, CLIPTextModel)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings == MAX_LENGTH
    assert json.loads((pocket_path() / "model_index.json").read_text())["safety_checker"] in (None, [None, None])
    assert all((pocket_path() / "tokenizer" / name).exists() for name in ("vocab.json", "merges.txt"))


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds(pipe, tokenizer):
    assert pipe.tokenizer.get_vocab() == tokenizer.get_vocab()
    text = "a zwx striped mug, photo of an Ünïcode 猫 in the snow"
    assert pipe.tokenizer(text).input_ids == tokenizer(text).input_ids


def test_its_dtype_is_float32_unless_another_is_asked_for():
    assert pocket_pipeline().unet.dtype == torch.float32
    assert pocket_pipeline(torch.bfloat16).unet.dtype == torch.bfloat16


def test_it_draws_what_the_seed_says_and_not_a_flat_field(pipe):
    def draw(prompt: str, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return np.asarray(pipe(prompt, num_inference_steps=8, generator=generator).images[0], dtype=np.float32)

    mug = draw("a red mug in the snow", 0)
    assert mug.shape == (64, 64, 3)
    assert mug.std() > 25
    assert np.array_equal(mug, draw("a red mug in the snow", 0))
    assert np.abs(mug - draw("a red mug in the snow", 1)).mean() > 5
    night = draw("a red mug at night", 0)
    assert mug[:12].mean() > night[:12].mean() + 40  # the sky


def test_every_attention_layer_can_be_cut_into_blocks_of_32(pipe):
    layers = [
        module for name, module in pipe.unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    assert layers
    assert all(layer.in_features % 32 == 0 for layer in layers)


def test_latents_have_unit_variance(pipe):
    rng = random.Random(0)
    from oft_diffusion.pocket import render

    pictures = np.stack([np.asarray(render(sample_scene(rng))) for _ in range(16)])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    with torch.no_grad():
        posterior = pipe.vae.encode(x).latent_dist
        back = pipe.vae.decode(posterior.mode()).sample
    assert (posterior.mean * pipe.vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.15)
    assert (back - x).abs().mean() < 0.1


# The script that makes it


def test_nonsense_words_are_put_in_before_the_object_and_in_place_of_nothing(pretrain):
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


def test_condensed_latents_are_the_principal_components_scaled_to_one(pretrain):
    torch.manual_seed(0)
    wide = build_vae(8).eval()
    pictures = np.stack([np.asarray(render(sample_scene(random.Random(i)), SIZE)) for i in range(8)])
    x = pretrain.to_model(pictures, torch.device("cpu"))
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
def tiny(pretrain, monkeypatch):
    """The script with models of a few thousand weights, and no pictures to draw for previews."""
    import oft_diffusion.pocket.model as model

    unet, vae = model.build_unet().config, model.build_vae().config
    small_unet = dict(unet) | {
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
    }
    small_vae = dict(vae) | {"block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    monkeypatch.setattr(pretrain, "build_unet", lambda: UNet2DConditionModel.from_config(small_unet))

    def small_build(latent_channels=model.LATENT_CHANNELS):
        return AutoencoderKL.from_config(small_vae | {"latent_channels": latent_channels})

    monkeypatch.setattr(pretrain, "build_vae", small_build)
    monkeypatch.setattr("oft_diffusion.pocket.latents.build_vae", small_build)
    monkeypatch.setattr(pretrain.Denoiser, "snapshot", lambda self: None)
    return pretrain


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
    args = argparse.Namespace(out=tmp_path, seed=0, unet_steps=1, batch_size=2, export=tmp_path / "weights")
    denoiser = tiny.Denoiser(args, tiny.build_vae(), torch.device("cpu"))
    before = {k: v.clone() for k, v in denoiser.unet.state_dict().items()}
    for _ in range(2):
        denoiser.export(args.export)
    assert all(torch.equal(v, before[k]) for k, v in denoiser.unet.state_dict().items())
    loaded = StableDiffusionPipeline.from_pretrained(args.export)
    assert loaded.unet.dtype == torch.float32
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]
