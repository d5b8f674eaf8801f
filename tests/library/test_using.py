"""Strengths by component, enabling and disabling, hot swaps, and files that prove themselves."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from oft_diffusion import (
    OFTConfig,
    disable_oft_adapters,
    enable_oft_adapters,
    fuse_oft,
    list_oft_adapters,
    load_oft_weights,
    oft_state_dict,
    save_oft_weights,
    set_oft_adapters,
    unload_oft_weights,
)
from oft_diffusion.errors import AdapterError, AdapterFileError
from oft_diffusion.files import load_adapter_file, save_adapter_file
from oft_diffusion.hooks import bank_of
from tests.library.support import (
    assert_loading_refused,
    assert_one_sentence,
    copy_pipe,
    distance,
    draw,
    seal_again,
    split_raw,
    write_raw,
)

MOVED = 0.01


# -- strengths -------------------------------------------------------------------------------------------------------


def test_a_strength_for_each_component(pipe: Any, mug: Path, base_pipe: Any) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug")
    set_oft_adapters(pipe, "mug", {"unet": 0.6, "text_encoder": 0.0})
    (listed,) = list_oft_adapters(pipe)
    assert listed.strengths == {"unet": 0.6, "text_encoder": 0.0}
    assert listed.strength is None
    mixed = draw(pipe)
    alone = copy_pipe(base_pipe)
    file = load_adapter_file(mug)
    only = save_adapter_file(
        mug.parent / "only.safetensors", {"unet": file.components["unet"]},
        type(file.metadata)({"unet": file.metadata.components["unet"]}),
    )  # fmt: skip
    load_oft_weights(alone, only, adapter_name="mug", strength=0.6)
    assert torch.equal(draw(alone), mixed)
    set_oft_adapters(pipe, ["mug"], [{"unet": 0.6}])  # the text encoder's is 1 then
    assert list_oft_adapters(pipe)[0].strengths == {"unet": 0.6, "text_encoder": 1.0}
    assert distance(draw(pipe), mixed) > MOVED
    with pytest.raises(AdapterError) as error:
        set_oft_adapters(pipe, "mug", {"vae": 1.0})
    assert_one_sentence(error, "'vae'", "text_encoder, unet")
    assert list_oft_adapters(pipe)[0].strengths == {"unet": 0.6, "text_encoder": 1.0}


def test_disabled_adapters_keep_place_and_strength(pipe: Any, mug: Path, style: Path, untouched: Any) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug")
    load_oft_weights(pipe, style, adapter_name="style")
    set_oft_adapters(pipe, ["style", "mug"], [0.4, 0.7])
    both = draw(pipe)
    set_oft_adapters(pipe, ["mug"], 0.7)
    one = draw(pipe)
    set_oft_adapters(pipe, ["style", "mug"], [0.4, 0.7])
    disable_oft_adapters(pipe, "style")
    assert distance(draw(pipe), one) < 1e-5
    listed = {a.name: a for a in list_oft_adapters(pipe)}
    assert (listed["style"].enabled, listed["style"].strength) == (False, 0.4)
    assert (listed["mug"].enabled, listed["mug"].strength) == (True, 0.7)
    disable_oft_adapters(pipe)
    assert torch.equal(draw(pipe), untouched)
    enable_oft_adapters(pipe, ["style", "mug"])
    assert torch.equal(draw(pipe), both)
    enable_oft_adapters(pipe)  # nothing to do
    assert torch.equal(draw(pipe), both)


def test_setting_strengths_enables(pipe: Any, mug: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug")
    disable_oft_adapters(pipe, "mug")
    set_oft_adapters(pipe, "mug", 0.5)
    assert list_oft_adapters(pipe)[0].enabled
    disable_oft_adapters(pipe)
    unload_oft_weights(pipe, "mug")
    load_oft_weights(pipe, mug, adapter_name="mug")
    assert list_oft_adapters(pipe)[0].enabled


def test_resting_and_fused_adapters_are_not_switched(pipe: Any, mug: Path, style: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug")
    load_oft_weights(pipe, style, adapter_name="style")
    set_oft_adapters(pipe, ["mug"])
    with pytest.raises(AdapterError, match=r"'style' .* not active"):
        disable_oft_adapters(pipe, ["mug", "style"])
    assert list_oft_adapters(pipe)[0].enabled
    fuse_oft(pipe)
    for switch in (disable_oft_adapters, enable_oft_adapters):
        with pytest.raises(AdapterError, match="merged"):
            switch(pipe, "mug")


# -- hot swap --------------------------------------------------------------------------------------------------------


def test_a_swapped_adapter_is_as_if_loaded_there(pipe: Any, mug: Path, plain: Path, make: Any, base_pipe: Any) -> None:
    series = make("series", seed=4, config=OFTConfig(8, parametrisation="cayley_neumann", neumann_order=4))
    load_oft_weights(pipe, mug, adapter_name="subject", strength=0.7)
    for path in (plain, series, mug):
        swapped = load_oft_weights(pipe, path, adapter_name="subject", hotswap=True)
        fresh = copy_pipe(base_pipe)
        load_oft_weights(fresh, path, adapter_name="subject", strength=0.7)
        assert swapped.metadata == list_oft_adapters(fresh)[0].metadata
        assert torch.equal(draw(pipe), draw(fresh))
        for part in ("unet", "text_encoder"):
            ours, theirs = (oft_state_dict(getattr(p, part), "subject") for p in (pipe, fresh))
            assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_layers_that_the_new_file_lacks_become_the_identity(pipe: Any, mug: Path, style: Path, base_pipe: Any) -> None:
    load_oft_weights(pipe, mug, adapter_name="subject")
    load_oft_weights(pipe, style, adapter_name="subject", hotswap=True)
    fresh = copy_pipe(base_pipe)
    load_oft_weights(fresh, style)
    assert torch.equal(draw(pipe), draw(fresh))


def test_files_that_cannot_take_the_place_change_nothing(pipe: Any, mug: Path, style: Path, make: Any) -> None:
    load_oft_weights(pipe, style, adapter_name="subject")
    wide = make("wide", parts=("unet",), config=OFTConfig(16))
    assert_loading_refused(pipe, mug, "it adapts text_encoder", adapter_name="subject", hotswap=True)
    assert_loading_refused(pipe, wide, "has shape", "(4, 28) there", adapter_name="subject", hotswap=True)
    more = make("more", parts=("unet",), config=OFTConfig(8, targets="all-linear"))
    assert_loading_refused(pipe, more, "is not in it", adapter_name="subject", hotswap=True)
    assert_loading_refused(pipe, style, "'other'", kind=AdapterError, adapter_name="other", hotswap=True)


@pytest.mark.parametrize("how", ["wrapped", "in place", "repeated blocks"])
def test_swaps_and_strengths_recompile_nothing(pipe: Any, mug: Path, plain: Path, how: str) -> None:
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")
    load_oft_weights(pipe, mug, adapter_name="subject")
    eager = {}
    for path, strength in ((mug, 1.0), (plain, 1.0), (plain, 0.4)):
        load_oft_weights(pipe, path, adapter_name="subject", hotswap=True)
        set_oft_adapters(pipe, "subject", strength)
        eager[path, strength] = draw(pipe)
    load_oft_weights(pipe, mug, adapter_name="subject", hotswap=True)
    set_oft_adapters(pipe, "subject")
    if how == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend=backend)
    elif how == "in place":
        pipe.unet.compile(backend=backend)
    else:
        pipe.unet.compile_repeated_blocks(backend=backend)
    assert distance(draw(pipe), eager[mug, 1.0]) < 1e-5
    graphs = backend.frame_count
    assert graphs > 0
    for (path, strength), picture in eager.items():
        load_oft_weights(pipe, path, adapter_name="subject", hotswap=True)
        set_oft_adapters(pipe, "subject", strength)
        assert distance(draw(pipe), picture) < 1e-5
        disable_oft_adapters(pipe)
        draw(pipe)
        enable_oft_adapters(pipe)
    assert backend.frame_count == graphs
    torch.compiler.reset()


def test_a_thousand_swaps_leave_nothing_behind(pipe: Any, mug: Path, plain: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="subject")
    draw(pipe)
    states = [load_adapter_file(path).components["unet"] for path in (mug, plain)]
    bank = bank_of(pipe.unet)
    assert bank is not None
    layers = [{key.removesuffix(".oft_R.weight"): t for key, t in state.items()} for state in states]
    slots = [[d.data_ptr() for d in hook.eval_deltas or ()] for hook in bank.hooks.values()]

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    before = tensors()
    for i in range(1000):
        bank.swap("subject", layers[i % 2])
        if i % 100 == 0:
            bank.set_adapters(["subject"], 1.0 + i / 1000)
    bank.set_adapters(["subject"])
    for path in (mug, plain) * 5:
        load_oft_weights(pipe, path, adapter_name="subject", hotswap=True)
    assert [[d.data_ptr() for d in hook.eval_deltas or ()] for hook in bank.hooks.values()] == slots
    assert tensors() <= before + 2


# -- what a file lacks, or proves ------------------------------------------------------------------------------------


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
    pipe.unet = torch.nn.Linear(8, 8)
    with pytest.raises((AdapterFileError, AdapterError)):
        load_oft_weights(pipe, odd, strict=False, adapter_name="again")


def test_another_base_is_told_and_the_same_in_half_precision_is_not(pipe: Any, mug: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_oft_weights(pipe, mug, adapter_name="a")
        unload_oft_weights(pipe)
        pipe.unet.to(torch.bfloat16)
        pipe.text_encoder.to(torch.float16)
        load_oft_weights(pipe, mug, adapter_name="b")
    unload_oft_weights(pipe)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.05)
    with pytest.warns(UserWarning, match=r"was trained on another base .* than this pipeline's unet"):
        load_oft_weights(pipe, mug)


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


def test_a_rotation_on_the_wrong_layer_is_noticed_on_the_same_base_alone(pipe: Any, mug: Path, tmp_path: Path) -> None:
    file = load_adapter_file(mug)
    state = dict(file.components["unet"])
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    a, b = (f"{attention}.{name}.oft_R.weight" for name in ("to_q", "to_k"))
    state[a], state[b] = state[b], state[a]
    odd = save_adapter_file(tmp_path / "odd.safetensors", {**file.components, "unet": state}, file.metadata)
    assert_loading_refused(pipe, odd, "through the very base", "answer otherwise")
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)
        for parameter in pipe.unet.parameters():
            parameter.add_(0.01)
    with pytest.warns(UserWarning, match="another base"):
        load_oft_weights(pipe, odd)


def test_a_saved_adapter_keeps_what_its_file_proved(pipe: Any, mug: Path, tmp_path: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug")
    again = load_adapter_file(save_oft_weights(pipe, tmp_path, "mug"))
    before = load_adapter_file(mug)
    assert again.metadata.probes == before.metadata.probes
    assert again.metadata.base == before.metadata.base
    assert before.metadata.probes["layers"]["unet"]
