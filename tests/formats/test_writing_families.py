"""Files for OneTrainer and sd-scripts of families with names and weights of their own: theirs and ours are the same.

Keys are spelled out in `tests/peers`, and weights are those of the tools' formulas.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from oft_diffusion import OFTConfig, fuse_oft, load_oft_weights
from oft_diffusion.files import AdapterFile, load_adapter_file, save_adapter_file
from oft_diffusion.formats import write_single_file
from oft_diffusion.formats.components import describe, modules_of
from oft_diffusion.formats.tools import names_of
from oft_diffusion.metadata import AdapterMetadata
from tests.helpers.tiny_families import tiny_family
from tests.library.support import generators
from tests.peers import algebra, onetrainer, sd_scripts
from tests.peers.trainer_keys import KINDS, LATE, SD, XL, Layers

ALL = KINDS | LATE
NAMES = {"flat": "LEGACY", "kohya": "KOHYA", "diffusers": "DIFFUSERS", "comfy": "COMFY", "native": "ORIGINAL"}
CASES = [
    *((name, naming) for name in KINDS for naming in NAMES),
    *((name, naming) for name in LATE for naming in NAMES if naming != "flat"),  # whose LEGACY is dotted
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: tiny_family(name, tmp_path_factory.mktemp("tiny")) for name in ALL}


def adapter(base: Any, layers: Layers, folder: Path) -> AdapterFile:
    """One of ours: a rotation of its own for each key, the same in all of its layers; convolutions turn channels."""
    states: dict[str, dict[str, Tensor]] = {}
    for seed, (part, names) in enumerate(layers.values()):
        for name in names:
            packed = generators(getattr(base, part).get_submodule(name).weight.shape[1] // 4, 4, seed=seed, norm=0.4)
            states.setdefault(part, {})[f"{name}.oft_R.weight"] = packed
    config = OFTConfig(4, targets=".*", parametrisation="cayley_neumann", neumann_order=4)
    metadata = AdapterMetadata(dict.fromkeys(states, config), trigger="sks")
    return load_adapter_file(save_adapter_file(folder / "ours", states, metadata))


def weights_with(base: Any, path: Path, layers: Layers) -> tuple[str, dict[str, Tensor]]:
    """The format of a file, and the native weights of a pipeline with it, in float64."""
    modules = {part: copy.deepcopy(module).double() for part, module in modules_of(base).items()}
    pipe = type(base)(**{**base.components, **modules})
    loaded = load_oft_weights(pipe, path)
    fuse_oft(pipe)
    return str(loaded.format), {key: weight_of(pipe, *meant) for key, meant in layers.items()}


def weight_of(pipe: Any, part: str, layers: tuple[str, ...]) -> Tensor:
    """The native weight: its layers' rows below one another."""
    return torch.cat([getattr(pipe, part).get_submodule(layer).weight.detach() for layer in layers])


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def assert_theirs_and_ours(
    base: Any, layers: Layers, folder: Path, tool: str, naming: str | None, formula: Callable[..., Tensor], found: str
) -> Path:
    """A file has the tool's keys, comes to our weights by the tool's formula, and is read as the tool's again."""
    file, parts = adapter(base, layers, folder), modules_of(base)
    namings = names_of(tool, describe(parts), file.components, naming)
    path = write_single_file(folder / "theirs.safetensors", file, parts, namings, tool=tool).path
    tensors = load_file(path)
    assert tensors.keys() == {f"{key}.oft_R.weight" for key in layers}
    _, wanted = weights_with(base, file.path, layers)
    told, again = weights_with(base, path, layers)
    assert told == found
    for key, meant in layers.items():
        weight = weight_of(base, *meant)
        got = formula(weight, algebra.of_layer(tensors, key), header_of(path))
        torch.testing.assert_close(got, wanted[key], rtol=0, atol=1e-5, msg=key)
        torch.testing.assert_close(again[key], wanted[key], rtol=0, atol=1e-6, msg=key)
        assert float((wanted[key] - weight).abs().max()) > 1e-3, key
    return path


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("name", "naming"), CASES)
def test_onetrainer_comes_to_our_weights(bases: Any, tmp_path: Path, name: str, naming: str) -> None:
    layers, formula = ALL[name][NAMES[naming]], onetrainer.merged_weight_onetrainer
    path = assert_theirs_and_ours(bases[name], layers, tmp_path, "onetrainer", naming, formula, "OneTrainer")
    # Nobody else's: neither of sd-scripts, nor of a revision of OneTrainer's.
    assert not header_of(path).keys() & {"ss_network_module", "ot_branch", "ot_revision"}


@pytest.mark.parametrize("name", ALL)
def test_onetrainer_gets_its_usual_names(bases: Any, tmp_path: Path, name: str) -> None:
    layers, formula = ALL[name]["LEGACY"], onetrainer.merged_weight_onetrainer
    assert_theirs_and_ours(bases[name], layers, tmp_path, "onetrainer", None, formula, "OneTrainer")


@pytest.mark.parametrize("name", [SD, XL])
def test_sd_scripts_comes_to_our_weights(bases: Any, tmp_path: Path, name: str) -> None:
    layers, formula = KINDS[name]["KOHYA"], sd_scripts.merged_weight_sd_scripts
    path = assert_theirs_and_ours(bases[name], layers, tmp_path, "sd-scripts", None, formula, "sd-scripts")
    header = header_of(path)
    assert (header["ss_network_module"], header["ss_network_dim"]) == ("networks.oft_v2", "4")
    # As one would have to ask for them there: texts, and 3x3 kernels by name.
    assert json.loads(header["ss_network_args"]) == {"block_size": "4", "coft": "False", "enable_conv": "True"}


def test_sd_scripts_is_told_no_block_size_where_there_are_several(bases: Any, tmp_path: Path) -> None:
    layers = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in")
    blocks = {f"{layers[0]}.oft_R.weight": generators(4, 8), f"{layers[1]}.oft_R.weight": generators(2, 2)}
    metadata = AdapterMetadata({"unet": OFTConfig("mixed", targets=".*", neumann_order=4)})
    file = load_adapter_file(save_adapter_file(tmp_path / "ours", {"unet": blocks}, metadata))
    path = write_single_file(tmp_path / "x.safetensors", file, {"unet": bases[SD].unet}, "kohya").path
    assert "block_size" not in json.loads(header_of(path)["ss_network_args"])
    assert header_of(path)["ss_network_dim"] == "8"
