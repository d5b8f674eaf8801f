"""What a file says of itself and does not keep, or says in another tool's words: refused, never left out in silence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from oft_diffusion.formats import read
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import LAYER, assert_loading_refused
from tests.peers import algebra, kohya_oft, lycoris_oft, onetrainer, peft_oft, sd_scripts, wild

KEYS = ["lora_unet_" + LAYER.format(name).removesuffix(".oft_R.weight").replace(".", "_") for name in ("to_q", "to_k")]
SHAPES = dict.fromkeys(KEYS, (32, 32))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One for all: refused files leave it as it is, which each test checks."""
    pipe = StableDiffusionPipeline.from_pretrained(write_tiny_sd(tmp_path_factory.mktemp("tiny")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def written(folder: Path, made: algebra.Written, tensors: Mapping[str, Tensor | None], **texts: str) -> Path:
    """The file with other tensors for every layer, None for one that is to be left out, and other texts."""
    changed = {f"{key}.{suffix}": tensor for key in KEYS for suffix, tensor in tensors.items()}
    kept = {name: t for name, t in {**made.tensors, **changed}.items() if t is not None}
    return algebra.save(algebra.Written(kept, made.metadata | texts), folder / "theirs.safetensors")


def unknown(layers: algebra.Shapes, **options: Any) -> algebra.Written:
    """Nobody's: packed generators and no header."""
    return onetrainer.write_onetrainer(layers, **options)._replace(metadata={})


# Words of another tool


PACKED: dict[str, Callable[..., algebra.Written]] = {
    "unknown": unknown,
    "onetrainer": onetrainer.write_onetrainer,
    "sd-scripts": sd_scripts.write_sd_scripts,
    "wan": wild.write_wan,
}


STRANGE = ("alpha", "rescale", "oft_coft_metadata", "oft_coft_buffer")


@pytest.mark.parametrize(
    ("tool", "suffix"),
    [(tool, suffix) for tool in PACKED for suffix in STRANGE if (tool, suffix) != ("wan", "oft_coft_buffer")],
)
def test_words_of_another_tool(pipe: Any, tmp_path: Path, tool: str, suffix: str) -> None:
    made = PACKED[tool](SHAPES, block_size=8)
    path = written(tmp_path, made, {suffix: torch.tensor(1.0)})
    # Some of these words make it a fork's file, which lacks that fork's other words or has too many.
    assert_loading_refused(pipe, path, "theirs.safetensors", "oft_" if suffix.startswith("oft_") else suffix)


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


# A bound that would be left out


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


def test_a_bound_in_a_header_beside_a_forks_tensors(pipe: Any, tmp_path: Path) -> None:
    for made in (wild.write_musubi(SHAPES, block_size=8), wild.write_wan(SHAPES, block_size=8)):
        path = written(tmp_path, made, {}, ss_network_args='{"coft": "True", "coft_eps": "0.1"}')
        assert_loading_refused(pipe, path, "theirs.safetensors", "coft")


# Sizes and shares that a file tells


@pytest.mark.parametrize(
    ("made", "suffix", "value"),
    [
        (wild.write_musubi, "oft_block_size_metadata", 64.0),
        (wild.write_musubi, "oft_block_size_metadata", 4.0),
        (wild.write_musubi, "alpha", 0.5),
        (wild.write_musubi, "oft_block_share_metadata", 1.0),
        (wild.write_wan, "oft_block_size_buffer", 64),
        (wild.write_wan, "oft_rank_buffer", 3),
        (wild.write_wan, "oft_block_share_buffer", 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sizes_that_a_fork_tells(pipe: Any, tmp_path: Path, made: Any, suffix: str, value: float) -> None:
    path = written(tmp_path, made(SHAPES, block_size=8), {suffix: torch.tensor(value)})
    assert_loading_refused(pipe, path, "theirs.safetensors", "attn1_to_", suffix)


@pytest.mark.parametrize(
    "told",
    [{"peft_type": "LORA"}, {"peft_type": None}, {"oft_scaled": True}, {"oft_block_size": 16}, {"oft_block_size": "8"},
     {"oft_block_size": -8}, {"oft_block_share": True}, {"oft_scaled": "yes"}],
    ids=str,
)  # fmt: skip
def test_what_onetrainer_says_of_its_own_file(pipe: Any, tmp_path: Path, told: dict[str, Any]) -> None:
    made = onetrainer.write_onetrainer(SHAPES, block_size=8)
    [entry] = told
    path = written(tmp_path, made, {}, ot_config=json.dumps(told))
    assert_loading_refused(pipe, path, "theirs.safetensors", entry.removeprefix("oft_"))


def test_markers_of_some_layers_or_against_the_settings(pipe: Any, tmp_path: Path) -> None:
    made = onetrainer.write_onetrainer(SHAPES, block_size=8, scaled=True)
    assert_loading_refused(pipe, written(tmp_path, made, {}, ot_config='{"oft_scaled": false}'), "oft_R.scaled_oft")
    del made.tensors[f"{KEYS[1]}.oft_R.scaled_oft"]
    assert_loading_refused(pipe, written(tmp_path, made, {}), "oft_R.scaled_oft", "some of its layers")


def test_what_sd_scripts_says_of_its_own_file(pipe: Any, tmp_path: Path) -> None:
    made = sd_scripts.write_sd_scripts(SHAPES, block_size=8)
    path = written(tmp_path, made, {}, ss_network_args='{"block_share": "True"}')
    assert_loading_refused(pipe, path, "attn1_to_", "block_share")


@pytest.mark.parametrize("change", [{"oft_block_size": 16}, {"block_share": True}, {"block_share": "no"}], ids=str)
def test_what_peft_says_of_its_own_file(pipe: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    name = LAYER.format("to_q").removesuffix(".oft_R.weight")
    folder = peft_oft.write_peft(tmp_path / "peft", {name: (32, 32)}, block_size=8)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert_loading_refused(pipe, folder, *change)


@pytest.mark.parametrize("block_size", [5, 7, 12, 24, 33, 1000])
def test_sizes_that_divide_nothing_are_what_was_asked_for(pipe: Any, tmp_path: Path, block_size: int) -> None:
    """All tools take the divisor that is next, and note what the user asked for."""
    made = onetrainer.write_onetrainer(SHAPES, block_size=block_size, config=True)
    assert read(written(tmp_path, made, {}), {"unet": pipe.unet}).format == "OneTrainer"
    name = LAYER.format("to_q").removesuffix(".oft_R.weight")
    folder = peft_oft.write_peft(tmp_path / "peft", {name: (32, 32)}, block_size=block_size)
    assert read(folder / "adapter_model.safetensors", {"unet": pipe.unet}).format == "PEFT"
