"""Quantized layers keep nothing for their backward below an adapter, and gradients stay what they were."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oft_diffusion import OFTConfig, inject_oft, merge_oft, remove_oft, unmerge_oft
from oft_diffusion.frozen import FrozenForward, thaw_quantized
from oft_diffusion.hooks import bank_of
from oft_diffusion.load import load_pipeline
from oft_diffusion.quantization import quantize_with_bitsandbytes, scheme
from oft_diffusion.quantized import FourBit
from oft_diffusion.training.memory import LiveStorages
from tests.core.reference import relative
from tests.library.support import excite
from tests.quantization.backends import DEVICE, GGUF, ON_A_PROCESSOR, contents, denoiser_knobs, quantized_layers
from tests.quantization.test_numerics import BOUNDS, answer, inputs

KEEPING = [*(name for name in ON_A_PROCESSOR if name != "nf4"), GGUF]
WEIGHTS = ("torchao-int8", "torchao-float8", GGUF)  # of which autograd would keep each weight as floats


def adapted(backend: str, model: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    unet = load_pipeline(model, dtype, DEVICE, **denoiser_knobs(backend, model, folder)).unet.train()
    excite(inject_oft(unet, OFTConfig(block_size=16)), norm=0.3)
    return unet


def frozen(module: nn.Module) -> list[str]:
    return [n for n, layer in module.named_modules() if isinstance(layer.__dict__.get("forward"), FrozenForward)]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", KEEPING)
def test_gradients_are_the_librarys(backend: str, dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    unet = adapted(backend, model, tmp_path, dtype)
    assert frozen(unet) == list(quantized_layers(unet))
    ours = answer(unet, dtype)
    thaw_quantized(unet)
    assert not frozen(unet)
    theirs = answer(unet, dtype)
    assert torch.equal(ours[0], theirs[0])
    for own, their, bound in zip(ours[1:], theirs[1:], BOUNDS[dtype][1:], strict=True):
        assert relative(own, their) < bound


@pytest.mark.parametrize("backend", KEEPING)
def test_a_step_holds_less(backend: str, model: Path, tmp_path: Path) -> None:
    """At its most; of libraries whose float weights autograd keeps, by nearly all of these."""
    unet, passed = adapted(backend, model, tmp_path), dict[nn.Module, int]()
    for weight in quantized_layers(unet).values():
        own: Any = weight.layer
        own.register_forward_hook(
            lambda layer, _, out: passed.update({layer: out.requires_grad * 4 * layer.in_features * layer.out_features})
        )

    def most() -> int:
        unet(*inputs(torch.float32)).sample.sum().backward()  # what the first call makes is there
        with LiveStorages(DEVICE) as alive:
            unet(*inputs(torch.float32)).sample.sum().backward()
        return alive.most

    ours = most()
    thaw_quantized(unet)
    spared = most() - ours
    assert spared > (0.8 * sum(passed.values()) if backend in WEIGHTS else 0)


@pytest.mark.parametrize("backend", KEEPING)
def test_a_rotated_input_is_gone_after_its_layer(backend: str, model: Path, tmp_path: Path) -> None:
    unet, seen = adapted(backend, model, tmp_path), []
    for name, weight in quantized_layers(unet).items():
        if name.endswith("attn1.to_out.0"):  # of which nobody else has the input
            weight.layer.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    out = unet(*inputs(torch.float32, grad=True)).sample
    assert seen
    assert all(own() is None for own in seen)
    out.sum().backward()


@pytest.fixture
def two() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).requires_grad_(False).train()
    quantize_with_bitsandbytes(made, scheme("int8"), torch.float32)
    excite(inject_oft(made, OFTConfig(block_size=16, targets=r"\d")), norm=0.3)
    return made


def gradients(module: nn.Module, x: Tensor, **how: Any) -> list[Tensor]:
    """First and second ones."""
    bank = bank_of(module)
    assert bank is not None
    answer = checkpoint(module, x, use_reentrant=False) if how else module(x)
    first = torch.autograd.grad(answer.square().sum(), [x, *bank.parameters()], create_graph=not how)
    return [*first] if how else [*first, *torch.autograd.grad(first[0].square().sum(), [x, *bank.parameters()])]


def test_second_derivatives_checkpoints_and_copies(two: nn.Sequential) -> None:
    x = torch.randn(3, 5, 64, requires_grad=True)
    plain = copy.deepcopy(two)
    thaw_quantized(plain)
    wanted = gradients(plain, x)
    for module in (two, copy.deepcopy(two)):
        assert len(frozen(module)) == 2
        for found, want in zip(gradients(module, x), wanted, strict=True):
            assert relative(found, want) < 1e-5
        for found, want in zip(gradients(module, x, checkpointed=True), wanted, strict=False):
            assert relative(found, want) < 1e-5
    copied = copy.deepcopy(two)
    assert copied[0].__dict__["forward"].weight.layer is copied[0]


def test_a_bias_that_is_trained_has_its_gradient(two: nn.Sequential) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    two.get_parameter("2.bias").requires_grad_()
    two(x).sum().backward()
    grad = two.get_parameter("2.bias").grad
    assert grad is not None
    assert relative(grad, torch.full((64,), 3.0)) < 1e-6


def test_an_empty_input(two: nn.Sequential) -> None:
    x = torch.zeros(0, 64, requires_grad=True)
    two(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_removing_adapters_gives_the_forward_back(two: nn.Sequential) -> None:
    merge_oft(two)
    unmerge_oft(two)
    remove_oft(two)
    assert not frozen(two)
    assert all("forward" not in layer.__dict__ for layer in two)


def test_beside_hooks_that_replace_forwards_too(two: nn.Sequential) -> None:
    """accelerate's: those that were there first keep their layer, those that came later may go first."""
    x = torch.randn(3, 64)
    wanted = two(x)
    add_hook_to_module(two[0], AlignDevicesHook("cpu"))
    assert torch.equal(two(x), wanted)
    remove_hook_from_module(two[0])
    assert len(frozen(two)) == 2
    remove_oft(two)
    add_hook_to_module(two[0], AlignDevicesHook("cpu"))
    inject_oft(two, OFTConfig(block_size=16, targets=r"\d"))
    assert frozen(two) == ["2"]


