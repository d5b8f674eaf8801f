"""`share_qkv`: one generator for the projections of an attention that read the same input."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from oft_diffusion import OFTConfig, inject_oft, load_oft_state_dict, merge_oft, oft_state_dict, unmerge_oft
from oft_diffusion.errors import AdapterFileError
from oft_diffusion.files import load_adapter_file, save_adapter_file
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.targets import find_targets, tied_projections
from tests.core.reference import relative
from tests.helpers import tiny_denoisers as tiny
from tests.library.support import assert_one_sentence, excite

TIED, APART = OFTConfig(block_size=8, share_qkv=True), OFTConfig(block_size=8)
Build = Callable[[], tuple[Any, dict[str, Any]]]


def clip() -> tuple[Any, dict[str, Any]]:
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, vocab_size=20,
        max_position_embeddings=8,
    )  # fmt: skip
    return CLIPTextModel(config).eval(), {"input_ids": torch.arange(6)[None]}


KINDS = [
    clip, tiny.unet, tiny.sd3, tiny.flux, tiny.pixart, tiny.wan, tiny.qwen_image, tiny.mochi, tiny.easy_animate,
    tiny.hunyuan_video_15, tiny.joy_image,
]  # fmt: skip


def built(build: Build) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = build()
    for parameter in model.parameters():  # what is zero at initialisation would hide differences
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval(), inputs


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    result: Tensor = model(**inputs, return_dict=False)[0]
    return result


@pytest.mark.parametrize("build", KINDS)
def test_tied_are_those_that_read_the_same_input_and_no_others(build: Build) -> None:
    model, inputs = built(build)
    found = find_targets(model, "attention")
    tied = tied_projections(model, found)
    read: dict[str, Tensor] = {}
    for target in found:
        target.module.register_forward_pre_hook(lambda _, args, name=target.name: read.update({name: args[0]}))
    output(model, inputs)
    projections = [t.name for t in found if re.search(r"\.(to_|add_)?[qkv](_proj)?$", t.name)]
    expected = {}
    for later in projections:
        for earlier in projections[: projections.index(later)]:
            same_parent = earlier.rpartition(".")[0] == later.rpartition(".")[0]
            if same_parent and read[earlier].shape == read[later].shape and read[earlier].equal(read[later]):
                expected[later] = earlier
                break
    assert tied == expected
    assert tied or build is tiny.joy_image  # where q, k and v are one layer already


@pytest.mark.parametrize("build", [clip, tiny.unet, tiny.wan])
def test_the_gradient_is_the_sum_of_those_of_the_layers(build: Build) -> None:
    grads, layers = [], []
    outputs = []
    for config in (TIED, APART):
        model, inputs = built(build)
        bank = inject_oft(model, config)
        if config is TIED:
            excite(bank)
            state = oft_state_dict(model)
            tied = dict(bank.adapters["default"].tied)
        else:
            load_oft_state_dict(model, state)
        out = output(model, inputs)
        out.square().sum().backward()
        gradient = bank.generators["default"].grad
        assert gradient is not None
        outputs.append(out)
        grads.append(gradient)
        layers.append(bank.layer_slices("default"))
    assert relative(outputs[0], outputs[1]) < 1e-5
    assert grads[0].shape[0] < grads[1].shape[0]
    for keeper in layers[0].keys() - tied.keys():
        group = [keeper, *(name for name, of in tied.items() if of == keeper)]
        whole = sum(grads[1][layers[1][name]] for name in group)
        assert isinstance(whole, Tensor)
        assert relative(grads[0][layers[0][keeper]], whole) < 1e-4


def test_a_file_holds_every_layer_and_any_adapter_reads_it(tmp_path: Path) -> None:
    model, inputs = built(tiny.unet)
    base = output(model, inputs)
    bank = inject_oft(model, TIED)
    excite(bank)
    live = output(model, inputs).detach()
    assert relative(live, base) > 0.01
    path = tmp_path / "adapter.safetensors"
    config = bank.adapters["default"].config
    save_adapter_file(path, {"unet": oft_state_dict(model)}, AdapterMetadata(components={"unet": config}))
    file = load_adapter_file(path)
    assert file.metadata is not None
    assert file.metadata.components["unet"].share_qkv
    state = file.components["unet"]
    assert len(state) == 32
    for layer, keeper in bank.adapters["default"].tied.items():
        assert state[f"{layer}.oft_R.weight"].equal(state[f"{keeper}.oft_R.weight"])
    for other in (TIED, APART):
        again, _ = built(tiny.unet)
        inject_oft(again, other, layers=[key.removesuffix(".oft_R.weight") for key in state])
        load_oft_state_dict(again, state)
        assert relative(output(again, inputs).detach(), live) < 1e-5


def test_tensors_that_differ_are_refused_and_change_nothing() -> None:
    free, inputs = built(tiny.unet)
    excite(inject_oft(free, APART))
    tied, _ = built(tiny.unet)
    inject_oft(tied, TIED)
    before = output(tied, inputs)
    with pytest.raises(AdapterFileError) as error:
        load_oft_state_dict(tied, oft_state_dict(free))
    assert_one_sentence(error, "to_k and", "to_q of UNet2DConditionModel share one generator", "share_qkv=False")
    assert output(tied, inputs).equal(before)


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, -0.7)])
@pytest.mark.parametrize("order", [("tied", "apart"), ("apart", "tied"), ("tied", "other"), ("tied",)])
def test_beside_other_adapters_live_is_merged_and_a_copy_is_the_same(
    order: tuple[str, ...], strengths: tuple[float, float]
) -> None:
    model, inputs = built(tiny.unet)
    base = output(model, inputs)
    some = [t.name for t in find_targets(model, "attention")][::3]
    for seed, (name, config, layers) in enumerate(
        (("tied", TIED, None), ("apart", APART, some), ("other", TIED, None)), start=1
    ):
        bank = inject_oft(model, config, name, layers=layers)
        excite(bank, name, seed=seed)
        bank.freeze(name)
    bank.set_adapters(order, strengths[: len(order)])
    # One after the other, each by its own layers' generators, as separate adapters without ties would do it.
    plain, _ = built(tiny.unet)
    for name in order:
        other = inject_oft(plain, APART, name, layers=bank.adapters[name].blocks)
        load_oft_state_dict(plain, oft_state_dict(model, name), name)
        other.freeze(name)
    other.set_adapters(order, strengths[: len(order)])
    with torch.no_grad():
        live = output(model, inputs)
        assert relative(live, base) > 0.01
        assert relative(live, output(plain, inputs)) < 1e-5
        assert output(copy.deepcopy(model), inputs).equal(live)
        merge_oft(model)
        assert relative(output(model, inputs), live) < 1e-4
        unmerge_oft(model)
        assert output(model, inputs).equal(live)
