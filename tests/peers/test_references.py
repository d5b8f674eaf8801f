"""The references against the real PEFT and LyCORIS, and against identities that hold for the series."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lycoris
import peft
import pytest
import torch
import torch.nn.functional as F
from lycoris.functional import factorization
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from peft.tuners.oft.layer import OFTLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.peers.algebra import (
    Written,
    adjusted_block_size,
    block_size_of,
    cayley,
    draw_packed,
    generator,
    identity,
    neumann,
    of_layer,
    old_neumann,
    project,
    save,
    skew,
)
from tests.peers.lycoris_oft import factors, merged_weight_lycoris, write_lycoris, write_lycoris_boft
from tests.peers.peft_oft import (
    PREFIX,
    merged_weight_peft,
    peft_config,
    peft_file,
    write_old_peft,
    write_peft,
    write_peft_embedding,
)


class Layers(nn.Module):
    """One of each kind; 24 inputs are no multiple of 16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow = nn.Linear(16, 12)
        self.wide = nn.Linear(24, 64)
        self.point = nn.Conv2d(16, 6, 1)
        self.kernel = nn.Conv2d(8, 20, 3, padding=1)
        self.words = nn.Embedding(10, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(x)


SHAPES = {name.removesuffix(".weight"): tuple(p.shape) for name, p in Layers().named_parameters() if p.dim() > 1}
LINEAR_LIKE = {name: SHAPES[name] for name in ("narrow", "wide", "point")}
INPUTS = {
    "narrow": (3, 16),
    "wide": (2, 5, 24),
    "point": (2, 16, 4, 4),
}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().double().norm() / b.detach().double().norm())


