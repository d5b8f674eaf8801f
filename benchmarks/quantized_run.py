"""One run of `benchmarks.quantized_training`: the pocket base, quantized or not, learns a subject by one method."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.pocket_subjects import CONFIG
from benchmarks.quantized_learner import Learner, changed_weights, learn, validated
from oft_diffusion.disk import write_atomically
from oft_diffusion.evaluation import Row, looks_of
from oft_diffusion.evaluation.looks import instance_images
from oft_diffusion.evaluation.measure import draw_rows, prompt_sets
from oft_diffusion.pocket import SUBJECTS, pocket_path, subjects_path
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.training import TrainConfig
from oft_diffusion.training.batches import Batches
from oft_diffusion.training.class_images import make_class_images
from oft_diffusion.training.families import Family
from oft_diffusion.training.preflight import Plan, preflight
from oft_diffusion.training.prepare import load_family, pictures_of

NONE = "none"  # the base as it is
DRAWN = ("subject", "recoloured", "other")  # what the figures here are read from
LAST = 50  # steps over which the training loss is averaged


@dataclass(frozen=True)
class Task:
    """One run, and what tells it from others.

    Attributes:
        purpose: "search" for a method's learning rate, "final" for the comparison.
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


class Bench:
    """Runs, one after another, and what several of them need, which is made once and kept in a folder.

    Args:
        settings: that differ from pocket.toml.
        pictures: per set.
        folder: for class images and what was read of the bases' own pictures.
        busy: whether other work runs meanwhile.
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
        validation: int,
    ) -> None:
        self.settings, self.pictures, self.folder = settings, pictures, folder
        self.device, self.busy = torch.device(device), busy
        self.validation = validation

    @cached_property
    def _versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("peft", "bitsandbytes")}

    def make_class_images(self, task: Task) -> None:
        """Of a subject and a seed, by the base as it is: the same ones for all methods and quantizations."""
        config = config_of(replace(task, quantization=NONE), self.settings, self.folder)
        plan = preflight(config)
        if plan.class_images is not None and plan.class_images.missing:
            make_class_images(plan.class_images, load_family(config, plan.base, self.device), lambda found, _: found)

    def draw_base(self, task: Task) -> list[Row]:
        """What a base without adapter draws, read; from the folder, if it is there."""
        path = self.folder / "base" / f"{task.quantization}-{task.subject}-{task.seed}.json"
        if path.exists():
            return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
        config = config_of(task, self.settings, self.folder)
        rows = self._draw(task, config, load_family(config, preflight(config).base, self.device), on=False)
        write_atomically(path, json.dumps([row.to_json() for row in rows]).encode())
        return rows

    def run(self, task: Task) -> dict[str, str]:
        """A row of figures."""
        gc.collect()
        config, plan, learner = self.prepare(task)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seen, seconds = learn(learner, config, plan, config.steps)
        peak = str(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else ""
        shown = self._shown(learner, config, seen)
        base = self.draw_base(task)
        shares = shares_of([*base, *self._draw(task, config, learner.family, on=True)])
        if task.purpose == "final" and task.quantization == NONE:
            save_file(changed_weights(learner), self.weights_file(task.method, task.subject, task.seed))
        return self._row(task, config, learner, shown | shares, {"seconds": f"{seconds:.6g}", "peak_bytes": peak})

    def prepare(self, task: Task) -> tuple[TrainConfig, Plan, Learner]:
        """All that comes before the first step."""
        self.make_class_images(task)
        config = config_of(task, self.settings, self.folder)
        plan = preflight(config)
        family = load_family(config, plan.base, self.device)
        batches = Batches(config, family, pictures_of(config, plan), self.device)
        batches.fill_caches(lambda found, _: found)
        if config.cache_latents:
            family.vae.to("cpu")
        if self.device.type == "cpu" and config.mixed_precision == "bf16":
            family.quicken_backward(config.resolution)
        return config, plan, Learner(config, plan, family, batches, task.method)

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
