"""One stage of pretraining the pocket base: what it trains, and a snapshot from which it goes on."""

from __future__ import annotations

import json
import math
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


class Stage:
    """What a stage trains: named modules, their moving average, Adam, and the step; saved as one safetensors file."""

    def __init__(self, path: Path, modules: nn.ModuleDict, lr: float, steps: int, run: Mapping[str, Any]) -> None:
        self.path, self.modules, self.lr, self.steps, self.step = path, modules, lr, steps, 0
        self.run_settings = json.dumps({"learning rate": lr, "steps": steps, **run}, sort_keys=True)
        self.parameters = dict(modules.named_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.ema = {name: value.detach().clone() for name, value in self.parameters.items()}
        if path.exists():
            self._load()

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
        self.step = int(noted["step"])
        state: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for i, (name, parameter) in enumerate(self.parameters.items()):
                parameter.copy_(tensors[f"model/{name}"])
                self.ema[name].copy_(tensors[f"ema/{name}"])
                state[i] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"exp_avg/{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
                }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def save(self) -> None:
        """Writes the snapshot; a crash while writing leaves the previous one."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors[f"model/{name}"] = parameter.detach()
            tensors[f"ema/{name}"] = self.ema[name]
            tensors[f"exp_avg/{name}"] = state["exp_avg"]
            tensors[f"exp_avg_sq/{name}"] = state["exp_avg_sq"]
        partial = self.path.with_suffix(".partial")
        save_file(
            {k: v.contiguous().cpu() for k, v in tensors.items()},
            partial,
            {"step": str(self.step), "run": self.run_settings},
        )
        partial.replace(self.path)

    def update(self, loss: Tensor) -> None:
        """One Adam step (linear warm-up, then cosine) and one step of the moving average."""
        warm = min(1.0, (self.step + 1) / 100)
        rate = self.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / self.steps))))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay)
        self.step += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the modules hold the moving average."""
        own = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._put(self.ema)
        try:
            with torch.no_grad():
                yield
        finally:
            self._put(own)

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def run(self, name: str, loss_at: Callable[[int], Tensor], every: int, snapshot: Callable[[], None]) -> None:
        """Trains up to `steps`, with a progress line, and a snapshot every so many steps and at the end."""
        began, first, recent = time.monotonic(), self.step, 0.0
        while self.step < self.steps:
            loss = loss_at(self.step)
            self.update(loss)
            recent = loss.item() if self.step == first + 1 else 0.98 * recent + 0.02 * loss.item()
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


def generator(*parts: object) -> torch.Generator:
    """A generator of its own for each step, so that nothing but the step number needs saving."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, parts))).getrandbits(62))
