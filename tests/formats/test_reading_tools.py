"""What PEFT and LyCORIS themselves save, with their options, gives here what their own models give."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lycoris import LycorisNetwork, create_lycoris
from torch import Tensor, nn

from oft_diffusion import fuse_oft, load_oft_weights
from tests.helpers.lycoris_presets import preset
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import assert_loading_refused, copy_pipe

LINEAR = ["to_q", "to_v", "ff.net.2"]
POINT = ["proj_in", "conv_shortcut"]  # 1x1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(write_tiny_sd(tmp_path_factory.mktemp("tiny")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def answer(unet: Any) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=draw)
    with torch.no_grad():
        found: Tensor = unet(x, torch.tensor([10, 500]), torch.randn(2, 5, 32, generator=draw))[0]
    return found


def excite(model: nn.Module, part: str, std: float) -> None:
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if part in name:
            nn.init.normal_(parameter, std=std)


def load(base: Any, path: Path, **options: Any) -> Any:
    """A pipeline with the file, and what was warned of."""
    pipe = copy_pipe(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_oft_weights(pipe, path, **options)
    return pipe, [str(warning.message) for warning in caught]


def assert_same(base: Any, pipe: Any, wanted: Tensor) -> None:
    """Live and fused answer as the tool's model does, which is not what the base does."""
    assert float((wanted - answer(base.unet)).abs().max()) > 1e-2
    assert float((answer(pipe.unet) - wanted).abs().max()) < 1e-5
    fuse_oft(pipe)
    assert float((answer(pipe.unet) - wanted).abs().max()) < 1e-5


