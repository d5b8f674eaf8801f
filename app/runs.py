"""Training runs: started, stopped, paused and gone on with, and the adapter that comes of them onto the shelf."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import ConfigError
from oft_diffusion.training import TrainConfig, TrainResult, TrainStep, estimate, train
from oft_diffusion.training.checkpoint import list_checkpoints
from oft_diffusion.training.class_images import class_record
from oft_diffusion.training.find import download_base, find_base, is_hub_id

from .machine import Cancelled, Job
from .photos import Photos
from .presets import Preset
from .shelf import LONGEST_WORD, Card, Shelf, checked_name
from .workspace import Workspace, new_id

CONFIG, STATE, PHOTOS = "config.toml", "state.json", "photos"
_HERE = Path(__file__).parent
PRESETS = next(p for p in (_HERE / "presets", _HERE.parent / "train_scripts" / "configs") if p.is_dir())  # of a wheel
Asked = Literal["save", "sample"]
_TELL_EVERY = 2.0  # seconds: a page on the same processor takes the training's time
_CHECKPOINTS = 5  # of a run, evenly: to go on from, and to compare
LIMITS = {  # of what a person may fill in
    "steps": (1, 20_000), "learning_rate": (1e-7, 1.0), "block_size": (2, 128), "batch_size": (1, 16),
    "num_class_images": (1, 1000), "validation_count": (1, 16), "sampling_steps": (1, 150),
}  # fmt: skip
MOST_PROMPTS, LONGEST_PROMPT = 12, 500


@dataclass(frozen=True)
class Wish:
    """What a person fills in.

    Attributes:
        name: of the adapter to be.
        trigger, class_word: what names the subject.
        settings: knobs of `TrainConfig` that differ from the preset's.
        preset: name of one of `Runs.presets`; the first of them where it is empty.
    """

    name: str
    trigger: str
    class_word: str
    settings: dict[str, Any]
    preset: str = ""


@dataclass(frozen=True)
class Earlier:
    """A run of before.

    Attributes:
        id: of its folder.
        name: of the adapter to be.
        owner: who began it, as `Workspace.person` has it.
        step, steps: done, and of how many.
        done: whether its adapter is on the shelf, or it will never have one; if not, it can be gone on with.
        checkpoints: step to folder, in order; none where it was ended before its first.
    """

    id: str
    name: str
    owner: str
    step: int
    steps: int
    done: bool
    checkpoints: Mapping[int, Path]


class Runs:
    """Training in a workspace, on a model.

    Args:
        workspace, shelf: where runs and their adapters are kept.
        model: what is trained on.
        moved_model: its name on another machine.
        presets: settings that fit it, by name, the best first.
        knobs: what all of them are changed in.
        cover: gives a new adapter its cover, in a job's turn: its card then, and sentences about what went wrong.
    """

    def __init__(
        self, workspace: Workspace, shelf: Shelf, model: str, moved_model: str, presets: Mapping[str, Preset],
        knobs: Mapping[str, Any], cover: Callable[[Card, Job], tuple[Card, list[str]]],
    ) -> None:  # fmt: skip
        self.workspace, self.shelf, self.model, self.moved_model = workspace, shelf, model, moved_model
        self.presets, self.knobs, self.cover = presets, knobs, cover
        self._control: dict[str, Control] = {}

    def config(self, wish: Wish, folder: Path) -> TrainConfig:
        """The whole configuration of a run in that folder.

        Raises:
            ConfigError: a knob is unknown.
        """
        # What a finished run of the page shows is drawn by the page; samples are for looking on.
        own = {
            "model": self.model,
            "instance_dir": str(folder / PHOTOS),
            "output_dir": str(folder / "run"),
            "evaluation_count": 0,
        }
        words = {"trigger": wish.trigger.strip(), "class_word": wish.class_word.strip()}
        own |= {knob: word for knob, word in words.items() if word}  # else the preset's
        name = wish.preset or next(iter(self.presets))
        if name not in self.presets:
            raise ConfigError("there is no such preset", expected=", ".join(self.presets), fix="choose one of these")
        file, memory = PRESETS / f"{self.presets[name].recipe}.toml", self.presets[name].memory
        config = TrainConfig.from_toml(file, {**own, **self.knobs, **wish.settings, "memory": memory})
        longer = config.steps / TrainConfig.from_toml(file, own).steps
        return replace(
            config,
            warmup_steps=round(config.warmup_steps * longer),  # the preset's, as a share of the run
            decay_steps=round(config.decay_steps * longer),
            checkpoint_every=max(1, config.steps // _CHECKPOINTS),
            keep_checkpoints=_CHECKPOINTS + 1,
        )

    def prepare(self, wish: Wish, photos: Photos) -> str:
        """Make a run's folder, with copies of the pictures; its id.

        Raises:
            ConfigError: something is not filled in, or a knob is unknown.
        """
        self.check(wish, photos)
        run_id = new_id()
        folder = self.workspace.run(run_id)
        config = self.config(wish, folder)
        with ExitStack() as unless_done:
            unless_done.callback(shutil.rmtree, folder, ignore_errors=True)
            photos.copy_to(folder / PHOTOS)
            write_atomically(folder / CONFIG, config.to_toml().encode())
            begun = {
                "name": checked_name(wish.name), "owner": photos.owner, "step": 0, "steps": config.steps,
                "model": self.moved_model,
            }  # fmt: skip
            self._note(run_id, begun | {"done": False})
            unless_done.pop_all()
        return run_id

    def estimate(self, wish: Wish, photos: Photos, job: Job) -> None:
        """Measure how long a run would take and in how much memory: what the job finds is the `Estimate`."""

        def tell(part: str) -> None:
            job.check()
            job.tell(text=f"measuring: {part}")

        with TemporaryDirectory(dir=self.workspace.temporary) as folder:
            photos.copy_to(Path(folder) / PHOTOS)
            found = estimate(self._reusing(self.config(wish, Path(folder))), tell)
        job.check()
        job.tell(found)

    def check(self, wish: Wish, photos: Photos) -> None:
        """Refuse what cannot be trained.

        Raises:
            ConfigError: something is not filled in, or a knob is unknown.
        """
        for what, text in {"a name": wish.name, "a trigger": wish.trigger, "a class word": wish.class_word}.items():
            if not text.strip():
                raise ConfigError(f"{what} is missing", expected="one", fix="fill it in")
        checked_name(wish.name)
        if photos.count() < 2:
            raise ConfigError("fewer than two pictures", expected="3 to 8 of the subject", fix="drop some more")
        check_limits(self.config(wish, self.workspace.temporary))

    def _reusing(self, config: TrainConfig) -> TrainConfig:
        """With the class images of an earlier run, where that made the same."""
        if not config.prior_preservation:
            return config
        model = download_base(config.model) if is_hub_id(config.model) else config.model
        record = class_record(config, find_base(model, config.config_dir))
        folder = self.workspace.class_images(record)
        if folder.is_dir():
            os.utime(folder)  # it is in use
        return replace(config, class_dir=str(folder))

    def work(self, run_id: str, job: Job) -> None:
        """Train, or go on, telling the job of steps and pictures.

        What a job finds: `TrainStep`s and, of what was asked for meanwhile, sentences; then the `Card`.
        """
        folder = self.workspace.run(run_id)
        control = Control(max(_checkpoints(folder), default=0))
        self._control[job.id] = control
        try:
            job.on_cancel = lambda: self.stop(job, pause=True)  # as the server ends
            job.tell(text="preparing")
            config = self._reusing(TrainConfig.from_toml(folder / CONFIG, self._resumed(folder)))
            with train(
                config, progress=False, on_note=lambda note: job.tell(text=note),
                on_item=lambda *item: _prepare(job, control, *item),
            ) as run:  # fmt: skip
                control.stop_run = run.stop
                _end_early(job, control)
                told = 0.0
                untold: list[TrainStep] = []
                for step in run:
                    if control.sample.is_set():
                        control.sample.clear()
                        step = replace(step, pictures=run.sample())
                        job.tell(f"Drew pictures after step {step.step}")
                    if control.save.is_set():
                        control.save.clear()
                        step = replace(step, checkpoint=run.save())
                        job.tell(f"Saved a checkpoint after step {step.step}")
                    if step.checkpoint:
                        self._note(run_id, {"step": step.step})
                    untold.append(self._for_page(run_id, step))
                    if time.monotonic() - told > _TELL_EVERY or step.pictures or step.step == step.steps:
                        told = time.monotonic()
                        _tell(job, untold)
                        untold = []
                if untold:  # it was stopped
                    _tell(job, untold)
            self._finish(run_id, job, run.result, control)
        except BaseException:
            if not control.paused and not list_checkpoints(folder / "run"):
                self._note(run_id, {"done": True})
            raise
        finally:
            self._control.pop(job.id, None)

    def stop(self, job: Job, *, pause: bool) -> bool:
        """End a run after its step: paused, to be gone on with, or with the adapter as it is; whether it takes any."""
        if (control := self._control.get(job.id)) is None:
            return False
        control.paused, control.ended = pause, True
        control.stop_run()
        return True

    def takes_steps(self, job: Job) -> bool:
        """Whether a run prepares for steps or takes them: it can be stopped, and asked for what it does after one."""
        return job.id in self._control

    def ask(self, job: Job, what: Asked) -> bool:
        """Have a run "save" a checkpoint, or "sample" pictures, after its step; whether it is under way."""
        if (control := self._control.get(job.id)) is None:
            return False
        {"save": control.save, "sample": control.sample}[what].set()
        return True

    def earlier(self) -> list[Earlier]:
        """All runs, newest first."""
        found = []
        for folder in sorted(self.workspace.runs.iterdir(), reverse=True):
            try:
                state = self._state(folder.name)
                told = (
                    str(state["name"]),
                    str(state["owner"]),
                    int(state["step"]),
                    int(state["steps"]),
                    bool(state["done"]),
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue
            found.append(Earlier(folder.name, *told, _checkpoints(folder)))
        return found

    def with_checkpoints(self) -> list[Earlier]:
        """Those that have any to compare, newest first."""
        return [run for run in self.earlier() if run.checkpoints]

    def has_checkpoints(self, run_id: str) -> bool:
        """Whether a run has any to compare."""
        return bool(_checkpoints(self.workspace.run(run_id)))

    def model_of(self, run_id: str) -> str:
        """What a run was begun on, as the app's `--model` has it."""
        return str(self._state(run_id).get("model", self.moved_model))  # runs of earlier versions do not tell

    def config_of(self, run_id: str) -> TrainConfig:
        """The configuration that a run was begun with."""
        return TrainConfig.from_toml(self.workspace.run(run_id) / CONFIG)

    def _finish(self, run_id: str, job: Job, result: TrainResult, control: Control) -> None:
        self._note(run_id, {"step": result.steps})
        if control.paused:
            job.tell(text=f"paused at step {result.steps}")
            return
        del self._control[job.id]  # what is left cannot be paused
        card = self.shelf.add(result.adapter, self._state(run_id)["name"])
        self._note(run_id, {"done": True})
        card, notes = self.cover(card, job)
        job.tell(*notes, card, text=f"the adapter {card.name} is on the shelf")

    def _for_page(self, run_id: str, step: TrainStep) -> TrainStep:
        """With its grid where the page may show it from: in a run's folder lie its pictures, too."""
        if step.pictures is None:
            return step
        shown = self.workspace.grids(self._state(run_id)["owner"]) / f"{run_id}-{step.pictures.name}"
        return replace(step, pictures=Path(shutil.copy(step.pictures, shown)))

    def _resumed(self, folder: Path) -> dict[str, Any]:
        return {"resume": "latest"} if list_checkpoints(folder / "run") else {"overwrite": True}

    def _state(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.workspace.run(run_id) / STATE).read_text(encoding="utf-8"))
        return found

    def _note(self, run_id: str, changes: dict[str, Any]) -> None:
        try:
            state = self._state(run_id)
        except (OSError, ValueError):
            state = {}
        write_atomically(self.workspace.run(run_id) / STATE, json.dumps(state | changes).encode())


