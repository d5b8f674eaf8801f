"""In training, loading, merging and unmerging nothing as large as a weight comes to be, of layers as wide as SD 1.5's.

Every new tensor is looked at, so the step is so short that all its activations are smaller than the smallest weight: no
shape of theirs can be mistaken for a weight's. Autocast is off, which casts weights itself, an adapter or not.
`test_cost.py` asks the allocator for what operations take inside them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.methods import kernels_switched
from oft_diffusion import (
    OFTConfig,
    fuse_oft,
    inject_oft,
    load_oft_weights,
    merge_oft,
    remove_oft,
    save_oft_weights,
    unfuse_oft,
    unmerge_oft,
)
from oft_diffusion.bank import OFTBank
from oft_diffusion.hooks import hooked_layers
from oft_diffusion.kernels import processor
from oft_diffusion.quantization import quantize_with_bitsandbytes, scheme
from tests.core.card_path import needs_triton, pretend
from tests.library.support import excite

WIDTHS, TEXT_WIDTH = (320, 640, 1280), 768
SMALLEST = 320 * 320  # numbers in the smallest weight
IMAGE, TEXT = 4, 40  # 4 x 4 latents, and tokens of text: 40 x 1280 numbers are the most that an attention computes
SIZE = 32
PACKED = SIZE * (SIZE - 1) // 2
ONE = [width // SIZE for width in (*WIDTHS, TEXT_WIDTH)]  # blocks of a layer
ALL = [sum(6 * width + 2 * TEXT_WIDTH for width in widths) // SIZE for widths in (WIDTHS, WIDTHS[:2])]  # of a model


def unet(widths: tuple[int, ...] = WIDTHS) -> UNet2DConditionModel:
    """SD 1.5's attentions, one of each width; of the rest of it little."""
    depth = len(widths)
    with torch.device("meta"):
        model = UNet2DConditionModel(
            sample_size=IMAGE, block_out_channels=widths, layers_per_block=1, cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",) * depth,
            up_block_types=("UpBlock2D",) * depth, mid_block_type=None,
        )  # fmt: skip
    model.to_empty(device="cpu").train().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.uniform_(-0.03, 0.03)  # faster than what each layer would draw
    return model


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(1, 4, IMAGE, IMAGE, dtype=dtype),
        torch.tensor([10]),
        torch.randn(1, TEXT, TEXT_WIDTH, dtype=dtype),
    )


def is_the_adapters(shape: torch.Size) -> bool:
    """Generators, D, and D's gradient, side by side for layers of one input: no weight has so many blocks."""
    if len(shape) > 2:
        return shape[-3] in (*ONE, *ALL) and shape[-2] == SIZE and shape[-1] in (SIZE, 2 * SIZE, 3 * SIZE)
    return shape[0] in ALL and shape[-1] in (PACKED, SIZE * SIZE)


