"""What diffusers itself saves of PEFT's OFT: pictures are those of diffusers' pipeline with the adapter in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata  # what diffusers' own scripts call
from peft import OFTConfig, get_peft_model_state_dict
from torch import nn

from oft_diffusion import load_oft_weights, set_oft_adapters
from oft_diffusion.info import describe_file
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import assert_loading_refused, copy_pipe, distance, draw


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(write_tiny_sd(tmp_path_factory.mktemp("tiny")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapt(pipe: Any, options: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Give components random adapters of PEFT's, as diffusers does."""
    parts = {part: getattr(pipe, part) for part in options}
    torch.manual_seed(0)
    for part, module in parts.items():
        module.add_adapter(OFTConfig(**options[part]))
        for name, parameter in module.named_parameters():
            if "oft_R" in name:
                nn.init.normal_(parameter, std=0.1)
    return parts


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cayley_neumann": False},
        {"num_cayley_neumann_terms": 7},
        {"coft": True, "eps": 0.5},
        {"block_share": True},
        {"target_modules": ["to_q", "proj_in", "conv_shortcut"]},
    ],
    ids=str,
)
def test_a_file_of_one_model(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    pipe = copy_pipe(base)
    adapt(pipe, {"unet": {"oft_block_size": 8, "target_modules": ["to_q", "to_v"]} | options})
    wanted = draw(pipe)
    pipe.unet.save_lora_adapter(tmp_path)
    ours = copy_pipe(base)
    assert load_oft_weights(ours, tmp_path).format == "PEFT"
    assert distance(wanted, draw(base)) > 0.01
    assert distance(draw(ours), wanted) < 1e-4


def test_a_file_of_several_components(base: Any, tmp_path: Path) -> None:
    pipe = copy_pipe(base)
    parts = adapt(
        pipe,
        {
            "unet": {"oft_block_size": 8, "target_modules": ["to_q", "to_v"], "use_cayley_neumann": False},
            "text_encoder": {"oft_block_size": 4, "target_modules": ["q_proj"], "coft": True, "eps": 0.5},
        },
    )
    wanted = draw(pipe)
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(module) for part, module in parts.items()}
    pipe.save_lora_weights(tmp_path, **layers, **_collate_lora_metadata(parts))
    told = "\n".join(describe_file(tmp_path))
    assert "parametrisation cayley (unet)" in told
    assert "neumann_order 4 (text_encoder)" in told
    ours = copy_pipe(base)
    loaded = load_oft_weights(ours, tmp_path)
    assert (loaded.format, set(loaded.components)) == ("PEFT", set(parts))
    assert distance(wanted, draw(base)) > 0.01
    assert distance(draw(ours), wanted) < 1e-4
    pipe.unet.disable_adapters()  # the encoder alone is right, too
    set_oft_adapters(ours, loaded.name, {"unet": 0.0, "text_encoder": 1.0})
    assert distance(draw(pipe), draw(base)) > 0.001
    assert distance(draw(ours), draw(pipe)) < 1e-4


def test_larger_kernels_are_refused(base: Any, tmp_path: Path) -> None:
    pipe = copy_pipe(base)
    adapt(pipe, {"unet": {"oft_block_size": 8, "target_modules": ["conv1"]}})
    pipe.unet.save_lora_adapter(tmp_path)
    assert_loading_refused(copy_pipe(base), tmp_path, "convolution of 9 taps")


def test_a_file_without_its_settings_says_how_to_save_it_with_them(base: Any, tmp_path: Path) -> None:
    pipe = copy_pipe(base)
    unet = adapt(pipe, {"unet": {"oft_block_size": 8, "target_modules": ["to_q"]}})["unet"]
    layers = get_peft_model_state_dict(unet)
    pipe.save_lora_weights(tmp_path / "bare", unet_lora_layers=layers)
    words = ("diffusers' save_lora_weights, and no metadata", "unet_lora_adapter_metadata=")
    assert_loading_refused(copy_pipe(base), tmp_path / "bare", *words)
    settings = pipe.unet.peft_config["default"].to_dict()  # as the sentence says
    pipe.save_lora_weights(tmp_path / "told", unet_lora_layers=layers, unet_lora_adapter_metadata=settings)
    assert load_oft_weights(copy_pipe(base), tmp_path / "told").format == "PEFT"
