"""Names of every kind, and weights that q, k and v share, in files of other tools: weights equal the tools' formulas.

Keys are spelled out, not made by this package; a native weight is put together of its layers' rows, which are in the
order that the native models have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oft_diffusion import fuse_oft, load_oft_weights
from oft_diffusion.errors import AdapterFileError
from tests.helpers.tiny_families import tiny_family
from tests.library.support import assert_one_sentence
from tests.peers import algebra, kohya_oft, lycoris_oft, onetrainer, sd_scripts
from tests.peers.comfy_node import merged_weight_comfy_node

SD, XL, SD3, FLUX = (f"{name}Pipeline" for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux"))
Layers = Mapping[str, tuple[str, tuple[str, ...]]]  # by key: the component, and the layers whose rows its weight has

_CLIP, _T5 = "encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"
_ATTENTION = "attentions.0.transformer_blocks.0.attn1.to_q"
_IN = {SD: f"down_blocks.0.{_ATTENTION}", XL: f"down_blocks.1.{_ATTENTION}"}
_NATIVE_IN = {
    SD: "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    XL: "input_blocks.3.1.transformer_blocks.0.attn1.to_q",
}
_DOWN, _NATIVE_DOWN = "down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"  # 3x3
_POINT = {SD: "down_blocks.0.attentions.0.proj_in", XL: "down_blocks.1.resnets.0.conv_shortcut"}  # 1x1
_NATIVE_POINT = {SD: "input_blocks.1.1.proj_in", XL: "input_blocks.3.0.skip_connection"}


def flat(name: str) -> str:
    return name.replace(".", "_")


def qkv(attention: str, ends: tuple[str, ...] = ("to_q", "to_k", "to_v")) -> tuple[str, ...]:
    return tuple(f"{attention}.{end}" for end in ends)


_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE, _SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"
# Native name: the layers whose rows it has.
_FLUX = {
    "double_blocks.0.img_attn.qkv": qkv(_DOUBLE),
    "double_blocks.0.txt_attn.qkv": qkv(_DOUBLE, _ADDED),
    "double_blocks.0.img_mlp.2": ("transformer_blocks.0.ff.net.2",),
    "single_blocks.0.linear1": (*qkv(f"{_SINGLE}.attn"), f"{_SINGLE}.proj_mlp"),
    "single_blocks.0.linear2": (f"{_SINGLE}.proj_out",),
}
_SD3 = {
    "joint_blocks.0.x_block.attn.qkv": qkv(_DOUBLE),
    "joint_blocks.1.context_block.attn.qkv": qkv("transformer_blocks.1.attn", _ADDED),
    "joint_blocks.0.x_block.attn2.qkv": qkv("transformer_blocks.0.attn2"),
    "joint_blocks.0.x_block.mlp.fc2": ("transformer_blocks.0.ff.net.2",),
}


def _unets(name: str) -> dict[str, Layers]:
    """The namings of Stable Diffusion's UNets."""
    own = {_IN[name]: _IN[name], _DOWN: _DOWN, _POINT[name]: _POINT[name]}
    native = {_NATIVE_IN[name]: _IN[name], _NATIVE_DOWN: _DOWN, _NATIVE_POINT[name]: _POINT[name]}

    def unet(prefix: str, names: Mapping[str, str], spell: Callable[[str], str] = str) -> dict[str, Any]:
        return {prefix + spell(key): ("unet", (layer,)) for key, layer in names.items()}

    def text(*keys: str) -> dict[str, Any]:
        parts = (("text_encoder", _CLIP), ("text_encoder_2", f"text_model.{_CLIP}"))
        return {key: (part, (layer,)) for key, (part, layer) in zip(keys, parts, strict=False)}

    te, parts = (["te"], ["text_encoder"]) if name == SD else (["te1", "te2"], ["text_encoder", "text_encoder_2"])
    clips = ["clip_l", "clip_g"][: len(te)]
    in_te = text(*(f"lora_{t}_text_model_{flat(_CLIP)}" for t in te))
    return {
        "LEGACY": unet("lora_unet_", own, flat) | in_te,
        "KOHYA": unet("lora_unet_", native if name == XL else own, flat) | in_te,
        "DIFFUSERS": unet("unet.", own) | text(*(f"{part}.text_model.{_CLIP}" for part in parts)),
        "COMFY": unet("diffusion_model.", native)
        | text(*(f"text_encoders.{clip}.transformer.text_model.{_CLIP}" for clip in clips)),
        "ORIGINAL": unet("", native),
    }


