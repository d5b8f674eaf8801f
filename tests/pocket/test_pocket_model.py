import json
import random

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from oft_diffusion.evaluation.prompts import held_out_prompts
from oft_diffusion.evaluation.reading import read
from oft_diffusion.generate import generate
from oft_diffusion.pocket import GUIDANCE, STEPS, pocket_path, pocket_pipeline
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.pocket.pretrain.captions import training_caption
from oft_diffusion.pocket.vocabulary import COMMON_WORDS, MAX_LENGTH, build_tokenizer
from oft_diffusion.pocket.world import CAPTIONED, caption, sample_scene


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


def test_no_caption_is_cut_off(tokenizer):
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


@pytest.mark.slow
def test_it_follows_captions_that_it_has_never_seen(pipe):
    asked = held_out_prompts(12)
    found = generate(pipe, [p.text for p in asked], range(12), steps=STEPS, guidance=GUIDANCE, batch_size=12)
    readings = read(load_classifier(), [picture.image for picture in found])
    right = {name: sum(r[name] == p.named[name] for r, p in zip(readings, asked, strict=True)) for name in CAPTIONED}
    assert min(right[name] for name in ("object", "colour", "background")) >= 11
    assert right["pattern"] >= 9  # spots are what it gets wrong


def test_it_draws_what_the_seed_says_and_not_a_flat_field(pipe):
    def draw(prompt: str, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return np.asarray(pipe(prompt, num_inference_steps=8, generator=generator).images[0], dtype=np.float32)

    mug = draw("a red mug in the snow", 0)
    assert mug.shape == (128, 128, 3)
    assert mug.std() > 25
    assert np.array_equal(mug, draw("a red mug in the snow", 0))
    assert np.abs(mug - draw("a red mug in the snow", 1)).mean() > 5
    night = draw("a red mug at night", 0)
    assert mug[:24].mean() > night[:24].mean() + 40  # the sky


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
    assert (back - x).abs().mean() < 0.06
