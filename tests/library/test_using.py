"""Strengths by component, enabling and disabling, and what adapters cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from oft_diffusion import (
    OFTConfig,
    disable_oft_adapters,
    enable_oft_adapters,
    fuse_oft,
    hooks,
    list_oft_adapters,
    load_oft_weights,
    set_oft_adapters,
    unload_oft_weights,
)
from oft_diffusion.errors import AdapterError
from oft_diffusion.files import load_adapter_file, save_adapter_file
from oft_diffusion.kernels import block_rotate, processor
from tests.library.support import (
    assert_one_sentence,
    copy_pipe,
    distance,
    draw,
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


def test_one_strength_by_component_for_adapters_of_which_some_lack_one(pipe: Any, mug: Path, style: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="mug")
    load_oft_weights(pipe, style, adapter_name="style")  # the unet alone
    set_oft_adapters(pipe, ["mug", "style"], {"unet": 0.8, "text_encoder": 0.4})
    mug_now, style_now = list_oft_adapters(pipe)
    assert mug_now.strengths == {"unet": 0.8, "text_encoder": 0.4}
    assert style_now.strengths == {"unet": 0.8}
    with pytest.raises(AdapterError) as error:
        set_oft_adapters(pipe, ["mug", "style"], [1.0, {"text_encoder": 0.4}])
    assert_one_sentence(error, "'text_encoder'", "'style'")


def test_adapters_of_equal_block_sizes_cost_as_much_as_one(pipe: Any, plain: Path, make: Any, monkeypatch: Any) -> None:
    turned: list[int] = []

    def counted(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        turned.append(1)
        return block_rotate(x, delta)

    monkeypatch.setattr(hooks, "block_rotate", counted)
    monkeypatch.setattr(processor, "library", lambda: None)  # what C does, nothing here counts

    def count() -> int:
        turned.clear()
        draw(pipe)
        return len(turned)

    load_oft_weights(pipe, plain, adapter_name="a")
    alone = count()
    load_oft_weights(pipe, make("second", seed=9), adapter_name="b")
    assert count() == alone > 0
    load_oft_weights(pipe, make("third", seed=8, parts=("unet",), config=OFTConfig(16)), adapter_name="c")
    assert count() > alone
