"""Foreign keys: those that tools are known to write, those that they write here, and what cannot be told is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from lycoris import LycorisNetwork, create_lycoris
from lycoris.kohya import LycorisNetworkKohya
from torch import nn

from oft_diffusion.errors import AdapterFileError, OFTError, TargetError
from oft_diffusion.formats.names import (
    NAMINGS,
    ComponentLayers,
    Components,
    Leaf,
    Meaning,
    describe,
    read_names,
    write_names,
)
from tests.formats.real_models import BUILDERS, real_components
from tests.helpers import tiny_denoisers
from tests.helpers.lycoris_presets import preset
from tests.helpers.tiny_families import BUILDERS as FAMILIES
from tests.helpers.tiny_families import tiny_family

_TE = "encoder.layers.0.self_attn.q_proj"
_T5 = "encoder.block.0.layer.0.SelfAttention.q"
_BLOCK0 = "down_blocks.1.attentions.0.transformer_blocks.0"
_QKV = tuple(f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv")

# (pipeline, key, component, layers): keys as the tools write them, spelled out.
KNOWN: list[tuple[str, str, str, tuple[str, ...]]] = [
    # SD 1.x and 2.x: every trainer's flat names, and ComfyUI's.
    ("SD 1.5", "lora_unet_down_blocks_0_attentions_0_proj_in", "unet", ("down_blocks.0.attentions.0.proj_in",)),
    ("SD 1.5", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0", "unet",
     ("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",)),
    ("SD 1.5", "lora_unet_up_blocks_0_upsamplers_0_conv", "unet", ("up_blocks.0.upsamplers.0.conv",)),
    ("SD 1.5", "lora_unet.up_blocks.0.upsamplers.0.conv", "unet", ("up_blocks.0.upsamplers.0.conv",)),
    ("SD 1.5", "diffusion_model.output_blocks.2.1.conv", "unet", ("up_blocks.0.upsamplers.0.conv",)),
    ("SD 1.5", "diffusion_model.output_blocks.5.2.conv", "unet", ("up_blocks.1.upsamplers.0.conv",)),
    ("SD 1.5", "oft_unet_input_blocks_1_1_proj_in", "unet", ("down_blocks.0.attentions.0.proj_in",)),
    ("SD 1.5", "oft_unet_down_blocks_0_attentions_0_proj_in", "unet", ("down_blocks.0.attentions.0.proj_in",)),
    ("SD 1.5", "lora_te_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder", (_TE,)),
    ("SD 1.5", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder", (_TE,)),
    ("SD 1.5", "text_encoder.encoder.layers.0.self_attn.q_proj", "text_encoder", (_TE,)),
    ("SD 1.5", "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder",
     (_TE,)),
    ("SD 2.1", "text_encoders.clip_h.transformer.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder",
     (_TE,)),
    ("SD 2.1", "clip_l.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder", (_TE,)),
    # SDXL.
    ("SDXL", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "unet", (f"{_BLOCK0}.attn1.to_q",)),
    ("SDXL", "oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "unet", (f"{_BLOCK0}.attn1.to_q",)),
    ("SDXL", "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj", "unet",
     ("mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",)),
    ("SDXL", "lora_unet_output_blocks_5_1_proj_out", "unet", ("up_blocks.1.attentions.2.proj_out",)),
    ("SDXL", "lora_unet_input_blocks_3_0_op", "unet", ("down_blocks.0.downsamplers.0.conv",)),
    ("SDXL", "lora_unet_input_blocks_4_0_skip_connection", "unet", ("down_blocks.1.resnets.0.conv_shortcut",)),
    ("SDXL", "lora_unet_label_emb_0_2", "unet", ("add_embedding.linear_2",)),
    ("SDXL", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "unet",
     (f"{_BLOCK0}.attn1.to_q",)),
    ("SDXL", "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q", "unet", (f"{_BLOCK0}.attn1.to_q",)),
    ("SDXL", "lora_unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q", "unet", (f"{_BLOCK0}.attn1.to_q",)),
    ("SDXL", "input_blocks.4.1.transformer_blocks.0.attn1.to_q", "unet", (f"{_BLOCK0}.attn1.to_q",)),
    ("SDXL", f"base_model.model.{_BLOCK0}.attn1.to_q", "unet", (f"{_BLOCK0}.attn1.to_q",)),
    ("SDXL", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder", (_TE,)),
    ("SDXL", "lora_te2_text_model_encoder_layers_31_mlp_fc1", "text_encoder_2",
     ("text_model.encoder.layers.31.mlp.fc1",)),
    ("SDXL", "lora_te2_text_projection", "text_encoder_2", ("text_projection",)),
    ("SDXL", "lora_te2.text_model.encoder.layers.31.mlp.fc1", "text_encoder_2",
     ("text_model.encoder.layers.31.mlp.fc1",)),
    ("SDXL", "text_encoders.clip_g.transformer.text_model.encoder.layers.31.mlp.fc1", "text_encoder_2",
     ("text_model.encoder.layers.31.mlp.fc1",)),
    ("SDXL", "clip_g.text_model.encoder.layers.31.mlp.fc1", "text_encoder_2",
     ("text_model.encoder.layers.31.mlp.fc1",)),
    # Transformers: split in OneTrainer's LEGACY and in diffusers' names, fused in native ones.
    ("Flux.1 dev", "lora_transformer_transformer_blocks_0_attn_to_q", "transformer", _QKV[:1]),
    ("Flux.1 dev", "transformer.transformer_blocks.0.attn.to_q", "transformer", _QKV[:1]),
    ("Flux.1 dev", "lycoris_transformer_blocks_0_attn_to_q", "transformer", _QKV[:1]),
    ("Flux.1 dev", "lora_unet_double_blocks_0_img_attn_qkv", "transformer", _QKV),
    ("Flux.1 dev", "oft_unet_double_blocks_0_img_attn_qkv", "transformer", _QKV),
    ("Flux.1 dev", "diffusion_model.double_blocks.0.img_attn.qkv", "transformer", _QKV),
    ("Flux.1 dev", "double_blocks.0.img_attn.qkv", "transformer", _QKV),
    ("Flux.1 dev", "transformer.double_blocks.0.img_attn.qkv.1", "transformer", _QKV[1:2]),
    ("Flux.1 dev", "lora_unet_single_blocks_37_linear2", "transformer", ("single_transformer_blocks.37.proj_out",)),
    ("Flux.1 dev", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder", (_TE,)),
    ("Flux.1 dev", "lora_te2_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_2", (_T5,)),
    ("Flux.1 dev", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_2", (_T5,)),
    ("Flux.1 dev", f"text_encoders.t5xxl.transformer.{_T5}", "text_encoder_2", (_T5,)),
    ("Flux.1 dev", f"t5.{_T5}", "text_encoder_2", (_T5,)),
    ("SD 3.5 Medium", "lora_unet_joint_blocks_0_x_block_attn2_qkv", "transformer",
     tuple(f"transformer_blocks.0.attn2.to_{letter}" for letter in "qkv")),
    ("SD 3.5 Medium", "diffusion_model.joint_blocks.23.context_block.adaLN_modulation.1", "transformer",
     ("transformer_blocks.23.norm1_context.linear",)),
    ("SD 3.5 Medium", "lora_transformer_transformer_blocks_0_attn2_to_q", "transformer",
     ("transformer_blocks.0.attn2.to_q",)),
    ("SD 3.5 Medium", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_3", (_T5,)),
    ("Chroma", "lora_te_encoder_block_0_layer_0_SelfAttention_q", "text_encoder", (_T5,)),
    ("Chroma", "lora_te1_encoder_block_0_layer_0_SelfAttention_q", "text_encoder", (_T5,)),
    ("Z-Image", "diffusion_model.layers.0.attention.to_q", "transformer", ("layers.0.attention.to_q",)),
    ("Z-Image", "lora_unet_layers_0_attention_qkv", "transformer",
     tuple(f"layers.0.attention.to_{letter}" for letter in "qkv")),
    ("Lumina 2", "lora_unet_layers_0_attention_out", "transformer", ("layers.0.attn.to_out.0",)),
    ("Wan 2.1", "lora_unet_blocks_0_self_attn_q", "transformer", ("blocks.0.attn1.to_q",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "component", "layers"), KNOWN, ids=[f"{row[0]}: {row[1]}" for row in KNOWN])
def test_a_key_that_a_tool_writes_means_these_layers(
    name: str, key: str, component: str, layers: tuple[str, ...]
) -> None:
    meaning = read_names(real_components(name), [key])[key]
    assert (meaning.component, meaning.layers) == (component, layers)


# Those of ComfyUI's text encoders that are called after their checkpoints: (pipeline, component, key, layer).
ENCODERS = [
    ("PixArtSigmaPipeline", "text_encoder", f"text_encoders.t5xxl.transformer.{_T5}", _T5),
    ("QwenImagePipeline", "text_encoder", "text_encoders.qwen25_7b.transformer.model.layers.1.mlp.down_proj",
     "model.language_model.layers.1.mlp.down_proj"),
    ("QwenImagePipeline", "text_encoder", "text_encoders.qwen25_7b.transformer.visual.blocks.0.attn.qkv",
     "model.visual.blocks.0.attn.qkv"),
    ("HiDreamImagePipeline", "text_encoder", f"text_encoders.clip_l.transformer.text_model.{_TE}", f"text_model.{_TE}"),
    ("HiDreamImagePipeline", "text_encoder_2", f"text_encoders.clip_g.transformer.text_model.{_TE}",
     f"text_model.{_TE}"),
    ("HiDreamImagePipeline", "text_encoder_3", f"text_encoders.t5xxl.transformer.{_T5}", _T5),
    ("HiDreamImagePipeline", "text_encoder_4", "text_encoders.llama.transformer.model.layers.0.self_attn.q_proj",
     "model.layers.0.self_attn.q_proj"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "key", "layer"), ENCODERS, ids=[row[2] for row in ENCODERS])
def test_text_encoders_of_comfyui(name: str, part: str, key: str, layer: str, tmp_path: Path) -> None:
    pipe = tiny_family(name, tmp_path)
    about = describe({n: module for n, module in pipe.components.items() if isinstance(module, nn.Module)})
    assert read_names(about, [key]) == {key: Meaning(part, (Leaf(layer),))}
    assert write_names(about, part, [layer], "comfy") == {key: Meaning(part, (Leaf(layer),))}


def test_a_combined_pipeline_knows_its_prior_by_both_names() -> None:
    """Kandinsky's: what is trained on the pipeline of the prior alone has that one's names."""
    prior = ComponentLayers("PriorTransformer", {}, {"transformer_blocks.0.attn1.to_q": 8})
    encoder = ComponentLayers("CLIPTextModelWithProjection", {}, {_TE: 8})
    decoder = ComponentLayers("UNet2DConditionModel", {}, {"down_blocks.0.attentions.0.to_q": 8})
    about = {"unet": decoder, "prior_prior": prior, "prior_text_encoder": encoder}
    [layer] = prior.layers
    for name in ("prior", "prior_prior"):
        for key in (f"{name}.{layer}", f"{name}.base_model.model.{layer}", f"lora_{name}_{layer.replace('.', '_')}"):
            assert read_names(about, [key]) == {key: Meaning("prior_prior", (Leaf(layer),))}
    for key in (f"text_encoder.{_TE}", f"prior_text_encoder.text_model.{_TE}"):
        assert read_names(about, [key]) == {key: Meaning("prior_text_encoder", (Leaf(_TE),))}
    # Where the pipeline has one of that name itself, that one is meant.
    both = {**about, "text_encoder": ComponentLayers("MultilingualCLIP", {}, {_TE: 8})}
    assert read_names(both, [f"text_encoder.{_TE}"])[f"text_encoder.{_TE}"].component == "text_encoder"


# What each pipeline has no names for.
_UNWRITTEN = {(name, part, "native") for name in BUILDERS for part in BUILDERS[name] if part.startswith("text_encoder")}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_layer_is_written_once_and_read_back(name: str, naming: str) -> None:
    about = real_components(name)
    for part, described in about.items():
        if (name, part, naming) in _UNWRITTEN:
            with pytest.raises(TargetError, match="no name in 'native' files"):
                write_names(about, part, described.layers, naming)
            continue
        written = write_names(about, part, described.layers, naming)
        layers = [layer for meaning in written.values() for layer in meaning.layers]
        assert sorted(layers) == sorted(described.layers)
        # Of one denoiser, and with prefixes that differ, no file needs to say what it is for.
        told = part if naming in ("peft", "lycoris") else None
        assert read_names(about, written, told) == written


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_s_layers_have_flat_and_dotted_names(name: str, tmp_path: Path) -> None:
    pipe = tiny_family(name, tmp_path)
    modules = {part: module for part, module in pipe.components.items() if isinstance(module, nn.Module)}
    about = describe(modules)
    assert set(about) == set(modules) - {"vae"}
    written: dict[str, Meaning] = {}
    for naming in ("flat", "diffusers"):
        for part in about:
            keys = write_names(about, part, about[part].layers, naming)
            assert not keys.keys() & written.keys()
            assert [meaning.layers for meaning in keys.values()] == [(layer,) for layer in about[part].layers]
            written |= keys
    assert read_names(about, written) == written
    for part, layers in about.items():
        kinds = [type(module).__name__ for module in modules[part].modules()]
        assert len(layers.layers) == sum(kind in ("Linear", "Conv2d", "Conv3d") for kind in kinds)


# -- the tools themselves ---------------------------------------------------------------------------------------------


def _layers_of(keys: Any, suffix: str, about: Components, component: str | None) -> set[str]:
    stems = {key.partition(suffix)[0] for key in keys if suffix in key}
    found = read_names(about, stems, component)
    assert all(len(meaning.leaves) == 1 for meaning in found.values())
    return {meaning.layers[0] for meaning in found.values()}


@pytest.mark.parametrize("build", [tiny_denoisers.unet, tiny_denoisers.sd3, tiny_denoisers.flux])
@pytest.mark.parametrize("wrapped", [True, False])
def test_what_peft_writes_is_read(build: Any, wrapped: bool) -> None:
    model, _ = build()
    about = {"transformer": ComponentLayers.from_model(model)}
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules="all-linear")
    adapted: Any = peft.get_peft_model(model, config) if wrapped else model
    if not wrapped:
        peft.inject_adapter_in_model(config, model)
    state = peft.get_peft_model_state_dict(adapted)
    assert all(key.startswith("base_model.model.") == wrapped for key in state)
    linear = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.oft.layer.Linear)}
    assert linear
    assert _layers_of(state, ".oft_R", about, None) == linear
    assert ComponentLayers.from_model(model) == about["transformer"]  # the wrappers are looked through


@pytest.fixture
def tiny_sd() -> dict[str, Any]:
    unet, _ = tiny_denoisers.unet()
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return {"unet": unet, "text_encoder": transformers.CLIPTextModel(config)}


def test_what_lycoris_writes_is_read(tiny_sd: dict[str, Any]) -> None:
    about = {part: ComponentLayers.from_model(module) for part, module in tiny_sd.items()}
    for part, module in tiny_sd.items():
        with preset(LycorisNetwork, {"target_module": ["Transformer2DModel", "CLIPEncoderLayer"]}):
            network = create_lycoris(module, 1.0, linear_dim=4, algo="diag-oft")
        network.apply_to()
        layers = _layers_of(network.state_dict(), ".oft_blocks", about, part)
        assert len(layers) == len(network.loras) > 10
        assert layers <= set(about[part].layers)


def test_what_lycoris_writes_in_sd_scripts_is_read(tiny_sd: dict[str, Any]) -> None:
    about = {part: ComponentLayers.from_model(module) for part, module in tiny_sd.items()}
    targets = {"unet": ["Transformer2DModel", "ResnetBlock2D"], "text_encoder": ["CLIPEncoderLayer"]}
    with preset(LycorisNetworkKohya, {f"{part}_target_module": classes for part, classes in targets.items()}):
        network = LycorisNetworkKohya(
            tiny_sd["text_encoder"], tiny_sd["unet"], lora_dim=4, conv_lora_dim=4, network_module="diag-oft"
        )
    stems = {lora.lora_name for lora in (*network.unet_loras, *network.text_encoder_loras)}
    found = read_names(about, stems)
    assert {meaning.component for meaning in found.values()} == {"unet", "text_encoder"}
    assert sum(meaning.component == "text_encoder" for meaning in found.values()) == 12
    assert len({meaning.leaves for meaning in found.values()}) == len(stems) > 60


# -- what is told -----------------------------------------------------------------------------------------------------


def test_a_fused_weight_with_some_of_its_leaves_alone_is_told() -> None:
    about = real_components("Flux.1 dev")
    written = write_names(about, "transformer", [_QKV[0], "single_transformer_blocks.0.proj_out"], "comfy")
    assert {key: meaning.missing for key, meaning in written.items()} == {
        "diffusion_model.double_blocks.0.img_attn.qkv": _QKV[1:],
        "diffusion_model.single_blocks.0.linear2": (),
    }
    assert written["diffusion_model.double_blocks.0.img_attn.qkv"].leaves[1] == Leaf(_QKV[1], ((3072, 3072),))
    assert not any(meaning.missing for meaning in write_names(about, "transformer", _QKV, "comfy").values())


def test_sd_scripts_has_native_names_of_sdxl_alone() -> None:
    [key] = write_names(real_components("SDXL"), "unet", ["conv_in"], "kohya")
    assert key == "lora_unet_input_blocks_0_0"
    for name in ("SD 1.5", "SD 2.1"):
        [key] = write_names(real_components(name), "unet", ["conv_in"], "kohya")
        assert key == "lora_unet_conv_in"
        [key] = write_names(real_components(name), "unet", ["conv_in"], "comfy")
        assert key == "diffusion_model.input_blocks.0.0"


@pytest.mark.parametrize(
    ("naming", "key"),
    [("flat", "lora_te_encoder_block"), ("kohya", "lora_te1_encoder_block"), ("comfy", "text_encoders.t5xxl.transfor")],
)
def test_chroma_s_one_encoder_has_a_number_in_kohya_s_names_alone(naming: str, key: str) -> None:
    [written] = write_names(real_components("Chroma"), "text_encoder", [_T5], naming)
    assert written.startswith(key)


def test_adapters_for_z_image_and_sana_are_not_fused() -> None:
    for name, layer in (("Z-Image", "layers.0.attention.to_q"), ("Sana", "transformer_blocks.0.attn1.to_q")):
        assert set(write_names(real_components(name), "transformer", [layer], "comfy")) == {f"diffusion_model.{layer}"}


def test_text_model_is_optional_every_way() -> None:
    for name, part in (("SDXL", "text_encoder"), ("SDXL", "text_encoder_2")):
        about = real_components(name)
        [live] = [layer for layer in about[part].layers if layer.endswith("layers.3.mlp.fc2")]
        for given in ("encoder.layers.3.mlp.fc2", "text_model.encoder.layers.3.mlp.fc2"):
            [(key, meaning)] = write_names(about, part, [given], "diffusers").items()
            assert key == f"{part}.text_model.encoder.layers.3.mlp.fc2"
            assert meaning.layers == (live,)
            assert read_names(about, [f"{part}.{given}"])[f"{part}.{given}"].layers == (live,)


def test_names_that_name_no_component_need_to_be_told_of_several() -> None:
    about = real_components("SDXL")
    key = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    with pytest.raises(AdapterFileError, match="may be a layer of text_encoder or of text_encoder_2"):
        read_names(about, [key])
    for part in ("text_encoder", "text_encoder_2"):
        assert read_names(about, [key], part)[key].component == part


def test_a_file_for_one_of_two_experts() -> None:
    with torch.device("meta"):
        expert = ComponentLayers.from_model(diffusers.WanTransformer3DModel(num_layers=2))
    about = {"transformer": expert, "transformer_2": expert}
    key = "lora_unet_blocks_0_self_attn_q"
    with pytest.raises(AdapterFileError, match="of transformer or of transformer_2"):
        read_names(about, [key])
    for part in about:
        assert read_names(about, [key], part)[key] == Meaning(part, (Leaf("blocks.0.attn1.to_q"),))
        written = write_names(about, part, expert.layers, "flat")
        assert read_names(about, written) == written


def test_a_file_for_a_text_encoder_may_have_denoiser_s_layers() -> None:
    key = "lora_unet_input_blocks_0_0"
    assert read_names(real_components("SDXL"), [key], "text_encoder_2")[key].component == "unet"


def test_a_compiled_module_and_one_beside_a_lora_are_described_as_without() -> None:
    model, _ = tiny_denoisers.flux()
    plain = ComponentLayers.from_model(model)
    assert ComponentLayers.from_model(torch.compile(model)) == plain  # type: ignore[arg-type]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "proj_out"]))
    assert ComponentLayers.from_model(model) == plain
    assert plain.class_name == "FluxTransformer2DModel"
    assert plain.config["num_layers"] == 1
    plain_module = ComponentLayers.from_model(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Conv2d(1, 4, 1)))
    assert plain_module == ComponentLayers("Sequential", {}, {"0": 3, "2": 4})


# -- what is refused --------------------------------------------------------------------------------------------------


def test_keys_of_no_layer_are_refused() -> None:
    about = real_components("SD 1.5")
    with pytest.raises(AdapterFileError) as caught:
        read_names(
            about, ["lora_unet_conv_in", "lora_unet_conv", "lora_unet_input_blocks_12_0"], source="x.safetensors"
        )
    found = str(caught.value)
    assert found.startswith(
        "x.safetensors was trained on another model and does not fit this SD 1 pipeline of unet (UNet"
    )
    assert "text_encoder (CLIPTextModel): 2 of its 3 layers are not in it, lora_unet_conv; lora_unet_input" in found


_ODD = {"unet": ComponentLayers("Odd", {}, {"a.b": 1, "a_b": 1})}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: write_names(_ODD, "transformer", ["a.b"], "flat"), "no component 'transformer'"),
        (lambda: read_names(_ODD, [], "transformer"), "no component 'transformer'"),
        (lambda: write_names(_ODD, "unet", ["a.c", "a.b"], "flat"), r"unet \(Odd\) has no layer a.c"),
        (lambda: write_names(_ODD, "unet", ["a.b", "a_b"], "flat"), "two layers of the name lora_unet_a_b"),
        (lambda: write_names(_ODD, "unet", ["a.b"], "comfy"), "have no name in 'comfy' files: a.b"),
    ],
)
def test_what_cannot_be_named_is_refused(call: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        call()


def test_a_flat_name_of_two_layers_is_refused() -> None:
    assert read_names(_ODD, ["unet.a.b"])["unet.a.b"].layers == ("a.b",)
    with pytest.raises(AdapterFileError, match="may be a layer of unet or of unet"):
        read_names(_ODD, ["lora_unet_a_b"])


def test_an_encoder_of_an_unknown_family_has_no_names_in_comfy() -> None:
    about = {
        "transformer": ComponentLayers("SanaTransformer2DModel", {}, {}),
        "text_encoder": ComponentLayers("T5EncoderModel", {}, {_T5: 8}),
    }
    assert list(write_names(about, "text_encoder", [_T5], "flat")) == [f"lora_te_{_T5.replace('.', '_')}"]
    with pytest.raises(OFTError, match="no name in 'comfy' files"):
        write_names(about, "text_encoder", [_T5], "comfy")
    two = {**about, "text_encoder_2": about["text_encoder"]}
    for part, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        assert list(write_names(two, part, [_T5], "flat")) == [f"{prefix}{_T5.replace('.', '_')}"]
