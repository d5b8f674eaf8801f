"""Files for ComfyUI, with and without its node of OFTv2: through its own key maps they come to our weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from oft_diffusion import OFTConfig, fuse_oft, inject_oft, save_oft_weights
from oft_diffusion.errors import ConfigError, OFTError, TargetError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.formats import read, write_single_file
from oft_diffusion.formats.carriers import export_diff, export_lora
from oft_diffusion.formats.components import describe, modules_of
from oft_diffusion.formats.glora import export_glora
from oft_diffusion.formats.names import APART, read_names, write_names
from oft_diffusion.formats.tools import TOOLS, names_of
from oft_diffusion.formats.writing import SINGLE_FILE, part_of
from oft_diffusion.targets import canonical_name
from tests.helpers.tiny_families import BUILDERS, tiny_family
from tests.library.support import assert_one_sentence, excite
from tests.peers.comfy_core import comfy_weight
from tests.peers.comfy_keys import KeyMap
from tests.peers.comfy_node import merged_weight_comfy_node

SD, SD2, XL, SD3, FLUX, CHROMA = (
    "StableDiffusionPipeline", "StableDiffusionPipeline 2.x", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline",
    "FluxPipeline", "ChromaPipeline",
)  # fmt: skip
REFINER = "StableDiffusionXLImg2ImgPipeline refiner"
CLIPS = ("text_encoder", "text_encoder_2", "text_encoder_3")
FIVE_TERMS: dict[str, Any] = {"parametrisation": "cayley_neumann", "neumann_order": 4}
# Whether q, k and v must be rotated alike, and which components' layers ComfyUI knows beside the denoiser's.
KNOWN: dict[str, tuple[bool, tuple[str, ...]]] = {
    SD: (False, CLIPS), SD2: (False, CLIPS), XL: (False, CLIPS), SD3: (False, CLIPS), FLUX: (False, CLIPS),
    CHROMA: (False, CLIPS), REFINER: (False, CLIPS), "QwenImagePipeline": (False, ()), "Flux2Pipeline": (True, ()),
    "Lumina2Pipeline": (True, ()), "WanPipeline 2.1": (False, ()), "HiDreamImagePipeline": (False, ()),
    "PixArtSigmaPipeline": (False, ()), "ZImagePipeline": (False, ()),
}  # fmt: skip


def family(name: str, folder: Path) -> Any:
    if name == REFINER:
        return refiner(folder)
    pipe = tiny_family(name, folder)
    if name == SD2:
        pipe.text_encoder.config.hidden_act = "gelu"  # OpenCLIP's
    return pipe


def refiner(folder: Path) -> Any:
    """SDXL's second model: the second text encoder is its only one."""
    base = tiny_family(XL, folder)
    width = base.text_encoder_2.config.hidden_size
    unet = type(base.unet).from_config({**base.unet.config, "cross_attention_dim": width})
    parts = {**base.components, "unet": unet, "text_encoder": None, "tokenizer": None}
    parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    return diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)


def adapt(pipe: Any, parts: Sequence[str], targets: Any, **settings: Any) -> None:
    for seed, part in enumerate(parts):
        if getattr(pipe, part, None) is None:
            continue
        own = targets if part in ("unet", "transformer") else "all-linear"
        config = OFTConfig(**{"block_size": 4, "targets": own, **FIVE_TERMS, **settings})
        bank = inject_oft(getattr(pipe, part), config, "a")
        excite(bank, "a", seed=seed)
        bank.freeze("a")


def weights(pipe: Any) -> dict[tuple[str, str], Tensor]:
    return {
        (part, name): module.weight.detach().double()
        for part, root in modules_of(pipe).items()
        for name, module in root.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
    }


def fused(pipe: Any) -> dict[tuple[str, str], Tensor]:
    for part in modules_of(pipe).values():
        part.double()
    fuse_oft(pipe)
    return weights(pipe)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    moved = [name for name in wanted if not torch.equal(wanted[name], before[name])]
    assert len(moved) > 5
    for name, weight in wanted.items():
        assert float((got[name] - weight).abs().max()) < 1e-5 * max(1.0, float(weight.abs().max())), name


