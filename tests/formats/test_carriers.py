"""Carriers: each, read as its tools read it, gives the weights that merging gives, and blends towards the base."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from oft_diffusion import OFTConfig, inject_oft, merge_oft, remove_oft
from oft_diffusion.disk import tensor_digest
from oft_diffusion.errors import AdapterError, AdapterFileError, ConfigError, TargetError
from oft_diffusion.formats.carrier import Exported
from oft_diffusion.formats.carriers import export_diff, export_lora
from oft_diffusion.formats.glora import export_glora
from oft_diffusion.formats.live import EXPORT_KEY
from oft_diffusion.formats.names import ComponentLayers, Meaning, describe, read_names
from oft_diffusion.inject import inject_state
from oft_diffusion.rotation import packed_size
from tests.helpers.tiny_families import side_of, tiny_family
from tests.library.support import assert_one_sentence, assert_unchanged, excite, fingerprint
from tests.peers.a1111 import a1111_diff, a1111_lora
from tests.peers.algebra import blend, of_layer
from tests.peers.comfy_core import comfy_weight

SD, XL, SD3, FLUX = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
)  # fmt: skip
FAMILIES = (SD, XL, SD3, FLUX)
STRENGTHS = (1.0, 0.5, -0.5)
Export = Callable[..., Exported]
Weights = dict[tuple[str, str], Tensor]  # by component and layer


def every_layer(name: str, layer: nn.Module) -> bool:
    del name, layer
    return True


def no_kernels(name: str, layer: nn.Module) -> bool:
    del name
    return layer.weight[0].numel() == layer.weight.shape[1]  # type: ignore[index]


def attention(name: str, layer: nn.Module) -> bool:
    del layer
    return any(part in name for part in ("attn", "mlp", "Attention"))


Kept = Callable[[str, nn.Module], bool]


def parts_of(pipe: Any) -> list[str]:
    return [part for part, about in describe(modules(pipe)).items() if about.layers]


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {part: module for part, module in pipe.components.items() if isinstance(module, nn.Module)}


def adapt(pipe: Any, kept: Kept = every_layer, parts: Iterable[str] | None = None, **settings: Any) -> None:
    """Give a pipeline a frozen adapter far from the identity."""
    for seed, part in enumerate(parts or parts_of(pipe)):
        model = getattr(pipe, part).eval()
        layers = [n for n in ComponentLayers.from_model(model).layers if kept(n, model.get_submodule(n))]
        bank = inject_oft(model, OFTConfig(block_size=4, **settings), layers=layers)
        excite(bank, seed=seed)
        bank.freeze("default")


def layers_of(pipe: Any) -> dict[tuple[str, str], nn.Module]:
    return {
        (part, layer): getattr(pipe, part).get_submodule(layer)
        for part in parts_of(pipe)
        for layer in ComponentLayers.from_model(getattr(pipe, part)).layers
    }


def weights_of(pipe: Any) -> Weights:
    return {name: layer.weight.detach().clone() for name, layer in layers_of(pipe).items()}  # type: ignore[operator]


def another_base(pipe: Any, seed: int) -> None:
    """Give a pipeline other weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in layers_of(pipe).values():
            layer.weight.normal_(std=0.2)  # type: ignore[operator]


def merged(pipe: Any) -> Weights:
    """What merging makes of the weights."""
    for part in parts_of(pipe):
        merge_oft(getattr(pipe, part))
    return weights_of(pipe)


def native(meaning: Meaning, weights: Weights) -> Tensor:
    """A native weight of the layers that lie in it, or one that is empty but for the rows known."""
    parts = [(leaf, weights[meaning.component, leaf.layer]) for leaf in meaning.leaves]
    whole = parts[0][1].new_zeros(sum(len(own) for _, own in parts), *parts[0][1].shape[1:])
    for leaf, own in parts:
        leaf.put(whole, own)
    return whole


def keys_in(pipe: Any, tensors: Mapping[str, Tensor]) -> dict[str, Meaning]:
    """What the keys of a file mean, as we read them; `test_comfy_names.py` holds them to ComfyUI's own maps."""
    ends = re.compile(r"\.(diff|alpha|(lora_up|lora_down|lora_A|lora_B|[ab][12])\.weight)$")
    return read_names(describe(modules(pipe)), sorted({ends.sub("", name) for name in tensors}))


