"""What an adapter adds to a training step, beside PEFT's LoRA on the same model: counts, which do not wobble."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft import OFTConfig as PeftOFTConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.counting import largest_allocation, leaf_operations, python_calls, saved_bytes
from benchmarks.methods import kernels_switched
from benchmarks.works import Sizes, Work, sd15
from oft_diffusion import OFTConfig, inject_oft, load_oft_state_dict, merge_oft, oft_state_dict, unmerge_oft
from oft_diffusion.hooks import bank_of
from oft_diffusion.inject import inject_state
from oft_diffusion.kernels import processor
from tests.core.card_path import pretend
from tests.core.reference import relative
from tests.library.support import generators

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet() -> UNet2DConditionModel:
    """SD 1.5's structure, narrow: every attention of the real one."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 64, 64), cross_attention_dim=64, attention_head_dim=4
    )
    return model.requires_grad_(False)


def plain() -> tuple[Any, list[Tensor]]:
    return unet(), []


def with_ours(model: Any) -> list[Tensor]:
    return list(inject_oft(model, OFTConfig(block_size=32)).parameters())


def ours() -> tuple[Any, list[Tensor]]:
    model = unet()
    return model, with_ours(model)


def with_lora(model: Any) -> list[Tensor]:
    inject_adapter_in_model(LoraConfig(r=16, target_modules=PROJECTIONS), model)
    return []  # its parameters are the model's own


def lora() -> tuple[Any, list[Tensor]]:
    model = unet()
    return model, with_lora(model)


def peft_oft() -> tuple[Any, list[Tensor]]:
    model = unet()
    inject_adapter_in_model(PeftOFTConfig(oft_block_size=32, target_modules=PROJECTIONS), model)
    return model, []


def forward(model: Any, *, of_inputs: bool, autocast: bool = False, images: int = 1) -> Callable[[], Tensor]:
    """A training step's forward. Where nothing is trainable, gradients flow back to the inputs."""
    x = torch.randn(images, 4, 16, 16, requires_grad=of_inputs)
    text = torch.randn(images, 77, 64, requires_grad=of_inputs)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss: Tensor = model(x, torch.tensor([10]), text).sample.float().square().mean()
        return loss

    return call


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "autocast"])
def figures(request: pytest.FixtureRequest) -> dict[str, tuple[int, int]]:
    """Operations of a step, and bytes that its forward saves; ours in plain PyTorch, where all of them are seen."""
    with kernels_switched(on=False):
        return {build.__name__: counted(build, autocast=request.param) for build in (plain, lora, peft_oft, ours)}


def counted(build: Callable[[], tuple[Any, list[Tensor]]], *, autocast: bool = False) -> tuple[int, int]:
    model, parameters = build()
    call = forward(model, of_inputs=build is plain, autocast=autocast)
    call().backward()  # what is built once
    for parameter in (*model.parameters(), *parameters):
        parameter.grad = None  # as a step has it, which makes LoRA's and ours anew
    saved = saved_bytes(call, [*model.parameters(), *parameters])
    return leaf_operations(lambda: call().backward()), saved


def test_operations_are_about_a_third_of_loras(figures: dict[str, tuple[int, int]]) -> None:
    base, peft, own = (figures[name][0] for name in ("plain", "lora", "ours"))
    assert peft - base > 1000, "the count misses what LoRA does"
    assert 100 < own - base <= 0.35 * (peft - base)


def test_operations_are_a_tenth_of_pefts_oft(figures: dict[str, tuple[int, int]]) -> None:
    base, peft, own = (figures[name][0] for name in ("plain", "peft_oft", "ours"))
    assert own - base <= 0.10 * (peft - base)


@pytest.mark.skipif(processor.library() is None, reason="no compiler, or no Linux")
def test_in_c_a_rotation_is_one_call_and_so_is_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly an operation of torch's is left beside them, and no more is saved."""
    (base, _), (own, saved) = counted(plain), counted(ours)
    with kernels_switched(on=False):
        assert saved <= counted(ours)[1]
    model, _ = ours()
    calls, real = [], processor.library()

    class Noticed:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(real, name)

    monkeypatch.setattr(processor, "_library", Noticed)
    forward(model, of_inputs=False)().backward()
    inputs = 16 * 5  # of an attention q, k and v's one, or q's, k's and v's; and out's
    assert Counter(calls) == {"oft_rotate": inputs, "oft_backward": inputs}
    assert own - base < inputs
    calls.clear()
    bank = bank_of(model)
    assert bank is not None
    bank.set_adapters("default", 0.5, "linear")  # whose D the C builds of all layers at once, and again
    forward(model, of_inputs=False)().backward()
    assert Counter(calls) == {"oft_build": 2, "oft_rotate": inputs, "oft_backward": inputs, "oft_unbuild": 1}
    bank.set_adapters("default")
    bank.freeze("default")
    draw = torch.no_grad()(forward(model, of_inputs=False))
    draw()  # which builds D, once
    calls.clear()
    draw()
    assert Counter(calls) == {"oft_rotate": inputs}


