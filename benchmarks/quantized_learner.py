"""A base with one method's adapters, and the loop that trains them.

Loop, noise, batches, losses, optimizer and schedule are those of `oft_diffusion.training`; only the adapter differs.
Two things are left out of the loop, the same for all methods: nothing is read from the card amid it, so a step whose
loss is not finite is not skipped, and shows in the figures; and there is neither checkpoint nor report.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from statistics import median
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from benchmarks.methods import METHODS, Adapted
from oft_diffusion import OFTConfig
from oft_diffusion.hooks import bank_of
from oft_diffusion.merge import live_weights
from oft_diffusion.targets import choose_block_size, find_targets
from oft_diffusion.text_encoders import last_hidden_state
from oft_diffusion.training import TrainConfig
from oft_diffusion.training.batches import Batch, Batches
from oft_diffusion.training.families import Family
from oft_diffusion.training.losses import losses
from oft_diffusion.training.memory import LiveStorages
from oft_diffusion.training.model import AdaptedModel
from oft_diffusion.training.precision import DTYPES
from oft_diffusion.training.preflight import Plan
from oft_diffusion.training.prepare import Parts, make_noise, make_optimizer, make_schedule
from oft_diffusion.training.skeleton import adapted

SETTLED = 0.1  # the share of steps, at the beginning, that no time is taken from


class Learner:
    """A base with one method's adapters: of a trainer's `Parts` what `losses` asks for.

    Attributes:
        adapted: by component.
        began: how the adapters were set, for the row.
    """

    def __init__(self, config: TrainConfig, plan: Plan, family: Family, batches: Batches, method: str) -> None:
        self.config, self.family, self.batches = config, family, batches
        self.noise = make_noise(config, family)
        torch.manual_seed(config.seed)  # for LoRA's A
        self.adapted: dict[str, Adapted] = {}
        for name, settings in adapted(config, plan.base).items():
            if replace(settings, block_size=32, targets="attention") != OFTConfig():
                raise ValueError(
                    f"{settings} has more than targets and block size, which other methods know nothing of"
                )
            component = family.module(name)
            used = last_hidden_state(plan.base.pipeline, name, config.clip_skip or 0)
            targets = find_targets(component, settings.targets, hidden_state=used)
            size = choose_block_size(targets, settings.block_size)
            self.adapted[name] = METHODS[method].adapt(component, [target.name for target in targets], size)
            component.train()
        self.began = "; ".join(dict.fromkeys(found.settings for found in self.adapted.values()))
        components = [family.module(name) for name in self.adapted]
        self.banks = [bank for component in components if (bank := bank_of(component)) is not None]
        self.layers = [layer for c in components for layer in c.modules() if isinstance(layer, BaseTunerLayer)]
        self._model = AdaptedModel(family, {}, config.resolution)
        self._cast = DTYPES[config.mixed_precision]

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for found in self.adapted.values() for parameter in found.trained]

    def model(self, noisy: Tensor, *rest: Any) -> Tensor:
        """As accelerate has it: below autocast, and float32 in the end."""
        with torch.autocast(noisy.device.type, self._cast, enabled=self._cast != torch.float32):
            answer: Tensor = self._model(noisy, *rest)
        return answer.float()

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The base as it was, by what each library has for it."""
        try:
            self._switch(on=False)
            yield
        finally:
            self._switch(on=True)

    def _switch(self, *, on: bool) -> None:
        for bank in self.banks:
            bank.set_adapters([active.name for active in bank.active], float(on))
        for layer in self.layers:
            layer.enable_adapters(on)

    def losses(self, batch: Batch) -> Tensor:
        """Instance loss and prior loss, `(2,)`."""
        return torch.stack(losses(cast("Parts", self), batch, self.config))


class _Clock:
    """When each step began, without waiting for the card."""

    def __init__(self, device: torch.device) -> None:
        self._on_card = device.type == "cuda"
        self._ticks: list[Any] = []

    def tick(self) -> None:
        if not self._on_card:
            self._ticks.append(time.perf_counter())
            return
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record()
        self._ticks.append(event)

    def median(self) -> float:
        """Seconds of a step."""
        if self._on_card:
            torch.cuda.synchronize()
        pairs = list(zip(self._ticks, self._ticks[1:], strict=False))
        taken = [a.elapsed_time(b) / 1000 if self._on_card else b - a for a, b in pairs]
        return median(taken[int(SETTLED * len(taken)) :])


def learn(learner: Learner, config: TrainConfig, plan: Plan, steps: int) -> tuple[Tensor, float]:
    """Train so many of the steps that the schedule is made for.

    Returns:
        Instance loss and prior loss of every step, `(steps, 2)`; seconds of a step.
    """
    clock, found = _Clock(learner.family.device), []
    training = training_steps(learner, config, plan)
    for _ in range(steps):
        clock.tick()
        found.append(next(training))
    clock.tick()
    return torch.stack(found).cpu(), clock.median()


def training_steps(learner: Learner, config: TrainConfig, plan: Plan) -> Iterator[Tensor]:
    """Train, a step at a time. Yields instance loss and prior loss, `(2,)`."""
    parts = {name: nn.ParameterList(found.trained) for name, found in learner.adapted.items()}
    optimizer = make_optimizer(config, plan.base, parts)
    schedule, trained = make_schedule(config, optimizer), learner.trained
    weights = torch.tensor([1.0, config.prior_weight], device=learner.family.device)
    for step in count():
        both = learner.losses(learner.batches.at(step))
        both.dot(weights).backward()
        nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        for bank in learner.banks:
            bank.project_()
        schedule.step()
        yield both.detach()


def step_bytes(training: Iterator[Tensor], device: torch.device, trained: int) -> int:
    """Bytes of a step, as many as live at once: with gradients and AdamW's moments, without base, adapter and batches.

    Args:
        training: that has not begun.
        device: where. On a card the second step is looked at: libraries take memory for themselves in a first one.
        trained: numbers that are trained.
    """
    if device.type != "cuda":
        with LiveStorages(device.type) as alive:
            next(training)
        return alive.most
    next(training)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - 2 * 4 * trained  # the moments are there
    next(training)
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def validated(learner: Learner, config: TrainConfig, count: int) -> list[float]:
    """Instance loss and prior loss on the batches behind the last one of training: the same pictures, other noise."""
    found = [learner.losses(learner.batches.at(config.steps + i)) for i in range(count)]
    return [float(loss) for loss in torch.stack(found).mean(dim=0)]


@torch.no_grad()
def changed_weights(learner: Learner) -> dict[str, Tensor]:
    """The adapted layers' weights as merging would have them, `(out, in)` by "component.layer"."""
    found: dict[str, Tensor] = {}
    for part in learner.adapted:
        component = learner.family.module(part)
        for live in live_weights(component):
            found[f"{part}.{live.layer}"] = live.rotated(live.weight).contiguous()
        tuned: list[tuple[str, Any]] = [(n, m) for n, m in component.named_modules() if isinstance(m, BaseTunerLayer)]
        for name, layer in tuned:
            layer.merge()
            found[f"{part}.{name}"] = layer.get_base_layer().weight.detach().clone()
            layer.unmerge()
    return found