def loaded(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # block sizes that were adjusted
        return peft.PeftModel.from_pretrained(Layers(), str(directory)).double()


# PEFT

OPTIONS: list[dict[str, Any]] = [
    {},
    {"terms": 1},
    {"terms": 2},
    {"terms": 3},
    {"terms": 4},
    {"terms": 6},
    {"terms": 9},
    {"exact": True},
    {"block_share": True},
    {"coft": True, "eps": 0.5},
    {"coft": True},
    {"coft": True, "eps": 0.5, "block_share": True, "exact": True},
    {"block_size": 16, "dtype": torch.bfloat16},
    {"block_size": 1000},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_peft_forward_and_merge(options: dict[str, Any], tmp_path: Path) -> None:
    directory = write_peft(tmp_path, LINEAR_LIKE, **({"block_size": 8, "norm": 0.8} | options))
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    model, base = loaded(directory), Layers().double()
    expected = {}
    for name, shape in INPUTS.items():
        layer = base.get_submodule(name)
        expected[name] = merged_weight_peft(layer.weight, of_layer(tensors, PREFIX + name), config)  # type: ignore[arg-type]
        x = torch.randn(shape, generator=generator(1), dtype=torch.float64)
        operation: Callable[..., Tensor] = F.conv2d if name == "point" else F.linear
        moved = relative(expected[name], layer.weight)  # type: ignore[arg-type]
        assert (moved > 1e-5) == (options.get("terms") != 1)
        found = model.base_model.model.get_submodule(name)(x)
        assert relative(found, operation(x, expected[name], layer.bias)) < 1e-6 * min(1.0, moved) + 1e-14
    merged = model.merge_and_unload()
    for name, weight in expected.items():
        assert relative(merged.get_submodule(name).weight, weight) < 1e-7, name


def test_peft_files_look_like_its_own(tmp_path: Path) -> None:
    theirs = peft.OFTConfig(r=0, oft_block_size=16, target_modules=list(LINEAR_LIKE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(Layers(), theirs).save_pretrained(str(tmp_path / "theirs"))
    write_peft(tmp_path / "ours", LINEAR_LIKE, block_size=16)
    seen, told = [], []
    for side in ("theirs", "ours"):
        with safe_open(tmp_path / side / "adapter_model.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            seen.append((file.metadata(), {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}))
        config = json.loads((tmp_path / side / "adapter_config.json").read_text())
        told.append(config | {"auto_mapping": None, "target_modules": sorted(config["target_modules"])})
    assert seen[0] == seen[1]
    assert told[0] == told[1]


def test_peft_knows_no_strength_and_breaks_larger_kernels(tmp_path: Path) -> None:
    config = peft_config(["kernel"])
    weight = Layers().kernel.weight
    tensors = {"oft_R.weight": draw_packed(generator(0), weight.shape, 8)}
    with pytest.raises(ValueError, match="larger kernel"):
        merged_weight_peft(weight, tensors, config)
    with pytest.raises(ValueError, match="no strength"):
        merged_weight_peft(Layers().narrow.weight, tensors, config, 0.5)
    directory = write_peft(tmp_path, {"kernel": SHAPES["kernel"]}, block_size=8, norm=0.0)
    x = torch.randn(1, 8, 6, 6, generator=generator(1), dtype=torch.float64)
    turned_by_nothing = loaded(directory).base_model.model.kernel(x)
    assert relative(turned_by_nothing, Layers().double().kernel(x)) > 1.0


def test_peft_refuses_its_old_files_or_loads_nothing(tmp_path: Path) -> None:
    layers = {"narrow": SHAPES["narrow"]}
    stored = write_old_peft(tmp_path / "stored", layers)
    assert set(load_file(stored / "adapter_model.safetensors")) == {f"{PREFIX}narrow.oft_r", f"{PREFIX}narrow.oft_s"}
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(Layers(), str(stored))
    with pytest.raises(ValueError, match="old OFT checkpoint"):
        loaded(write_old_peft(tmp_path / "live", layers, live=True))
    with pytest.raises(ValueError, match="since PEFT"):
        loaded(write_old_peft(tmp_path / "older", layers, version="0.13"))


def test_peft_loads_its_embeddings(tmp_path: Path) -> None:
    """So that a refusal of them is not of a broken file. (PEFT's BOFT would compile a CUDA extension here.)"""
    words = loaded(write_peft_embedding(tmp_path, {"words": SHAPES["words"]})).merge_and_unload().words
    packed = load_file(tmp_path / "adapter_model.safetensors")[f"{PREFIX}words.oft_embedding_R.weight"]
    rotation = torch.block_diag(*neumann(skew(packed)))
    assert relative(words.weight, Layers().double().words.weight @ rotation) < 1e-6


@pytest.mark.parametrize("peft_version", [None, "0.17.1", "0.18.0", "0.18.0.dev0@abc", "1.0.0"])
def test_series_by_version(peft_version: str | None) -> None:
    config = peft_config(["narrow"], peft_version=peft_version)
    weight = Layers().narrow.weight
    packed = draw_packed(generator(0), weight.shape, 8)
    old = peft_version in (None, "0.17.1")
    rotation = torch.block_diag(*(old_neumann if old else neumann)(skew(packed)))
    assert relative(merged_weight_peft(weight, {"oft_R.weight": packed}, config), weight.double() @ rotation.T) < 1e-14


# The series


def test_identities() -> None:
    q = skew(draw_packed(generator(0), (1, 96), 8, norm=0.9))
    one = identity(q)
    power = torch.linalg.matrix_power
    exact = cayley(q)
    assert relative(exact @ exact.mT, one) < 1e-14
    assert relative(exact.mT, cayley(-q)) < 1e-14
    for terms in (4, 5, 6, 7):
        assert relative(neumann(q, terms), (one - power(q, terms - 1)) @ exact) < 1e-13
        assert relative(neumann(q, terms).mT, neumann(-q, terms)) < 1e-14
        assert relative(old_neumann(q, terms), neumann(q, terms) + power(q, terms - 1)) < 1e-14
    assert relative(old_neumann(q), exact - 2 * power(q, 5) @ torch.linalg.inv(one - q)) < 1e-13
    assert torch.equal(neumann(q, 3), neumann(q, 4))


def test_packing_and_projection() -> None:
    packed = torch.arange(1.0, 13.0).reshape(2, 6)
    assert block_size_of(packed) == 4
    rows, columns = torch.triu_indices(4, 4, 1)
    assert torch.equal(skew(packed)[:, rows, columns], packed.double())
    for eps in (1e-3, 1e3):
        norms = skew(project(packed, eps)).flatten(1).norm(dim=1)
        assert torch.allclose(norms, skew(packed).flatten(1).norm(dim=1).clamp(max=eps / 2**0.5), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7, 24, 36, 320, 1280])
def test_adjusted_block_sizes_and_factors(size: int) -> None:
    theirs: Any = OFTLayer.adjust_oft_parameters
    for wanted in (1, 2, 3, 5, 16, 20, 31, 32, 64, 2000):
        if size % wanted or wanted > size:
            assert adjusted_block_size(size, wanted) == theirs(None, size, wanted), wanted
        assert factors(size, wanted) == factorization(size, wanted), wanted


# LyCORIS

ROWS = {name: SHAPES[name] for name in ("narrow", "wide", "kernel")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dim": 4},
        {"constraint": 1e-3},
        {"constraint": 10.0},
        {"rescaled": True},
        {"rescaled": True, "constraint": 2e-2, "dtype": torch.bfloat16},
        {"norm": 1.5},
    ],
    ids=str,
)
def test_lycoris_from_its_files(options: dict[str, Any], tmp_path: Path) -> None:
    written = write_lycoris({f"lycoris_{name}": shape for name, shape in ROWS.items()}, **options)
    path = save(written, tmp_path / "lycoris.safetensors")
    base = Layers()
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), base)
    assert len(network.loras) == len(ROWS)
    for lora in network.loras:
        name = lora.lora_name.removeprefix("lycoris_")
        weight, own = base.get_submodule(name).weight, of_layer(load_file(path), lora.lora_name)
        assert isinstance(weight, Tensor)
        expected = merged_weight_lycoris(weight, own)
        assert relative(lora.get_merged_weight()[0], expected) < 1e-6, name
        assert relative(expected, weight) > 1e-4
        for strength in (0.5, -1.0, 2.0):
            blended = merged_weight_lycoris(weight, own, None, strength)
            assert relative(lora.get_merged_weight(strength)[0], blended) < 1e-6, name


def test_lycoris_rescaled_is_not_blended() -> None:
    layer, draw = nn.Linear(16, 12), generator(2)
    module = DiagOFTModule("lycoris_x", layer, 0.5, lora_dim=4, rescaled=True)
    own = of_layer(write_lycoris({"lycoris_x": (12, 16)}, lora_dim=4, rescaled=True).tensors, "lycoris_x")
    module.load_state_dict(own)
    expected = merged_weight_lycoris(layer.weight, own, None, 0.5)
    assert relative(module.get_merged_weight(0.5)[0], expected) < 1e-6
    x = torch.randn(3, 16, generator=draw)
    assert relative(module(x), F.linear(x.double(), expected, layer.bias.double())) < 1e-6
    with pytest.raises(RuntimeError):
        module.get_diff_weight(0.5)


@pytest.mark.parametrize("constraint", [0.0, 1e-3])
@pytest.mark.parametrize("rescaled", [False, True])
def test_lycoris_files_look_like_its_own(constraint: float, rescaled: bool, tmp_path: Path) -> None:
    network = lycoris.create_lycoris(
        Layers(), 1.0, linear_dim=8, algo="diag-oft", constraint=constraint, rescaled=rescaled
    )
    network.apply_to()
    network.save_weights(str(tmp_path / "theirs.safetensors"), None, {})
    theirs = load_file(tmp_path / "theirs.safetensors")
    names = {f"lycoris_{name}": SHAPES[name] for name in SHAPES if f"lycoris_{name}.oft_blocks" in theirs}
    assert len(names) >= len(ROWS)
    ours = write_lycoris(names, constraint=constraint, rescaled=rescaled, wrapper="plain").tensors
    assert _kinds(ours) == _kinds(theirs)


def test_lycoris_boft_files_are_its_own(tmp_path: Path) -> None:
    module = ButterflyOFTModule("lycoris_wide", nn.Linear(24, 64), lora_dim=4)
    theirs = {f"lycoris_wide.{name}": tensor for name, tensor in module.state_dict().items()}
    ours = write_lycoris_boft({"lycoris_wide": (64, 24)}, constraint=0).tensors
    assert ours["lycoris_wide.oft_blocks"].dim() == 4
    assert _kinds(ours) == _kinds(theirs)


def _kinds(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}


def test_saved_as_written(tmp_path: Path) -> None:
    written: Written = peft_file(LINEAR_LIKE, prefix="", dtype=torch.float16)
    found = load_file(save(written, tmp_path / "a.safetensors"))
    assert _kinds(found) == _kinds(written.tensors)
    assert all(torch.equal(found[key], tensor) for key, tensor in written.tensors.items())
