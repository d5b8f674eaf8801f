"""Any adapter, of any shape, block size, dtype and names, comes back from other tools' files as it was."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from oft_diffusion import OFTConfig, inject_oft, merge_oft, oft_state_dict, remove_oft
from oft_diffusion.errors import AdapterFileError
from oft_diffusion.files import load_adapter_file, save_adapter_file
from oft_diffusion.formats import read, write_peft, write_single_file
from oft_diffusion.formats.writing import SINGLE_FILE
from oft_diffusion.inject import inject_state
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.rotation import rotation_delta
from tests.helpers import tiny_denoisers
from tests.library.support import excite, generators
from tests.peers import algebra, lycoris_oft

# Parts of dotted names, such as models have; no two of which become one when dots are underscores.
NAMES = st.lists(
    st.sampled_from(["blocks", "attn1", "to_q", "to_out", "ff", "net", "proj", "linear", "0", "1", "17", "q_proj"]),
    min_size=1, max_size=4,
).map(".".join)  # fmt: skip


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A model of a few layers, and a block size that divides all of their inputs."""
    block_size = draw(st.sampled_from([2, 3, 4, 6, 8, 16]))
    names = draw(st.lists(NAMES, min_size=1, max_size=5, unique_by=lambda n: n.replace(".", "_")))
    names = [n for n in names if not any(n != o and (n.startswith(f"{o}.") or o.startswith(f"{n}.")) for o in names)]
    model = nn.Module()
    for name in names or ["only"]:
        parent: nn.Module = model
        *path, leaf = name.split(".")
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = getattr(parent, step)
        features, outputs = block_size * draw(st.integers(1, 4)), draw(st.integers(1, 9))
        kernel = draw(st.sampled_from([0, 0, 1, 3]))
        parent.add_module(leaf, nn.Conv2d(features, outputs, kernel) if kernel else nn.Linear(features, outputs))
    return model, block_size


def adapter(model: nn.Module, block_size: int, folder: Path, seed: int, **settings: Any) -> Any:
    bank = inject_oft(model, OFTConfig(block_size, targets=".*", **settings))
    excite(bank, seed=seed, norm=0.4)
    state = oft_state_dict(model)
    remove_oft(model)
    metadata = AdapterMetadata({"unet": bank.adapters["default"].config})
    return load_adapter_file(save_adapter_file(folder / "ours", {"unet": state}, metadata))


def rotations(file: Any) -> dict[str, Tensor]:
    """Dense rotations of the flattened weight's columns, whichever way a file holds them."""
    config = file.metadata.components["unet"]
    return {
        key.removesuffix(".oft_R.weight"): torch.block_diag(*rotation_delta(packed.double(), config))
        for key, packed in file.components["unet"].items()
    }


