"""Words that a tool does not write, and some of a tool's words without the rest: none is left out in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from oft_diffusion.formats import read
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import LAYER, assert_loading_refused
from tests.peers import algebra, kohya_oft, lycoris_oft, onetrainer, peft_oft

KEYS = ["lora_unet_" + LAYER.format(name).removesuffix(".oft_R.weight").replace(".", "_") for name in ("to_q", "to_k")]
SHAPES = dict.fromkeys(KEYS, (32, 32))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One for all: refused files leave it as it is, which each test checks."""
    pipe = StableDiffusionPipeline.from_pretrained(write_tiny_sd(tmp_path_factory.mktemp("tiny")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def written(folder: Path, made: algebra.Written, tensors: Mapping[str, Tensor]) -> Path:
    """The file with these tensors for every layer, too."""
    added = {f"{key}.{suffix}": tensor for key in KEYS for suffix, tensor in tensors.items()}
    return algebra.save(made._replace(tensors={**made.tensors, **added}), folder / "theirs.safetensors")


def unknown(layers: algebra.Shapes, **options: Any) -> algebra.Written:
    """Nobody's: packed generators and no header."""
    return onetrainer.write_onetrainer(layers, **options)._replace(metadata={})


@pytest.mark.parametrize("suffix", ["oft_block_size_metadata", "scaled_oft_metadata", "oft_rank_buffer"])
def test_words_of_another_side(pipe: Any, tmp_path: Path, suffix: str) -> None:
    for made in (lycoris_oft.write_lycoris(SHAPES), kohya_oft.write_kohya_oft(SHAPES)):
        path = written(tmp_path, made, {suffix: torch.tensor(8.0)})
        assert_loading_refused(pipe, path, "theirs.safetensors", suffix)


def test_words_of_another_tool_in_pefts_folder(pipe: Any, tmp_path: Path) -> None:
    name = LAYER.format("to_q").removesuffix(".oft_R.weight")
    folder = peft_oft.write_peft(tmp_path / "peft", {name: (32, 32)}, block_size=8)
    made = peft_oft.peft_file({name: (32, 32)}, block_size=8)
    extra = {f"{peft_oft.PREFIX}{name}.alpha": torch.tensor(0.5)}
    algebra.save(made._replace(tensors={**made.tensors, **extra}), folder / "adapter_model.safetensors")
    assert_loading_refused(pipe, folder, "alpha")


@pytest.mark.parametrize("module", [{}, {"ss_network_module": "networks.oft_v2"}], ids=str)
def test_a_bound_without_the_other_words_of_its_tool_is_not_lost(
    pipe: Any, tmp_path: Path, module: dict[str, str]
) -> None:
    """A fork's reader takes what is missing as its default; so it is bounded here, too, or refused."""
    made = algebra.Written(unknown(SHAPES, block_size=8, norm=2.0).tensors, module)
    for bound in (
        {"oft_coft_metadata": torch.tensor(1.0), "coft_eps_metadata": torch.tensor(1e-3)},
        {"oft_coft_buffer": torch.tensor(1), "oft_coft_eps_buffer": torch.tensor(1e-3)},
    ):
        [state] = read(written(tmp_path, made, bound), {"unet": pipe.unet}).file.components.values()
        assert all(0 < float(tensor.norm()) <= 1e-3 for tensor in state.values())
    for suffix in ("oft_coft_metadata", "oft_coft_buffer"):  # and how tight it is, nobody would know
        assert_loading_refused(pipe, written(tmp_path, made, {suffix: torch.tensor(1.0)}), "coft_eps")


def test_the_number_of_terms_alone_is_not_lost(pipe: Any, tmp_path: Path) -> None:
    made = unknown(SHAPES, block_size=8)
    path = written(tmp_path, made, {"oft_num_cayley_neumann_terms_buffer": torch.tensor(9)})
    assert read(path, {"unet": pipe.unet}).file.metadata.components["unet"].neumann_order == 8


@pytest.mark.parametrize("block_size", [5, 7, 12, 24, 33, 1000])
def test_sizes_that_divide_nothing_are_what_was_asked_for(pipe: Any, tmp_path: Path, block_size: int) -> None:
    """All tools take the divisor that is next, and note what the user asked for."""
    made = onetrainer.write_onetrainer(SHAPES, block_size=block_size, config=True)
    assert read(written(tmp_path, made, {}), {"unet": pipe.unet}).format == "OneTrainer"
    name = LAYER.format("to_q").removesuffix(".oft_R.weight")
    folder = peft_oft.write_peft(tmp_path / "peft", {name: (32, 32)}, block_size=block_size)
    assert read(folder / "adapter_model.safetensors", {"unet": pipe.unet}).format == "PEFT"
