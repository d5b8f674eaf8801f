"""What a file lacks or proves: layers left out, probes of rotations and layers, the fingerprint of its base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from oft_diffusion import (
    inject,
    load_oft_weights,
    save_oft_weights,
    unload_oft_weights,
)
from oft_diffusion.errors import AdapterError, AdapterFileError
from oft_diffusion.files import load_adapter_file, save_adapter_file
from oft_diffusion.targets import canonical_name
from tests.library.support import (
    assert_loading_refused,
    seal_again,
    split_raw,
    write_raw,
)


def test_layers_that_the_pipeline_lacks_can_be_left_out(pipe: Any, style: Path, tmp_path: Path) -> None:
    file = load_adapter_file(style)
    state = dict(file.components["unet"])
    state["down_blocks.9.attn.to_q.oft_R.weight"] = next(iter(state.values()))
    odd = save_adapter_file(tmp_path / "odd.safetensors", {"unet": state}, file.metadata)
    assert_loading_refused(pipe, odd, "down_blocks.9.attn.to_q")
    with pytest.warns(UserWarning, match="1 layers that this pipeline does not have were left out"):
        loaded = load_oft_weights(pipe, odd, strict=False)
    assert loaded.unmatched == ("unet.down_blocks.9.attn.to_q",)
    assert loaded.matched == len(state) - 1
    names = {f"unet.{key.removesuffix('.oft_R.weight')}" for key in state}
    assert set(loaded.layers) == names - {"unet.down_blocks.9.attn.to_q"}
    pipe.unet = torch.nn.Linear(8, 8)
    with pytest.raises((AdapterFileError, AdapterError)):
        load_oft_weights(pipe, odd, strict=False, adapter_name="again")


def says_nothing(pipe: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_oft_weights(pipe, path)
    unload_oft_weights(pipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_half_precision_is_the_same(pipe: Any, mug: Path, make: Any, dtype: Any) -> None:
    says_nothing(pipe, mug)
    pipe.unet.to(dtype)
    pipe.text_encoder.to(dtype)
    says_nothing(pipe, mug)
    rounded = save_oft_weights(loaded_into(pipe, mug), mug.parent / f"{dtype}.safetensors", "mug")
    unload_oft_weights(pipe)
    pipe.unet.to(torch.float32)  # half-precision weights loaded as float32
    says_nothing(pipe, mug)
    says_nothing(pipe, rounded)
    pipe.unet.to(torch.bfloat16)
    says_nothing(pipe, rounded)  # float16, and then bfloat16


def loaded_into(pipe: Any, path: Path) -> Any:
    load_oft_weights(pipe, path, adapter_name="mug")
    return pipe


@pytest.mark.parametrize("by", [5e-2, 4e-3, 5e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_base_is_told(pipe: Any, mug: Path, by: float, dtype: Any) -> None:
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1 + by)
    pipe.unet.to(dtype)
    with pytest.warns(UserWarning, match=r"was trained on another base .* than this pipeline's unet"):
        load_oft_weights(pipe, mug)


def test_what_is_put_beside_a_base_makes_no_other_of_it(pipe: Any, mug: Path) -> None:
    pipe.unet.encoder_hid_proj = torch.nn.Linear(4, 4)  # an IP-Adapter's
    pipe.unet.mid_block.register_module("to_k_ip", torch.nn.Linear(4, 4))
    rows = pipe.text_encoder.get_input_embeddings().weight.shape[0]
    pipe.text_encoder.resize_token_embeddings(rows + 2)  # textual inversion's
    says_nothing(pipe, mug)


@pytest.mark.parametrize(
    ("part", "change"), [("unet", {"attention_head_dim": 2}), ("text_encoder", {"hidden_act": "gelu"})]
)
def test_the_same_weights_under_another_config_are_another_base(pipe: Any, mug: Path, part: str, change: Any) -> None:
    module = getattr(pipe, part)
    for key, value in change.items():
        if part == "unet":
            module.register_to_config(**{key: value})
        else:
            setattr(module.config, key, value)
    with pytest.warns(UserWarning, match=f"was trained on another base .* than this pipeline's {part}"):
        load_oft_weights(pipe, mug)


def test_entries_of_configs_that_come_and_go_with_versions_make_no_other_base(pipe: Any, mug: Path) -> None:
    pipe.unet.register_to_config(sample_size=99, new_entry=1, center_input_sample=None)
    pipe.text_encoder.config.eos_token_id = 2
    pipe.text_encoder.config.another = "one"
    says_nothing(pipe, mug)


def rewritten(path: Path, to: Path, change: Any) -> Path:
    """The file with changed metadata, and the digest of its tensors as it is."""
    header, body = split_raw(path.read_bytes())
    told = json.loads(header["__metadata__"]["oft_diffusion"])
    change(told)
    header["__metadata__"]["oft_diffusion"] = json.dumps(told)
    return seal_again(write_raw(to, header, body))


@pytest.mark.parametrize(
    "change",
    [
        {"parametrisation": "cayley_neumann", "neumann_order": 4},
        {"parametrisation": "cayley_series"},
    ],
    ids=str,
)
def test_another_series_than_when_it_was_written_is_noticed(pipe: Any, mug: Path, tmp_path: Path, change: Any) -> None:
    odd = rewritten(mug, tmp_path / "odd.safetensors", lambda told: told["components"]["unet"].update(change))
    assert_loading_refused(pipe, odd, "rotations of unet are not those that were saved")


def test_another_sign_or_packing_is_noticed(pipe: Any, mug: Path, monkeypatch: Any) -> None:
    from oft_diffusion import rotation

    sound = rotation.unpack
    for broken in (lambda packed: -sound(packed), lambda packed: sound(packed.flip(1))):
        monkeypatch.setattr(rotation, "unpack", broken)
        assert_loading_refused(pipe, mug, "are not those that were saved")
        monkeypatch.undo()
    load_oft_weights(pipe, mug)


PAIRS = [
    ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "to_k"),
    ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "to_v"),
    ("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "to_v"),
    ("text_encoder", "encoder.layers.1.self_attn.q_proj", "v_proj"),
]


@pytest.mark.parametrize(("part", "layer", "other"), PAIRS, ids=lambda value: str(value).rpartition(".")[2])
def test_two_rotations_on_each_others_layers_are_noticed(
    pipe: Any, mug: Path, tmp_path: Path, part: str, layer: str, other: str
) -> None:
    file = load_adapter_file(mug)
    state = dict(file.components[part])
    a, b = (
        next(key for key in state if key.endswith(f"{name}.oft_R.weight"))
        for name in (layer, f"{layer.rpartition('.')[0]}.{other}")
    )
    assert state[a].shape == state[b].shape
    state[a], state[b] = state[b], state[a]
    odd = save_adapter_file(tmp_path / "odd.safetensors", {**file.components, part: state}, file.metadata)
    assert_loading_refused(pipe, odd, "through the very base", f"2 adapted layers of {part}", "answer otherwise")
    load_oft_weights(pipe, mug, adapter_name="mug")
    assert_loading_refused(pipe, odd, "through the very base", adapter_name="mug", hotswap=True)
    unload_oft_weights(pipe)
    with torch.no_grad():
        for parameter in getattr(pipe, part).parameters():
            parameter.add_(0.01)
    with pytest.warns(UserWarning, match="another base"):  # where nothing can be proven
        load_oft_weights(pipe, odd)


@pytest.mark.parametrize("edited", ["attn2.to_k", "attn1.to_q"])
def test_an_edit_of_one_adapted_layer_is_another_base_and_no_fault_of_ours(pipe: Any, mug: Path, edited: str) -> None:
    layer = pipe.unet.get_submodule(f"mid_block.attentions.0.transformer_blocks.0.{edited}")
    with torch.no_grad():
        layer.weight[0, 0] += 0.01
    with pytest.warns(UserWarning, match=r"was trained on another base .* than this pipeline's unet"):
        load_oft_weights(pipe, mug)


def test_a_loader_that_mixes_layers_up_is_noticed(pipe: Any, mug: Path, monkeypatch: Any) -> None:
    sound = inject._match

    def exchanged(state: Any, wanted: Any, suffix: str) -> Any:
        found, problems = sound(state, wanted, suffix)
        mixed = {name.replace("to_q", "@").replace("to_v", "to_q").replace("@", "to_v"): t for name, t in found.items()}
        return {name: mixed[name] for name in found}, problems

    monkeypatch.setattr(inject, "_match", exchanged)
    assert_loading_refused(pipe, mug, "through the very base", "unet")


def test_every_layer_is_proven(mug: Path) -> None:
    file = load_adapter_file(mug)
    for part, state in file.components.items():
        layers = {canonical_name(key.removesuffix(".oft_R.weight")) for key in state}
        assert set(file.metadata.probes["layers"][part]) == layers


def test_a_saved_adapter_keeps_what_its_file_proved(pipe: Any, mug: Path, tmp_path: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug")
    again = load_adapter_file(save_oft_weights(pipe, tmp_path, "mug"))
    before = load_adapter_file(mug)
    assert again.metadata.probes == before.metadata.probes
    assert again.metadata.base == before.metadata.base
    assert before.metadata.probes["layers"]["unet"]
