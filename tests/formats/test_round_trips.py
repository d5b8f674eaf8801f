"""Any adapter, of any shape, block size, dtype and names, comes back from other tools' files as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from oft_diffusion import OFTConfig, inject_oft, oft_state_dict, remove_oft
from oft_diffusion.files import load_adapter_file, save_adapter_file
from oft_diffusion.formats import read, write_peft, write_single_file
from oft_diffusion.metadata import AdapterMetadata
from oft_diffusion.rotation import rotation_delta
from tests.library.support import excite

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
