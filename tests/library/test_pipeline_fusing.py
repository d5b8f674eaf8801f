"""Fusing adapters into a pipeline's weights, and out again."""

import tempfile
from collections import Counter

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from oft_diffusion import (
    fuse_oft,
    list_oft_adapters,
    load_oft_weights,
    merge_oft,
    save_oft_weights,
    set_oft_adapters,
    unfuse_oft,
    unload_oft_weights,
)
from oft_diffusion.errors import AdapterError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.pipeline import fusing
from tests.library.support import (
    assert_one_sentence,
    assert_unchanged,
    distance,
    draw,
    fingerprint,
)

MOVED = 0.01  # of a picture's range, far above what rounding does
ROUNDING = 1e-5


def names(pipe):
    return [a.name for a in list_oft_adapters(pipe)]


@pytest.mark.parametrize("keep_base", ["cpu", "disk"])
def test_unfusing_brings_every_bit_back(pipe, base_pipe, mug, keep_base):
    load_oft_weights(pipe, mug, adapter_name="mug", strength=0.8)
    live, before = draw(pipe), fingerprint(pipe)
    fuse_oft(pipe, keep_base=keep_base)
    assert not torch.equal(
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight,
        base_pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight,
    )
    assert [(a.strength, a.fused) for a in list_oft_adapters(pipe)] == [(0.8, True)]
    unfuse_oft(pipe)
    assert_unchanged(pipe, before)
    assert [(a.strength, a.fused) for a in list_oft_adapters(pipe)] == [(0.8, False)]
    assert torch.equal(draw(pipe), live)


def test_baking_an_adapter_in(pipe, mug, untouched, tmp_path):
    load_oft_weights(pipe, mug, adapter_name="mug")
    live = draw(pipe)
    fuse_oft(pipe, keep_base=False)
    with pytest.raises(AdapterError) as error:
        unfuse_oft(pipe)
    assert_one_sentence(error, "mug", "keep_base")
    unload_oft_weights(pipe)
    assert list_oft_adapters(pipe) == []
    pipe.save_pretrained(tmp_path / "baked")
    baked = type(pipe).from_pretrained(tmp_path / "baked")
    assert distance(draw(baked), live) < ROUNDING
    assert distance(live, untouched) > MOVED


def test_only_the_last_can_be_fused_while_others_stay(pipe, mug, style):
    load_oft_weights(pipe, mug, adapter_name="mug")
    load_oft_weights(pipe, style, adapter_name="style")
    live = draw(pipe)
    before = fingerprint(pipe)
    with pytest.raises(AdapterError) as error:
        fuse_oft(pipe, ["mug"])
    assert_one_sentence(error, "mug", "style")
    assert_unchanged(pipe, before)  # the text encoder, which could have been fused, too
    assert not any(a.fused for a in list_oft_adapters(pipe))
    fuse_oft(pipe, ["style"])
    assert [(a.name, a.fused) for a in list_oft_adapters(pipe)] == [("mug", False), ("style", True)]
    assert distance(draw(pipe), live) < ROUNDING
    set_oft_adapters(pipe, "mug", 0.0)
    assert distance(draw(pipe), live) > MOVED
    unfuse_oft(pipe)
    set_oft_adapters(pipe, ["mug", "style"])
    assert torch.equal(draw(pipe), live)


def test_fusing_nothing_is_an_error(pipe, mug, style):
    load_oft_weights(pipe, mug, adapter_name="mug")
    with pytest.raises(AdapterError) as error:
        unfuse_oft(pipe)
    assert_one_sentence(error, "nothing is fused")
    set_oft_adapters(pipe, [])
    for wanted in (None, ["mug"], []):
        with pytest.raises(AdapterError) as error:
            fuse_oft(pipe, wanted)
        assert_one_sentence(error, "active")
    set_oft_adapters(pipe, "mug")
    fuse_oft(pipe)
    with pytest.raises(AdapterError) as error:
        fuse_oft(pipe)
    assert_one_sentence(error, "mug")


