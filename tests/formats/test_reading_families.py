"""Names of every kind, and weights that q, k and v share, in files of other tools: weights equal the tools' formulas.

A native weight is put together of its layers' rows, which are in the order that the native models have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oft_diffusion import fuse_oft, load_oft_weights
from oft_diffusion.errors import AdapterFileError
from tests.helpers.tiny_families import tiny_family
from tests.library.support import assert_one_sentence
from tests.peers import algebra, kohya_oft, lycoris_oft, onetrainer, sd_scripts, wild
from tests.peers.comfy_node import merged_weight_comfy_node
from tests.peers.trainer_keys import FLUX, FLUX_WEIGHTS, KINDS, LATE, NAMINGS, SD, SD3, SD3_WEIGHTS, XL, Layers, flat

ALL = KINDS | LATE


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: tiny_family(name, tmp_path_factory.mktemp("tiny")) for name in ALL}


def weight_of(pipe: Any, part: str, layers: tuple[str, ...]) -> Tensor:
    """The native weight: its layers' rows below one another."""
    return torch.cat([getattr(pipe, part).get_submodule(layer).weight.detach() for layer in layers])


def shapes(base: Any, layers: Layers) -> dict[str, tuple[int, ...]]:
    return {key: tuple(weight_of(base, *meant).shape) for key, meant in layers.items()}


def assert_weights(
    base: Any,
    folder: Path,
    layers: Layers,
    written: algebra.Written,
    formula: Callable[..., Tensor],
    *,
    strength: float = 1.0,
) -> str:
    """Every weight is what the tool's formula makes of the base's, all others are the base's; the format's name."""
    modules = {part: copy.deepcopy(m) for part, m in base.components.items() if isinstance(m, nn.Module)}
    pipe = type(base)(**{**base.components, **modules})
    loaded = load_oft_weights(pipe, algebra.save(written, folder / "theirs.safetensors"), strength=strength)
    assert loaded.matched == sum(len(meant[1]) for meant in layers.values())
    fuse_oft(pipe)
    touched = set()
    for key, (part, names) in layers.items():
        weight = weight_of(base, part, names)
        wanted = formula(weight, algebra.of_layer(written.tensors, key), written.metadata, strength)
        assert float((weight_of(pipe, part, names).double() - wanted).abs().max()) < 1e-5, key
        assert float((wanted - weight).abs().max()) > 2e-4, key
        touched |= {(part, f"{name}.weight") for name in names}
    for part in modules:
        for name, tensor in getattr(base, part).state_dict().items():
            assert (part, name) in touched or torch.equal(getattr(pipe, part).state_dict()[name], tensor)
    return str(loaded.format)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", ALL)
def test_every_naming_of_onetrainer(bases: Any, tmp_path: Path, name: str, naming: str) -> None:
    layers = ALL[name][naming]
    written = onetrainer.write_onetrainer(shapes(bases[name], layers), block_size=8, scaled=True)
    found = assert_weights(bases[name], tmp_path, layers, written, onetrainer.merged_weight_onetrainer)
    assert found == "OneTrainer"


@pytest.mark.thinned(5)
@pytest.mark.parametrize("options", [{"coft_eps": 0.2}, {"block_share": True}], ids=str)
@pytest.mark.parametrize("strength", [1.0, -0.7])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", [XL, FLUX])
def test_settings_of_onetrainer_in_every_naming(
    bases: Any, tmp_path: Path, name: str, naming: str, strength: float, options: dict[str, Any]
) -> None:
    layers = KINDS[name][naming]
    written = onetrainer.write_onetrainer(shapes(bases[name], layers), block_size=8, **options)
    formula = onetrainer.merged_weight_onetrainer
    assert assert_weights(bases[name], tmp_path, layers, written, formula, strength=strength) == "OneTrainer"


@pytest.mark.parametrize("name", [SD, XL])
def test_names_of_sd_scripts(bases: Any, tmp_path: Path, name: str) -> None:
    layers = KINDS[name]["KOHYA"]
    written = sd_scripts.write_sd_scripts(shapes(bases[name], layers), block_size=8)
    found = assert_weights(bases[name], tmp_path, layers, written, sd_scripts.merged_weight_sd_scripts, strength=0.4)
    assert found == "sd-scripts"


