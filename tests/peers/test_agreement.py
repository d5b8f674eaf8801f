"""The references among themselves: where two tools are known to agree, and where they are known not to."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.peers.a1111 import a1111_diff, a1111_lora, a1111_oft
from tests.peers.algebra import Written, blend, draw_packed, generator, neumann, of_layer, project, skew, times
from tests.peers.comfy_core import comfy_weight
from tests.peers.comfy_node import VARIANTS, merged_weight_comfy_node, write_comfy_node_only
from tests.peers.kohya_oft import (
    merged_weight_kohya_oft,
    merged_weight_kohya_oft_flux,
    write_kohya_oft,
    write_kohya_oft_flux,
)
from tests.peers.lycoris_oft import (
    merged_weight_lycoris,
    merged_weight_oft_diag,
    write_lycoris,
    write_lycoris_oft_diag,
)
from tests.peers.onetrainer import divisor, merged_weight_onetrainer, write_onetrainer
from tests.peers.peft_oft import merged_weight_peft, peft_config, peft_file
from tests.peers.sd_scripts import merged_weight_sd_scripts, write_sd_scripts
from tests.peers.wild import merged_weight_musubi, write_musubi, write_wan

LAYERS = {"a": (24, 32), "b": (32, 32), "c": (16, 8, 1, 1), "d": (8, 16, 3, 3)}
FLUX = {"oft_unet_double_blocks_0_img_attn_qkv": (48, 16), "oft_unet_single_blocks_0_linear1": (112, 16), "x": (16, 32)}
WEIGHTS = {
    name: torch.randn(shape, generator=generator(7), dtype=torch.float64) for name, shape in (LAYERS | FLUX).items()
}
WRITERS: dict[str, Callable[..., Written]] = {
    "peft": lambda **o: peft_file(LAYERS, **o),
    "onetrainer": lambda **o: write_onetrainer(LAYERS, scaled=True, embedding="x", **o),
    "sd_scripts": lambda **o: write_sd_scripts(LAYERS, coft=True, **o),
    "node": lambda **o: write_comfy_node_only(LAYERS, "dora_scale", **o),
    "kohya": lambda **o: write_kohya_oft(LAYERS, **o),
    "kohya_flux": lambda **o: write_kohya_oft_flux(FLUX, **o),
    "lycoris": lambda **o: write_lycoris(LAYERS, rescaled=True, **o),
    "oft_diag": lambda **o: write_lycoris_oft_diag(LAYERS, **o),
    "musubi": lambda **o: write_musubi(LAYERS, **o),
    "wan": lambda **o: write_wan(LAYERS, **o),
}


def same(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


def layer_of(written: Written, name: str) -> dict[str, Tensor]:
    return of_layer(written.tensors, name)


@pytest.mark.parametrize("name", WRITERS)
def test_files_follow_from_the_seed(name: str) -> None:
    first, again, other = (WRITERS[name](seed=seed) for seed in (0, 0, 1))
    assert first.metadata == again.metadata
    assert first.tensors.keys() == again.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in first.tensors.items())
    assert any(not torch.equal(other.tensors[key], tensor) for key, tensor in first.tensors.items())
    assert all(isinstance(value, str) for value in first.metadata.values())


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_is_saved_in_the_dtype_that_was_asked_for(name: str, dtype: torch.dtype) -> None:
    kept = {t.dtype for key, t in WRITERS[name](dtype=dtype).tensors.items() if t.dtype != torch.int64}
    assert kept == {dtype}


# The input side


def test_the_input_side_agrees_on_linear_layers_and_not_on_convolutions() -> None:
    packed = {name: draw_packed(generator(1), shape, 8) for name, shape in LAYERS.items()}
    config = peft_config(list(LAYERS))
    for name, weight in WEIGHTS.items():
        if name not in LAYERS:
            continue
        own = {"oft_R.weight": packed[name]}
        by_onetrainer = merged_weight_onetrainer(weight, own, {})
        for other in (
            merged_weight_sd_scripts(weight, own, {}),
            merged_weight_comfy_node(weight, own),
            merged_weight_musubi(weight, own),
        ):
            assert same(other, by_onetrainer)
        if name == "d":
            continue
        flipped = {"oft_R.weight": packed[name] * (-1 if weight.dim() == 4 else 1)}
        assert same(merged_weight_peft(weight, flipped, config), by_onetrainer)
        assert same(merged_weight_peft(weight, own, config), by_onetrainer) == (weight.dim() == 2)
        reverse = merged_weight_peft(weight, own, config | {"use_cayley_neumann": False})
        assert not same(reverse, merged_weight_peft(weight, own, config), 1e-2)


def test_scaled_oft_and_its_two_divisors() -> None:
    assert divisor(32) == 2 * 31**0.5
    assert divisor(32, legacy=True) == 496**0.5
    assert divisor(8) == pytest.approx(divisor(8, legacy=True))
    plain, scaled, legacy = (
        write_onetrainer(LAYERS, block_size=16, scaled=scaled, legacy_scale=legacy)
        for scaled, legacy in ((False, False), (True, False), (True, True))
    )
    for name in LAYERS:
        expected = merged_weight_onetrainer(WEIGHTS[name], layer_of(plain, name), plain.metadata)
        own, old = layer_of(scaled, name), layer_of(legacy, name)
        assert same(merged_weight_onetrainer(WEIGHTS[name], own, {}), expected, 1e-6)
        assert same(merged_weight_comfy_node(WEIGHTS[name], own), expected, 1e-6)
        assert same(merged_weight_onetrainer(WEIGHTS[name], old, {}, legacy_scale=True), expected, 1e-6)
        right = same(merged_weight_onetrainer(WEIGHTS[name], old, {}), expected, 1e-2)
        assert right == (name == "c")  # 8 inputs, one block of 8: there the two are equal
        marked = own | {"oft_R.scaled_oft": torch.tensor(False)}  # its value does not count
        assert same(merged_weight_onetrainer(WEIGHTS[name], marked, {}), expected, 1e-6)
        assert not same(merged_weight_sd_scripts(WEIGHTS[name], own, {}), expected, 1e-1)


def test_coft_is_told_by_the_header() -> None:
    by_config = write_onetrainer(LAYERS, coft_eps=0.3)
    assert json.loads(by_config.metadata["ot_config"])["coft_eps"] == 0.3
    told = merged_weight_onetrainer(WEIGHTS["a"], layer_of(by_config, "a"), by_config.metadata)
    for oft_names in (False, True):
        by_arguments = write_sd_scripts(LAYERS, coft=True, coft_eps=0.3, oft_names=oft_names)
        own = layer_of(by_arguments, "a")
        assert same(merged_weight_sd_scripts(WEIGHTS["a"], own, by_arguments.metadata), told)
        assert not same(merged_weight_sd_scripts(WEIGHTS["a"], own, {}), told, 1e-2)
    kernel = layer_of(by_config, "d")  # OneTrainer's convolutions were not projected
    assert same(
        merged_weight_onetrainer(WEIGHTS["d"], kernel, by_config.metadata),
        merged_weight_onetrainer(WEIGHTS["d"], kernel, {}),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_node_only_files_differ_from_plain_ones(variant: Any) -> None:
    written = write_comfy_node_only(LAYERS, variant)
    own = layer_of(written, "a")
    assert len(own) > 1
    if variant in ("clipped_oft", "cans_oft"):
        with pytest.raises(NotImplementedError):
            merged_weight_comfy_node(WEIGHTS["a"], own)
        return
    plain = merged_weight_onetrainer(WEIGHTS["a"], own, {})
    scaled = merged_weight_comfy_node(WEIGHTS["a"], own)
    assert not same(scaled, plain, 1e-2)
    assert same(scaled / scaled.norm(dim=1, keepdim=True), plain / plain.norm(dim=1, keepdim=True))  # rows only
    assert same(merged_weight_comfy_node(WEIGHTS["a"], own, None, 0.5), blend(WEIGHTS["a"], scaled, 0.5))


def test_forks() -> None:
    musubi = layer_of(write_musubi(LAYERS, norm=0.9), "a")
    plain = layer_of(write_onetrainer(LAYERS, scaled=True, norm=0.9), "a")
    assert torch.equal(musubi["oft_R.weight"], plain["oft_R.weight"])
    whole = merged_weight_musubi(WEIGHTS["a"], musubi)
    assert same(whole, merged_weight_onetrainer(WEIGHTS["a"], plain, {}))
    half = plain | {"oft_R.weight": 0.5 * plain["oft_R.weight"]}
    turned = merged_weight_musubi(WEIGHTS["a"], musubi, None, 0.5)
    assert same(turned, merged_weight_onetrainer(WEIGHTS["a"], half, {}))
    assert not same(turned, blend(WEIGHTS["a"], whole, 0.5), 1e-2)
    clamped = musubi | {"oft_coft_metadata": torch.tensor(1.0), "coft_eps_metadata": torch.tensor(2.0)}
    packed = project(musubi["oft_R.weight"], 2.0) / divisor(32)  # first projected, then scaled
    expected = merged_weight_onetrainer(WEIGHTS["a"], {"oft_R.weight": packed}, {})
    assert same(merged_weight_musubi(WEIGHTS["a"], clamped), expected)
    assert not same(expected, whole, 1e-2)
    wan = write_wan(LAYERS, terms=6)
    for name in LAYERS:
        own = layer_of(wan, name)
        assert own["oft_rank_buffer"] * own["oft_block_size_buffer"] == WEIGHTS[name][0].numel()


# The output side


def test_output_side_readers() -> None:
    constrained = write_lycoris(LAYERS, lora_dim=4, constraint=1e-3)
    for name, weight in WEIGHTS.items():
        if name not in LAYERS:
            continue
        own = layer_of(constrained, name)
        expected = merged_weight_lycoris(weight, own, None, 0.5)
        assert same(merged_weight_kohya_oft(weight, own, None, 0.5), expected, 1e-6)
        assert same(a1111_oft(weight, own, 0.5), expected, 1e-6)
        free = {"oft_blocks": own["oft_blocks"]}
        assert same(a1111_oft(weight, free | {"alpha": torch.tensor(0)}), merged_weight_lycoris(weight, free), 1e-7)


def test_flux_splits_are_layers_of_their_own() -> None:
    written = write_kohya_oft_flux(FLUX, alpha=2e-3)
    counts = {name: sum(key.startswith("oft_blocks.") for key in layer_of(written, name)) for name in FLUX}
    assert list(counts.values()) == [3, 4, 1]
    for name in FLUX:
        own = layer_of(written, name)
        merged = merged_weight_kohya_oft_flux(WEIGHTS[name], own)
        at = 0
        for index in range(counts[name]):
            blocks = own[f"oft_blocks.{index}"]
            rows = slice(at, at := at + blocks.shape[0] * blocks.shape[1])
            part = merged_weight_kohya_oft(WEIGHTS[name][rows], {"oft_blocks": blocks, "alpha": own["alpha"]})
            assert torch.equal(merged[rows], part)
        assert at == WEIGHTS[name].shape[0]
        assert torch.allclose(merged.norm(dim=0), WEIGHTS[name].norm(dim=0), rtol=1e-6)


def test_oft_diag_is_the_rotation() -> None:
    own = layer_of(write_lycoris_oft_diag(LAYERS), "d")
    merged = merged_weight_oft_diag(WEIGHTS["d"], own)
    assert same(merged.flatten(1).norm(dim=0), WEIGHTS["d"].flatten(1).norm(dim=0), 1e-6)
    assert same(a1111_oft(WEIGHTS["d"], own), merged)


# Carriers


@pytest.mark.parametrize("name", ["a", "b", "x"])
@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
def test_carriers_give_the_blend(name: str, strength: float) -> None:
    weight = WEIGHTS[name]
    rotation = neumann(skew(draw_packed(generator(3), weight.shape, 8)))
    rotated = times(weight, rotation.mT)
    expected, delta = blend(weight, rotated, strength), rotated - weight
    out, size = weight.shape
    dense = torch.block_diag(*rotation)
    glora = {
        "a1.weight": dense.T - torch.eye(size),
        "a2.weight": torch.eye(size),
        "b1.weight": torch.zeros(out, 1),
        "b2.weight": torch.zeros(1, size),
    }
    assert same(comfy_weight(weight, glora, strength), expected)
    lora = {"lora_up.weight": torch.eye(out), "lora_down.weight": delta}
    renamed = {"lora_B.weight": torch.eye(out), "lora_A.weight": delta}
    for alpha in ({}, {"alpha": torch.tensor(float(out))}):
        for reader in (comfy_weight, a1111_lora):
            assert same(reader(weight, lora | alpha, strength), expected)
            assert same(reader(weight, renamed | alpha, strength), expected)
        assert same(a1111_diff(weight, {"diff": delta} | alpha, strength), expected)
        assert same(comfy_weight(weight, {"diff": delta} | alpha, strength), expected)
    assert same(
        comfy_weight(weight, lora | {"alpha": torch.tensor(1.0)}, strength), blend(weight, rotated, strength / out)
    )
    assert same(comfy_weight(weight, {"set_weight": rotated}, strength), rotated)
    assert torch.equal(comfy_weight(weight, {"oft_R.weight": torch.ones(1, 6)}, strength), weight)
    if out != size:
        with pytest.raises(ValueError, match="no rank"):
            comfy_weight(weight, glora | {"alpha": torch.tensor(1.0)}, strength)


def test_carriers_of_convolutions_and_biases() -> None:
    weight = WEIGHTS["d"]
    rotated = times(weight, neumann(skew(draw_packed(generator(3), weight.shape, 8))).mT)
    delta = rotated - weight
    lora = {"lora_up.weight": torch.eye(8).reshape(8, 8, 1, 1), "lora_down.weight": delta}
    for reader in (comfy_weight, a1111_lora):
        assert same(reader(weight, lora, 0.5), blend(weight, rotated, 0.5))
    assert torch.equal(comfy_weight(weight, {"diff": delta.flatten(1)}), weight)
    assert same(a1111_diff(weight, {"diff": delta.flatten(1)}), rotated)
    point = WEIGHTS["c"]
    turn = neumann(skew(draw_packed(generator(4), point.shape, 4))).mT
    glora = {"a1.weight": torch.block_diag(*turn) - torch.eye(8), "a2.weight": torch.eye(8)}
    glora |= {"b1.weight": torch.zeros(16, 1), "b2.weight": torch.zeros(1, 8)}
    assert same(comfy_weight(point, glora, 0.5), blend(point, times(point, turn), 0.5))
