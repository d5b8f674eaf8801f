"""Stable Diffusion 2.x in small: linear projections, heads per level, an OpenCLIP-like text encoder, v-prediction."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from oft_diffusion import load_oft_weights, unload_oft_weights
from oft_diffusion.files import load_adapter_file
from oft_diffusion.training import TrainConfig
from tests.helpers.tiny_sd import MAX_TOKENS, RESOLUTION, tiny_pipeline
from tests.training.conftest import Run


@pytest.fixture(scope="module")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_sd2")
    pipe = tiny_pipeline(folder, prediction_type="v_prediction")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=48,
        attention_head_dim=(2, 4), use_linear_projection=True, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(pipe.tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=MAX_TOKENS, hidden_act="gelu",
            bos_token_id=pipe.tokenizer.bos_token_id, eos_token_id=pipe.tokenizer.eos_token_id,
        )
    )  # fmt: skip
    pipe.register_modules(unet=unet, text_encoder=text_encoder)
    pipe.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("targets", "layers"), [("attention", 32), ("attention+mlp", 40), ("all-linear", 48), ("all-linear+conv", 71)]
)
def test_it_trains_and_its_adapter_draws(
    targets: str, layers: int, config: Callable[..., TrainConfig], run: Run, tiny_sd2: Path
) -> None:
    steps, result = run(
        config(model=str(tiny_sd2), targets=targets, text_encoder=True, steps=5, learning_rate=1e-2,
               min_snr_gamma=5.0, validation_prompts=["a {trigger} {class_word}"])
    )  # fmt: skip
    assert all(step.applied and math.isfinite(step.loss) for step in steps)
    assert result.silent_layers == ()
    file = load_adapter_file(result.adapter)
    assert file.metadata is not None
    assert file.metadata.base["prediction_type"] == "v_prediction"
    assert (len(file.components["unet"]), len(file.components["text_encoder"])) == (layers, 8 if layers == 32 else 12)

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd2, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        drawn = pipe("a sks mug", height=RESOLUTION, width=RESOLUTION, num_inference_steps=2, latents=latents,
                     output_type="latent")  # fmt: skip
        return torch.as_tensor(drawn.images)

    base = draw()
    load_oft_weights(pipe, result.adapter)
    assert (draw() - base).norm() > 1e-3 * base.norm()
    unload_oft_weights(pipe)
    assert draw().equal(base)
