"""The real sizes of SD 1.5, with random weights: the same `train()`, two steps, save, load, draw. Slow."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from oft_diffusion import load_oft_weights, set_oft_adapters
from oft_diffusion.files import load_adapter_file
from oft_diffusion.generate import generate
from oft_diffusion.load import load_pipeline
from oft_diffusion.pocket.vocabulary import build_tokenizer
from oft_diffusion.training import TrainConfig, train

pytestmark = pytest.mark.slow
SIZE = 256  # SD 1.5 draws 512; a quarter of the pixels exercises the same layers


@pytest.fixture(scope="module")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.5's UNet, VAE and text encoder as their configs say, random float16 weights; the pocket's tokenizer."""
    folder = tmp_path_factory.mktemp("sd15")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ).half(),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=77,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).half(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).half(),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def test_train_save_load_generate(
    sd15_folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (SIZE + 16 * index, SIZE), colour).save(photos / f"{index}.jpg")
    config = TrainConfig(
        model=str(sd15_folder),
        instance_dir=str(photos),
        trigger="zwx",
        class_word="mug",
        output_dir=str(tmp_path / "out"),
        resolution=SIZE,
        text_encoder=True,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        steps=2,
        seed=3,
    )
    with train(config, progress=False) as run:
        losses = [step.loss for step in run]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)

    file = load_adapter_file(run.result.adapter)
    assert {part: len(state) for part, state in file.components.items()} == {"unet": 128, "text_encoder": 48}
    assert sum(t.shape[0] for t in file.components["unet"].values()) == 3108
    assert all(t.abs().max() > 0 for t in file.components["unet"].values())

    pipe = load_pipeline(sd15_folder)
    load_oft_weights(pipe, run.result.adapter, adapter_name="mug")
    [adapted] = generate(pipe, "a zwx mug", [1], steps=2, width=SIZE, height=SIZE)
    set_oft_adapters(pipe, "mug", 0.0)
    [base] = generate(pipe, "a zwx mug", [1], steps=2, width=SIZE, height=SIZE)
    assert adapted.image.size == (SIZE, SIZE)
    assert adapted.image.tobytes() != base.image.tobytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    record_property(
        "figure",
        f"SD 1.5 at {SIZE} px, float32, batch 1, checkpointed: losses {losses[0]:.3f}, {losses[1]:.3f}; "
        f"adapter {run.result.adapter.stat().st_size / 1e6:.1f} MB",
    )
    assert peak < 20
