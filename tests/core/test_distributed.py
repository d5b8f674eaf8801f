"""DistributedDataParallel over two gloo processes: the gradients of the whole batch, and replicas that stay equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from oft_diffusion import OFTConfig, inject_oft
from tests.core.reference import relative, unet_inputs
from tests.library.support import excite, tiny_unet

STEPS, RATE = 3, 0.5


class Adapted(nn.Module):
    """A component and its bank in one module: the bank is not registered on the component."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.unet: Any = tiny_unet()
        self.bank = inject_oft(self.unet, OFTConfig(block_size=8))
        excite(self.bank)
        if checkpointed:
            self.unet.train().enable_gradient_checkpointing()

    def forward(self, **inputs: Any) -> torch.Tensor:
        return self.unet(**inputs).sample


def train(model: nn.Module, bank: Any, rows: slice) -> dict[str, torch.Tensor]:
    """Some steps of plain descent; the first gradient, and where it led."""
    optimizer = torch.optim.SGD(bank.parameters(), lr=RATE)
    first = None
    for step in range(STEPS):
        inputs = {name: value[rows] for name, value in unet_inputs(bank_unet(model), seed=step).items()}
        optimizer.zero_grad()
        model(**inputs).square().mean().backward()
        first = bank.generators["default"].grad.clone() if first is None else first
        optimizer.step()
    assert first is not None
    return {"gradient": first, "generators": bank.generators["default"].detach().clone()}


def bank_unet(model: Any) -> Any:
    return getattr(model, "module", model).unet


def worker(rank: int, folder: str, checkpointed: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = Adapted(checkpointed)
    if rank == 1:
        excite(model.bank, seed=99)  # DistributedDataParallel must bring rank 0's generators here
    wrapped = DistributedDataParallel(model)
    result = train(wrapped, model.bank, slice(rank, rank + 1))
    save_file(result, Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_processes_train_as_one_with_the_whole_batch(checkpointed: bool, tmp_path: Path) -> None:
    start = Adapted(checkpointed=False)
    before = start.bank.generators["default"].detach().clone()
    whole = train(start, start.bank, slice(0, 2))
    spawn(worker, (str(tmp_path), checkpointed), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name in ("gradient", "generators"):
        assert torch.equal(first[name], second[name])
        assert relative(first[name], whole[name]) < 1e-4
    assert relative(whole["generators"], before) > 1e-3
