"""Merging: equal to live within what the dtype can hold, and undone bit by bit."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.counting import leaf_operations, python_calls
from oft_diffusion import OFTConfig, base_copy, inject_oft, merge, merge_oft, remove_oft, unmerge_oft
from oft_diffusion.errors import AdapterError, TargetError
from oft_diffusion.hooks import hooked_layers
from tests.core.reference import SEEDS, dense_rotation, relative, two_layers, unet_inputs
from tests.library.support import assert_one_sentence, excite, tiny_unet

KEEP = ["cpu", "disk"]
LINEAR = OFTConfig(block_size=8, targets=".*")


def weight_of(layer: nn.Module) -> torch.Tensor:
    assert isinstance(layer.weight, torch.Tensor)
    return layer.weight.detach()


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).sample


@given(
    seed=SEEDS,
    strength=st.sampled_from([1.0, 0.5, -1.0]),
    parametrisation=st.sampled_from(["cayley", "cayley_neumann"]),
)
def test_merged_equals_live_in_float32(seed: int, strength: float, parametrisation: Any) -> None:
    unet = tiny_unet(seed % 5)
    inputs = unet_inputs(unet, seed)
    base = run(unet, inputs)
    bank = inject_oft(unet, OFTConfig(block_size=8, targets="all-linear", parametrisation=parametrisation))
    excite(bank, seed=seed)
    bank.set_adapters("default", strength)
    live = run(unet, inputs)
    merge_oft(unet)
    assert relative(run(unet, inputs), live) < 1e-5
    assert relative(live, base) > 1e-2


@given(seed=SEEDS)
def test_merged_equals_live_in_bfloat16_within_its_rounding(seed: int) -> None:
    exact = tiny_unet(seed % 5)
    inputs = unet_inputs(exact, seed)
    excite(inject_oft(exact, OFTConfig(block_size=8)), seed=seed)
    reference = run(exact, inputs)
    unet = tiny_unet(seed % 5).to(torch.bfloat16)
    low = unet_inputs(unet, seed, torch.bfloat16)
    base = run(unet, low)
    excite(inject_oft(unet, OFTConfig(block_size=8)), seed=seed)
    live = run(unet, low)
    merge_oft(unet)
    merged = run(unet, low)
    assert next(unet.parameters()).dtype == torch.bfloat16
    # Both are bfloat16 computations of one function: merged may be off the exact result by no more than about as much
    # as live is, and both by far less than the adapter moves.
    assert relative(merged, reference) < 2 * relative(live, reference)
    assert relative(merged, reference) < 0.2 * relative(base, reference)


@given(seed=SEEDS)
def test_the_merged_weight_is_w_r_transposed(seed: int) -> None:
    model = two_layers(seed % 5)
    bank = inject_oft(model, LINEAR)
    excite(bank, seed=seed)
    before = weight_of(model[0]).clone()
    expected = before.double() @ dense_rotation(bank, "0").T
    merge_oft(model)
    assert relative(weight_of(model[0]), expected) < 1e-6
    assert relative(before, expected) > 0.1


@given(seed=SEEDS, keep=st.sampled_from(KEEP), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_unmerging_is_bit_exact(seed: int, keep: Any, dtype: torch.dtype) -> None:
    unet = tiny_unet(seed % 5).to(dtype)
    inputs = unet_inputs(unet, seed, dtype)
    state = {k: v.clone() for k, v in unet.state_dict().items()}
    addresses = {k: v.data_ptr() for k, v in unet.state_dict().items()}
    excite(inject_oft(unet, OFTConfig(block_size=8)), seed=seed)
    live = run(unet, inputs)
    merge_oft(unet, keep_base=keep)
    changed = [k for k, v in unet.state_dict().items() if not torch.equal(v, state[k])]
    assert len(changed) == 4 * 8
    unmerge_oft(unet)
    assert all(torch.equal(v, state[k]) for k, v in unet.state_dict().items())
    assert {k: v.data_ptr() for k, v in unet.state_dict().items()} == addresses
    assert torch.equal(run(unet, inputs), live)


def test_an_adapter_baked_in_stays_when_it_is_removed() -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    excite(inject_oft(unet, OFTConfig(block_size=8)))
    live = run(unet, inputs)
    merge_oft(unet, keep_base=False)
    with pytest.raises(AdapterError, match="was not kept"):
        unmerge_oft(unet)
    remove_oft(unet)
    assert relative(run(unet, inputs), live) < 1e-5
    assert not any(m._forward_pre_hooks for m in unet.modules())


def test_two_adapters_merge_as_they_act() -> None:
    for sizes in ((8, 8), (4, 8)):
        unet = tiny_unet()
        inputs = unet_inputs(unet)
        for i, (name, size) in enumerate(zip("ab", sizes, strict=True)):
            excite(inject_oft(unet, OFTConfig(block_size=size), name), name, seed=i)
        live = run(unet, inputs)
        merge_oft(unet)
        assert relative(run(unet, inputs), live) < 1e-5
        unmerge_oft(unet)
        assert torch.equal(run(unet, inputs), live)


def test_the_last_of_two_merges_alone_and_the_first_does_not() -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    for i, name in enumerate("ab"):
        excite(inject_oft(unet, OFTConfig(block_size=8), name), name, seed=i)
    bank = inject_oft(unet, OFTConfig(block_size=8), "c")
    bank.set_adapters(["a", "b"])
    live = run(unet, inputs)
    with pytest.raises(AdapterError, match="'a' cannot be merged while 'b', which acts after it"):
        merge_oft(unet, ["a"])
    assert torch.equal(run(unet, inputs), live)
    merge_oft(unet, ["b"])
    assert bank.merged == ("b",)
    assert [a.name for a in bank.active] == ["a"]
    assert relative(run(unet, inputs), live) < 1e-5
    unmerge_oft(unet)
    assert torch.equal(run(unet, inputs), live)


def test_what_a_merged_model_refuses() -> None:
    unet = tiny_unet()
    excite(inject_oft(unet, OFTConfig(block_size=8)))
    merge_oft(unet)
    for refused in (
        lambda: merge_oft(unet),
        lambda: remove_oft(unet),
        lambda: remove_oft(unet, "default"),
        lambda: inject_oft(unet, OFTConfig(block_size=8), "second"),
    ):
        with pytest.raises(AdapterError, match=r"'default' is merged .* Fix: "):
            refused()
    unmerge_oft(unet)
    with pytest.raises(AdapterError, match="no adapter is merged"):
        unmerge_oft(unet)


def test_merging_nothing_or_something_inactive_is_refused() -> None:
    unet = tiny_unet()
    bank = inject_oft(unet, OFTConfig(block_size=8))
    bank.set_adapters([])
    for names in (None, ["default"]):
        with pytest.raises(AdapterError, match="nothing to merge"):
            merge_oft(unet, names)
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        merge_oft(unet, ["x"])


def test_a_layer_without_a_float_matrix_is_refused_before_anything_changes() -> None:
    model = two_layers()
    excite(inject_oft(model, LINEAR))
    first = weight_of(model[0]).clone()
    model[2].weight = nn.Parameter(torch.zeros(10, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"layer 2 \(Linear\) has no floating weight matrix"):
        merge_oft(model)
    assert torch.equal(weight_of(model[0]), first)


@pytest.mark.parametrize("keep_base", [True, None, "gpu", "CPU"])
def test_a_keep_base_that_is_no_place_is_refused_before_anything_is_merged(keep_base: Any) -> None:
    model = two_layers()
    excite(inject_oft(model, LINEAR))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(AdapterError, match=r"keep_base is .*\"cpu\""):
        merge_oft(model, keep_base=keep_base)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


class Unlucky:
    """Stands in for `_rotate_columns_`, and fails at the third call."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls, self.rotate = error, 0, merge._rotate_columns_

    def __call__(self, weight: torch.Tensor, delta: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 3:
            weight[0] = 7.0  # half of a layer is written
            raise self.error
        self.rotate(weight, delta)


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_merge_that_breaks_off_leaves_the_base(monkeypatch: Any, keep: Any, error: BaseException) -> None:
    unet = tiny_unet()
    inputs = unet_inputs(unet)
    state = {k: v.clone() for k, v in unet.state_dict().items()}
    bank = inject_oft(unet, OFTConfig(block_size=8))
    excite(bank)
    live = run(unet, inputs)
    monkeypatch.setattr(merge, "_rotate_columns_", Unlucky(error))
    with pytest.raises(type(error)):
        merge_oft(unet, keep_base=keep)
    assert not bank.merged
    assert torch.equal(run(unet, inputs), live)
    remove_oft(unet)
    assert all(torch.equal(v, state[k]) for k, v in unet.state_dict().items())


def test_a_full_disk_is_told_before_anything_is_merged(monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    unet = tiny_unet()
    bank = inject_oft(unet, OFTConfig(block_size=8))
    excite(bank)
    live = run(unet, unet_inputs(unet))
    monkeypatch.setattr(base_copy, "save_file", full)
    with pytest.raises(AdapterError) as error:
        merge_oft(unet, keep_base="disk")
    assert_one_sentence(error, "No space left on device", 'keep_base="cpu"')
    assert not bank.merged
    assert torch.equal(run(unet, unet_inputs(unet)), live)


def test_one_name_may_be_passed_without_a_list() -> None:
    unet = tiny_unet()
    bank = inject_oft(unet, OFTConfig(block_size=8), "mug")
    merge_oft(unet, "mug")
    assert bank.merged == ("mug",)


def test_merged_layers_cost_a_look_at_their_hook() -> None:
    """Operations and Python functions of a forward, torch's own around a hook included."""
    unet = tiny_unet()
    inputs = unet_inputs(unet, 0)

    def counts() -> tuple[float, int]:
        run(unet, inputs)
        return leaf_operations(lambda: run(unet, inputs)), python_calls(lambda: run(unet, inputs))

    operations, calls = counts()
    excite(inject_oft(unet, OFTConfig(block_size=8)))
    layers = len(hooked_layers(unet))
    merge_oft(unet)
    merged_operations, merged_calls = counts()
    assert merged_operations == operations
    assert 0 < merged_calls - calls <= 4 * layers + 20