def assert_same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def assert_read_as_merged(
    pipe: Any, path: Path, readers: Sequence[Any], base: Weights, turned: Weights, tolerance: float = 1e-5
) -> None:
    tensors = load_file(path)
    reached = set()
    for key, meaning in keys_in(pipe, tensors).items():
        before, after = native(meaning, base), native(meaning, turned)
        for reader in readers:
            for strength in STRENGTHS:
                assert_same(reader(before, of_layer(tensors, key), strength), blend(before, after, strength), tolerance)
        assert of_layer(tensors, key)
        reached |= {(meaning.component, layer) for layer in meaning.layers}
    assert reached >= {layer for layer in base if not torch.equal(base[layer], turned[layer])}


CASES = [
    pytest.param(export, naming, readers, id=f"{export.__name__}-{naming}")
    for export, readers in ((export_diff, (comfy_weight, a1111_diff)), (export_lora, (comfy_weight, a1111_lora)))
    for naming in ("kohya", "flat", "comfy", *(("diffusers",) if export is export_lora else ()))
]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("export", "naming", "readers"), CASES)
def test_differences_and_full_rank_are_the_merged_weights(
    name: str, export: Export, naming: str, readers: Sequence[Any], tmp_path: Path
) -> None:
    pipe = tiny_family(name, tmp_path)
    # Some layers only, so that fused weights lack some: their rows stay.
    only = {SD3: ["transformer", "text_encoder"], FLUX: ["transformer", "text_encoder"]}.get(name)
    adapt(pipe, lambda layer, _: "add_k" not in layer and "to_v" not in layer, only)
    base, before = weights_of(pipe), fingerprint(pipe)
    found = export(pipe, tmp_path / "x.safetensors", naming=naming, dtype=torch.float32)
    assert_unchanged(pipe, before)
    assert found.path.parent.joinpath("x.safetensors") == found.path
    assert found.overall.delta < 1e-6
    for part in only or parts_of(pipe):
        merge_oft(getattr(pipe, part))
    turned = weights_of(pipe)
    assert {f"{part}.{layer}" for part, layer in base if not torch.equal(base[part, layer], turned[part, layer])} == (
        found.layers.keys()
    )
    assert_read_as_merged(pipe, found.path, readers, base, turned)


def test_fused_weights_change_in_the_rows_of_adapted_layers_only(tmp_path: Path) -> None:
    pipe = tiny_family(FLUX, tmp_path)
    adapt(pipe, lambda layer, _: layer.endswith("attn.to_q"), ["transformer"])
    diff = load_file(export_diff(pipe, tmp_path / "x.safetensors").path)
    assert diff.keys() == {
        "lora_unet_double_blocks_0_img_attn_qkv.diff",
        "lora_unet_single_blocks_0_linear1.diff",
    }
    qkv = diff["lora_unet_double_blocks_0_img_attn_qkv.diff"]
    assert qkv.shape == (96, 32)
    assert qkv[:32].any()
    assert not qkv[32:].any()


@pytest.mark.parametrize("reader", [comfy_weight, a1111_diff, a1111_lora])
def test_another_base_gets_the_change_of_the_first(reader: Any, tmp_path: Path) -> None:
    """A difference, unlike a rotation, is of one base: on another it is no rotation any more."""
    pipe, twin = tiny_family(SD, tmp_path), tiny_family(SD, tmp_path)
    adapt(pipe, attention)
    adapt(twin, attention)
    first, turned = weights_of(pipe), merged(twin)
    export = export_lora if reader is a1111_lora else export_diff
    tensors = load_file(export(pipe, tmp_path / "x.safetensors", dtype=torch.float32).path)
    with torch.no_grad():
        for name, layer in layers_of(pipe).items():
            layer.weight.copy_(3.0 * first[name].flip(0))  # type: ignore[operator]
    second = weights_of(pipe)
    rotated = merged(pipe)
    for key, meaning in keys_in(pipe, tensors).items():
        before, wanted = native(meaning, second), native(meaning, rotated)
        got = reader(before, of_layer(tensors, key))
        assert_same(got, before + native(meaning, turned) - native(meaning, first))
        assert float((got - wanted).norm()) > 0.1 * float((wanted - before).norm()), key