class Large(TorchDispatchMode):
    """Notes tensors of new memory that are as large as a weight, in whatever shape and dtype; not the adapter's own.

    Attributes:
        of_memory_alone: `kernels.processor` goes on as it does unwatched; what it writes to, torch has allocated.
        shapes: of all that came.
        alive: the shapes of floating ones that are there now, by storage.
        at_once: those that were there at once, each time that one more came.
    """

    of_memory_alone = True

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.alive: dict[int, tuple[int, ...]] = {}
        self.at_once: list[list[tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(answer):
            # What was given comes back as a view, or written in place, and is nothing new.
            is_new = isinstance(one, Tensor) and one.untyped_storage()._cdata not in given
            if is_new and one.numel() >= SMALLEST and not is_the_adapters(one.shape):
                self._note(one)
        return answer

    def _note(self, one: Tensor) -> None:
        storage = one.untyped_storage()
        self.shapes.append(tuple(one.shape))
        if one.is_floating_point() and storage._cdata not in self.alive:
            self.alive[storage._cdata] = tuple(one.shape)
            weakref.finalize(storage, self.alive.pop, storage._cdata).atexit = False
            self.at_once.append(list(self.alive.values()))


def large(call: Callable[[], object]) -> Large:
    """What a call makes. It is held until here what it returned."""
    with Large() as seen:
        returned = call()
    del returned
    return seen


WAYS = [
    pytest.param("in C", marks=pytest.mark.skipif(processor.library() is None, reason="no compiler, or no Linux")),
    "in plain PyTorch",
    pytest.param("as on a card", marks=needs_triton),
]


class Way(NamedTuple):
    """How rotations are done, and the kernels that were launched so far."""

    name: str
    launched: list[str]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    with kernels_switched(on=request.param == "in C"):
        on_card = request.param == "as on a card"
        yield Way(request.param, pretend(monkeypatch, runs=False) if on_card else [])


def steps(model: UNet2DConditionModel, bank: OFTBank, dtype: torch.dtype = torch.float32) -> None:
    """Two, the first of which makes the optimizer's state."""
    optimizer = torch.optim.AdamW(bank.parameters(), lr=1e-3)
    for _ in range(2):
        model(*inputs(dtype)).sample.square().mean().backward()
        optimizer.step()
        bank.project_()
        optimizer.zero_grad()


def test_activations_are_smaller_than_weights_and_a_rotated_weight_would_be_seen() -> None:
    """Or the tests below would prove nothing."""
    model = unet()
    x, time, text = inputs()
    step = large(lambda: model(x.requires_grad_(), time, text.requires_grad_()).sample.square().mean().backward())
    assert step.shapes == []
    weight = model.get_parameter("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight")
    assert weight.shape == (320, 768)
    for one in (
        lambda: weight @ torch.eye(768),
        lambda: weight.view(320, 24, 32).transpose(0, 1).contiguous(),
        lambda: weight.view(-1, 32, 32) + 0.0,
        lambda: torch.cat([weight, weight]).flatten(),
        lambda: torch.block_diag(*torch.zeros(10, 32, 32)),
        lambda: weight.bfloat16(),
    ):
        assert large(one).shapes, "it would not be seen"
    assert large(lambda: weight.mul_(1.0).view(-1).t()).shapes == []


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_makes_nothing_as_large_as_a_weight(way: Way, checkpointed: bool) -> None:
    model = unet()
    if checkpointed:
        model.enable_gradient_checkpointing()
    bank = inject_oft(model, OFTConfig(SIZE, coft_eps=1.0))
    assert [sum(bank.adapters["default"].blocks.values())] == ALL[:1]
    shapes = {tuple(layer.get_parameter("weight").shape) for layer in hooked_layers(model).values()}
    assert shapes == {(width, read) for width in WIDTHS for read in (width, TEXT_WIDTH)}
    assert large(lambda: steps(model, bank)).shapes == []
    assert (bank._rebuilt is not None, bool(way.launched)) == (way.name == "in C", way.name == "as on a card")
    model.eval()
    with torch.no_grad():
        assert large(lambda: model(*inputs())).shapes == []


@pytest.mark.parametrize("way", WAYS[:2], indirect=True)  # a card has no forms of its own for these
def test_loading_merging_and_unmerging_make_nothing_as_large_as_a_weight(way: Way, tmp_path: Path) -> None:
    """From the file to the weights and back, but for the copy of the base that unmerging needs: one of each weight."""
    model = unet()
    excite(inject_oft(model, OFTConfig(SIZE), "mug"), "mug", norm=0.3)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe: Any = StableDiffusionPipeline(**nothing, unet=model, scheduler=DDIMScheduler(), requires_safety_checker=False)
    path = tmp_path / "mug.safetensors"
    assert large(lambda: save_oft_weights(pipe, path, "mug")).shapes == []
    remove_oft(model)
    assert large(lambda: load_oft_weights(pipe, path, adapter_name="mug")).shapes == []
    assert large(lambda: load_oft_weights(pipe, path, adapter_name="mug", hotswap=True)).shapes == []
    layers = hooked_layers(model)
    kept = Counter(tuple(layer.get_parameter("weight").shape) for layer in layers.values())
    name, layer = next(iter(layers.items()))
    before = layer.get_parameter("weight").clone()
    merged = large(lambda: fuse_oft(pipe))
    assert Counter(merged.shapes) == kept
    assert len(merged.alive) == len(layers), "they are not the copy"
    assert not torch.equal(layer.get_parameter("weight"), before), f"{name} was not merged"
    assert large(lambda: unfuse_oft(pipe)).shapes == []
    assert torch.equal(layer.get_parameter("weight"), before)
    assert large(lambda: fuse_oft(pipe, keep_base=False)).shapes == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_of_a_quantized_base_one_weight_at_a_time_is_floats(kind: str, dtype: torch.dtype) -> None:
    """Training has one such tensor at most; merging those of one layer, two, to tell what quantizing it anew has lost.

    NF4 of 16 bits is 16 bits again before it is float32, so there is a third for that moment.
    """
    model = unet(WIDTHS[:2])
    for module in model.modules():
        module._apply(lambda tensor: tensor.to(dtype), recurse=False)
    quantize_with_bitsandbytes(model, scheme(kind), dtype)
    bank = inject_oft(model, OFTConfig(SIZE))
    excite(bank, norm=0.3)
    trained = large(lambda: steps(model, bank, dtype))
    assert max(map(len, trained.at_once)) == 1
    most = 3 if kind == "nf4" and dtype != torch.float32 else 2
    for merge in (lambda: merge_oft(model), lambda: unmerge_oft(model), lambda: merge_oft(model, keep_base=False)):
        seen = large(merge).at_once
        assert len(seen) >= len(bank.hooks)
        assert max(map(len, seen)) <= most
        assert all(len(set(shapes)) == 1 for shapes in seen), "floats of two layers at once"