def denoiser_of(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def cases() -> list[Any]:
    """Every family in the names that it usually gets, and in all others that the node reads."""
    found = [pytest.param(name, None, id=name) for name in KNOWN]
    denoisers = {
        **dict.fromkeys((SD, XL, REFINER), "UNet2DConditionModel"), SD3: "SD3Transformer2DModel",
        FLUX: "FluxTransformer2DModel", CHROMA: "ChromaTransformer2DModel", "WanPipeline 2.1": "WanTransformer3DModel",
        "QwenImagePipeline": "QwenImageTransformer2DModel", "ZImagePipeline": "ZImageTransformer2DModel",
    }  # fmt: skip
    for name, denoiser in denoisers.items():
        namings = TOOLS["comfyui-oftv2"][denoiser].denoiser
        found += [pytest.param(name, n, id=f"{name}-{n}") for n in namings if n != APART]
    return found


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("name", "naming"), cases())
def test_the_node_comes_to_our_weights(name: str, naming: str | None, tmp_path: Path) -> None:
    pipe = family(name, tmp_path)
    keys, before = KeyMap(pipe), weights(pipe)
    shared, clips = KNOWN[name]
    targets: Any = "all-linear+conv" if denoiser_of(pipe) == "unet" else "all-linear"
    if naming in ("kohya", "comfy") and name in (SD3, FLUX, CHROMA):
        shared = True
        # Of single blocks the MLP is in the weight, too, and of SD 3's last one not all is adapted: nothing ties those.
        block = r"transformer_blocks\.\d+\."
        targets = [f"{block}attn.(to_[qkv]|to_out.0)", f"{block}ff.net.(0.proj|2)", "x_embedder", "proj_out"]
        targets = ["pos_embed.proj" if name == SD3 and t == "x_embedder" else t for t in targets]
    adapt(pipe, (denoiser_of(pipe), *clips), targets, share_qkv=shared)
    file = load_adapter_file(save_oft_weights(pipe, tmp_path / "ours", "a"))
    parts = modules_of(pipe)
    how = names_of("comfyui-oftv2", describe(parts), file.components, naming)
    written = write_single_file(tmp_path / "x.safetensors", file, parts, how)
    native, wanted = keys.native(before), keys.native(fused(pipe))
    got = keys.patched(native, load_file(written.path), merged_weight_comfy_node)
    assert_same(got, wanted, native)


@pytest.mark.parametrize("naming", ["flat", "kohya", "comfy"])
def test_the_refiner_s_encoder_is_called_as_an_only_one(naming: str, tmp_path: Path) -> None:
    pipe = refiner(tmp_path)
    about, keys = describe(modules_of(pipe)), KeyMap(pipe).keys
    written = write_names(about, "text_encoder_2", about["text_encoder_2"].layers, naming)
    assert any(key.endswith("text_projection") for key in written)
    for key, meaning in written.items():
        layer = about["text_encoder_2"].file_name(meaning.layers[0])
        assert keys[key].weight == f"clip_g.transformer.{layer}", key
        also = f"lora_te2_{layer.replace('.', '_')}"  # as in files of the base's
        assert read_names(about, [key, also]) == {key: meaning, also: meaning}


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    "name", [name for name in KNOWN if name not in ("HiDreamImagePipeline", "PixArtSigmaPipeline")]
)
@pytest.mark.parametrize("export", [export_diff, export_lora, export_glora])
def test_comfyui_comes_to_our_weights(name: str, export: Callable[..., Any], tmp_path: Path) -> None:
    pipe = family(name, tmp_path)
    keys, before = KeyMap(pipe), weights(pipe)
    shared, clips = KNOWN[name]
    adapt(pipe, (denoiser_of(pipe), *clips), "all-linear", share_qkv=shared)
    written = export(pipe, tmp_path / "x.safetensors", dtype=torch.float32)
    native, wanted = keys.native(before), keys.native(fused(pipe))
    assert_same(keys.patched(native, load_file(written.path), comfy_weight), wanted, native)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", [SD, XL, SD3, FLUX])
@pytest.mark.parametrize("naming", ["flat", "comfy"])
@pytest.mark.parametrize("export", [export_diff, export_lora])
def test_other_names_of_carriers(name: str, naming: str, export: Callable[..., Any], tmp_path: Path) -> None:
    pipe = family(name, tmp_path)
    keys, before = KeyMap(pipe), weights(pipe)
    adapt(pipe, (denoiser_of(pipe), *CLIPS), "all-linear")
    written = export(pipe, tmp_path / "x.safetensors", dtype=torch.float32, naming=naming)
    native, wanted = keys.native(before), keys.native(fused(pipe))
    assert_same(keys.patched(native, load_file(written.path), comfy_weight), wanted, native)


@pytest.mark.parametrize("name", ["SanaPipeline", "Krea2Pipeline", "HiDreamImagePipeline", "PixArtSigmaPipeline"])
def test_carriers_for_what_comfyui_has_no_names(name: str, tmp_path: Path) -> None:
    pipe = tiny_family(name, tmp_path)
    adapt(pipe, ["transformer"], "all-linear")
    for export in (export_diff, export_lora, export_glora):
        with pytest.raises(TargetError) as error:
            export(pipe, tmp_path / "x.safetensors")
        assert_one_sentence(error, type(pipe.transformer).__name__)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["QwenImagePipeline", "Flux2Pipeline", "WanPipeline 2.1", "ZImagePipeline"])