# Several adapters, strengths, sides and places at once


def pieces(pipe: Any, shapes: Mapping[str, tuple[int, int]], seed: int, config: OFTConfig, name: str) -> None:
    source = torch.Generator().manual_seed(seed)
    state = {
        f"{layer}.oft_R.weight": 0.2 * torch.randn(r, packed_size(b), generator=source)
        for layer, (r, b) in shapes.items()
    }
    if config.side == "output":
        layer, (r, b) = next(iter(shapes.items()))
        state[f"{layer}.oft_scale.weight"] = 0.5 + torch.rand(r, b, generator=source)
    inject_state(pipe.unet, config, state, name).freeze(name)


_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."


def many_kinds(tmp_path: Path) -> Any:
    pipe = tiny_family(SD, tmp_path)
    to_q, conv, proj = f"{_BLOCK}attn1.to_q", "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in"
    pieces(pipe, {to_q: (4, 8), conv: (8, 4), proj: (2, 16)}, 1, OFTConfig(), "inputs")
    pieces(pipe, {to_q: (8, 4), conv: (32, 9)}, 2, OFTConfig(parametrisation="cayley_series"), "patches")
    pieces(pipe, {to_q: (2, 16), conv: (4, 8)}, 3, OFTConfig(side="output"), "outputs")
    bank = inject_oft(pipe.text_encoder, OFTConfig(block_size=8), "inputs")
    excite(bank, "inputs")
    return pipe


def weigh(pipe: Any, mode: Any) -> None:
    strengths = {"inputs": 0.7, "patches": -0.4 if mode == "linear" else 1.0, "outputs": 0.6}
    for part in ("unet", "text_encoder"):
        bank = getattr(pipe, part)
        [bank] = {hook.bank for hook in bank._forward_pre_hooks.values()}
        names = [name for name in strengths if name in bank.adapters]
        bank.set_adapters(names, [strengths[name] for name in names], mode)


@pytest.mark.parametrize("mode", ["rotation", "linear"])
@pytest.mark.parametrize("export", [export_diff, export_lora])
def test_what_is_live_is_exported(export: Export, mode: str, tmp_path: Path) -> None:
    pipe = many_kinds(tmp_path)
    weigh(pipe, mode)
    base = weights_of(pipe)
    found = export(pipe, tmp_path / "x.safetensors", dtype=torch.float32)
    assert len(found.layers) == 3 + 8
    assert_read_as_merged(pipe, found.path, (comfy_weight,), base, merged(pipe))


# Low rank, and rounding