class Control:
    """What can be asked of a run from outside.

    Attributes:
        begun: step of the checkpoint that it goes on from.
    """

    def __init__(self, begun: int) -> None:
        self.begun = begun
        self.paused = self.ended = False
        self.save, self.sample = threading.Event(), threading.Event()
        self.stop_run: Any = lambda: None


def check_limits(config: TrainConfig) -> None:
    """Refuse what would keep the machine, or fill its disk, for far longer than an adapter takes.

    Raises:
        ConfigError: with the limit.
    """
    for knob, (least, most) in LIMITS.items():
        value = getattr(config, knob)
        if value != "auto" and not least <= value <= most:
            raise ConfigError(f"{knob} = {value:g}", expected=f"{least:g} to {most:g}", fix="change it")
    if len(config.validation_prompts) > MOST_PROMPTS:
        raise ConfigError(
            f"{len(config.validation_prompts)} prompts", expected=f"at most {MOST_PROMPTS}", fix="leave some out"
        )
    lengths = {LONGEST_PROMPT: config.validation_prompts, LONGEST_WORD: (config.trigger, config.class_word)}
    for longest, texts in lengths.items():
        if any(len(text) > longest for text in texts):
            raise ConfigError("a text too long", expected=f"at most {longest} letters", fix="shorten it")


def _checkpoints(folder: Path) -> dict[int, Path]:
    return {int(path.name.rpartition("-")[2]): path for path in list_checkpoints(folder / "run")}


def _prepare(job: Job, control: Control, what: str, done: int, total: int) -> None:
    _end_early(job, control)
    job.tell(text=f"preparing {what}, {done} of {total}", done=done, total=total)


def _end_early(job: Job, control: Control) -> None:
    if not control.ended:
        return
    how, begun = "paused" if control.paused else "stopped", control.begun
    kept = f" at step {begun}, before it went on: it can still be gone on with" if begun else " before the first step"
    job.tell(text=f"{how}{kept}")
    raise Cancelled


def _tell(job: Job, steps: Sequence[TrainStep]) -> None:
    step = steps[-1]
    job.tell(
        *steps,
        text=f"step {step.step} of {step.steps}",
        done=step.step,
        total=step.steps,
        seconds_left=step.seconds_left,
    )
