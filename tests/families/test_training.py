"""A run on every family: it learns, its adapter loads into a fresh pipeline, and without it the base is the base."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oft_diffusion import OFTConfig, fuse_oft, inject_oft, load_oft_weights, unfuse_oft, unload_oft_weights
from oft_diffusion.files import save_adapter_file
from oft_diffusion.load import clip_skip_mended
from oft_diffusion.training import TrainConfig, prepare, train
from oft_diffusion.training.families import Family
from oft_diffusion.training.losses import losses
from oft_diffusion.training.state import adapter_metadata, adapter_tensors
from tests.families.conftest import EVERY_FAMILY
from tests.helpers.tiny_families import side_of

Load = Callable[[str], Family]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("text_encoder", [False, True], ids=["denoiser", "text encoders too"])
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_fixed_batch_is_learned_and_the_adapter_travels(
    name: str, text_encoder: bool, folder_of: Callable[[str], Path], load: Load, instances: Path, tmp_path: Path
) -> None:
    config = TrainConfig.from_dict(
        {"model": str(folder_of(name)), "instance_dir": str(instances), "trigger": "sks", "class_word": "mug",
         "output_dir": str(tmp_path / "run"), "resolution": side_of(name), "block_size": 8, "targets": "all-linear",
         "text_encoder": text_encoder, "text_encoder_learning_rate": 2e-2 if text_encoder else None,
         "learning_rate": 0.1, "steps": 20, "batch_size": 2, "validation_prompts": []}
    )  # fmt: skip
    with train(config, progress=False) as run:
        parts = run.parts
        assert parts is not None
        batch = parts.batches.at(0)
        found = []
        for _ in range(20):
            loss, _ = losses(parts, batch, config)
            loss.backward()
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            found.append(float(loss.detach()))
        assert found[-1] < 0.95 * found[0]
        expected = set(parts.family.base.denoisers) | (
            set(parts.family.base.trained_text_encoders) if text_encoder else set()
        )
        assert set(parts.banks) == expected
        encoders = [bank for part, bank in parts.banks.items() if part in parts.family.base.text_encoders]
        for bank in encoders:
            for layer, generator in bank.effective_generators("default").items():
                assert generator.abs().max() > 1e-3, f"{layer} learned nothing"
        for bank in parts.banks.values():
            bank.freeze("default")
        live = _draw(parts.family)
        for bank in encoders:  # without its share the picture is another
            bank.set_adapters("default", 0.0)
            assert not np.array_equal(_draw(parts.family), live)
            bank.set_adapters("default", 1.0)
        file = tmp_path / "adapter.safetensors"
        tensors = adapter_tensors(parts)
        save_adapter_file(file, tensors, adapter_metadata(parts, config, 20, tensors))
    fresh = load(name)
    plain, before = _draw(fresh), _weights(fresh)
    load_oft_weights(fresh.pipe, file)
    loaded = _draw(fresh)
    assert np.array_equal(loaded, live)
    assert np.abs(loaded.astype(float) - plain).mean() >= 1
    assert min(loaded.std(), plain.std()) > 1
    fuse_oft(fresh.pipe)
    assert np.abs(_draw(fresh).astype(float) - loaded).mean() < 0.5
    unfuse_oft(fresh.pipe)
    assert np.array_equal(_draw(fresh), loaded)
    unload_oft_weights(fresh.pipe)
    assert np.array_equal(_draw(fresh), plain)
    assert all(torch.equal(before[key], value) for key, value in _weights(fresh).items())


def _draw(family: Family) -> Any:
    [image] = family.sample(["a sks mug"], [1], side_of(family.base.pipeline), 2, 1.0)
    return np.asarray(image)


def _weights(family: Family) -> dict[str, torch.Tensor]:
    names = (*family.base.denoisers, *family.base.text_encoders)
    return {f"{n}.{k}": v.clone() for n in names for k, v in family.module(n).state_dict().items()}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_no_text_encoder_is_asked_once_embeddings_are_cached(
    name: str, folder_of: Callable[[str], Path], instances: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie on the CPU then, and the denoiser elsewhere."""
    park = prepare._park

    def park_for_good(config: TrainConfig, family: Family) -> None:
        park(config, family)
        for part in family.base.text_encoders:
            family.module(part).register_forward_pre_hook(lambda *_: pytest.fail("a text encoder is asked"))

    monkeypatch.setattr(prepare, "_park", park_for_good)
    config = TrainConfig(
        model=str(folder_of(name)), instance_dir=str(instances), trigger="sks", class_word="mug", steps=1, block_size=8,
        output_dir=str(tmp_path / "run"), resolution=side_of(name), cache_text_embeddings=True,
        validation_prompts=(),
    )  # fmt: skip
    with train(config, progress=False) as run:
        assert all(step.applied for step in run)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_clip_skip_is_the_pipelines_and_leaves_the_skipped_layer_alone(
    name: str, folder_of: Callable[[str], Path], instances: Path, tmp_path: Path
) -> None:
    def run(clip_skip: int | None) -> tuple[set[str], float]:
        config = TrainConfig(
            model=str(folder_of(name)), instance_dir=str(instances), trigger="sks", class_word="mug",
            output_dir=str(tmp_path / str(clip_skip)), resolution=side_of(name), block_size=8, text_encoder=True,
            steps=4, clip_skip=clip_skip, validation_prompts=("a {trigger} mug",), validation_count=1,
            sampling_steps=1,
        )  # fmt: skip
        with train(config, progress=False) as run:
            steps = list(run)
            assert run.parts is not None
            assert run.silent_layers == ()
            told = run.parts.family.encode_text(["a dog"], config.resolution)["encoder_hidden_states"]
            with torch.no_grad(), clip_skip_mended(run.parts.family.pipe):
                wanted = run.parts.family.pipe.encode_prompt(
                    prompt="a dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False,
                    clip_skip=clip_skip,
                )[0]  # fmt: skip
            assert torch.equal(told.detach(), wanted)
            assert all(step.applied for step in steps)
            if clip_skip is not None:
                _run_the_reports_snippet(run.result.report)
            return set(run.parts.banks["text_encoder"].hooks), steps[0].loss

    (whole, loss), (fewer, other) = run(None), run(1)
    assert fewer < whole
    assert loss != other


