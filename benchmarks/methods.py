"""Ways to adapt a model, each a function from a model and its target layers to what is trained. All adapt the same.

A method never looks for targets itself, so that all of them have the same ones. What a method cannot do is told by
`UnsupportedError`, with the reason.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.boft.layer import get_fbd_cuda
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from benchmarks.weight_centric import rotate_weight
from oft_diffusion import OFTConfig, inject_oft, merge_oft, oft_state_dict, unmerge_oft
from oft_diffusion.inject import load_oft_state_dict
from oft_diffusion.kernels import processor
from oft_diffusion.kernels.block_rotate import triton_kernels

# Ours in plain PyTorch, and as it comes: with its kernels for cards, or for processors.
BASE, OURS, TRITON, NATIVE = "base", "ours", "ours, Triton kernels", "ours, C kernels"
LORA, EQUAL_LORA, DORA = "PEFT LoRA", "PEFT LoRA, equal parameters", "PEFT DoRA"
PEFT_OFT, BOFT, LYCORIS = "PEFT OFT", "PEFT BOFT", "LyCORIS diag-oft"
WEIGHT_CENTRIC, DENSE, FULL = "weight-centric OFT", "weight-centric OFT, dense R", "full finetuning"
RANK = 16
_NAME = "bench"


class UnsupportedError(Exception):
    """Why a method has no figure here."""


@dataclass
class Adapted:
    """One adapted model.

    Attributes:
        trained: what an optimiser gets.
        settings: what is to be known of the method, for the row.
        freeze: makes it ready for inference.
        merge, unmerge, swap: what the method offers of these, None where it does not. A swap overwrites the adapter by
            another of its shape.
        lacks: why, where one is None.
        beside: tensors that stay in memory besides parameters and buffers of the model, and `trained`.
    """

    trained: list[nn.Parameter] = field(default_factory=list)
    settings: str = ""
    freeze: Callable[[], None] = lambda: None
    merge: Callable[[], object] | None = None
    unmerge: Callable[[], None] | None = None
    swap: Callable[[], None] | None = None
    lacks: str = ""
    beside: Callable[[], list[Tensor]] = list


@dataclass(frozen=True)
class Method:
    """A way to adapt.

    Attributes:
        adapt: takes a model, names of its target layers and a block size.
        own_weights: it trains the weights themselves, and cannot share them with others.
    """

    adapt: Callable[[nn.Module, Sequence[str], int], Adapted]
    own_weights: bool = False


def base(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    """No adapter."""
    return Adapted(lacks="there is no adapter")


def full(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    """Every weight of the model."""
    return Adapted(list(model.requires_grad_(True).parameters()))


def ours(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    """This package."""
    bank = inject_oft(model, OFTConfig(block_size=block_size), _NAME, layers=names)
    state = {key: tensor.to(next(bank.parameters()).device) for key, tensor in oft_state_dict(model, _NAME).items()}
    return Adapted(
        list(bank.parameters()),
        f"b = {block_size}",
        freeze=lambda: bank.freeze(_NAME),
        merge=lambda: merge_oft(model),
        unmerge=lambda: unmerge_oft(model),
        swap=lambda: load_oft_state_dict(model, state, _NAME),
        beside=lambda: [
            delta for h in bank.hooks.values() for slot in (h.grad_deltas, h.eval_deltas) for delta in slot or ()
        ],
    )


def ours_in_triton(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    """This package with its kernels for CUDA cards; `kernels_switched` turns them off around each call of `OURS`."""
    if next(model.parameters()).device.type != "cuda":
        raise UnsupportedError("the kernels need a CUDA card")
    with kernels_switched(on=True):
        if triton_kernels() is None:
            raise UnsupportedError("the kernels need Triton and a C compiler")
    return ours(model, names, block_size)


def ours_in_c(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    """This package with its kernels for processors, likewise."""
    if next(model.parameters()).device.type != "cpu":
        raise UnsupportedError("the kernels are for processors")
    with kernels_switched(on=True):
        if processor.library() is None:
            raise UnsupportedError("the kernels need Linux and a C compiler")
    return ours(model, names, block_size)


@contextmanager
def kernels_switched(*, on: bool) -> Iterator[None]:
    """Whether this package takes its kernels, inside. It asks the environment once, so it is made to forget."""
    before = os.environ.get("OFT_DIFFUSION_KERNELS")
    os.environ["OFT_DIFFUSION_KERNELS"] = "1" if on else "0"
    found = (triton_kernels, processor.library)
    for one in found:
        one.cache_clear()
        one()  # not amid what is timed
    try:
        yield
    finally:
        os.environ.pop("OFT_DIFFUSION_KERNELS")
        if before is not None:
            os.environ["OFT_DIFFUSION_KERNELS"] = before
        for one in found:
            one.cache_clear()


def lora(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    return _peft(model, names, f"r = {RANK}", lambda p: peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=p))


def equal_lora(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    """LoRA of the rank whose parameters come nearest to ours."""
    rank = equal_rank(model, names, block_size)
    return _peft(model, names, f"r = {rank}", lambda p: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=p))


def equal_rank(model: nn.Module, names: Sequence[str], block_size: int) -> int:
    """The rank at which LoRA has as many parameters as OFT, as nearly as it can."""
    layers: list[Any] = [model.get_submodule(name) for name in names]
    own = sum(layer.in_features * (block_size - 1) / 2 for layer in layers)
    return max(1, round(own / sum(layer.in_features + layer.out_features for layer in layers)))


def dora(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    return _peft(
        model,
        names,
        f"r = {RANK}",
        lambda p: peft.LoraConfig(r=RANK, lora_alpha=RANK, use_dora=True, target_modules=p),
    )


def peft_oft(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    """With PEFT's defaults: the series of five terms."""
    config = f"b = {block_size}, Cayley-Neumann"
    return _peft(model, names, config, lambda p: peft.OFTConfig(oft_block_size=block_size, target_modules=p))