def test_carriers_for_text_encoders_that_comfyui_has_no_names_of(name: str, tmp_path: Path) -> None:
    pipe = tiny_family(name, tmp_path)
    adapt(pipe, ["transformer", "text_encoder"], "all-linear", share_qkv=True)
    for export in (export_diff, export_lora, export_glora):
        with pytest.raises(TargetError) as error:
            export(pipe, tmp_path / "x.safetensors")
        assert_one_sentence(error, "text_encoder", "--only transformer")
    assert not list(tmp_path.glob("*.safetensors"))
    assert export_diff(pipe, tmp_path / "x.safetensors", components=["transformer"]).layers


# -- other tools ------------------------------------------------------------------------------------------------------

_BLOCK = "transformer_blocks.0.attn.to_q"
_DOTTED = f"transformer.{_BLOCK}"
_UNET = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
# What OneTrainer's savers and sd-scripts write for a layer: (tool, pipeline, naming asked for, component, layer, key).
KEYS: list[tuple[str, str, str | None, str, str, str]] = [
    ("onetrainer", SD, None, "unet", _UNET.replace("_", "."), f"lora_unet_{_UNET}"),
    ("onetrainer", SD, "diffusers", "unet", "conv_in", "unet.conv_in"),
    ("onetrainer", SD, "comfy", "unet", "conv_in", "diffusion_model.input_blocks.0.0"),
    ("onetrainer", SD, "native", "unet", "conv_in", "input_blocks.0.0"),
    ("onetrainer", SD, None, "text_encoder", "encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
    ("onetrainer", XL, None, "unet", "conv_in", "lora_unet_conv_in"),
    ("onetrainer", XL, "kohya", "unet", "conv_in", "lora_unet_input_blocks_0_0"),
    ("onetrainer", XL, None, "text_encoder_2", "encoder.layers.0.mlp.fc1",
     "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    ("onetrainer", SD3, None, "transformer", _BLOCK, f"lora_transformer_{_BLOCK.replace('.', '_')}"),
    ("onetrainer", FLUX, None, "transformer", _BLOCK, f"lora_transformer_{_BLOCK.replace('.', '_')}"),
    ("onetrainer", CHROMA, None, "transformer", _BLOCK, f"lora_transformer_{_BLOCK.replace('.', '_')}"),
    ("onetrainer", CHROMA, None, "text_encoder", "encoder.block.0.layer.0.SelfAttention.q",
     "lora_te_encoder_block_0_layer_0_SelfAttention_q"),
    ("onetrainer", "PixArtSigmaPipeline", None, "transformer", "transformer_blocks.0.attn1.to_q",
     "lora_transformer_transformer_blocks_0_attn1_to_q"),
    ("onetrainer", "QwenImagePipeline", None, "transformer", _BLOCK, _DOTTED),
    ("onetrainer", "Flux2Pipeline", None, "transformer", _BLOCK, _DOTTED),
    ("onetrainer", "ZImagePipeline", None, "transformer", "layers.0.attention.to_q",
     "transformer.layers.0.attention.to_q"),
    ("onetrainer", "ZImagePipeline", "kohya", "transformer", "layers.0.attention.to_q",
     "lora_unet_layers_0_attention_to_q"),
    ("onetrainer", "SanaPipeline", None, "transformer", "transformer_blocks.0.attn1.to_q",
     "transformer.transformer_blocks.0.attn1.to_q"),
    ("onetrainer", "HiDreamImagePipeline", None, "transformer", "double_stream_blocks.0.block.attn1.to_q",
     "transformer.double_stream_blocks.0.block.attn1.to_q"),
    ("onetrainer", "Krea2Pipeline", None, "transformer", "transformer_blocks.0.attn.to_q",
     "transformer.transformer_blocks.0.attn.to_q"),
    ("sd-scripts", SD, None, "unet", "conv_in", "lora_unet_conv_in"),
    ("sd-scripts", SD2, None, "unet", "conv_in", "lora_unet_conv_in"),
    ("sd-scripts", XL, None, "unet", "conv_in", "lora_unet_input_blocks_0_0"),
    ("sd-scripts", XL, None, "text_encoder", "encoder.layers.0.mlp.fc1",
     "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tool", "name", "naming", "part", "layer", "key"), KEYS, ids=[f"{row[0]}: {row[1]}: {row[5]}" for row in KEYS]
)
def test_a_tool_gets_its_own_names(
    tool: str, name: str, naming: str | None, part: str, layer: str, key: str, tmp_path: Path
) -> None:
    pipe = family(name, tmp_path)
    module = getattr(pipe, part)
    layer = next(n for n, _ in module.named_modules() if canonical_name(n).replace("_", ".") == layer.replace("_", "."))
    excite(inject_oft(module, OFTConfig(block_size=2, **FIVE_TERMS), "a", layers=[layer]), "a")
    file = load_adapter_file(save_oft_weights(pipe, tmp_path / "ours", "a"))
    parts = modules_of(pipe)
    how = names_of(tool, describe(parts), file.components, naming)
    written = write_single_file(tmp_path / "x.safetensors", file, parts, how)
    assert set(load_file(written.path)) == {f"{key}.oft_R.weight"}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_is_lost_in_any_naming(name: str, tmp_path: Path) -> None:
    """Whatever the naming: the file holds every layer, as one reads it again, or there is none."""
    pipe = family(name, tmp_path)
    parts = modules_of(pipe)
    about = describe(parts)
    adapt(pipe, list(about), "all-linear", share_qkv=True)
    whole = load_adapter_file(save_oft_weights(pipe, tmp_path / "ours", "a"))
    written = 0
    for naming in SINGLE_FILE:
        for file in (whole, *(part_of(whole, part) for part in whole.components)):
            path = tmp_path / "x.safetensors"
            try:
                write_single_file(path, file, parts, naming)
            except OFTError:
                assert not path.exists()
                continue
            written += 1
            # Wan's experts have the same names in most: a file of one cannot tell which.
            other = {"transformer", "transformer_2"} - file.components.keys() if "transformer_2" in parts else ()
            again = read(path, {p: m for p, m in parts.items() if p not in other})
            assert layers(again.file) == layers(file)
            path.unlink()
    assert written >= 3


def layers(file: Any) -> dict[str, set[str]]:
    return {part: {canonical_name(key) for key in state} for part, state in file.components.items()}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("tool", TOOLS)
def test_each_tool_has_a_family_or_refuses_it(name: str, tool: str, tmp_path: Path) -> None:
    about = describe(modules_of(family(name, tmp_path)))
    denoiser = "unet" if "unet" in about else "transformer"
    known = TOOLS[tool].get(about[denoiser].class_name)
    if known is None:
        with pytest.raises(TargetError) as error:
            names_of(tool, about, [denoiser])
        assert_one_sentence(error, tool, about[denoiser].class_name)
        return
    assert names_of(tool, about, [denoiser]) == {denoiser: known.denoiser[0]}
    for naming in set(SINGLE_FILE) - set(known.denoiser):
        with pytest.raises(ConfigError) as refused:
            names_of(tool, about, [denoiser], naming)
        assert_one_sentence(refused, tool, naming)
    if not known.encoders:
        with pytest.raises(TargetError) as error:
            names_of(tool, about, ["text_encoder"])
        assert_one_sentence(error, "text_encoder", "--only")


ROWS = {  # of the table in docs/formats.md
    "SD 1, SD 2, SDXL": [SD, SD2, XL], "SD 3, Flux.1, Chroma": [SD3, FLUX, CHROMA],
    "PixArt": ["PixArtAlphaPipeline", "PixArtSigmaPipeline"], "Qwen-Image": ["QwenImagePipeline"],
    "Flux.2": ["Flux2Pipeline", "Flux2KleinPipeline"], "Z-Image": ["ZImagePipeline"],
    "HiDream": ["HiDreamImagePipeline"], "Sana": ["SanaPipeline"], "Krea 2": ["Krea2Pipeline"],
    "Lumina 2, Wan": ["Lumina2Pipeline", "WanPipeline"],
}  # fmt: skip


def test_the_table_in_the_docs_is_the_data(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    [header] = [row for row in rows if row[0] == "" and row[1] == "`onetrainer`"]
    found = {row[0]: row[1:] for row in rows if row[0] in ROWS and len(row) == len(header)}
    assert found.keys() == ROWS.keys()
    for row, name in ((row, name) for row, names in ROWS.items() for name in names):
        pipe = tiny_family(name, tmp_path)
        family = type(getattr(pipe, denoiser_of(pipe))).__name__
        for tool, cell in zip(header[1:], found[row], strict=True):
            known = TOOLS[tool.strip("`")].get(family)
            if known is None:
                assert cell == "-", (row, tool)
                continue
            apart = known.denoiser[0] == APART  # kohya, but flat
            usual = ("kohya", "flat") if apart else known.denoiser[:1]
            assert cell.startswith(usual[0]), (row, tool)
            told = {naming for naming in SINGLE_FILE if naming in cell}
            assert told == {*usual, *known.denoiser} - {APART}, (row, tool)
            assert ("the denoiser alone" in cell) == (not known.encoders), (row, tool)