@pytest.mark.parametrize("naming", ["flat", "diffusers"])
@given(model=models(), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), seed=st.integers(0, 99))
def test_single_files(
    tmp_path_factory: pytest.TempPathFactory, naming: str, model: tuple[nn.Module, int], dtype: torch.dtype, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("x")
    module, block_size = model
    file = adapter(module, block_size, folder, seed, parametrisation="cayley_neumann", neumann_order=4)
    written = write_single_file(folder / "theirs.safetensors", file, {"unet": module}, naming, dtype=dtype)
    again = read(written.path, {"unet": module}).file
    before, after = rotations(file), rotations(again)
    assert after.keys() == before.keys()
    for layer, wanted in before.items():
        got = after[layer]
        if len(got) != len(wanted):  # of channels, as patches now
            wanted = torch.kron(wanted, torch.eye(len(got) // len(wanted), dtype=torch.float64))
        rounded = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert float((got - wanted).abs().max()) < rounded


@given(
    model=models(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
    series=st.sampled_from(
        [{}, {"parametrisation": "cayley_neumann", "neumann_order": 4}, {"parametrisation": "cayley_neumann"}]
    ),
)
def test_peft(
    tmp_path_factory: pytest.TempPathFactory, model: tuple[nn.Module, int], dtype: torch.dtype, seed: int, series: Any
) -> None:
    folder = tmp_path_factory.mktemp("x")
    module, block_size = model
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > 1:
            parent = module.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Conv2d(layer.in_channels, layer.out_channels, 1))
    file = adapter(module, block_size, folder, seed, **series)
    write_peft(folder / "peft", file, {"unet": module}, dtype=dtype)
    again = read(folder / "peft" / "adapter_model.safetensors", {"unet": module}).file
    assert again.metadata.components["unet"].parametrisation == file.metadata.components["unet"].parametrisation
    for layer, wanted in rotations(file).items():
        rounded = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
        assert float((rotations(again)[layer] - wanted).abs().max()) < rounded


@cache
def denoiser(kind: str) -> nn.Module:
    model, _ = getattr(tiny_denoisers, kind)()
    assert isinstance(model, nn.Module)
    return model


@given(data=st.data(), kind=st.sampled_from(["unet", "sd3", "flux"]), naming=st.sampled_from(SINGLE_FILE))
def test_native_names(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, naming: str) -> None:
    """Any layers of a denoiser whose native weights are fused: what is written is read again, or refused."""
    folder, model = tmp_path_factory.mktemp("x"), denoiser(kind)
    part = "unet" if kind == "unet" else "transformer"
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = data.draw(st.lists(st.sampled_from(sorted(linear)), min_size=1, max_size=12, unique=True))
    size, alike = data.draw(st.sampled_from([2, 4])), data.draw(st.booleans())
    layers = [layer for layer in layers if linear[layer].in_features % size == 0]
    assume(layers)
    state = {
        f"{layer}.oft_R.weight": generators(linear[layer].in_features // size, size, seed=0 if alike else number)
        for number, layer in enumerate(layers)
    }
    config = OFTConfig(size, targets=".*", parametrisation="cayley_neumann", neumann_order=4)
    file = load_adapter_file(save_adapter_file(folder / "ours", {part: state}, AdapterMetadata({part: config})))
    path = folder / "theirs.safetensors"
    refusal = ""
    try:
        write_single_file(path, file, {part: model}, naming)
    except AdapterFileError as error:
        refusal = str(error)
    assert path.exists() == (not refusal)
    if refusal:
        assert "is one weight of" in refusal
        assert naming in ("kohya", "comfy", "native")
        assert kind != "unet"
        return
    again = read(path, {part: model}).file.components[part]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


@given(
    model=models(), dim=st.sampled_from([2, 3, 4, 8]), bound=st.sampled_from([0.0, 1e-2, 10.0]),
    rescaled=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_rotated_outputs(
    tmp_path_factory: pytest.TempPathFactory,
    model: tuple[nn.Module, int],
    dim: int,
    bound: float,
    rescaled: bool,
    seed: int,
) -> None:
    """LyCORIS's files, as ours, saved and loaded: the weights are those of its own formula."""
    folder, (module, _) = tmp_path_factory.mktemp("x"), model
    layers = {name: m for name, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    layers = {name: m for name, m in layers.items() if lycoris_oft.factors(len(m.weight), dim)[0] > 1}
    assume(layers)
    keys = {f"lora_unet_{name.replace('.', '_')}": name for name in layers}
    shapes = {key: tuple(layers[name].weight.shape) for key, name in keys.items()}
    written = lycoris_oft.write_lycoris(shapes, lora_dim=dim, constraint=bound, rescaled=rescaled, seed=seed)
    theirs = read(algebra.save(written, folder / "theirs.safetensors"), {"unet": module}).file
    file = load_adapter_file(save_adapter_file(folder / "ours", theirs.components, theirs.metadata))
    before = {key: layers[name].weight.detach().clone() for key, name in keys.items()}
    inject_state(module.double(), file.metadata.components["unet"], file.components["unet"], "a").freeze("a")
    merge_oft(module)
    for key, name in keys.items():
        wanted = lycoris_oft.merged_weight_lycoris(
            before[key], algebra.of_layer(written.tensors, key), written.metadata
        )
        assert float((layers[name].weight - wanted).abs().max()) < 1e-5