def boft(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    """Two butterfly factors of blocks of 8; where PEFT cannot compile its CUDA extension, which it needs for a second
    factor, one of blocks of 16. Either has about as many parameters as ours with blocks of 32.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says for every layer that the extension is not there
        factors = 2 if get_fbd_cuda() else 1
        size = 16 // factors
        return _peft(
            model,
            names,
            f"b = {size}, {factors} factor{'s' * (factors > 1)}",
            lambda p: peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=p),
        )


def _peft(model: nn.Module, names: Sequence[str], settings: str, config: Callable[[str], peft.PeftConfig]) -> Adapted:
    """Its parameters are float32, as `get_peft_model` and diffusers' scripts make them, whatever the base; for
    inference in the base's dtype, as diffusers loads them.
    """
    dtype = next(model.parameters()).dtype
    peft.inject_adapter_in_model(config(_pattern(names)), model, _NAME)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    _expect(len(names), len(layers))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    state = {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(model, adapter_name=_NAME).items()}

    def freeze() -> None:
        for parameter in trained:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)

    def swap() -> None:
        peft.set_peft_model_state_dict(model, state, adapter_name=_NAME)

    def each(verb: str) -> Callable[[], None]:
        def call() -> None:
            for layer in layers:
                getattr(layer, verb)()

        return call

    return Adapted(trained, settings, freeze, each("merge"), each("unmerge"), swap)


def lycoris(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    """It rotates outputs, by as many blocks as it takes where a layer is too narrow for this many entries a block."""
    from lycoris.logging import logger
    from lycoris.wrapper import LycorisNetwork

    logger.setLevel("ERROR")
    usual = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    LycorisNetwork.apply_preset({"target_module": [], "target_name": [f"(?:{_pattern(names)})$"]})
    try:
        network = LycorisNetwork(model, lora_dim=block_size, network_module="diag-oft")
    finally:
        for name, value in usual.items():  # presets are of the class, and would stay for others
            setattr(LycorisNetwork, name, value)
    _expect(len(names), len(network.loras))
    network.apply_to()
    network.to(next(model.parameters()).device)
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    trained = list(network.parameters())
    sizes = sorted({layer.block_size for layer in network.loras})

    def freeze() -> None:
        network.requires_grad_(False)

    def swap() -> None:
        network.load_state_dict(state)

    return Adapted(
        trained,
        f"b = {' and '.join(map(str, sizes))}",
        freeze,
        swap=swap,
        lacks="its merging cannot be undone",
        beside=lambda: list(network.buffers()),
    )


def weight_centric(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    """The rotated weight block by block."""
    return _weight_centric(model, names, block_size, dense=False)


def dense_weight_centric(model: nn.Module, names: Sequence[str], block_size: int) -> Adapted:
    """The rotated weight as the authors' code has it: a product with one large R."""
    return _weight_centric(model, names, block_size, dense=True)


def _weight_centric(model: nn.Module, names: Sequence[str], block_size: int, *, dense: bool) -> Adapted:
    trained = [rotate_weight(model.get_submodule(name), block_size, dense=dense) for name in names]

    def freeze() -> None:
        for parameter in trained:
            parameter.requires_grad_(False)

    return Adapted(trained, f"b = {block_size}", freeze, lacks="the reference only runs")


METHODS: dict[str, Method] = {
    BASE: Method(base),
    OURS: Method(ours),
    TRITON: Method(ours_in_triton),
    NATIVE: Method(ours_in_c),
    LORA: Method(lora),
    EQUAL_LORA: Method(equal_lora),
    DORA: Method(dora),
    PEFT_OFT: Method(peft_oft),
    BOFT: Method(boft),
    LYCORIS: Method(lycoris),
    WEIGHT_CENTRIC: Method(weight_centric),
    DENSE: Method(dense_weight_centric),
    FULL: Method(full, own_weights=True),
}


@torch.no_grad()
def disturb(trained: Sequence[Tensor], seed: int = 0) -> None:
    """Move an adapter away from where it starts, so that it does something."""
    draws = torch.Generator().manual_seed(seed)
    for parameter in trained:
        noise: Any = torch.randn(parameter.shape, generator=draws)
        parameter.add_(0.02 * noise.to(device=parameter.device, dtype=parameter.dtype))


def _pattern(names: Sequence[str]) -> str:
    return "|".join(map(re.escape, names))


def _expect(wanted: int, found: int) -> None:
    if wanted != found:
        raise UnsupportedError(f"it adapts {found} of {wanted} target layers")