def test_offloaded_after_it_was_adapted(two: nn.Sequential) -> None:
    """Its weights are elsewhere when the backward comes, so the library's own graph is asked."""
    x = torch.randn(3, 64, requires_grad=True)
    (wanted,) = torch.autograd.grad(two(x).sum(), x)
    for layer in (two[0], two[2]):
        add_hook_to_module(layer, AlignDevicesHook("cpu"))
    answer = two(x)
    assert "_Frozen" not in str(answer.grad_fn)
    (found,) = torch.autograd.grad(answer.sum(), x)
    assert relative(found, wanted) < 1e-5


def test_compiled(two: nn.Sequential) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    (wanted,) = torch.autograd.grad(two(x).sum(), x)
    (found,) = torch.autograd.grad(torch.compile(two, backend="aot_eager")(x).sum(), x)
    assert relative(found, wanted) < 1e-5


def test_nf4_does_not_pack_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does on processors with bfloat16 instructions, drawing in eval mode: no gradient passes it any more."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    quantize_with_bitsandbytes(made, scheme("nf4"), torch.float32)
    base = contents(made)
    x = torch.randn(3, 64)
    with torch.no_grad():
        made.eval()(x)
    assert all(torch.equal(base[name], tensor) for name, tensor in contents(made).items())
    found = []
    for packed in (False, True):
        module = copy.deepcopy(made)
        for weight in quantized_layers(module).values():
            assert isinstance(weight, FourBit)
            if packed:  # by somebody else's loader
                weight.layer.support_avx512bf16_for_cpu = True
                weight._put(*_convert_weight_packed_for_cpu(weight.weight.data, weight.weight.quant_state))
        bank = inject_oft(module, OFTConfig(block_size=16, targets=r"\d"))
        excite(bank)
        with torch.no_grad():
            module.eval()(x)
        module.train()(x).square().sum().backward()
        (parameter,) = bank.parameters()
        assert parameter.grad is not None
        found.append(parameter.grad)
    assert found[0].norm() > 0
    assert relative(found[1], found[0]) < 0.02  # packing had rounded scales
