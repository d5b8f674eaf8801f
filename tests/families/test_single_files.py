"""Single-file checkpoints of other families than SD 1.x, where diffusers can load them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oft_diffusion.errors import ConfigError
from oft_diffusion.training import TrainConfig, train
from oft_diffusion.training.families import FAMILIES, Family
from oft_diffusion.training.find import find_base
from tests.helpers.single_files import write_single_file
from tests.helpers.tiny_families import side_of
from tests.library.support import assert_one_sentence

SDXL = "StableDiffusionXLPipeline"


@pytest.mark.slow
def test_an_sdxl_file_is_the_same_model_and_trains(
    folder_of: Callable[[str], Path], load: Callable[[str], Family], instances: Path, tmp_path: Path
) -> None:
    family, configs = load(SDXL), folder_of(SDXL)
    file = write_single_file(family.pipe, tmp_path / "tiny_xl.safetensors")
    single = FAMILIES[SDXL].load(find_base(str(file), str(configs)), torch.float32)
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        theirs, ours = (f.module(component).state_dict() for f in (family, single))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].device.type == "cpu" and ours[name].equal(theirs[name]) for name in ours), component
    config = TrainConfig(
        model=str(file), config_dir=str(configs), instance_dir=str(instances), trigger="sks", class_word="mug",
        output_dir=str(tmp_path / "run"), resolution=side_of(SDXL), block_size=8, text_encoder=True, steps=2,
    )  # fmt: skip
    with train(config, progress=False) as run:
        assert all(step.applied for step in run)
    assert set(run.result.adapter.parent.iterdir()) >= {run.result.adapter}


def test_a_file_that_lacks_some_of_a_model_is_refused(
    folder_of: Callable[[str], Path], load: Callable[[str], Family], tmp_path: Path
) -> None:
    whole = load_file(write_single_file(load(SDXL).pipe, tmp_path / "whole.safetensors"))
    lacking = tmp_path / "lacking.safetensors"
    save_file({name: tensor for name, tensor in whole.items() if not name.endswith("text_projection")}, lacking)
    with pytest.raises(ConfigError) as caught:
        FAMILIES[SDXL].load(find_base(str(lacking), str(folder_of(SDXL))), torch.float32)
    assert_one_sentence(caught, "lacking.safetensors holds no weights for 1 tensors", "text_encoder_2.text_projection")
