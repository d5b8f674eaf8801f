"""One run of `benchmarks.quantized_training`: the pocket base, quantized or not, learns a subject by one method.

Loop, noise, batches, losses, optimizer and schedule are those of `oft_diffusion.training`; only the adapter differs.
Two things are left out of the loop, the same for all methods: nothing is read from the card amid it, so a step whose
loss is not finite is not skipped, and shows in the figures; and there is neither checkpoint nor report.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.methods import METHODS, Adapted
from benchmarks.pocket_subjects import CONFIG
from oft_diffusion import OFTConfig
from oft_diffusion.disk import write_atomically
from oft_diffusion.evaluation import Row, looks_of
from oft_diffusion.evaluation.looks import instance_images
from oft_diffusion.evaluation.measure import draw_rows, prompt_sets
from oft_diffusion.hooks import bank_of
from oft_diffusion.merge import live_weights
from oft_diffusion.pocket import SUBJECTS, pocket_path, subjects_path
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.targets import choose_block_size, find_targets
from oft_diffusion.text_encoders import last_hidden_state
from oft_diffusion.training import TrainConfig
from oft_diffusion.training.batches import Batch, Batches
from oft_diffusion.training.class_images import make_class_images
from oft_diffusion.training.families import Family
from oft_diffusion.training.losses import losses
from oft_diffusion.training.model import AdaptedModel
from oft_diffusion.training.precision import DTYPES
from oft_diffusion.training.preflight import Plan, preflight
from oft_diffusion.training.prepare import (
    Parts,
    load_family,
    make_noise,
    make_optimizer,
    make_schedule,
    pictures_of,
)
from oft_diffusion.training.skeleton import adapted

NONE = "none"  # the base as it is
DRAWN = ("subject", "recoloured", "other")  # what the figures here are read from
LAST = 50  # steps over which the training loss is averaged
SETTLED = 0.1  # the share of steps, at the beginning, that no time is taken from


@dataclass(frozen=True)
class Task:
    """One run, and what tells it from others.

    Attributes:
        purpose: "search" for a method's learning rate, "final" for the comparison, "times" for nothing but times.
        quantization: of denoiser and text encoder, `NONE` for none.
        rate: of the denoiser; the text encoder's has the same proportion to it as in the configuration.
        epsilon: AdamW's.
    """

    purpose: str
    quantization: str
    method: str
    subject: str
    seed: int
    rate: float
    epsilon: float

    def columns(self) -> dict[str, str]:
        """As a row has them; a run with the same ones is the same run."""
        own = {name: str(getattr(self, name)) for name in ("purpose", "quantization", "method", "subject", "seed")}
        return own | {"learning_rate": f"{self.rate:.6g}", "epsilon": f"{self.epsilon:.6g}"}


def config_of(task: Task, settings: Mapping[str, Any], folder: Path) -> TrainConfig:
    """Those of pocket.toml, for one run. Class images lie in `folder`, by subject and seed, and are of all methods."""
    quantization = None if task.quantization == NONE else task.quantization
    own = {
        "model": str(pocket_path()),
        "instance_dir": str(subjects_path(task.subject)),
        "class_word": SUBJECTS[task.subject].object,
        "class_dir": str(folder / "class-images" / f"{task.subject}-{task.seed}"),
        "output_dir": str(folder / "unused"),
        "validation_prompts": [],
        "evaluation_count": 0,
        "seed": task.seed,
        "quantization": quantization,
        "text_encoder_quantization": quantization,
    }
    usual = TrainConfig.from_toml(CONFIG, {**own, **settings})
    text_rate = usual.text_encoder_learning_rate
    return replace(
        usual,
        learning_rate=task.rate,
        text_encoder_learning_rate=text_rate and text_rate * task.rate / usual.learning_rate,
        adam_epsilon=task.epsilon,
    )


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
    parts = {name: nn.ParameterList(found.trained) for name, found in learner.adapted.items()}
    optimizer = make_optimizer(config, plan.base, parts)
    schedule, clock, trained = make_schedule(config, optimizer), _Clock(learner.family.device), learner.trained
    weights = torch.tensor([1.0, config.prior_weight], device=learner.family.device)
    found = []
    for step in range(steps):
        clock.tick()
        both = learner.losses(learner.batches.at(step))
        both.dot(weights).backward()
        nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        for bank in learner.banks:
            bank.project_()
        schedule.step()
        found.append(both.detach())
    clock.tick()
    return torch.stack(found).cpu(), clock.median()


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


class Bench:
    """Runs, one after another, and what several of them need, which is made once and kept in a folder.

    Args:
        settings: that differ from pocket.toml.
        pictures: per set.
        folder: for class images and what was read of the bases' own pictures.
        busy: whether other work runs meanwhile.
        timed: steps of a run for times.
        validation: batches for the validation loss.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        pictures: int,
        folder: Path,
        device: str,
        *,
        busy: bool,
        timed: int,
        validation: int,
    ) -> None:
        self.settings, self.pictures, self.folder = settings, pictures, folder
        self.device, self.busy = torch.device(device), busy
        self.timed, self.validation = timed, validation

    @cached_property
    def _versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("peft", "bitsandbytes")}

    def make_class_images(self, task: Task) -> None:
        """Of a subject and a seed, by the base as it is: the same ones for all methods and quantizations."""
        config = config_of(replace(task, quantization=NONE), self.settings, self.folder)
        plan = preflight(config)
        if plan.class_images is not None and plan.class_images.missing:
            make_class_images(plan.class_images, load_family(config, plan.base, self.device), lambda found, _: found)

    def draw_base(self, task: Task, family: Family | None = None) -> list[Row]:
        """What a base without adapter draws, read; from the folder, if it is there."""
        path = self.folder / "base" / f"{task.quantization}-{task.subject}-{task.seed}.json"
        if path.exists():
            return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
        config = config_of(task, self.settings, self.folder)
        rows = self._draw(task, config, family or load_family(config, preflight(config).base, self.device), on=False)
        write_atomically(path, json.dumps([row.to_json() for row in rows]).encode())
        return rows

    def run(self, task: Task) -> dict[str, str]:
        """A row of figures."""
        gc.collect()
        self.make_class_images(task)
        config = config_of(task, self.settings, self.folder)
        plan = preflight(config)
        family = load_family(config, plan.base, self.device)
        batches = Batches(config, family, pictures_of(config, plan), self.device)
        batches.fill_caches(lambda found, _: found)
        timed = task.purpose == "times"
        base = [] if timed else self.draw_base(task, family)
        if config.cache_latents:
            family.vae.to("cpu")
        if self.device.type == "cpu" and config.mixed_precision == "bf16":
            family.quicken_backward(config.resolution)
        learner = Learner(config, plan, family, batches, task.method)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seen, seconds = learn(learner, config, plan, min(self.timed, config.steps) if timed else config.steps)
        peak = str(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else ""
        shown = {} if timed else self._shown(learner, config, seen)
        shares = {} if timed else shares_of([*base, *self._draw(task, config, family, on=True)])
        if task.purpose == "final" and task.quantization == NONE:
            save_file(changed_weights(learner), self.weights_file(task.method, task.subject, task.seed))
        return self._row(task, config, learner, shown | shares, {"seconds": f"{seconds:.6g}", "peak_bytes": peak})

    def weights_file(self, method: str, subject: str, seed: int) -> Path:
        """What a run of the comparison made of the unquantized base's weights, for `benchmarks.quantized_merge`."""
        path = self.folder / "weights" / f"{method}-{subject}-{seed}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _draw(self, task: Task, config: TrainConfig, family: Family, *, on: bool) -> list[Row]:
        classifier, group = load_classifier(self.device), f"{task.subject}/{task.seed}"
        looks = looks_of(classifier, instance_images(subjects_path(task.subject)))
        sets = prompt_sets(looks, config.trigger, self.pictures, salt=group)
        how: Any = {"group": group, "steps": config.sampling_steps, "guidance": config.guidance_scale}
        with family.pipeline() as pipe:
            return draw_rows(pipe, classifier, looks, {name: sets[name] for name in DRAWN}, adapted=on, **how)

    def _shown(self, learner: Learner, config: TrainConfig, seen: Tensor) -> dict[str, float]:
        """Losses, each with class images and without."""
        weights = torch.tensor([1.0, config.prior_weight])
        last = seen[-LAST:].mean(dim=0)
        held = torch.tensor(validated(learner, config, self.validation))
        return {
            "first_loss": float(seen[0].dot(weights)),
            "loss": float(last.dot(weights)),
            "instance_loss": float(last[0]),
            "validation_loss": float(held.dot(weights)),
            "validation_instance_loss": float(held[0]),
        }

    def _row(
        self, task: Task, config: TrainConfig, learner: Learner, found: Mapping[str, float], cost: Mapping[str, str]
    ) -> dict[str, str]:
        return {
            **self._versions,
            **task.columns(),
            "text_encoder_learning_rate": f"{config.text_encoder_learning_rate or 0:.6g}",
            "adapter": learner.began,
            "parameters": str(sum(parameter.numel() for parameter in learner.trained)),
            "dtype": config.mixed_precision,
            "steps": str(config.steps),
            "pictures": str(self.pictures),
            "validation_batches": str(self.validation),
            **{name: f"{found[name]:.6g}" if name in found else "" for name in (*LOSSES, *SHARES)},
            **cost,
            "busy": "yes" if self.busy else "no",
            "failed": "",
        }

    def failed(self, task: Task, reason: str) -> dict[str, str]:
        """The row of a run that came to nothing."""
        told = {"busy": "yes" if self.busy else "no", "failed": reason}
        return dict.fromkeys(COLUMNS, "") | self._versions | task.columns() | told


LOSSES = ("first_loss", "loss", "instance_loss", "validation_loss", "validation_instance_loss")
SHARES = (
    "hit", "fidelity", "fidelity_base", "hit_and_fidelity", "kept", "kept_base", "preservation",
)  # fmt: skip
COLUMNS = (
    "peft", "bitsandbytes", "purpose", "quantization", "method", "subject", "seed", "learning_rate", "epsilon",
    "text_encoder_learning_rate", "adapter", "parameters", "dtype", "steps", "pictures", "validation_batches",
    *LOSSES, *SHARES, "seconds", "peak_bytes", "busy", "failed",
)  # fmt: skip


def shares_of(rows: Sequence[Row]) -> dict[str, float]:
    """The figures of docs/evaluation.md that are of `DRAWN`, as `evaluation.figures` has them, of one run.

    "Kept" is prompt fidelity on prompts without the subject; preservation is that minus the same base's without
    adapter, quantized as it is.
    """

    def of(name: str, *, on: bool) -> list[Row]:
        return [row for row in rows if row.set == name and row.adapted is on]

    recoloured, kept = (
        of("recoloured", on=True),
        [fmean(r.faithful for r in of("other", on=on)) for on in (True, False)],
    )
    return {
        "hit": fmean(row.hit for row in of("subject", on=True)),
        "fidelity": fmean(row.faithful for row in recoloured),
        "fidelity_base": fmean(row.faithful for row in of("recoloured", on=False)),
        "hit_and_fidelity": fmean(row.hit and row.faithful for row in recoloured),
        "kept": kept[0],
        "kept_base": kept[1],
        "preservation": kept[0] - kept[1],
    }