def errors_of(pipe: Any, path: Path, base: Weights, turned: Weights) -> dict[str, tuple[float, float, float]]:
    """Per layer, the norms of what the file has wrong, of the live change and of the rotated weight, in float64."""
    tensors, found = load_file(path), {}
    for key, meaning in keys_in(pipe, tensors).items():
        made = comfy_weight(native(meaning, base), of_layer(tensors, key))
        for leaf in meaning.leaves:
            name = (meaning.component, leaf.layer)
            before, after = base[name].double(), turned[name].double()
            norms = [float(t.norm()) for t in (leaf.take(made) - after, after - before, after)]
            found[".".join(name)] = (norms[0], norms[1], norms[2])
    return found


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", [SD, FLUX])
@pytest.mark.parametrize("rank", [1, 5, 4096, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_errors_told_are_those_of_the_file(name: str, rank: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = tiny_family(name, tmp_path)
    adapt(pipe, attention)
    base = weights_of(pipe)
    told = export_lora(pipe, tmp_path / "x.safetensors", rank=rank, dtype=dtype)
    errors = errors_of(pipe, told.path, base, merged(pipe))
    assert errors.keys() >= told.layers.keys()  # a fused weight has more layers
    errors = {layer: errors[layer] for layer in told.layers}
    close = partial(pytest.approx, rel=1e-3, abs=1e-6)
    for layer, (wrong, delta, rotated) in errors.items():
        assert told.layers[layer].delta == close(wrong / delta)
        assert told.layers[layer].weight == close(wrong / rotated)
    wrong, delta, rotated = (math.hypot(*norms) for norms in zip(*errors.values(), strict=True))
    assert told.overall.delta == close(wrong / delta)
    assert told.overall.weight == close(wrong / rotated)
    if rank in (1, 5):
        assert told.overall.delta > 0.3
    else:
        assert told.overall.delta < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_no_lora_of_a_rank_is_nearer(rank: int, tmp_path: Path) -> None:
    pipe = tiny_family(SD, tmp_path)
    adapt(pipe)
    base = weights_of(pipe)
    told = export_lora(pipe, tmp_path / "x.safetensors", rank=rank, dtype=torch.float32)
    turned = merged(pipe)
    for (part, layer), before in base.items():
        delta = (turned[part, layer].double() - before.double()).flatten(1)
        values = torch.linalg.svdvals(delta)
        best = float(values[rank:].norm() / values.norm())
        assert told.layers[f"{part}.{layer}"].delta == pytest.approx(best, rel=1e-4, abs=1e-5)


def test_all_singular_vectors_together_are_the_full_rank(tmp_path: Path) -> None:
    pipe = tiny_family(XL, tmp_path)
    adapt(pipe)
    full = load_file(export_lora(pipe, tmp_path / "full.safetensors", dtype=torch.float32).path)
    found = export_lora(pipe, tmp_path / "svd.safetensors", rank=10_000, dtype=torch.float32)
    assert found.overall.delta < 1e-6
    svd = load_file(found.path)
    assert {name: t.shape for name, t in svd.items()} == {name: t.shape for name, t in full.items()}
    for key in {name.partition(".")[0] for name in full}:
        ups, downs = (
            [f[f"{key}.lora_{side}.weight"].double().flatten(1) for f in (svd, full)] for side in ("up", "down")
        )
        assert_same(ups[0] @ downs[0], ups[1] @ downs[1])


def test_float16_keeps_small_changes(tmp_path: Path) -> None:
    pipe = tiny_family(SD, tmp_path)
    adapt(pipe, attention)
    [bank] = {hook.bank for hook in pipe.unet._forward_pre_hooks.values()}
    bank.set_adapters(["default"], 1e-4)
    low = export_lora(pipe, tmp_path / "lora.safetensors", naming="diffusers")
    plain = export_diff(pipe, tmp_path / "diff.safetensors")
    layer = f"unet.{_BLOCK}attn1.to_q"
    assert plain.layers[layer].delta > 5e-3  # below what float16 holds without loss
    assert low.layers[layer].delta < 1e-3


# GLoRA


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("share", [False, True])
def test_a_glora_rotates_any_base(name: str, share: bool, tmp_path: Path) -> None:
    pipe = tiny_family(name, tmp_path)
    adapt(pipe, no_kernels, share_qkv=share)
    found = export_glora(pipe, tmp_path / "x.safetensors", dtype=torch.float32)
    assert found.overall.delta < 1e-6
    another_base(pipe, 1)
    base = weights_of(pipe)
    turned = merged(pipe)
    assert all(not torch.equal(weight, turned[layer]) for layer, weight in base.items() if weight.dim() == 2)
    assert_read_as_merged(pipe, found.path, (comfy_weight,), base, turned)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("mode", ["rotation", "linear"])
@pytest.mark.parametrize(
    "series", [{}, {"parametrisation": "cayley_series", "neumann_order": 2}, {"parametrisation": "cayley"}], ids=str
)
def test_a_glora_of_any_series_and_strength(series: dict[str, Any], mode: Any, tmp_path: Path) -> None:
    pipe = tiny_family(SD, tmp_path)
    adapt(pipe, no_kernels, **series)
    whole = load_file(export_glora(pipe, tmp_path / "whole.safetensors", dtype=torch.float32).path)
    for bank in banks(pipe):
        bank.set_adapters(["default"], 0.4, mode)
    found = export_glora(pipe, tmp_path / "x.safetensors", dtype=torch.float32)
    assert any(not torch.allclose(tensor, whole[name], atol=1e-3) for name, tensor in load_file(found.path).items())
    another_base(pipe, 1)
    base = weights_of(pipe)
    assert_read_as_merged(pipe, found.path, (comfy_weight,), base, merged(pipe))


def test_glora_names_are_native_where_a_weight_has_one_rotation(tmp_path: Path) -> None:
    def names(share: bool) -> set[str]:
        pipe = tiny_family(FLUX, tmp_path)
        adapt(pipe, lambda layer, _: "attn" in layer or "norm_out" in layer, ["transformer"], share_qkv=share)
        tensors = load_file(export_glora(pipe, tmp_path / "x.safetensors").path)
        return {name.removesuffix(".a1.weight") for name in tensors if name.endswith(".a1.weight")}

    apart, shared = names(False), names(True)
    # ComfyUI exchanges the halves of what comes by diffusers' name for this one, after rotating rows as they lie.
    swapped = "lora_unet_final_layer_adaLN_modulation_1"
    assert swapped in apart & shared
    assert "lora_unet_double_blocks_0_img_attn_qkv" in shared - apart
    assert {f"lora_transformer_transformer_blocks_0_attn_to_{x}" for x in "qkv"} <= apart - shared
    assert "lora_transformer_single_transformer_blocks_0_attn_to_q" in shared  # its MLP is in the same weight


def test_layers_that_a_glora_cannot_rotate_are_refused(tmp_path: Path) -> None:
    pipe = many_kinds(tmp_path)
    with pytest.raises(TargetError) as error:
        export_glora(pipe, tmp_path / "x.safetensors")
    assert_one_sentence(error, f"unet.{_BLOCK}attn1.to_q", ".diff")
    pipe = tiny_family(SD, tmp_path)
    adapt(pipe, parts=["unet"])
    with pytest.raises(TargetError) as error:
        export_glora(pipe, tmp_path / "x.safetensors")
    assert_one_sentence(error, "conv_in", "1x1")
    pipe = tiny_family("Lumina2Pipeline", tmp_path)
    adapt(pipe, lambda layer, _: layer.endswith(("to_q", "to_k")), ["transformer"])
    with pytest.raises(TargetError) as error:
        export_glora(pipe, tmp_path / "x.safetensors")
    assert_one_sentence(error, "attn.to_q", "share_qkv")
    assert not list(tmp_path.glob("*.safetensors"))


# diffusers


def draw(pipe: Any, name: str) -> Tensor:
    for module in modules(pipe).values():
        module.eval()
    pipe.set_progress_bar_config(disable=True)
    size = {"height": side_of(name), "width": side_of(name)}
    return pipe(
        "a dog", num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(0),
        output_type="latent", **size,
    ).images  # fmt: skip


def banks(pipe: Any) -> list[Any]:
    hooks = [hook for module in modules(pipe).values() for hook in module._forward_pre_hooks.values()]
    return [hook.bank for hook in hooks if hasattr(hook, "bank")]


LOADED = {
    SD: ["unet", "text_encoder"],
    XL: ["unet", "text_encoder", "text_encoder_2"],
    SD3: ["transformer", "text_encoder", "text_encoder_2"],
    FLUX: ["transformer", "text_encoder"],
}


def compare_with_diffusers(pipe: Any, name: str, source: Any, plain: Tensor) -> None:
    """Draw with live adapters, and with what diffusers loads from a LoRA file instead."""
    live = {}
    for strength in STRENGTHS:
        for bank in banks(pipe):
            bank.set_adapters(["default"], strength, mode="linear")
        live[strength] = draw(pipe, name)
    for part in LOADED[name]:
        remove_oft(getattr(pipe, part))
    assert torch.equal(draw(pipe, name), plain)
    pipe.load_lora_weights(source, adapter_name="oft")
    for strength, picture in live.items():
        pipe.set_adapters(["oft"], [strength])
        assert float((draw(pipe, name) - picture).abs().max()) < 1e-4
        assert float((picture - plain).abs().max()) > 1e-2
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, name), plain)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("told", [True, False])
def test_diffusers_draws_what_is_live(name: str, told: bool, tmp_path: Path) -> None:
    pipe = tiny_family(name, tmp_path)
    plain = draw(pipe, name)
    adapt(pipe, lambda layer, _: told or layer != "text_projection", LOADED[name])
    path = export_lora(pipe, tmp_path / "x.safetensors", naming="diffusers", dtype=torch.float32).path
    # Newer versions read ranks off the tensors, too, where the header tells none.
    compare_with_diffusers(pipe, name, path if told else load_file(path), plain)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", [SD, XL])
@pytest.mark.parametrize("naming", ["kohya", "flat"])
def test_diffusers_reads_flat_names_of_unets(name: str, naming: str, tmp_path: Path) -> None:
    pipe = tiny_family(name, tmp_path)
    plain = draw(pipe, name)
    adapt(pipe, attention, LOADED[name])
    path = export_lora(pipe, tmp_path / "x.safetensors", naming=naming, dtype=torch.float32).path
    compare_with_diffusers(pipe, name, path, plain)


def test_wan_has_a_file_for_each_expert(tmp_path: Path) -> None:
    pipe = tiny_family("WanPipeline", tmp_path)
    parts = ("transformer", "transformer_2")
    adapt(pipe, no_kernels, parts)
    draw_from = torch.Generator().manual_seed(0)
    told = [torch.randn(shape, generator=draw_from) for shape in ((1, 4, 1, 8, 8), (1, 6, 32))]

    def answers() -> list[Tensor]:
        with torch.no_grad():
            return [getattr(pipe, part)(told[0], torch.tensor([300.0]), told[1]).sample for part in parts]

    for naming in ("diffusers", "kohya"):
        with pytest.raises(TargetError) as error:
            export_lora(pipe, tmp_path / "x.safetensors", naming=naming)
        assert_one_sentence(error, "a layer of transformer and of transformer_2", "components")
    paths = [
        export_lora(
            pipe, tmp_path / f"{part}.safetensors", naming="diffusers", dtype=torch.float32, components=[part]
        ).path
        for part in parts
    ]
    live = answers()
    for part in parts:
        remove_oft(getattr(pipe, part))
    plain = answers()
    pipe.load_lora_weights(paths[0], adapter_name="oft")
    pipe.load_lora_weights(paths[1], adapter_name="oft", load_into_transformer_2=True)
    for answer, wanted, base in zip(answers(), live, plain, strict=True):
        assert_same(answer, wanted)
        assert float((wanted - base).abs().max()) > 1e-2


def test_components_can_be_chosen_and_resting_adapters_are_left_out(tmp_path: Path) -> None:
    pipe = many_kinds(tmp_path)
    weigh(pipe, "linear")
    layers = export_diff(pipe, tmp_path / "x.safetensors", components=["text_encoder"]).layers
    assert {name.partition(".")[0] for name in layers} == {"text_encoder"}
    [bank] = {hook.bank for hook in pipe.unet._forward_pre_hooks.values()}
    bank.set_adapters(["inputs", "patches", "outputs"], [0.0, 1.0, 0.0])
    found = export_diff(pipe, tmp_path / "x.safetensors", components=["unet"])
    assert found.layers.keys() == {f"unet.{_BLOCK}attn1.to_q", "unet.down_blocks.0.resnets.0.conv1"}
    with safe_open(found.path, framework="pt") as file:
        note = json.loads(file.metadata()[EXPORT_KEY])
    assert note["adapters"] == {"unet": [{"name": "patches", "strength": 1.0, "mode": "rotation"}]}
    for wrong in ("vae", "text_encoder_2"):
        with pytest.raises(AdapterError) as error:
            export_diff(pipe, tmp_path / "y.safetensors", components=["unet", wrong])
        assert_one_sentence(error, f"no adapter acts in {wrong}")


def test_the_header_tells_diffusers_every_rank(tmp_path: Path) -> None:
    from peft.utils.other import get_pattern_key

    pipe = tiny_family(FLUX, tmp_path)
    adapt(pipe, parts=LOADED[FLUX])
    path = export_lora(pipe, tmp_path / "x.safetensors", naming="diffusers").path
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    for name, tensor in load_file(path).items():
        part, _, layer = name.removesuffix(".lora_A.weight").partition(".")
        if name.endswith(".lora_A.weight"):
            ranks = config[f"{part}.rank_pattern"]
            assert ranks == config[f"{part}.alpha_pattern"]
            assert ranks.get(get_pattern_key(ranks, layer), config[f"{part}.r"]) == len(tensor), name
    assert config["transformer.lora_alpha"] == config["transformer.r"]


def test_what_diffusers_would_leave_out_is_refused(tmp_path: Path) -> None:
    for name, part in ((FLUX, "text_encoder_2"), ("PixArtSigmaPipeline", "transformer")):
        pipe = tiny_family(name, tmp_path)
        adapt(pipe, parts=[part])
        with pytest.raises(TargetError) as error:
            export_lora(pipe, tmp_path / "x.safetensors", naming="diffusers")
        assert_one_sentence(error, "load_lora_weights", part)


# What files say, and refusals


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("name", "version"), [(SD, {}), (XL, {"ss_base_model_version": "sdxl_base_v1-0"}), (FLUX, {})])
@pytest.mark.parametrize("export", [export_diff, export_lora, export_glora])
def test_a_header_says_what_the_file_is_of(export: Export, name: str, version: dict[str, str], tmp_path: Path) -> None:
    pipe = tiny_family(name, tmp_path)
    pipe.register_to_config(_name_or_path=str(tmp_path / "tiny-base"))
    adapt(pipe, attention)
    path = export(pipe, tmp_path / "x.safetensors").path
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    note = json.loads(header.pop(EXPORT_KEY))
    assert header == {"format": "pt", **version}
    assert note["format"] == export.__name__.removeprefix("export_")
    assert note["base"] == "tiny-base"
    assert note["adapters"]["text_encoder"] == [{"name": "default", "strength": 1.0, "mode": "rotation"}]
    assert note["software"].keys() >= {"torch", "oft-diffusion"}
    tensors = {key: t.flatten() for key, t in load_file(path).items()}
    assert note["sha256"] == tensor_digest(tensors)
    # Another base has another digest; a GLoRA has no base.
    another_base(pipe, 1)
    with safe_open(export(pipe, path).path, framework="pt") as file:
        changed = json.loads(file.metadata()[EXPORT_KEY])
    assert (changed["weights_sha256"] == note["weights_sha256"]) == (export is export_glora)
    assert (changed["sha256"] == note["sha256"]) == (export is export_glora)