# -- PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"oft_block_size": 0, "r": 4},
        {"oft_block_size": 48},  # which divides nothing
        {"use_cayley_neumann": False},
        {"coft": True, "eps": 0.5},
        {"coft": True, "eps": 0.5, "use_cayley_neumann": False},
        {"block_share": True},
        {"block_share": True, "coft": True, "eps": 0.5},
        {"block_share": True, "coft": True, "eps": 0.5, "use_cayley_neumann": False},
        *({"num_cayley_neumann_terms": terms, "std": 0.05} for terms in (2, 3, 4, 6, 9, 12)),
        {"target_modules": [*LINEAR, *POINT]},
        {"target_modules": [*LINEAR, *POINT], "use_cayley_neumann": False},
        {"target_modules": [*LINEAR, *POINT], "coft": True, "eps": 0.5},
        {"target_modules": [*LINEAR, *POINT], "block_share": True},
        {"target_modules": "all-linear"},
        {"exclude_modules": ["to_k"], "target_modules": ["to_q", "to_k", "to_v"]},
        {"module_dropout": 0.3},
    ],
    ids=str,
)
def test_an_adapter_of_peft_answers_as_in_peft(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    told: dict[str, Any] = {"oft_block_size": 8, "target_modules": LINEAR} | options
    std = told.pop("std", 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # block sizes that were adjusted
        model = peft.get_peft_model(copy.deepcopy(base.unet), peft.OFTConfig(**told)).eval()
    excite(model, "oft_R", std)
    model.save_pretrained(str(tmp_path / "peft"))
    pipe, _ = load(base, tmp_path / "peft")
    assert_same(base, pipe, answer(model))


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("part", "options"),
    [
        *(
            (part, options)
            for part in ("unet", "text_encoder")
            for options in ({}, {"use_cayley_neumann": False}, {"coft": True, "eps": 0.5}, {"block_share": True})
        ),
        ("unet", {"target_modules": [*LINEAR, *POINT]}),
    ],
    ids=str,
)
def test_an_adapter_of_diffusers_at_every_strength(
    base: Any, tmp_path: Path, part: str, options: dict[str, Any]
) -> None:
    """Saved by `save_lora_adapter`, or by `save_lora_weights`; PEFT's own merged weights, blended."""
    told: dict[str, Any] = {"target_modules": ["q_proj", "fc2"] if part == "text_encoder" else LINEAR, **options}
    pipe = copy_pipe(base)
    theirs = getattr(pipe, part)
    theirs.add_adapter(peft.OFTConfig(oft_block_size=8, **told))
    excite(theirs, "oft_R", 0.1)
    layers = peft.get_peft_model_state_dict(theirs)
    config = theirs.peft_config["default"].to_dict()
    if part == "unet":
        theirs.save_lora_adapter(tmp_path)
    else:
        pipe.save_lora_weights(tmp_path, text_encoder_lora_layers=layers, text_encoder_lora_adapter_metadata=config)
    merged = {}
    adapted: list[tuple[str, Any]] = [
        (name, module) for name, module in theirs.named_modules() if isinstance(module, peft.tuners.oft.layer.OFTLayer)
    ]
    for name, layer in adapted:
        before = layer.get_base_layer().weight.detach().clone()
        layer.merge()
        merged[name] = (before, layer.get_base_layer().weight.detach().clone())
    assert len(merged) >= 4
    for strength in (1.0, 0.4, -0.7, 0.0):
        ours, _ = load(base, tmp_path, strength=strength)
        fuse_oft(ours)
        for name, (before, after) in merged.items():
            got = getattr(ours, part).get_submodule(name).weight
            assert float((got - torch.lerp(before, after, strength)).abs().max()) < 1e-5
            assert float((after - before).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bias": "oft_only"}, "biases (PEFT"),
        ({"bias": "all"}, "biases (PEFT"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save)"),
        ({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms"),  # which is no rotation at all
        ({"target_modules": ["conv1"]}, "convolution of 9 taps"),
    ],
    ids=str,
)
def test_what_peft_does_and_is_no_rotation_is_refused(
    base: Any, tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    told: dict[str, Any] = {"oft_block_size": 8, "target_modules": LINEAR} | options
    peft.get_peft_model(copy.deepcopy(base.unet), peft.OFTConfig(**told)).save_pretrained(str(tmp_path / "peft"))
    assert_loading_refused(copy_pipe(base), tmp_path / "peft", "adapter_model.safetensors", word)


# -- LyCORIS ----------------------------------------------------------------------------------------------------


def trained(base: Any, path: Path, multiplier: float = 1.0, dtype: Any = None, **options: Any) -> tuple[Any, Tensor]:
    """LyCORIS's own network on a UNet, random, saved to `path`: the network and what the UNet answers with it."""
    unet = copy.deepcopy(base.unet)
    told: dict[str, Any] = {"algo": "diag-oft", **options}
    with preset(LycorisNetwork, {"target_module": ["Transformer2DModel", "ResnetBlock2D"]}):
        network = create_lycoris(unet, multiplier, linear_dim=4, conv_dim=4, **told)
    network.apply_to()
    excite(network, "oft_blocks", 0.1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "rescale" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    network.save_weights(str(path), dtype, {})
    return network, answer(unet)


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("multiplier", "options"),
    [
        (1.0, {}), (0.5, {}), (-0.7, {}), (1.0, {"constraint": 1e-2}), (1.0, {"constraint": 5.0}),
        (0.5, {"constraint": 1e-2}), (1.0, {"rescaled": True}), (1.0, {"rescaled": True, "constraint": 1e-2}),
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_of_lycoris_answers_as_in_lycoris(
    base: Any, tmp_path: Path, multiplier: float, options: dict[str, Any]
) -> None:
    network, wanted = trained(base, tmp_path / "lycoris.safetensors", multiplier, **options)
    pipe, warned = load(base, tmp_path / "lycoris.safetensors", strength=multiplier)
    assert warned == []
    assert_same(base, pipe, wanted)
    names = {f"lycoris_{name.replace('.', '_')}": name for name, _ in base.unet.named_modules()}
    assert len(network.loras) > 20
    for lora in network.loras:
        weight = pipe.unet.get_submodule(names[lora.lora_name]).weight
        merged = lora.get_merged_weight(multiplier)[0].detach().reshape(weight.shape)
        assert float((weight - merged).abs().max()) < 1e-5, lora.lora_name


def test_an_adapter_of_lycoris_in_half_precision(base: Any, tmp_path: Path) -> None:
    _, wanted = trained(base, tmp_path / "half.safetensors", dtype=torch.float16)
    pipe, _ = load(base, tmp_path / "half.safetensors")
    assert float((answer(pipe.unet) - wanted).abs().max()) < 5e-3  # rounded when it was saved
    assert float((wanted - answer(base.unet)).abs().max()) > 0.05


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "header",
    [
        {"lycoris_config": '{"algo": "diag-oft", "bypass_mode": true}'},
        {"lycoris_config": '{"apply_preset": {"module_algo_map": {"Attention": {"bypass_mode": true}}}}'},
        {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "diag-oft", "bypass_mode": "True"}'},
        {"lycoris_config": '{"bypass_mode": false}'},
        {},
    ],
    ids=str,
)
def test_biases_that_lycoris_rotated_are_told_where_the_file_tells(
    base: Any, tmp_path: Path, header: dict[str, str]
) -> None:
    path = tmp_path / "bypass.safetensors"
    network, wanted = trained(base, path, bypass_mode=True)
    network.save_weights(str(path), None, dict(header))
    pipe, warned = load(base, path)
    assert float((answer(pipe.unet) - wanted).abs().max()) > 1e-2  # so it matters
    assert any("bypass_mode" in text for text in warned) == (": true" in str(header) or '"True"' in str(header))


def test_layers_without_a_bias_are_the_same_in_bypass_mode(base: Any, tmp_path: Path) -> None:
    path = tmp_path / "bypass.safetensors"
    unet = copy.deepcopy(base.unet)
    with preset(LycorisNetwork, {"target_module": [], "target_name": [".*to_q", ".*to_k", ".*to_v"]}):
        network = create_lycoris(unet, 1.0, linear_dim=4, algo="diag-oft", bypass_mode=True)
    network.apply_to()
    excite(network, "oft_blocks", 0.3)
    network.save_weights(str(path), None, {"lycoris_config": '{"bypass_mode": true}'})
    pipe, warned = load(base, path)
    assert warned == []
    assert_same(base, pipe, answer(unet))


def test_norms_that_lycoris_trains_beside_are_refused(base: Any, tmp_path: Path) -> None:
    path = tmp_path / "lycoris.safetensors"
    trained(base, path, train_norm=True)
    assert_loading_refused(copy_pipe(base), path, "lycoris.safetensors", "LyCORIS's train_norm")


def test_boft_of_lycoris_is_refused(base: Any, tmp_path: Path) -> None:
    path = tmp_path / "boft.safetensors"
    trained(base, path, algo="boft")
    assert_loading_refused(copy_pipe(base), path, "boft.safetensors", "BOFT")
