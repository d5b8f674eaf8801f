"""Training runs: started, stopped, paused and gone on with, and the adapter that comes of them onto the shelf."""

from __future__ import annotations

import json
import shlex
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oft_diffusion.disk import write_atomically
from oft_diffusion.errors import ConfigError, OFTError
from oft_diffusion.training import TrainConfig, TrainResult, TrainStep, train

from .machine import Job
from .photos import Photos
from .shelf import Card, Shelf
from .workspace import Workspace, new_id

CONFIG, STATE = "config.toml", "state.json"
_HERE = Path(__file__).parent
PRESETS = next(p for p in (_HERE / "presets", _HERE.parent / "train_scripts" / "configs") if p.is_dir())  # of a wheel
_TELL_EVERY = 0.3  # seconds between steps that are told one by one


@dataclass(frozen=True)
class Wish:
    """What a person fills in.

    Attributes:
        name: of the adapter to be.
        trigger, class_word: what names the subject.
        settings: knobs of `TrainConfig` that differ from the preset's.
    """

    name: str
    trigger: str
    class_word: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Earlier:
    """A run that can be gone on with.

    Attributes:
        id: of its folder.
        name: of the adapter to be.
        step, steps: done, and of how many.
    """

    id: str
    name: str
    step: int
    steps: int


class Runs:
    """Training in a workspace, on a model."""

    def __init__(self, workspace: Workspace, shelf: Shelf, model: str, preset: str) -> None:
        self.workspace, self.shelf, self.model = workspace, shelf, model
        self.preset = PRESETS / f"{preset}.toml"
        self._control: dict[str, Control] = {}

    def config(self, wish: Wish, folder: Path) -> TrainConfig:
        """The whole configuration of a run in that folder.

        Raises:
            ConfigError: a knob is unknown.
        """
        # What a finished run of the page shows is drawn by the page; samples are for looking on.
        own = {
            "model": self.model,
            "instance_dir": str(folder / "photos"),
            "output_dir": str(folder / "run"),
            "trigger": wish.trigger.strip(),
            "class_word": wish.class_word.strip(),
            "evaluation_count": 0,
            "checkpoint_every": 100,
        }
        return TrainConfig.from_toml(self.preset, own | wish.settings)

    def prepare(self, wish: Wish, photos: Photos) -> str:
        """Make a run's folder, with copies of the pictures; its id.

        Raises:
            ConfigError: something is not filled in, or a knob is unknown.
        """
        for what, text in {"a name": wish.name, "a trigger": wish.trigger, "a class word": wish.class_word}.items():
            if not text.strip():
                raise ConfigError(f"{what} is missing", expected="one", fix="fill it in")
        run_id = new_id()
        folder = self.workspace.run(run_id)
        if photos.copy_to(folder / "photos") < 2:
            raise ConfigError("fewer than two pictures", expected="3 to 8 of the subject", fix="drop some more")
        config = self.config(wish, folder)
        write_atomically(folder / CONFIG, config.to_toml().encode())
        self._note(run_id, {"name": wish.name.strip(), "step": 0, "steps": config.steps, "done": False})
        return run_id

    def work(self, run_id: str, job: Job) -> None:
        """Train, or go on, telling the job of steps and pictures. What a job finds: `TrainStep`s, then the `Card`."""
        folder, control = self.workspace.run(run_id), Control()
        config = TrainConfig.from_toml(folder / CONFIG, self._resumed(folder))
        self._control[job.id] = control
        try:
            with train(config, progress=False, on_note=lambda note: job.tell(text=note)) as run:
                control.stop_run = run.stop
                job.on_cancel = run.stop
                told = 0.0
                for step in run:
                    self._note(run_id, {"step": step.step}) if step.checkpoint else None
                    if control.sample.is_set():
                        control.sample.clear()
                        run.sample()
                    if control.save.is_set():
                        control.save.clear()
                        run.save()
                    if time.monotonic() - told > _TELL_EVERY or step.pictures or step.step == step.steps:
                        told = time.monotonic()
                        _tell(job, step)
            self._finish(run_id, job, run.result, control)
        finally:
            del self._control[job.id]

    def stop(self, job: Job, *, pause: bool) -> None:
        """End a run after its step: paused, to be gone on with, or with the adapter as it is."""
        if (control := self._control.get(job.id)) is not None:
            control.paused = pause
            control.stop_run()

    def ask(self, job: Job, what: str) -> None:
        """Have a run "save" a checkpoint, or "sample" pictures, after its step."""
        if (control := self._control.get(job.id)) is not None:
            {"save": control.save, "sample": control.sample}[what].set()

    def earlier(self) -> list[Earlier]:
        """Runs that were paused, or cut off with the server, newest first."""
        found = []
        for folder in sorted(self.workspace.runs.iterdir(), reverse=True):
            try:
                state = json.loads((folder / STATE).read_text(encoding="utf-8"))
                if not state["done"] and any((folder / "run").glob("checkpoint-*/state.json")):
                    found.append(Earlier(folder.name, state["name"], int(state["step"]), int(state["steps"])))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def command(self, run_id: str) -> str:
        """The command line that trains the same elsewhere."""
        return f"oft-diffusion train --config {shlex.quote(str(self.workspace.run(run_id) / CONFIG))}"

    def _finish(self, run_id: str, job: Job, result: TrainResult, control: Control) -> None:
        self._note(run_id, {"step": result.steps})
        if control.paused:
            job.tell(text=f"paused at step {result.steps}")
            return
        state = json.loads((self.workspace.run(run_id) / STATE).read_text(encoding="utf-8"))
        cover = result.pictures[-1] if result.pictures else None
        card = self.shelf.add(result.adapter, state["name"], cover)
        self._note(run_id, {"done": True})
        job.tell(card, text=f"the adapter {card.name} is on the shelf")

    def _resumed(self, folder: Path) -> dict[str, Any]:
        begun = any((folder / "run").glob("checkpoint-*/state.json"))
        return {"resume": "latest"} if begun else {"overwrite": True}

    def _note(self, run_id: str, changes: dict[str, Any]) -> None:
        path = self.workspace.run(run_id) / STATE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            state = {}
        write_atomically(path, json.dumps(state | changes).encode())


class Control:
    """What can be asked of a run from outside."""

    def __init__(self) -> None:
        self.paused = False
        self.save, self.sample = threading.Event(), threading.Event()
        self.stop_run: Any = lambda: None


def _tell(job: Job, step: TrainStep) -> None:
    job.tell(
        step, text=f"step {step.step} of {step.steps}", done=step.step, total=step.steps, seconds_left=step.seconds_left
    )


__all__ = ["Card", "Earlier", "OFTError", "Runs", "Wish"]
