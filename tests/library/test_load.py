"""Pipelines from folders and files of every kind that training takes; what cannot be loaded is one sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from oft_diffusion import load_oft_weights, set_oft_adapters
from oft_diffusion.errors import ConfigError
from oft_diffusion.generate import generate
from oft_diffusion.load import load_pipeline
from tests.helpers.single_files import write_single_file
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import PROMPT, assert_one_sentence


def pixels(pictures):
    return np.stack([np.asarray(p.image, dtype=int) for p in pictures])


def test_a_folder_is_loaded_in_the_wanted_precision(model_folder, recwarn):
    pipe = load_pipeline(model_folder, torch.bfloat16)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert len(generate(pipe, PROMPT, [1], steps=1)) == 1
    assert not [w for w in recwarn if "torch_dtype" in str(w.message)]


def test_an_adapter_moves_a_half_precision_picture(model_folder, mug):
    pipe = load_pipeline(model_folder, torch.bfloat16)
    base = pixels(generate(pipe, PROMPT, [1], steps=2))
    load_oft_weights(pipe, mug, adapter_name="mug")
    assert abs(pixels(generate(pipe, PROMPT, [1], steps=2)) - base).max() > 3
    set_oft_adapters(pipe, "mug", 0)
    assert np.array_equal(pixels(generate(pipe, PROMPT, [1], steps=2)), base)


def test_offloading_is_diffusers_and_needs_a_card(model_folder, monkeypatch):
    with pytest.raises(ConfigError) as error:
        load_pipeline(model_folder, offload=True)
    assert_one_sentence(error, "offload", "cpu")
    asked = []
    monkeypatch.setattr(
        StableDiffusionPipeline, "enable_model_cpu_offload", lambda self, device: asked.append(device), raising=True
    )
    pipe = load_pipeline(model_folder, torch.bfloat16, "cuda:1", offload=True)
    assert asked == ["cuda:1"]
    assert pipe.unet.device.type == "cpu"


def _cut(path):
    path.write_bytes(path.read_bytes()[:200])


BROKEN = {
    "no index": lambda folder: (folder / "model_index.json").unlink(),
    "index is no JSON": lambda folder: (folder / "model_index.json").write_text("{"),
    "index says nothing": lambda folder: (folder / "model_index.json").write_text("{}"),
    "index is a list": lambda folder: (folder / "model_index.json").write_text("[]"),
    "cut weights": lambda folder: _cut(folder / "unet" / "diffusion_pytorch_model.safetensors"),
    "cut text weights": lambda folder: _cut(folder / "text_encoder" / "model.safetensors"),
    "no weights": lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
    "pickled weights only": lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.bin"
    ),
    "broken config": lambda folder: (folder / "unet" / "config.json").write_text("{"),
    "no vae": lambda folder: shutil.rmtree(folder / "vae"),
    "unknown class": lambda folder: (folder / "model_index.json").write_text(json.dumps({"_class_name": "NoSuch"})),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_folder_is_one_sentence(model_folder, tmp_path, damage):
    shutil.copytree(model_folder, tmp_path / "broken")
    BROKEN[damage](tmp_path / "broken")
    with pytest.raises(ConfigError) as error:
        load_pipeline(tmp_path / "broken")
    assert_one_sentence(error, "broken")


def _only_fp16(folder):
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    return folder


def _half_fp16(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".fp16.safetensors"))
    return folder


@pytest.mark.parametrize("rename", [_only_fp16, _half_fp16])
def test_a_folder_of_fp16_files_is_loaded(model_folder, tmp_path, rename):
    folder = rename(Path(shutil.copytree(model_folder, tmp_path / "model")))
    assert _same_weights(load_pipeline(folder), load_pipeline(model_folder))


def test_a_single_file_is_loaded_with_its_configs(tmp_path):
    folder = write_tiny_sd(tmp_path)
    file = write_single_file(StableDiffusionPipeline.from_pretrained(folder), tmp_path / "tiny.safetensors")
    pipe = load_pipeline(file, config_dir=folder)
    assert _same_weights(pipe, load_pipeline(folder))
    assert len(generate(pipe, PROMPT, [1], steps=1)) == 1
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    for config_dir, words in ((None, ["config_dir is not given"]), (tmp_path, ["no model_index"]), (folder, ["DDPM"])):
        with pytest.raises(ConfigError) as error:
            load_pipeline(file, config_dir=config_dir)
        assert_one_sentence(error, *words)


def _same_weights(a, b):
    return all(
        torch.equal(value, getattr(b, part).state_dict()[name])
        for part in ("unet", "vae", "text_encoder")
        for name, value in getattr(a, part).state_dict().items()
    )


def test_a_missing_folder_file_or_device_is_one_sentence(model_folder, tmp_path):
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"x")
    for model in (tmp_path, tmp_path / "none", str(tmp_path / "none"), "no-such/model", single):
        with pytest.raises(ConfigError) as error:
            load_pipeline(model)
        assert_one_sentence(error, str(model))
    for device in ("nonsense", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ConfigError) as error:
            load_pipeline(model_folder, device=device)
        assert_one_sentence(error, device)
