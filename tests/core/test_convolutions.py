"""Convolutions: the rotation acts on the input channels, whatever kernel, stride and padding are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from oft_diffusion import OFTConfig, inject_oft, load_oft_weights, merge_oft, remove_oft, save_oft_weights, unmerge_oft
from oft_diffusion.errors import TargetError
from oft_diffusion.inject import oft_state_dict
from tests.core.reference import dense_rotation, relative, unet_inputs
from tests.helpers.tiny_sd import tiny_pipeline
from tests.library.support import assert_one_sentence, draw, excite, tiny_unet

CHANNELS = 24
GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1), "padding": "same", "bias": False},
    {"kernel_size": 3, "dilation": 2, "padding": 2, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": (0, 1), "padding_mode": "reflect", "stride": (1, 2)},
]


def convolution(seed: int = 0, **geometry: Any) -> nn.Sequential:
    """One convolution in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(CHANNELS, 10, **geometry)).double()


def pictures(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", [(2, CHANNELS, 9, 8), (CHANNELS, 9, 8)], ids=["batch", "one"])
def test_it_is_the_convolution_whose_taps_are_rotated(geometry: dict[str, Any], shape: tuple[int, ...]) -> None:
    model, x = convolution(**geometry), pictures(*shape)
    reference = convolution(**geometry)
    base = model(x).detach()
    bank = inject_oft(model, OFTConfig(block_size=8, targets="0"))
    assert torch.equal(model(x), base)  # no rotation at the start
    excite(bank)
    with torch.no_grad():
        rotation = dense_rotation(bank, "0")
        weight = reference.get_parameter("0.weight")
        weight.copy_(torch.einsum("oiyx,ji->ojyx", weight, rotation))
    assert relative(model(x), reference(x)) < 1e-6
    assert relative(model(x), base) > 0.1


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients_are_those_of_the_rotated_weight(geometry: dict[str, Any]) -> None:
    model, x = convolution(**geometry), pictures(2, CHANNELS, 9, 8).requires_grad_()
    bank = inject_oft(model, OFTConfig(block_size=8, targets="0"))
    excite(bank)
    parameter = bank.generators["default"]
    found = torch.autograd.grad(model(x).square().sum(), [x, parameter])

    upper = torch.triu_indices(8, 8, 1)
    packed = parameter.detach().double().requires_grad_()
    q = torch.zeros(CHANNELS // 8, 8, 8, dtype=torch.float64).index_put((torch.arange(3)[:, None], *upper), packed)
    q = q - q.mT
    rotation = torch.block_diag(*torch.linalg.solve(torch.eye(8) - q, torch.eye(8) + q, left=False))
    weight = torch.einsum("oiyx,ji->ojyx", model[0].weight, rotation)
    copy = convolution(**geometry)
    output = torch.func.functional_call(copy, {"0.weight": weight}, (x,))
    wanted = torch.autograd.grad(output.square().sum(), [x, packed])
    assert relative(found[0], wanted[0]) < 1e-5
    assert relative(found[1], wanted[1]) < 1e-5


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"])
def test_merged_equals_live_and_unmerging_is_exact(geometry: dict[str, Any], layout: torch.memory_format) -> None:
    model, x = convolution(**geometry), pictures(2, CHANNELS, 9, 8).contiguous(memory_format=layout)
    weight = model.get_parameter("0.weight")
    weight.data = weight.data.contiguous(memory_format=layout)
    before = weight.detach().clone()
    excite(inject_oft(model, OFTConfig(block_size=8, targets="0")))
    live = model(x).detach()
    merge_oft(model)
    assert relative(model(x), live) < 1e-6
    assert not torch.equal(weight, before)
    unmerge_oft(model)
    remove_oft(model)
    assert torch.equal(weight, before)


def test_a_pointwise_one_is_pefts() -> None:
    ours, x = convolution(kernel_size=1).float(), pictures(2, CHANNELS, 5, 5).float()
    excite(inject_oft(ours, OFTConfig(block_size=8, targets="0", parametrisation="cayley_neumann", neumann_order=4)))
    config = peft.OFTConfig(
        r=0, oft_block_size=8, target_modules=["0"], use_cayley_neumann=True, num_cayley_neumann_terms=5
    )
    theirs = peft.inject_adapter_in_model(config, convolution(kernel_size=1).float())
    state = oft_state_dict(ours)
    outcome: Any = peft.set_peft_model_state_dict(theirs, state)
    assert not outcome.unexpected_keys
    assert relative(ours(x), theirs(x)) < 1e-6


def test_grouped_ones_are_refused_by_name_and_left_out_of_sets() -> None:
    model = nn.ModuleDict({"depthwise": nn.Conv2d(16, 16, 3, groups=16), "to_q": nn.Linear(16, 16)})
    with pytest.raises(TargetError) as caught:
        inject_oft(model, OFTConfig(block_size=8, targets="depthwise"))
    assert_one_sentence(caught, "layer depthwise of ModuleDict is a Conv2d of 16 groups")


def test_only_the_set_that_says_so_takes_them() -> None:
    """Stable Diffusion 1.x's `proj_in` is a 1x1 convolution, and a name that `all-linear` lists for SD 2.x."""
    kinds = {}
    for targets in ("all-linear", "all-linear+conv", r".*\.conv1"):
        bank = inject_oft(unet := tiny_unet(), OFTConfig(block_size=8, targets=targets))
        modules = dict(unet.named_modules())
        kinds[targets] = {name: type(modules[name]).__name__ for name in bank.hooks}
    assert set(kinds["all-linear"].values()) == {"Linear"}
    added = kinds["all-linear+conv"].items() - kinds["all-linear"].items()
    assert {kind for _, kind in added} == {"Conv2d"}
    leaves = {name.rpartition(".")[2] for name, _ in added}
    assert (
        {"conv1", "conv2", "conv_shortcut", "conv"}
        <= leaves
        <= {"conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out"}
    )
    assert set(kinds[r".*\.conv1"].values()) == {"Conv2d"}


def test_a_unet_with_checkpointing_has_the_same_gradients() -> None:
    found = []
    for checkpointed in (False, True):
        unet = tiny_unet().train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        bank = inject_oft(unet, OFTConfig(block_size=8, targets="all-linear+conv"))
        excite(bank)
        unet(**unet_inputs(unet)).sample.square().mean().backward()
        gradient = bank.generators["default"].grad
        assert gradient is not None
        found.append(gradient)
        for name, rows in bank.layer_slices("default").items():
            assert gradient[rows].abs().sum() > 0, name
    assert relative(found[1], found[0]) < 1e-5


@pytest.mark.slow
def test_a_compiled_unet_goes_on_with_new_strengths() -> None:
    torch.compiler.reset()
    unet = tiny_unet()
    bank = inject_oft(unet, OFTConfig(block_size=8, targets="all-linear+conv"))
    excite(bank)
    bank.freeze("default")
    inputs, live = unet_inputs(unet), []
    with torch.no_grad():
        for strength in (1.0, 0.3):
            bank.set_adapters("default", strength)
            live.append(unet(**inputs).sample)
        unet.compile(backend="aot_eager")
        with torch.compiler.set_stance("default"):
            assert relative(unet(**inputs).sample, live[1]) < 1e-5
        bank.set_adapters("default", 1.0)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert relative(unet(**inputs).sample, live[0]) < 1e-5
    torch.compiler.reset()


def test_a_file_of_them_draws_the_same_picture(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    excite(inject_oft(pipe.unet, OFTConfig(block_size=8, targets="all-linear+conv")))
    save_oft_weights(pipe, tmp_path / "adapter.safetensors", "default")
    again = tiny_pipeline(tmp_path)
    base = draw(again)
    load_oft_weights(again, tmp_path / "adapter.safetensors")
    assert torch.equal(draw(again), draw(pipe))
    assert (draw(again) - base).abs().mean() > 1 / 255
