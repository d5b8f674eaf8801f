"""One stage of pretraining: what it trains, with which optimizers, and a snapshot from which it goes on."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oft_diffusion.errors import TrainingError

EMA_DECAY = 0.999
WARM_UP = 100  # steps
DECAY = 0.3  # the last part of the steps, over which the learning rate falls to zero


class Stage:
    """Named modules, their moving average, the optimizers and the step; saved as one safetensors file.

    Matrices and convolution kernels of hidden layers learn by Muon, everything else by AdamW, at one learning rate:
    Muon's updates are scaled to the size of AdamW's. The rate is warmed up, constant, and falls linearly in the last
    `DECAY` of the steps, so that a run can be prolonged before that without having been told from the start.
    """

    def __init__(self, path: Path, modules: nn.ModuleDict, lr: float, steps: int, run: Mapping[str, Any]) -> None:
        self.path, self.modules, self.lr, self.steps, self.step, self.seconds = path, modules, lr, steps, 0, 0.0
        self.run_settings = json.dumps({"learning rate": lr, **run}, sort_keys=True)
        self.parameters = dict(modules.named_parameters())
        # Muon takes matrices; a kernel (out, in, h, w) is one of shape (out, in h w), in the same memory.
        self.matrices = {
            name: nn.Parameter(p.detach().view(len(p), -1))
            for name, p in self.parameters.items()
            if _is_matrix(name, p)
        }
        others = [p for name, p in self.parameters.items() if name not in self.matrices]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                self.matrices.values(), lr=lr, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
        )
        self.ema = {name: value.detach().clone() for name, value in self.parameters.items()}
        if path.exists():
            self._load()
        elif not steps:
            raise TrainingError(
                f"the stage {path.stem} has no snapshot {path}",
                expected="a stage that is trained now, or was trained before",
                fix=f"name {path.stem} in --stages",
            )

    # The snapshot

    def _learnt(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        for name, parameter in self.parameters.items():
            muon, adam = self.optimizers
            yield (name, self.matrices[name], muon) if name in self.matrices else (name, parameter, adam)

    def save(self) -> None:
        """Writes the snapshot; a crash while writing leaves the previous one."""
        tensors: dict[str, Tensor] = {}
        for name, parameter, optimizer in self._learnt():
            tensors[f"model/{name}"] = self.parameters[name].detach()
            tensors[f"ema/{name}"] = self.ema[name]
            tensors |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items() if key != "step"}
        write_tensors(
            self.path,
            tensors,
            {
                "step": str(self.step),
                "steps": str(self.steps or self.step),
                "seconds": f"{self.seconds:.0f}",
                "run": self.run_settings,
            },
        )

    def _load(self) -> None:
        tensors = load_file(self.path)
        with safe_open(self.path, "pt") as file:
            noted = file.metadata()
        if noted.get("run") != self.run_settings:
            raise TrainingError(
                f"the snapshot {self.path} is of another run",
                expected=f"one of {self.run_settings}; it is of {noted.get('run')}",
                fix="pass the options that it was made with, or another --out",
            )
        self.step, planned, self.seconds = int(noted["step"]), int(noted["steps"]), float(noted["seconds"])
        if self.steps not in (0, planned) and self.step > (1 - DECAY) * planned:
            raise TrainingError(
                f"the snapshot {self.path} is at step {self.step} of {planned}, where the learning rate falls already",
                expected=f"{planned} steps, or a change of them before that",
                fix="leave the number of steps as it was",
            )
        for name, parameter, optimizer in self._learnt():
            with torch.no_grad():
                self.parameters[name].copy_(tensors[f"model/{name}"])
                self.ema[name].copy_(tensors[f"ema/{name}"])
            keys = ("momentum_buffer",) if name in self.matrices else ("exp_avg", "exp_avg_sq")
            state = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in keys}
            optimizer.state[parameter] = (
                state if name in self.matrices else state | {"step": torch.tensor(float(self.step))}
            )

    # Training

    def update(self, loss: Tensor) -> None:
        """One step of both optimizers, and one of the moving average."""
        rate = self.lr * min(1.0, (self.step + 1) / WARM_UP, (self.steps - self.step) / (DECAY * self.steps))
        for parameter in self.parameters.values():
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for name, matrix in self.matrices.items():
            gradient = self.parameters[name].grad
            matrix.grad = None if gradient is None else gradient.view(len(matrix), -1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay)
        self.step += 1

    def digest(self) -> str:
        """Of the moving average, which is what later stages build on."""
        return digest(self.ema)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the modules hold the moving average, and nothing is recorded for gradients."""
        own = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.put(self.ema)
        try:
            with torch.no_grad():
                yield
        finally:
            self.put(own)

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Sets all parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def run(self, name: str, loss_at: Callable[[int], Tensor], every: int, snapshot: Callable[[], None]) -> None:
        """Trains up to `steps`, with a progress line, and a snapshot every so many steps and at the end."""
        began, first, recent, earlier = time.monotonic(), self.step, 0.0, self.seconds
        while self.step < self.steps:
            loss = loss_at(self.step)
            self.update(loss)
            recent = loss.item() if self.step == first + 1 else 0.98 * recent + 0.02 * loss.item()
            self.seconds = earlier + time.monotonic() - began
            rate = (self.step - first) / (time.monotonic() - began)
            if self.step % 50 == 0 or self.step == self.steps:
                left = (self.steps - self.step) / rate / 60
                print(
                    f"{name} {self.step}/{self.steps}  loss {recent:.4f}  {rate:.2f} steps/s  {left:.0f} min left",
                    flush=True,
                )
            if self.step % every == 0 or self.step == self.steps:
                self.save()
                snapshot()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, metadata)
    partial.replace(path)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and bytes, the first 16 digits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes it: not vectors, embeddings, and the narrow layers that read or write pictures."""
    return parameter.ndim >= 2 and "embedding" not in name and min(len(parameter), parameter[0].numel()) >= 16


def generator(*parts: object) -> torch.Generator:
    """A generator of its own for each step, so that nothing but the step number needs saving."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, parts))).getrandbits(62))