def test_sd2_is_told(tmp_path: Path) -> None:
    pipe = tiny_family("StableDiffusionPipeline 2.x", tmp_path)
    pipe.text_encoder.config.hidden_act = "gelu"
    adapt(pipe, attention)
    with safe_open(export_diff(pipe, tmp_path / "x.safetensors").path, framework="pt") as file:
        assert file.metadata()["ss_v2"] == "True"


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    pipe, path = tiny_family(SD, tmp_path), tmp_path / "x.safetensors"

    def refused(kind: type[Exception], *words: str, **options: Any) -> None:
        with pytest.raises(kind) as error:
            export_lora(options.pop("pipe", pipe), options.pop("path", path), **options)
        assert_one_sentence(error, *words)  # type: ignore[arg-type]

    refused(AdapterError, "no adapter acts")
    refused(AdapterError, "is no pipeline", pipe=pipe.unet)
    adapt(pipe, attention)
    refused(ConfigError, "naming='peft'", "diffusers", naming="peft")
    refused(ConfigError, "torch.float64", dtype=torch.float64)
    for rank in (0, -1, 2.0, True):
        refused(ConfigError, f"rank={rank!r}", rank=rank)
    refused(AdapterFileError, "x.pt", "x.safetensors", path=tmp_path / "x.pt")
    for bank in banks(pipe):
        bank.set_adapters(["default"], 0.0)
    refused(AdapterError, "no adapter acts")
    for bank in banks(pipe):
        bank.set_adapters(["default"], 1e7, mode="linear")
    with pytest.raises(AdapterFileError) as error:
        export_diff(pipe, path)
    assert_one_sentence(error, "torch.float16 cannot hold", "bfloat16")
    assert export_diff(pipe, path, dtype=torch.bfloat16).overall.delta < 8e-3
    path.unlink()
    for bank in banks(pipe):
        bank.set_adapters(["default"], 1.0)
    merge_oft(pipe.text_encoder)
    refused(AdapterError, "is merged")
    with pytest.raises(ConfigError):
        export_diff(pipe, path, naming="diffusers")
    pipe = tiny_family("PixArtSigmaPipeline", tmp_path)
    adapt(pipe, parts=["transformer"])
    refused(TargetError, "PixArt", 'naming="flat"', pipe=pipe)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_family(SD, tmp_path)
    adapt(pipe, attention)

    def stop(handle: int) -> None:
        raise KeyboardInterrupt

    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "fsync", stop)
    for export in (export_diff, export_lora, export_glora):
        with pytest.raises(KeyboardInterrupt):
            export(pipe, tmp_path / "x.safetensors")
    assert set(tmp_path.rglob("*")) == before
