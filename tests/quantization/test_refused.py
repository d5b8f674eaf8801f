"""What cannot be quantized is refused in one sentence, before a model is loaded; and bytes are counted as loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from huggingface_hub import snapshot_download

from oft_diffusion import inject_oft, load
from oft_diffusion.config import OFTConfig
from oft_diffusion.errors import ConfigError, TargetError, TrainingError
from oft_diffusion.formats.live import live_components
from oft_diffusion.load import load_pipeline
from oft_diffusion.merge import merge_oft
from oft_diffusion.quantization import INSTALL, SCHEMES, quantize_with_bitsandbytes, scheme
from oft_diffusion.training import TrainConfig, estimate, train
from oft_diffusion.training.count import count
from oft_diffusion.training.find import find_base
from oft_diffusion.training.memory import LiveStorages
from oft_diffusion.training.preflight import preflight
from oft_diffusion.training.prepare import load_family
from tests.library.support import assert_one_sentence, excite
from tests.quantization.backends import BACKENDS, GGUF, bytes_held, quantized_layers, settings, write_gguf


@pytest.mark.parametrize(
    ("name", "package"),
    [("nf4", "bitsandbytes"), ("torchao-int8", "torchao"), ("quanto-int8", "optimum.quanto")],
)
def test_a_library_that_is_missing(
    name: str, package: str, model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *a: None if asked == package else find(asked, *a))
    for call in (
        lambda: load_pipeline(model, quantization=name),
        lambda: preflight(settings(name, model, pictures, tmp_path)),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert_one_sentence(error, package.replace(".", "-"), INSTALL)


def test_what_needs_a_card(model: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_pipeline(model, quantization="torchao-int4")
    assert_one_sentence(error, "torchao-int4", "CUDA", "nf4")
    scheme("torchao-int4").require("cuda:0")


@pytest.mark.parametrize("part", ["quantization", "text_encoder_quantization"])
def test_what_is_for_drawing_alone(part: str, model: Path, pictures: Path, tmp_path: Path) -> None:
    """torchao's four bits: torch has no derivative of their product, as its form for processors shows."""
    config = settings("nf4", model, pictures, tmp_path, **{part: "torchao-int4"})
    with pytest.raises(ConfigError) as error:
        preflight(config)
    assert_one_sentence(error, part, "torchao-int4", "drawing", "nf4")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.zeros(64, 64, dtype=torch.int32), 1)
    x, scales = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True), torch.ones(2, 64, 2, dtype=torch.bfloat16)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)
    with pytest.raises(RuntimeError, match="not implemented"):
        out.sum().backward()


def test_a_name_that_is_none(model: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_pipeline(model, quantization="nf5")
    assert_one_sentence(error, "nf5", *SCHEMES)


def test_a_single_file(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ConfigError) as error:
        load_pipeline(file, config_dir=model, quantization="nf4")
    assert_one_sentence(error, "single file")


def test_a_file_that_is_no_gguf(model: Path, pictures: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"no GGUF at all")
    for path in (wrong, tmp_path / "missing.gguf"):
        with pytest.raises(ConfigError) as error:
            load_pipeline(model, denoiser_file=path)
        assert_one_sentence(error, str(path))
        config = settings("nf4", model, pictures, tmp_path, quantization=None, denoiser_file=str(path))
        with pytest.raises(ConfigError, match="no GGUF file"):
            preflight(config)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ConfigError) as error:
        load_pipeline(model, denoiser_file=broken)
    assert_one_sentence(error, str(broken), "UNet2DConditionModel")


def test_both_a_file_and_quantization(model: Path, pictures: Path, tmp_path: Path) -> None:
    file = write_gguf(model, tmp_path / "unet.gguf")
    with pytest.raises(ConfigError) as error:
        preflight(settings("nf4", model, pictures, tmp_path, denoiser_file=str(file)))
    assert_one_sentence(error, "denoiser_file", "quantization")


def test_a_file_and_quantization_outside_of_training(model: Path, tmp_path: Path) -> None:
    file = write_gguf(model, tmp_path / "unet.gguf")
    with pytest.raises(ConfigError) as error:
        load_pipeline(model, quantization="torchao-int8", denoiser_file=file)
    assert_one_sentence(error, "denoiser_file", "torchao-int8")