def _transformers(name: str) -> dict[str, Layers]:
    """The namings of SD 3 and Flux: q, k and v on their own in the first and third, else fused."""
    native = _FLUX if name == FLUX else _SD3
    own = [layer for layers in native.values() for layer in layers]
    # Two CLIPs with a projection, and T5; Flux has one without, and T5.
    clips = [_CLIP] if name == FLUX else [f"text_model.{_CLIP}"] * 2
    encoders = {f"text_encoder{'' if i == 0 else f'_{i + 1}'}": layer for i, layer in enumerate([*clips, _T5])}

    def text(spell: Callable[[int, str], str]) -> dict[str, Any]:
        spelled = [f"text_model.{_CLIP}"] * len(clips) + [_T5]
        return {
            spell(number, layer): (part, (encoders[part],))
            for number, (part, layer) in enumerate(zip(encoders, spelled, strict=True))
        }

    comfy = ["clip_l", "t5xxl"] if name == FLUX else ["clip_l", "clip_g", "t5xxl"]
    in_te = text(lambda number, layer: f"lora_te{number + 1}_{flat(layer)}")
    fused = {key: ("transformer", layers) for key, layers in native.items()}
    return {
        "LEGACY": {f"lora_transformer_{flat(layer)}": ("transformer", (layer,)) for layer in own} | in_te,
        "KOHYA": {f"lora_unet_{flat(key)}": meant for key, meant in fused.items()} | in_te,
        "DIFFUSERS": {f"transformer.{layer}": ("transformer", (layer,)) for layer in own}
        | text(lambda number, layer: f"{list(encoders)[number]}.{layer}"),
        "COMFY": {f"diffusion_model.{key}": meant for key, meant in fused.items()}
        | text(lambda number, layer: f"text_encoders.{comfy[number]}.transformer.{layer}"),
        "ORIGINAL": fused,
    }


KINDS = {name: _unets(name) for name in (SD, XL)} | {name: _transformers(name) for name in (SD3, FLUX)}
NAMINGS = ("LEGACY", "KOHYA", "DIFFUSERS", "COMFY", "ORIGINAL")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: tiny_family(name, tmp_path_factory.mktemp("tiny")) for name in KINDS}


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


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", KINDS)
def test_every_naming_of_onetrainer(bases: Any, tmp_path: Path, name: str, naming: str) -> None:
    layers = KINDS[name][naming]
    written = onetrainer.write_onetrainer(shapes(bases[name], layers), block_size=8, scaled=True)
    found = assert_weights(bases[name], tmp_path, layers, written, onetrainer.merged_weight_onetrainer)
    assert found == "OneTrainer"


@pytest.mark.parametrize("name", [SD, XL])
def test_names_of_sd_scripts(bases: Any, tmp_path: Path, name: str) -> None:
    layers = KINDS[name]["KOHYA"]
    written = sd_scripts.write_sd_scripts(shapes(bases[name], layers), block_size=8)
    found = assert_weights(bases[name], tmp_path, layers, written, sd_scripts.merged_weight_sd_scripts, strength=0.4)
    assert found == "sd-scripts"


# -- weights that layers share -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "", "transformer.", "lora_transformer_"])
@pytest.mark.parametrize("name", [SD3, FLUX])
def test_a_rotation_of_fused_inputs(bases: Any, tmp_path: Path, name: str, prefix: str, strength: float) -> None:
    native = _FLUX if name == FLUX else _SD3
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


@pytest.mark.parametrize("alpha", [1e-3, 10.0])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_kohyas_first_oft_of_flux(bases: Any, tmp_path: Path, alpha: float, strength: float) -> None:
    layers = {f"oft_unet_{flat(key)}": ("transformer", names) for key, names in _FLUX.items()}
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
    native = _FLUX if name == FLUX else _SD3
    layers = {f"lora_unet_{flat(key)}": ("transformer", names) for key, names in native.items()}
    written = lycoris_oft.write_lycoris(shapes(bases[name], layers), lora_dim=4, **options)
    assert_weights(bases[name], tmp_path, layers, written, lycoris_oft.merged_weight_lycoris)


def test_blocks_that_lie_across_two_layers_are_refused(bases: Any, tmp_path: Path) -> None:
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    written = lycoris_oft.write_lycoris({key: (96, 32)}, lora_dim=6)
    with pytest.raises(AdapterFileError, match=r"blocks of 6 across transformer_blocks\.0\.attn\.to_q") as error:
        load_oft_weights(bases[FLUX], algebra.save(written, tmp_path / "theirs.safetensors"))
    assert_one_sentence(error, key)
