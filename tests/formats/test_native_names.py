"""Native names against what reads them: diffusers' converters of single files and of LoRA files, from real sizes.

Each layer has numbers of its own, one per row, written where our tables say; a converter has to bring them home.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors import safe_open
from torch import Tensor

from oft_diffusion.errors import AdapterFileError, TargetError
from oft_diffusion.formats.names import ComponentLayers, Leaf, Meaning, checkpoint_names, write_names
from oft_diffusion.formats.native_dit import expand, native_names
from oft_diffusion.formats.native_unet import unet_names
from tests.formats.real_models import BUILDERS, denoiser_of, real_components, real_model
from tests.helpers.single_files import write_single_file
from tests.helpers.tiny_families import tiny_family


class Anything(dict[str, Tensor]):
    """A checkpoint that has norms and tables, too, for converters that ask for all of them."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, torch.zeros(2))


def marked(layers: Mapping[str, int]) -> dict[str, Tensor]:
    """A column for each layer, no number twice."""
    ends = list(itertools.accumulate(layers.values()))
    return {
        layer: torch.arange(end - count, end, dtype=torch.float64)[:, None]
        for (layer, count), end in zip(layers.items(), ends, strict=True)
    }


def native_weights(names: Mapping[str, Meaning], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The native tensors, filled by their leaves' rows."""
    native = {}
    for name, meaning in names.items():
        tensor = torch.full((sum(len(own[layer]) for layer in meaning.layers), 1), -1.0, dtype=torch.float64)
        tensor = tensor.T if meaning.leaves[0].transposed else tensor
        for leaf in meaning.leaves:
            leaf.put(tensor, own[leaf.layer])
        assert tensor.min() >= 0, name
        assert all(torch.equal(leaf.take(tensor), own[leaf.layer]) for leaf in meaning.leaves)
        native[name] = tensor
    return native


def in_layout(name: str, component: str, prefix: str) -> dict[str, Meaning]:
    """All tensors of a component in a checkpoint whose tensors have this prefix."""

    class AnyName(list[str]):
        def __contains__(self, tensor: object) -> bool:
            return str(tensor).startswith(prefix)

    about = real_components(name)
    return checkpoint_names(about, component, about[component].layers, AnyName())


def assert_home(converted: Mapping[str, Tensor], own: Mapping[str, Tensor], suffix: str = ".weight") -> None:
    lost = [layer for layer in own if f"{layer}{suffix}" not in converted]
    assert not lost, lost[:5]
    wrong = [layer for layer, rows in own.items() if not torch.equal(converted[f"{layer}{suffix}"], rows)]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("name", BUILDERS)
def test_diffusers_converts_our_native_checkpoint_of_a_denoiser(name: str) -> None:
    part = denoiser_of(name)
    about = real_components(name)[part]
    own = marked(about.layers)
    native = native_weights(in_layout(name, part, "model.diffusion_model."), own)
    biases = {key.removesuffix("weight") + "bias": rows[:, 0] for key, rows in native.items()}
    convert = SINGLE_FILE_LOADABLE_CLASSES[about.class_name]["checkpoint_mapping_fn"]
    # These converters take no prefix.
    stripped = len("model.diffusion_model.") if name in ("Flux.2", "Lumina 2", "Qwen-Image") else 0
    state = Anything({key[stripped:]: rows for key, rows in (native | biases).items()})
    assert_home(convert(state, config=dict(real_model(name, part).config)), own)


@pytest.mark.parametrize(
    ("name", "component", "prefix"),
    [
        ("SD 2.1", "text_encoder", "cond_stage_model.model."),
        ("SDXL", "text_encoder_2", "conditioner.embedders.1.model."),
        ("SDXL refiner", "text_encoder_2", "conditioner.embedders.0.model."),
    ],
)
def test_diffusers_converts_our_open_clip(name: str, component: str, prefix: str) -> None:
    model = real_model(name, component)
    own = marked(real_components(name)[component].layers)
    native = native_weights(in_layout(name, component, prefix), own)
    # Its converter splits rows by the size of this one, which is square.
    square = native.get(f"{prefix}text_projection")
    if square is not None:
        native[f"{prefix}text_projection"] = square.expand(square.shape[1], -1)
    converted = convert_open_clip_checkpoint(model, native, prefix=prefix)
    if square is not None:
        converted["text_projection.weight"] = converted["text_projection.weight"][:, :1]
    files = real_components(name)[component].file_name
    assert_home(converted, {files(layer): rows for layer, rows in own.items()})


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
def test_diffusers_converts_our_clip(name: str) -> None:
    own = marked(real_components(name)["text_encoder"].layers)
    prefix = {"SD 1.5": "cond_stage_model.transformer.", "SDXL": "conditioner.embedders.0.transformer."}[name]
    native = native_weights(in_layout(name, "text_encoder", prefix), own)
    assert_home(convert_ldm_clip_checkpoint(native), {f"text_model.{layer}": rows for layer, rows in own.items()})


@pytest.mark.parametrize("family", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_single_file_that_diffusers_loads_has_our_tensors(family: str, tmp_path: Path) -> None:
    pipe = tiny_family(family, tmp_path)
    file = write_single_file(pipe, tmp_path / "model.safetensors")
    parts = [part for part in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, part)]
    about = {part: ComponentLayers.from_model(getattr(pipe, part)) for part in parts}
    with safe_open(file, "pt") as tensors:
        names = set(tensors.keys())
        for part in parts:
            found = checkpoint_names(about, part, about[part].layers, names)
            assert {layer for meaning in found.values() for layer in meaning.layers} == set(about[part].layers)
            for name, meaning in found.items():
                assert meaning.missing == ()
                for leaf in meaning.leaves:
                    live = getattr(pipe, part).get_submodule(leaf.layer).weight
                    assert torch.equal(leaf.take(tensors.get_tensor(name)).reshape(live.shape), live)


# -- LoRA files -------------------------------------------------------------------------------------------------------

# Layers of which diffusers reads no LoRA in these files, or, of Flux.2's, one whose halves have not changed places as
# those of the weight have in its own converter of checkpoints.
_NOT_READ = {"Flux.2": ("norm_out",), "Lumina 2": ("x_embedder", "time_caption", "norm_out"), "Wan 2.1": ("patch",)}


def lora(names: Mapping[str, Meaning], own: Mapping[str, Tensor], kohya: bool) -> dict[str, Tensor]:
    """A LoRA of rank 1 whose second factor is each layer's marked column."""
    down, up = (".lora_down.weight", ".lora_up.weight") if kohya else (".lora_A.weight", ".lora_B.weight")
    native = native_weights(names, own)
    state = {f"{name}{up}": rows for name, rows in native.items()}
    return state | {f"{name}{down}": torch.ones(1, 1, dtype=torch.float64) for name in native}


def read_by_diffusers(pipeline: Any, state: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    read = pipeline.lora_state_dict(state, **options)
    state = read[0] if isinstance(read, tuple) else read
    return {key: rows for key, rows in state.items() if key.endswith(("lora_B.weight", "up.weight"))}


@pytest.mark.parametrize(
    ("name", "naming", "pipeline"),
    [
        ("Flux.1 dev", "kohya", diffusers.FluxPipeline),
        ("Flux.2", "comfy", diffusers.Flux2Pipeline),
        ("Lumina 2", "comfy", diffusers.Lumina2Pipeline),
        ("Qwen-Image", "comfy", diffusers.QwenImagePipeline),
        ("Wan 2.1", "comfy", diffusers.WanPipeline),
        ("Z-Image", "comfy", diffusers.ZImagePipeline),
        ("Z-Image", "kohya", diffusers.ZImagePipeline),
        ("Qwen-Image", "kohya", diffusers.QwenImagePipeline),
    ],
)
def test_diffusers_reads_our_names_of_a_lora(name: str, naming: str, pipeline: Any) -> None:
    about = real_components(name)
    layers = [layer for layer in about["transformer"].layers if not layer.startswith(_NOT_READ.get(name, ()))]
    own = marked({layer: about["transformer"].layers[layer] for layer in layers})
    names = write_names(about, "transformer", layers, naming)
    assert not any(meaning.missing for meaning in names.values())
    converted = read_by_diffusers(pipeline, lora(names, own, kohya=naming == "kohya"))
    # It forgets some of its own prefixes.
    assert_home({key.removeprefix("transformer."): rows for key, rows in converted.items()}, own, ".lora_B.weight")


@pytest.mark.parametrize(("name", "naming"), [("SDXL", "kohya"), ("SDXL", "flat"), ("SD 1.5", "kohya")])
def test_diffusers_reads_our_names_of_a_lora_for_stable_diffusion(name: str, naming: str) -> None:
    about = real_components(name)
    own: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    for part in about:
        # It loses the names of these two, which it knows as native ones alone.
        lost = ("add_embedding",) if (name, naming) == ("SDXL", "flat") else ()
        own[part] = marked({layer: n for layer, n in about[part].layers.items() if not layer.startswith(lost)})
        state |= lora(write_names(about, part, own[part], naming), own[part], kohya=True)
    pipeline = diffusers.StableDiffusionXLPipeline if name == "SDXL" else diffusers.StableDiffusionPipeline
    converted = read_by_diffusers(pipeline, state, unet_config=real_model(name, "unet").config)
    for part in about:
        found = {key.removeprefix(f"{part}."): rows for key, rows in converted.items() if key.startswith(f"{part}.")}
        found = convert_unet_state_dict_to_peft(found) if part == "unet" else convert_state_dict_to_peft(found)
        plain = {key.replace(".lora.up.", ".lora_B."): rows for key, rows in found.items()}  # of the projection
        assert_home(plain, {about[part].file_name(layer): rows for layer, rows in own[part].items()}, ".lora_B.weight")


# -- tables -----------------------------------------------------------------------------------------------------------


def test_every_layer_of_the_unets_has_a_native_name() -> None:
    for name, count in (("SD 1.5", 282), ("SD 2.1", 282), ("SDXL", 794)):
        layers = real_components(name)["unet"].layers
        named = [leaf.layer for leaves in unet_names(layers).values() for leaf in leaves]
        assert sorted(named) == sorted(layers)
        assert len(named) == count


def test_a_leaf_knows_its_rows() -> None:
    names = native_names("FluxTransformer2DModel", real_components("Flux.1 dev")["transformer"].layers)
    single = "single_transformer_blocks.37."
    assert names["single_blocks.37.linear1"] == (
        Leaf(f"{single}attn.to_q", ((0, 3072),)),
        Leaf(f"{single}attn.to_k", ((3072, 3072),)),
        Leaf(f"{single}attn.to_v", ((6144, 3072),)),
        Leaf(f"{single}proj_mlp", ((9216, 12288),)),
    )
    assert names["img_in"] == (Leaf("x_embedder"),)
    assert names["final_layer.adaLN_modulation.1"] == (Leaf("norm_out.linear", ((3072, 3072), (0, 3072))),)


def test_only_the_last_text_modulation_of_sd3_is_swapped() -> None:
    names = native_names("SD3Transformer2DModel", real_components("SD 3.5 Large")["transformer"].layers)
    swapped = [leaf.layer for leaves in names.values() for leaf in leaves if leaf.rows and len(leaf.rows) > 1]
    assert swapped == ["norm_out.linear", "transformer_blocks.37.norm1_context.linear"]


def test_a_native_weight_of_which_a_layer_is_missing_has_no_name() -> None:
    layers = dict.fromkeys(("blocks.0.q", "blocks.0.k", "blocks.0.o", "blocks.1.q"), 4)
    table = {"layers.* blocks.*": {"qk": "q k", "out": "o"}}
    assert set(expand(table, layers)) == {"layers.0.qk", "layers.0.out"}


def test_a_unet_of_another_kind_has_no_native_names() -> None:
    with torch.device("meta"):
        pixels = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
            norm_num_groups=8, resnet_skip_time_act=True,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        )  # fmt: skip
    about = {"unet": ComponentLayers.from_model(pixels)}
    assert unet_names(about["unet"].layers) == {}
    with pytest.raises(TargetError, match="have no name in 'comfy' files"):
        write_names(about, "unet", ["conv_in"], "comfy")


@pytest.mark.parametrize(
    ("component", "layers", "lacking"),
    [
        ("unet", ["conv_in", "conv_out"], "lacks 1 tensors of unet: model.diffusion_model.out.2.weight"),
        ("text_encoder", ["encoder.layers.0.mlp.fc1"], "lacks 1 tensors of text_encoder: cond_stage_model"),
    ],
)
def test_a_checkpoint_without_a_tensor_is_refused(component: str, layers: Iterable[str], lacking: str) -> None:
    tensors = {"model.diffusion_model.input_blocks.0.0.weight"}
    with pytest.raises(AdapterFileError, match=f"sd.safetensors {lacking}"):
        checkpoint_names(real_components("SD 1.5"), component, layers, tensors, source="sd.safetensors")


def test_a_component_of_which_we_know_no_checkpoint_is_refused() -> None:
    with pytest.raises(TargetError, match="no name in native checkpoints"):
        checkpoint_names({"prior": ComponentLayers("PriorTransformer", {}, {"a": 1})}, "prior", ["a"], ())


@pytest.mark.parametrize("bare", [False, True])
def test_layouts_of_a_checkpoint_are_told_by_its_tensors(bare: bool) -> None:
    about = real_components("SD 1.5")
    inside = "" if bare else "text_model."
    tensor = f"cond_stage_model.transformer.{inside}encoder.layers.3.mlp.fc1.weight"
    found = checkpoint_names(about, "text_encoder", ["text_model.encoder.layers.3.mlp.fc1"], {tensor})
    assert list(found) == [tensor]
    flux = real_components("Flux.1 dev")
    for tensor in ("double_blocks.0.img_attn.qkv.weight", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"):
        found = checkpoint_names(flux, "transformer", ["transformer_blocks.0.attn.to_k"], {tensor})
        assert found[tensor].missing == ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v")
    for comfy, part in (("clip_l", "text_encoder"), ("t5xxl", "text_encoder_2")):
        layer = next(iter(flux[part].layers))
        tensor = f"text_encoders.{comfy}.transformer.{flux[part].file_name(layer)}.weight"
        assert list(checkpoint_names(flux, part, [layer], {tensor})) == [tensor]
