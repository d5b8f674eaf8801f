"""DistributedDataParallel over two gloo processes: the gradients of the whole batch, and replicas that stay equal."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from oft_diffusion import OFTConfig, inject_oft, save_oft_weights
from oft_diffusion.training import TrainConfig, prepare
from oft_diffusion.training import train as start_run
from oft_diffusion.training.model import AdaptedModel
from tests.core.reference import relative, unet_inputs
from tests.helpers.tiny_sd import RESOLUTION, draw_pictures, tiny_pipeline
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


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for checkpointed in (False, True):
        model = Adapted(checkpointed)
        if rank == 1:
            excite(model.bank, seed=99)  # DistributedDataParallel must bring rank 0's generators here
        result = train(DistributedDataParallel(model), model.bank, slice(rank, rank + 1))
        save_file(result, Path(folder) / f"{rank}-{checkpointed}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    start = Adapted(checkpointed=False)
    before = start.bank.generators["default"].detach().clone()
    whole = train(start, start.bank, slice(0, 2))
    spawn(worker, (str(tmp_path),), nprocs=2)
    for checkpointed in (False, True):
        first, second = (load_file(tmp_path / f"{rank}-{checkpointed}.safetensors") for rank in range(2))
        for name in ("gradient", "generators"):
            assert torch.equal(first[name], second[name])
            assert relative(first[name], whole[name]) < 1e-4
    assert relative(whole["generators"], before) > 1e-3


def loop(knobs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The package's own loop: loss and gradient norm of every step, the clipped mean of gradients, and generators."""
    with start_run(TrainConfig.from_dict(knobs), progress=False) as run:
        assert run.parts is not None
        assert isinstance(getattr(run.parts.model, "module", run.parts.model), AdaptedModel)
        if isinstance(run.parts.model, DistributedDataParallel):  # which leaves alone what is frozen
            left = {name.partition(".")[0] for name in run.parts.model.parameters_to_ignore}
            sent = [name for name, _ in run.parts.model.module.named_parameters()]
            assert left == {"components"}
            assert {name for name in sent if name not in run.parts.model.parameters_to_ignore} == {
                name for name in sent if name.startswith("banks.")
            }
        steps = list(run)
        result = {"losses": torch.tensor([s.loss for s in steps]), "norms": torch.tensor([s.grad_norm for s in steps])}
        for name, bank in run.parts.banks.items():
            result[f"{name}.generators"] = bank.generators["default"].detach().clone()
            result[f"{name}.gradients"] = run.parts.adamw.state[bank.generators["default"]]["exp_avg"].clone()
    return result


def loop_worker(rank: int, folder: str, knobs: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(knobs.pop("port")), "WORLD_SIZE": "2"}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    prepare.streams = lambda config, device: bool(config.layer_offload)  # on a processor, too
    save_file(loop(knobs | {"batch_size": 1, "layer_offload": 0.5}), Path(folder) / f"loop-{rank}.safetensors")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_the_training_loop_in_two_processes_equals_one_with_twice_the_batch(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path / "model")
    excited = {}
    for name in ("unet", "text_encoder"):
        bank = inject_oft(getattr(pipe, name), OFTConfig(block_size=8))
        excite(bank)
        excited[name] = bank.generators["default"].detach().clone()
    adapter = save_oft_weights(pipe, tmp_path / "start.safetensors", "default")
    knobs = {
        "model": str(tmp_path / "model"), "instance_dir": str(draw_pictures(tmp_path / "pictures")), "trigger": "sks",
        "class_word": "mug", "resolution": RESOLUTION, "block_size": 8, "steps": 2, "accumulation": 2,
        "learning_rate": 1e-3, "text_encoder": True, "cache_text_embeddings": False, "init_adapter": str(adapter),
        "gradient_checkpointing": True, "checkpoint_every": 0, "validation_prompts": (),
    }  # fmt: skip
    whole = loop(knobs | {"batch_size": 2, "output_dir": str(tmp_path / "one")})
    shared = knobs | {"output_dir": str(tmp_path / "two"), "port": free_port()}
    spawn(loop_worker, (str(tmp_path), shared), nprocs=2)
    first, second = (load_file(tmp_path / f"loop-{rank}.safetensors") for rank in range(2))
    for name in whole:
        assert torch.equal(first[name], second[name]), name
        assert relative(first[name], whole[name]) < 1e-3, name
    for name, start in excited.items():
        assert relative(whole[f"{name}.generators"], start) > 1e-3
