"""Copies, casts, autocast, inference mode, and accelerate's offloading hooks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from diffusers.hooks import apply_group_offloading

from oft_diffusion import OFTConfig, inject_oft, merge_oft, remove_oft, unmerge_oft
from oft_diffusion.bank import OFTBank
from oft_diffusion.errors import TargetError
from oft_diffusion.hooks import bank_of
from oft_diffusion.inject import inject_state
from tests.core.reference import relative, unet_inputs
from tests.core.test_sites import INPUT, OUTPUT, Net, X, generators
from tests.helpers.tiny_sd import tiny_pipeline
from tests.library.support import assert_one_sentence, distance, draw, excite, tiny_unet


def adapted(frozen: bool) -> tuple[Any, OFTBank, torch.Tensor]:
    """A UNet with an excited adapter, its bank, and what the base said."""
    unet = tiny_unet()
    base = out_of(unet)
    bank = inject_oft(unet, OFTConfig(block_size=8))
    excite(bank)
    if frozen:
        bank.freeze("default")
    return unet, bank, base


def out_of(unet: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return unet(**unet_inputs(unet, dtype=dtype)).sample


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def after_training(model: Any) -> Any:
    model(**unet_inputs(model)).sample.sum().backward()
    return copy.deepcopy(model)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved, after_training])
def test_a_copy_works_on_its_own(duplicate: Callable[[Any], Any], frozen: bool) -> None:
    unet, bank, base = adapted(frozen)
    if duplicate is after_training and frozen:
        unet.conv_in.requires_grad_(True)
    before = out_of(unet)
    assert relative(before, base) > 1e-2
    other = duplicate(unet)
    assert torch.equal(out_of(other), before)
    its_bank = bank_of(other)
    assert its_bank is not None
    assert its_bank is not bank
    excite(its_bank, seed=5)
    assert relative(out_of(other), before) > 1e-2
    assert torch.equal(out_of(unet), before)
    remove_oft(unet)
    remove_oft(other)
    assert torch.equal(out_of(unet), base)
    assert torch.equal(out_of(other), base)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_component_leaves_the_generators_in_float32(dtype: torch.dtype, frozen: bool) -> None:
    unet, bank, base = adapted(frozen)
    exact = out_of(unet)
    unet.to(dtype)
    bank.to(dtype)
    assert bank.generators["default"].dtype == torch.float32
    cast = out_of(unet, dtype)
    assert cast.dtype == dtype
    assert relative(cast, exact) < 0.1 * relative(exact, base)
    unet.to(torch.float32)
    assert relative(out_of(unet), exact) < 0.1 * relative(exact, base)


def test_autocast_in_bfloat16_trains_float32_generators() -> None:
    unet, bank, base = adapted(frozen=False)
    inputs = unet_inputs(unet)
    unet(**inputs).sample.square().mean().backward()
    exact = bank.generators["default"].grad
    assert exact is not None
    bank.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(**inputs).sample
        loss = out.float().square().mean()
    loss.backward()
    gradient = bank.generators["default"].grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert relative(gradient, exact) < 0.1
    assert relative(out, base) > 1e-2


def test_inference_mode_first_and_training_after() -> None:
    unet, bank, base = adapted(frozen=True)
    with torch.inference_mode():
        out = unet(**unet_inputs(unet)).sample
    assert relative(out, base) > 1e-2
    bank.generators["default"].requires_grad_(True)
    unet(**unet_inputs(unet)).sample.sum().backward()
    assert bank.generators["default"].grad is not None
    bank.freeze("default")
    inputs = unet_inputs(unet)
    inputs["sample"].requires_grad_()
    unet(**inputs).sample.sum().backward()  # constants made under inference mode could not be saved for this
    assert inputs["sample"].grad is not None


def sequential(unet: Any) -> Callable[[], None]:
    cpu_offload(unet, torch.device("cpu"), offload_buffers=True)
    return lambda: remove_hook_from_submodules(unet)


def whole_model(unet: Any) -> Callable[[], None]:
    _, hook = cpu_offload_with_hook(unet, torch.device("cpu"))
    return hook.remove


def dispatched(unet: Any) -> Callable[[], None]:
    dispatch_model(unet, {"": "cpu"}, force_hooks=True)
    return lambda: remove_hook_from_submodules(unet)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("inject_first", [False, True])
@pytest.mark.parametrize("offload", [sequential, whole_model, dispatched])
def test_offloading_before_and_after_injection(
    offload: Callable[[Any], Callable[[], None]], inject_first: bool, frozen: bool
) -> None:
    expected_unet, _, base = adapted(frozen)
    expected = out_of(expected_unet)
    unet = tiny_unet()
    restore = None if inject_first else offload(unet)
    bank = inject_oft(unet, OFTConfig(block_size=8))
    excite(bank)
    if frozen:
        bank.freeze("default")
    restore = restore or offload(unet)
    assert torch.equal(out_of(unet), expected)
    assert relative(expected, base) > 1e-2
    bank.set_adapters("default", 0.0)
    assert torch.equal(out_of(unet), base)
    restore()
    remove_oft(unet)
    assert torch.equal(out_of(unet), base)


def adapt_pipe(pipe: Any) -> None:
    for component in (pipe.unet, pipe.text_encoder):
        bank = inject_oft(component, OFTConfig(block_size=8))
        excite(bank)
        bank.freeze("default")


def sequential_pipe(pipe: Any) -> None:
    for component in (pipe.unet, pipe.text_encoder, pipe.vae):  # what enable_sequential_cpu_offload does
        cpu_offload(component, torch.device("cpu"), offload_buffers=True)


def whole_model_pipe(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("inject_first", [False, True])
@pytest.mark.parametrize("offload", [sequential_pipe, whole_model_pipe])
def test_offloading_a_pipeline(offload: Callable[[Any], None], inject_first: bool, tmp_path: Path) -> None:
    base, expected, pipe = (tiny_pipeline(tmp_path) for _ in range(3))
    for each in (base, expected, pipe):
        each.set_progress_bar_config(disable=True)
    adapt_pipe(expected)
    steps = (adapt_pipe, offload) if inject_first else (offload, adapt_pipe)
    for step in steps:
        step(pipe)
    for _ in range(2):
        assert torch.equal(draw(pipe), draw(expected))
    assert distance(draw(expected), draw(base)) > 1e-2
    for component in (pipe.unet, pipe.text_encoder):
        remove_oft(component)
    assert torch.equal(draw(pipe), draw(base))


def to_disk_by_accelerate(model: Any, folder: Path) -> None:
    disk_offload(model, str(folder), execution_device=torch.device("cpu"), offload_buffers=True)


def to_disk_by_diffusers(model: Any, folder: Path) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, "leaf_level", offload_to_disk_path=str(folder))


@pytest.mark.parametrize(("side", "shapes"), [("input", INPUT), ("output", OUTPUT)])
def test_rotated_outputs_and_patches_find_offloaded_weights(side: Any, shapes: Any) -> None:
    """They need a bias, or a weight, when the forward is over and offloading has put it away."""
    model = Net().eval()
    with torch.no_grad():
        base = model(X)
        inject_state(model, OFTConfig(side=side), generators(shapes)).freeze("default")
        live = model(X)
        assert relative(live, base) > 1e-2
        sequential(model)
        assert torch.equal(model(X), live)
        merge_oft(model)
        assert relative(model(X), live) < 1e-5
        unmerge_oft(model)
        assert torch.equal(model(X), live)
        remove_oft(model)
        assert torch.equal(model(X), base)


@pytest.mark.parametrize("offload", [to_disk_by_accelerate, to_disk_by_diffusers])
@pytest.mark.parametrize(("side", "shapes"), [("input", INPUT), ("output", OUTPUT)])
def test_rotated_outputs_and_patches_refuse_weights_on_disk(
    side: Any, shapes: Any, offload: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    model = Net().eval()
    inject_state(model, OFTConfig(side=side), generators(shapes)).freeze("default")
    offload(model, tmp_path)
    what = "bias" if side == "output" else "weight"
    with torch.no_grad(), pytest.raises(TargetError, match=f"the {what} of layer conv is not in memory") as error:
        model(X)
    assert_one_sentence(error, "fuse_oft", "not to disk")


def test_deltas_follow_the_execution_device() -> None:
    unet, _, base = adapted(frozen=True)
    expected = out_of(unet)
    assert relative(expected, base) > 1e-2
    unet.to("meta")
    hook = AlignDevicesHook(execution_device=torch.device("meta"))
    for module in unet.modules():
        add_hook_to_module(module, hook, append=True)
    out = out_of(unet)
    assert out.device.type == "meta"
    assert out.shape == expected.shape
