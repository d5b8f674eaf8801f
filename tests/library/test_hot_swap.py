"""Hot swaps: another file in the place of a loaded adapter."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from oft_diffusion import (
    OFTConfig,
    disable_oft_adapters,
    enable_oft_adapters,
    list_oft_adapters,
    load_oft_weights,
    oft_state_dict,
    set_oft_adapters,
    unload_oft_weights,
)
from oft_diffusion.errors import AdapterError, ConfigError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.hooks import bank_of
from oft_diffusion.inject import load_oft_state_dict
from oft_diffusion.pipeline import loading
from tests.library.support import (
    assert_loading_refused,
    copy_pipe,
    distance,
    draw,
    memory,
)
from tests.peers import peft_oft


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


@pytest.mark.thinned(2)
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


@pytest.mark.slow
def test_a_thousand_swaps_leave_nothing_behind(pipe: Any, mug: Path, plain: Path) -> None:
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")
    load_oft_weights(pipe, mug, adapter_name="subject")
    pipe.unet.compile(backend=backend)
    picture = draw(pipe)
    graphs = backend.frame_count
    bank = bank_of(pipe.unet)
    assert bank is not None
    slots = [[d.data_ptr() for d in hook.eval_deltas or ()] for hook in bank.hooks.values()]

    def swap(times: int) -> None:
        for i in range(times):
            load_oft_weights(pipe, (plain, mug)[i % 2], adapter_name="subject", hotswap=True)
            if i % 50 == 0:
                set_oft_adapters(pipe, "subject", 1.0 + i / 1000)
                draw(pipe)

    swap(100)  # allocators and caches fill
    before = _tensors(), memory("VmRSS")
    swap(900)
    assert _tensors() <= before[0] + 2
    rotations = sum(d.numel() * d.element_size() for hook in bank.hooks.values() for d in hook.eval_deltas or ())
    assert 1e6 * (memory("VmRSS") - before[1]) < 900 * rotations / 4
    assert [[d.data_ptr() for d in hook.eval_deltas or ()] for hook in bank.hooks.values()] == slots
    set_oft_adapters(pipe, "subject")
    assert torch.equal(draw(pipe), picture)
    assert backend.frame_count == graphs > 0
    torch.compiler.reset()


def _tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_a_swap_takes_a_name_and_no_strength(pipe: Any, mug: Path) -> None:
    load_oft_weights(pipe, mug, adapter_name="subject", strength=0.5)
    assert_loading_refused(pipe, mug, "names no adapter", kind=ConfigError, hotswap=True)
    for strength in (0.3, float("nan")):
        options = {"adapter_name": "subject", "hotswap": True, "strength": strength}
        assert_loading_refused(pipe, mug, "set_oft_adapters", kind=ConfigError, **options)


def test_a_swapped_file_of_another_tool_is_blended_as_there(
    pipe: Any, style: Path, base_pipe: Any, tmp_path: Path
) -> None:
    file = load_adapter_file(style)
    shapes = {
        key.removesuffix(".oft_R.weight"): tuple(
            pipe.unet.get_submodule(key.removesuffix(".oft_R.weight")).weight.shape
        )
        for key in file.components["unet"]
    }
    theirs = peft_oft.write_peft(tmp_path / "peft", shapes, block_size=8)
    for mode in (None, "linear"):
        load_oft_weights(pipe, style, adapter_name="subject")
        set_oft_adapters(pipe, "subject", 0.5, mode)
        disable_oft_adapters(pipe, "subject")
        loaded = load_oft_weights(pipe, theirs, adapter_name="subject", hotswap=True, component="unet")
        assert (loaded.mode, loaded.format, loaded.enabled) == ("linear", "PEFT", False)
        enable_oft_adapters(pipe)
        fresh = copy_pipe(base_pipe)
        load_oft_weights(fresh, theirs, strength=0.5, component="unet")
        assert torch.equal(draw(pipe), draw(fresh))
        set_oft_adapters(pipe, "subject", 0.5, mode="rotation")  # asked for, so it stays
        chosen = draw(pipe)
        assert distance(chosen, draw(fresh)) > 1e-3
        load_oft_weights(pipe, theirs, adapter_name="subject", hotswap=True, component="unet")
        assert torch.equal(draw(pipe), chosen)
        unload_oft_weights(pipe)


def test_a_swap_that_breaks_off_leaves_every_component(pipe: Any, mug: Path, plain: Path, monkeypatch: Any) -> None:
    load_oft_weights(pipe, mug, adapter_name="subject", strength=0.6)
    before, picture = list_oft_adapters(pipe), draw(pipe)
    swapped: list[Any] = []

    def second_fails(model: Any, state: Any, name: str) -> None:
        swapped.append(model)
        if len(swapped) == 2:
            raise KeyboardInterrupt
        load_oft_state_dict(model, state, name)

    monkeypatch.setattr(loading, "load_oft_state_dict", second_fails)
    with pytest.raises(KeyboardInterrupt):
        load_oft_weights(pipe, plain, adapter_name="subject", hotswap=True)
    assert len(swapped) == 4  # two, and both back
    assert list_oft_adapters(pipe) == before
    assert torch.equal(draw(pipe), picture)
