"""Every way to quantize, one after another: train, save, load, merge, unmerge (`backends.STEPS`)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from oft_diffusion import fuse_oft, load_oft_weights, set_oft_adapters, unfuse_oft
from oft_diffusion.files import load_adapter_file
from oft_diffusion.load import load_pipeline
from oft_diffusion.training import TrainConfig, TrainResult, train
from tests.library.support import draw
from tests.quantization.backends import (
    BACKENDS,
    DEVICE,
    GGUF,
    GGUF_4_BITS,
    ON_A_PROCESSOR,
    contents,
    quantized_layers,
    settings,
)

# Relative error of quantizing a rotated weight anew, at most: a step of each kind of number.
LOST = {"nf4": 0.15, GGUF_4_BITS: 0.15, "torchao-float8": 0.05, "quanto-float8": 0.05}
USUAL = 0.02


class Trained(NamedTuple):
    backend: str
    config: TrainConfig
    result: TrainResult
    kinds: set[str]  # of layers that were quantized while it trained
    learned: float  # how far its generators have gone
    plain: int  # of its linear layers, how many were not quantized


@pytest.fixture(scope="module", params=BACKENDS)
def trained(
    request: pytest.FixtureRequest, model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    config = settings(request.param, model, pictures, tmp_path_factory.mktemp(request.param))
    with train(config, progress=False) as run:
        assert run.parts is not None
        unet = run.parts.family.module("unet")
        before = contents(unet)
        layers = quantized_layers(unet)
        linear = [m for m in unet.modules() if isinstance(getattr(m, "in_features", None), int)]
        for _ in run:
            pass
        after = contents(unet)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), "training changed the base"
        learned = max(float(p.detach().abs().max()) for bank in run.parts.banks.values() for p in bank.parameters())
    kinds = {type(weight.layer).__name__ for weight in layers.values()}
    yield Trained(request.param, config, run.result, kinds, learned, len(linear) - len(layers))
    gc.collect()


def loaded(trained: Trained, *, quantized: bool = True) -> Any:
    config = trained.config
    knobs: dict[str, Any] = {
        "quantization": config.quantization, "text_encoder_quantization": config.text_encoder_quantization,
        "denoiser_file": config.denoiser_file,
    } if quantized else {}  # fmt: skip
    return load_pipeline(config.model, torch.bfloat16, DEVICE, **knobs)


def test_train(trained: Trained) -> None:
    assert trained.kinds, "nothing was quantized"
    assert trained.plain == 0
    assert len(trained.result.losses) == 4
    assert all(0 < loss < 100 for loss in trained.result.losses)
    assert trained.learned > 0.01
    assert trained.result.silent_layers == ()


@pytest.mark.thinned(3)
def test_a_run_goes_on_from_its_checkpoint(trained: Trained) -> None:
    config = TrainConfig.from_dict(trained.config.to_dict() | {"resume": "latest", "steps": 5})
    with train(config, progress=False) as run:
        steps = list(run)
    assert [step.step for step in steps] == [5]


def test_save(trained: Trained) -> None:
    file = load_adapter_file(trained.result.adapter)
    assert set(file.components) == {"unet", "text_encoder"}
    assert all(tensor.dtype == torch.float32 for state in file.components.values() for tensor in state.values())
    assert file.metadata.training["quantization"] == trained.config.quantization


@pytest.mark.parametrize("onto", ["the same", "another", "the base itself"])
def test_load(trained: Trained, onto: str, recwarn: pytest.WarningsRecorder) -> None:
    if onto == "another":
        here = [name for name in ON_A_PROCESSOR if name != trained.backend]
        other = here[BACKENDS.index(trained.backend) % len(here)]
        pipe = load_pipeline(
            trained.config.model, torch.bfloat16, DEVICE, quantization=other, text_encoder_quantization=other
        )
    else:
        pipe = loaded(trained, quantized=onto == "the same")
    base = draw(pipe)
    name = load_oft_weights(pipe, trained.result.adapter).name
    assert not [w for w in recwarn if "another base" in str(w.message)]
    drawn = draw(pipe)
    assert torch.isfinite(drawn).all()
    assert not torch.equal(drawn, base)
    set_oft_adapters(pipe, name, 0.0)
    assert torch.equal(draw(pipe), base)


def test_merge_and_unmerge(trained: Trained) -> None:
    pipe = loaded(trained)
    base = draw(pipe)
    load_oft_weights(pipe, trained.result.adapter)
    before = {part: contents(getattr(pipe, part)) for part in ("unet", "text_encoder")}
    live = draw(pipe)
    errors = fuse_oft(pipe)
    parts = ("unet",) if trained.backend.startswith(GGUF) else ("unet", "text_encoder")
    assert {part for part, own in errors.items() if own} == set(parts)
    most = LOST.get(trained.backend, USUAL)
    assert all(0 < error < most for own in errors.values() for error in own.values())
    assert any(not torch.equal(before["unet"][k], v) for k, v in contents(pipe.unet).items())
    merged = draw(pipe)
    assert (merged - live).norm() < (merged - base).norm(), "nearer to the base than to the adapter"
    unfuse_oft(pipe)
    for part, own in before.items():
        after = contents(getattr(pipe, part))
        assert after.keys() == own.keys()
        assert all(torch.equal(own[name], after[name]) for name in own)
    assert torch.equal(draw(pipe), live)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["nf4", "int8"])
def test_a_folder_that_was_saved_in_few_bits_is_trained_as_it_is(
    backend: str, model: Path, pictures: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    load_pipeline(model, torch.bfloat16, DEVICE, quantization=backend).save_pretrained(saved)
    assert quantized_layers(load_pipeline(saved, torch.bfloat16, DEVICE).unet)
    knobs = {"quantization": None, "text_encoder_quantization": None, "layer_offload": 0.5}
    with train(settings(backend, saved, pictures, tmp_path, **knobs), progress=False) as run:
        assert run.parts is not None
        assert quantized_layers(run.parts.family.denoiser)
        steps = list(run)
    assert all(step.applied for step in steps)