def test_fused_adapters_are_neither_set_nor_joined_nor_unloaded(pipe, mug, style, words):
    load_oft_weights(pipe, style, adapter_name="style")
    load_oft_weights(pipe, words, adapter_name="words")
    set_oft_adapters(pipe, "style")
    fuse_oft(pipe)
    before = fingerprint(pipe)
    refused = (
        lambda: set_oft_adapters(pipe, ["words", "style"], 0.5),
        lambda: load_oft_weights(pipe, mug, adapter_name="mug"),
        lambda: unload_oft_weights(pipe),
        lambda: unload_oft_weights(pipe, "style"),
    )
    for action in refused:
        with pytest.raises(AdapterError) as error:
            action()
        assert_one_sentence(error, "style")
        assert_unchanged(pipe, before)
    assert sorted(names(pipe)) == ["style", "words"]
    unload_oft_weights(pipe, "words")
    assert names(pipe) == ["style"]


def test_a_fused_adapter_can_be_saved(pipe, mug, tmp_path):
    load_oft_weights(pipe, mug, adapter_name="mug", strength=0.5)
    fuse_oft(pipe)
    saved = load_adapter_file(save_oft_weights(pipe, tmp_path, "mug"))
    assert saved.metadata.sha256 == load_adapter_file(mug).metadata.sha256


@pytest.mark.parametrize("keep_base", ["cpu", "disk"])
def test_fusing_that_breaks_off_leaves_every_component(pipe, mug, monkeypatch, keep_base):
    load_oft_weights(pipe, mug, adapter_name="mug")
    live, before = draw(pipe), fingerprint(pipe)
    fused: list[torch.nn.Module] = []

    def second_fails(model, names, **options):
        if fused:
            raise KeyboardInterrupt
        fused.append(model)
        merge_oft(model, names, **options)

    monkeypatch.setattr(fusing, "merge_oft", second_fails)
    with pytest.raises(KeyboardInterrupt):
        fuse_oft(pipe, keep_base=keep_base)
    assert len(fused) == 1
    assert not any(a.fused for a in list_oft_adapters(pipe))
    assert_unchanged(pipe, before)
    assert torch.equal(draw(pipe), live)


def test_unfusing_that_cannot_be_whole_changes_nothing(pipe, mug, monkeypatch, tmp_path):
    """One component's LoRA was fused on top, or its copy is gone: the other one stays fused, too."""
    load_oft_weights(pipe, mug, adapter_name="mug")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "lora")
    pipe.unet.disable_adapters()
    fuse_oft(pipe)
    pipe.unet.enable_adapters()
    pipe.unet.fuse_lora()
    before, listed = fingerprint(pipe), list_oft_adapters(pipe)
    with pytest.raises(AdapterError) as error:
        unfuse_oft(pipe)
    assert_one_sentence(error, "LoRA")
    assert_unchanged(pipe, before)
    assert list_oft_adapters(pipe) == listed
    pipe.unet.unfuse_lora()
    unfuse_oft(pipe)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fuse_oft(pipe, keep_base="disk")
    before, listed = fingerprint(pipe), list_oft_adapters(pipe)
    kept = sorted(tmp_path.glob("oft-base-*/base.safetensors"))
    assert len(kept) == 2
    kept[1].unlink()
    with pytest.raises(AdapterError) as error:
        unfuse_oft(pipe)
    assert_one_sentence(error, "cannot be read again")
    assert_unchanged(pipe, before)
    assert list_oft_adapters(pipe) == listed


def test_what_was_fused_for_good_is_not_told_to_be_unfused(pipe, mug):
    load_oft_weights(pipe, mug, adapter_name="mug")
    fuse_oft(pipe, keep_base=False)
    for change in (
        lambda: unload_oft_weights(pipe, "mug"),
        lambda: set_oft_adapters(pipe, "mug"),
        lambda: load_oft_weights(pipe, mug, adapter_name="mug", hotswap=True),
    ):
        with pytest.raises(AdapterError) as error:
            change()
        assert_one_sentence(error, "base was not kept", "load the base again")


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(pipe):
    with Operations() as counted:
        draw(pipe)
    return counted.seen


def test_fused_adapters_cost_nothing(pipe, base_pipe, mug, style):
    base = operations(base_pipe)
    load_oft_weights(pipe, mug, adapter_name="mug")
    load_oft_weights(pipe, style, adapter_name="style")
    draw(pipe)
    assert operations(pipe)["aten.bmm.default"] > base["aten.bmm.default"]
    fuse_oft(pipe)
    assert operations(pipe) == base