# -- weights that layers share -----------------------------------------------------------------------------------------


@pytest.mark.thinned(5)
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "", "transformer.", "lora_transformer_"])
@pytest.mark.parametrize("name", [SD3, FLUX])
def test_a_rotation_of_fused_inputs(bases: Any, tmp_path: Path, name: str, prefix: str, strength: float) -> None:
    native = FLUX_WEIGHTS if name == FLUX else SD3_WEIGHTS
    spell = flat if prefix.endswith("_") else str
    layers = {prefix + spell(key): ("transformer", names) for key, names in native.items()}
    written = onetrainer.write_onetrainer(shapes(bases[name], layers), block_size=16)
    formula = onetrainer.merged_weight_onetrainer
    assert_weights(bases[name], tmp_path, layers, written, formula, strength=strength)


@pytest.mark.parametrize("name", [SD3, FLUX])
def test_a_rotation_of_fused_inputs_of_nobody(bases: Any, tmp_path: Path, name: str) -> None:
    """As a file without a header for the node ComfyUI-OFTv2, whose own formula it is held to."""
    layers = KINDS[name]["COMFY"]
    written = onetrainer.write_onetrainer(shapes(bases[name], layers), block_size=8)._replace(metadata={})
    with pytest.warns(UserWarning, match="does not tell which tool wrote it"):
        found = assert_weights(bases[name], tmp_path, layers, written, merged_weight_comfy_node, strength=0.4)
    assert found == "an unknown tool"


def test_a_rotation_of_fused_inputs_of_a_fork(bases: Any, tmp_path: Path) -> None:
    layers = KINDS[FLUX]["KOHYA"]
    written = wild.write_musubi(shapes(bases[FLUX], layers), block_size=8)
    found = assert_weights(bases[FLUX], tmp_path, layers, written, wild.merged_weight_musubi)
    assert found == "a musubi-tuner fork"


@pytest.mark.parametrize("alpha", [1e-3, 10.0])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_kohyas_first_oft_of_flux(bases: Any, tmp_path: Path, alpha: float, strength: float) -> None:
    layers = {f"oft_unet_{flat(key)}": ("transformer", names) for key, names in FLUX_WEIGHTS.items()}
    written = kohya_oft.write_kohya_oft_flux(shapes(bases[FLUX], layers), alpha=alpha, num_blocks=2)
    formula = kohya_oft.merged_weight_kohya_oft_flux
    found = assert_weights(bases[FLUX], tmp_path, layers, written, formula, strength=strength)
    assert found.startswith("output-side OFT")


def test_kohyas_splits_that_a_layer_does_not_have(bases: Any, tmp_path: Path) -> None:
    key = "oft_unet_double_blocks_0_img_attn_qkv"
    written = kohya_oft.write_kohya_oft_flux({key: (96, 32)}, num_blocks=2)
    del written.tensors[f"{key}.oft_blocks.2"]
    with pytest.raises(AdapterFileError, match="2 sets of blocks") as error:
        load_oft_weights(bases[FLUX], algebra.save(written, tmp_path / "theirs.safetensors"))
    assert_one_sentence(error, key)


@pytest.mark.parametrize("options", [{}, {"constraint": 5.0}, {"rescaled": True}], ids=str)
@pytest.mark.parametrize("name", [SD3, FLUX])
def test_a_rotation_of_fused_outputs(bases: Any, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    native = FLUX_WEIGHTS if name == FLUX else SD3_WEIGHTS
    layers = {f"lora_unet_{flat(key)}": ("transformer", names) for key, names in native.items()}
    written = lycoris_oft.write_lycoris(shapes(bases[name], layers), lora_dim=4, **options)
    assert_weights(bases[name], tmp_path, layers, written, lycoris_oft.merged_weight_lycoris)


def test_blocks_that_lie_across_two_layers_are_refused(bases: Any, tmp_path: Path) -> None:
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    written = lycoris_oft.write_lycoris({key: (96, 32)}, lora_dim=6)
    with pytest.raises(AdapterFileError, match=r"blocks of 6 across transformer_blocks\.0\.attn\.to_q") as error:
        load_oft_weights(bases[FLUX], algebra.save(written, tmp_path / "theirs.safetensors"))
    assert_one_sentence(error, key)