@pytest.fixture
def saved_quantized(model: Path, tmp_path: Path) -> Path:
    """A folder whose UNet says that it was saved in NF4, as such repositories on the hub do."""
    folder = tmp_path / "saved"
    shutil.copytree(model, folder)
    file = folder / "unet" / "config.json"
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": told}))
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="cards load it")
def test_a_base_saved_in_nf4_on_a_processor(saved_quantized: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_pipeline(saved_quantized)
    assert_one_sentence(error, "unet", "bitsandbytes", "CUDA")
    with pytest.raises(ConfigError) as error:
        preflight(settings("nf4", saved_quantized, pictures, tmp_path, quantization=None))
    assert_one_sentence(error, "unet", "bitsandbytes", "CUDA")


def test_a_base_saved_quantized_is_not_quantized_again(saved_quantized: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_pipeline(saved_quantized, quantization="quanto-int8")
    assert_one_sentence(error, "unet", "bitsandbytes", "quanto-int8")
    with pytest.raises(ConfigError) as error:
        preflight(settings("quanto-int8", saved_quantized, pictures, tmp_path, text_encoder_quantization=None))
    assert_one_sentence(error, "unet", "bitsandbytes", "quanto-int8")


def test_a_base_on_the_hub_is_looked_at_before_it_is_loaded(
    saved_quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of itself, from the hub's cache; its weights are not even there."""
    own = tmp_path / "cache" / "models--someone--quantized"
    snapshot = own / "snapshots" / ("0" * 40)
    for file in saved_quantized.rglob("*.json"):
        to = snapshot / file.relative_to(saved_quantized)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(file.read_bytes())
    (own / "refs").mkdir()
    (own / "refs" / "main").write_text("0" * 40)
    cached = partial(snapshot_download, cache_dir=tmp_path / "cache", local_files_only=True)
    monkeypatch.setattr(load, "snapshot_download", cached)
    with pytest.raises(ConfigError) as error:
        load_pipeline("someone/quantized", quantization="quanto-int8")
    assert_one_sentence(error, "unet", "bitsandbytes", "quanto-int8")


def test_what_the_index_does_not_name_is_not_looked_at(model: Path, saved_quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(model, folder)
    shutil.copytree(saved_quantized / "unet", folder / "unet_4bit")
    assert not quantized_layers(load_pipeline(folder).unet)


def test_a_base_saved_quantized_is_counted_by_its_files(saved_quantized: Path, pictures: Path, tmp_path: Path) -> None:
    config = settings("nf4", saved_quantized, pictures, tmp_path, quantization=None, text_encoder_quantization=None)
    file = saved_quantized / "unet" / "diffusion_pytorch_model.safetensors"
    assert count(config, find_base(config.model, None)).parts["unet"] == file.stat().st_size


@pytest.mark.parametrize("backend", ["nf4", "int8"])
def test_merging_into_a_quantized_layer_that_is_offloaded(backend: str) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).requires_grad_(False)
    quantize_with_bitsandbytes(layers, scheme(backend), torch.float32)
    cpu_offload(layers, execution_device=torch.device("cpu"))
    excite(inject_oft(layers, OFTConfig(block_size=8, targets=r"\d")))
    with pytest.raises(TargetError) as error:
        merge_oft(layers)
    assert_one_sentence(error, "offloaded", "Linear")


def test_another_gguf_than_the_run_began_with(model: Path, pictures: Path, tmp_path: Path) -> None:
    config = settings(GGUF, model, pictures, tmp_path, validation_prompts=[], steps=2)
    with train(config, progress=False) as run:
        list(run)
    write_gguf(model, Path(str(config.denoiser_file)), "Q5_0")
    again = TrainConfig.from_dict(config.to_dict() | {"resume": "latest", "steps": 3})
    with pytest.raises(TrainingError, match="denoiser file"), train(again, progress=False) as run:
        list(run)


def test_exports_ask_for_the_base_itself(model: Path) -> None:
    pipe = load_pipeline(model, torch.bfloat16, quantization="nf4")
    excite(inject_oft(pipe.unet, OFTConfig(block_size=16)))
    with pytest.raises(TargetError) as error:
        live_components(pipe)
    assert_one_sentence(error, "quantized")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_counted_as_they_are_loaded(backend: str, model: Path, pictures: Path, tmp_path: Path) -> None:
    config = settings(backend, model, pictures, tmp_path)
    base = find_base(config.model, None)
    family = load_family(config, base, torch.device("cpu"))
    held = sum(bytes_held(family.module(name)) for name in base.modules)
    assert count(config, base).base_bytes == pytest.approx(held, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on cards the allocator is asked")
@pytest.mark.parametrize("backend", ["nf4", "int8"])
def test_the_estimate_of_a_step_is_what_the_step_holds(
    backend: str, model: Path, pictures: Path, tmp_path: Path
) -> None:
    config = settings(backend, model, pictures, tmp_path, validation_prompts=[], checkpoint_every=0, steps=2)
    found = estimate(config).memory
    with train(config, progress=False) as run:
        steps = iter(run)
        next(steps)  # which makes the moments
        with LiveStorages("cpu") as alive:
            next(steps)
    gradients = found.adapter
    assert alive.most == pytest.approx(found.activations + gradients, rel=0.01)


def test_gguf_that_is_missing(model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(model, tmp_path / "unet.gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *a: None if asked == "gguf" else find(asked, *a))
    for call in (
        lambda: load_pipeline(model, denoiser_file=file),
        lambda: preflight(settings("nf4", model, pictures, tmp_path, quantization=None, denoiser_file=str(file))),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert_one_sentence(error, "gguf", INSTALL)