@kernels_switched(on=False)
def test_drawing_adds_a_product_and_a_sum_to_each_layer() -> None:
    model = unet()
    draw = torch.no_grad()(forward(model, of_inputs=False))
    base = leaf_operations(draw)
    bank = inject_oft(model, OFTConfig(block_size=32))
    bank.freeze("default")
    draw()  # which builds D, once
    assert leaf_operations(draw) - base <= 2 * len(bank.hooks)


def test_what_is_saved_for_backward_is_near_loras(figures: dict[str, tuple[int, int]]) -> None:
    """In plain PyTorch, the base's share counted in both: one D of all layers, in float32, aside, less than with LoRA.

    That bounds what is kept beside it: inputs, D in autocast's dtype, and D gathered for the layers of an input. D does
    not grow with tokens, and of so narrow a model it is nearly all that an adapter adds; the next test counts it.
    """
    base, peft, own = (figures[name][1] for name in ("plain", "lora", "ours"))
    deltas = sum(2 * p.numel() for p in ours()[1]) * 4 * 32 / 31  # b x b of b (b - 1) / 2 numbers
    assert base < peft
    assert own - deltas < peft, "more than the inputs and D"


# Bytes saved over those with PEFT's LoRA, as docs/benchmarks.md states them, by way and checkpointing; a card's forms
# gather no D of layers that share an input, and so keep less than plain PyTorch.
STATED = {
    ("in C", False): 0.97, ("in C", True): 1.00, ("plain", False): 1.04, ("plain", True): 1.34,
    ("as on a card", False): 1.03, ("as on a card", True): 1.34,
    ("as on a card, bfloat16", False): 0.95,  # which cards train in: adapters in float32, D in both
}  # fmt: skip


def loss_of(work: Work, dtype: torch.dtype) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return work().float().square().mean()

    return loss


@pytest.mark.parametrize(("way", "checkpointed"), STATED)
def test_no_more_is_saved_than_the_docs_state(way: str, checkpointed: bool) -> None:
    """On the model of the benchmark's table, all that is saved counted, D included, which only C does not keep."""
    if way == "in C" and processor.library() is None:
        pytest.skip("no compiler, or no Linux")
    saved = []
    with kernels_switched(on=way == "in C"), pytest.MonkeyPatch.context() as patch:
        dtype = torch.bfloat16 if "bfloat16" in way else torch.float32
        if "as on a card" in way:
            pytest.importorskip("triton")
            pretend(patch, runs=False)
        for adapt in (with_ours, with_lora):
            work = sd15(Sizes(), small=True).requires_grad_(False)
            trained = adapt(work.denoiser)
            work.denoiser.to(dtype)
            for parameter in (*work.denoiser.parameters(), *trained):
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            work.inputs = {
                name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in work.inputs.items()
            }
            if checkpointed:
                work.train().checkpoint()
            call = loss_of(work, dtype)
            call().backward()  # what is built once
            saved.append(saved_bytes(call, [*work.parameters(), *trained]))
    assert saved[0] <= STATED[way, checkpointed] * saved[1]


def test_of_several_images_no_more_is_saved_than_of_lora() -> None:
    """D, which does not grow with them, is less then than what LoRA keeps of each."""
    saved = {}
    for build in (lora, ours):
        model, parameters = build()
        saved[build.__name__] = saved_bytes(
            forward(model, of_inputs=False, images=4), [*model.parameters(), *parameters]
        )
    assert saved["ours"] <= saved["lora"]


def backward(call: Callable[[], Tensor]) -> None:
    call().backward()


@pytest.mark.skipif(processor.library() is None, reason="no compiler, or no Linux")
def test_in_c_a_step_enters_half_the_functions_that_it_does_with_lora() -> None:
    found = {}
    for build in (plain, ours, lora):
        model, _ = build()
        call = forward(model, of_inputs=build is plain)
        for _ in range(2):
            call().backward()
        found[build.__name__] = python_calls(partial(backward, call))
    own, peft = (found[name] - found["plain"] for name in ("ours", "lora"))
    assert peft > 3000, "the count misses what LoRA does"
    assert 0 < own <= 0.55 * peft