def _run_the_reports_snippet(report: Path | None) -> None:
    assert report is not None
    code = html.unescape(re.findall(r"<pre[^>]*>(.*?)</pre>", report.read_text(encoding="utf-8"), flags=re.DOTALL)[-1])
    assert "load_oft_weights(pipe" in code
    made: dict[str, Any] = {}
    exec(compile(code, "the report's snippet", "exec"), made)  # noqa: S102 - our own
    assert made["image"].width > 0


@pytest.mark.slow
def test_each_of_wans_experts_learns_its_own_noise_levels(load: Load) -> None:
    family = load("WanPipeline")
    high, low = (inject_oft(family.module(part), OFTConfig(block_size=8)) for part in family.base.denoisers)
    told: dict[str, list[float]] = {}
    for part in family.base.denoisers:
        family.module(part).register_forward_pre_hook(
            lambda _, __, kwargs, part=part: told.update({part: kwargs["timestep"].tolist()}), with_kwargs=True
        )
    noisy = torch.randn(4, *family.latent_shape(16))
    with torch.no_grad():
        conditioning = family.encode_text(["a dog"] * 4, 16)
    told.clear()
    answer = family.predict(noisy, torch.tensor([100.0, 990.0, 300.0, 876.0]), conditioning)
    assert told == {"transformer": [990.0, 876.0], "transformer_2": [100.0, 300.0]}
    for rows, own, other in (([1, 3], high, low), ([0, 2], low, high)):
        gradients = torch.autograd.grad(
            answer[rows].square().sum(), [*own.parameters(), *other.parameters()], retain_graph=True
        )
        assert gradients[0].any()
        assert not gradients[1].any()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_a_whole_run(name: str, folder_of: Callable[[str], Path], instances: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_dict(
        {"model": str(folder_of(name)), "instance_dir": str(instances), "trigger": "sks", "class_word": "mug",
         "output_dir": str(tmp_path / "run"), "resolution": side_of(name), "block_size": 8, "steps": 4,
         "prior_preservation": True, "prior_target": "base", "num_class_images": 1, "class_prompts": ["a mug"],
         "cache_text_embeddings": True, "gradient_checkpointing": True, "validation_prompts": ["a {trigger} mug"],
         "validation_count": 1, "validation_every": 2, "sampling_steps": 2, "guidance_scale": 3.0}
    )  # fmt: skip
    with train(config, progress=False) as run:
        steps = list(run)
    assert all(step.applied and step.prior_loss is not None for step in steps)
    assert run.result.adapter.is_file()
    assert run.result.report is not None
    assert run.silent_layers == ()