WIDE = 256
A_WEIGHT = 4 * WIDE * WIDE  # bytes of (in, in); (out, in) has more


class Wide(torch.nn.Module):
    """Layers whose weights are far larger than their activations, and than what an adapter has to build."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(WIDE, 2 * WIDE, bias=False) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x) * self.to_k(x) + self.to_v(x)


def adapted(parametrisation: Any) -> tuple[Wide, list[Tensor]]:
    model = Wide()
    bank = inject_oft(model, OFTConfig(8, parametrisation=parametrisation, targets=("to_.*",)))
    return model, list(bank.parameters())


@pytest.mark.parametrize("parametrisation", ["cayley", "cayley_neumann"])
def test_nothing_as_large_as_a_weight_is_ever_allocated(parametrisation: Any, tmp_path: Path) -> None:
    """In training, drawing, saving, loading, merging and unmerging; what merging keeps of the base aside."""
    model, parameters = adapted(parametrisation)
    optimizer, x = torch.optim.AdamW(parameters, lr=1e-2), torch.randn(4, WIDE)

    def train() -> None:
        model(x).square().mean().backward()
        optimizer.step()

    def save_and_load() -> None:
        save_file(oft_state_dict(model), tmp_path / "oft.safetensors")
        load_oft_state_dict(model, load_file(tmp_path / "oft.safetensors"))

    for act in (train, torch.no_grad()(lambda: model(x)), save_and_load, lambda: merge_oft(model, keep_base=False)):
        assert 0 < largest_allocation(act) < A_WEIGHT
    kept, _ = adapted(parametrisation)
    merge_oft(kept)
    assert largest_allocation(lambda: unmerge_oft(kept)) < A_WEIGHT


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("turned", ["channels", "patches"])
def test_a_convolution_is_loaded_and_merged_block_by_block(
    turned: str, memory_format: torch.memory_format, tmp_path: Path
) -> None:
    conv = torch.nn.Conv2d(WIDE, WIDE, 3, bias=False).requires_grad_(False)
    conv.weight.data = conv.weight.data.contiguous(memory_format=memory_format)
    model = torch.nn.Sequential(conv)
    blocks = WIDE // 8 * (9 if turned == "patches" else 1)
    inject_state(model, OFTConfig(8), {"0.oft_R.weight": generators(blocks, 8)})
    save_file(oft_state_dict(model), tmp_path / "oft.safetensors")
    x = torch.randn(1, WIDE, 4, 4)
    with torch.no_grad():
        live, plain = model(x), conv.forward(x)
    acts: list[Callable[[], object]] = [
        lambda: load_oft_state_dict(model, load_file(tmp_path / "oft.safetensors")),
        lambda: merge_oft(model, keep_base=False),
    ]
    for act in acts:
        assert 0 < largest_allocation(act) < 4 * conv.weight.numel()
    assert relative(conv.forward(x), live) < 1e-5
    assert relative(plain, live) > 0.1


def test_a_rotated_weight_would_be_seen() -> None:
    model, turn = Wide(), torch.eye(WIDE)
    assert largest_allocation(lambda: model.to_q(torch.randn(4, WIDE)) @ model.to_q.weight) < A_WEIGHT
    assert largest_allocation(lambda: model.to_q.weight @ turn) >= A_WEIGHT


def test_a_parameter_is_not_counted_as_saved_and_an_input_is() -> None:
    layer, x = torch.nn.Linear(100, 10), torch.randn(7, 100)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 7 * 100 * 4
    assert saved_bytes(lambda: layer(x), []) >= 7 * 100 * 4


def test_what_is_gone_before_the_forward_ends_is_not_counted_as_saved() -> None:
    x, weight = torch.randn(8, 4), torch.nn.Parameter(torch.randn(4, 4))

    def call() -> Tensor:
        size = (weight * 2.0).exp().sum().detach()  # of this graph nothing is left
        return (x @ weight / size).sum()

    assert saved_bytes(call, [weight]) == 4 * (x.numel() + 1)  # for the product, and by what it is divided


def test_operations_inside_a_custom_operator_are_counted() -> None:
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    assert leaf_operations(lambda: x @ y + y) == 2
