"""What the training tab can ask for: pictures and words checked, a run started, watched, stopped and taken along."""

from __future__ import annotations

import dataclasses
import re
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

from oft_diffusion.errors import ConfigError, OFTError
from oft_diffusion.pocket import SUBJECTS, subjects_path
from oft_diffusion.pocket.world import OBJECTS, Subject
from oft_diffusion.training import TrainConfig
from oft_diffusion.training.tokens import check_trigger, is_common

from .covers import covered
from .kept import Kept
from .machine import Busy, Job, Machine
from .model import Model
from .packing import packed, settings, settings_file
from .photos import Photos
from .room import check_shelf
from .runs import PHOTOS, Asked, Earlier, Runs, Wish, check_limits
from .shelf import Card, Shelf
from .workspace import Workspace


class Training:
    """Training in a workspace, on a model."""

    def __init__(self, workspace: Workspace, shelf: Shelf, machine: Machine, model: Model) -> None:
        self.workspace, self.shelf, self.machine, self.model = workspace, shelf, machine, model
        self.kept = Kept(workspace, machine, lambda: self.runs.earlier())
        self._taking = threading.Lock()

    @cached_property
    def runs(self) -> Runs:
        """With the presets that fit the model and this machine."""
        model = self.model
        knobs: dict[str, Any] = dict(model.quantized)
        if not model.shipped:
            own = model.abilities
            knobs |= {
                "resolution": own.size, "config_dir": model.config_dir, "mixed_precision": model.precision(),
                "sampling_steps": own.steps, "guidance_scale": own.guidance,
            }  # fmt: skip
        return Runs(self.workspace, self.shelf, model.source, model.name, model.presets(), knobs, self._cover)

    # -- before ------------------------------------------------------------------------------------------------------

    def photos(self, person: str) -> Photos:
        """This person's pictures for the next training."""
        return Photos(self.workspace, person)

    def examples(self) -> list[str]:
        """Subjects that come with the pocket base, to try training on."""
        return list(SUBJECTS) if self.model.shipped else []

    def take_example(self, person: str, name: str) -> Subject:
        """An example subject's pictures and captions, instead of what this person has uploaded.

        Raises:
            ConfigError: there is no such subject.
        """
        if name not in self.examples():
            raise ConfigError("there is no such example", expected="one of the list", fix="choose one")
        photos = self.photos(person)
        with self._taking:  # an impatient second click must not double them
            photos.clear()
            photos.add(sorted(subjects_path(name).iterdir()))
        return SUBJECTS[name]

    def defaults(self, preset: str = "") -> dict[str, Any]:
        """The knobs of a preset, or of the one that fits best.

        Raises:
            ConfigError: there is no such preset.
        """
        return dataclasses.asdict(self.runs.config(Wish("", "", "", {}, preset), self.workspace.temporary))

    @cached_property
    def resolution(self) -> int:
        """At which the preset that fits best trains, in pixels."""
        return int(self.defaults()["resolution"])

    def words_notes(self, trigger: str, class_word: str) -> list[str]:
        """What speaks against a trigger and a class word with this model, in sentences."""
        notes, word = [], class_word.strip().lower()
        own = self.model.studio().pipe.tokenizer
        tokenizer = getattr(own, "tokenizer", own)  # of a processor
        if trigger.strip():
            try:
                check_trigger(tokenizer, trigger.strip())
            except OFTError as error:
                notes.append(f"{error.problem}: {error.fix}")
        if self.model.shipped:
            if word and word not in OBJECTS:
                notes.append(f"this model has never seen a {word}: it knows {', '.join(OBJECTS)}")
        elif rare := [part for part in re.findall(r"\w+", word) if not is_common(tokenizer, part)]:
            notes.append(f"this model may not know a {word}: its tokenizer has no common word for {', '.join(rare)}")
        if word and word in trigger.lower().split():
            notes.append("the trigger holds the class word, whose meaning would be trained, too")
        return notes

    # -- runs --------------------------------------------------------------------------------------------------------

    def start(self, person: str, wish: Wish) -> Job:
        """Train on this person's pictures; the job finds the steps that were told, and at last the adapter's card.

        Raises:
            OFTError: before anyone waits, where something is missing or wrong.
        """
        self._check_free(person)
        self.machine.check(person)
        self.kept.check_room(person)
        check_shelf(self.workspace)
        run_id = self.runs.prepare(wish, self.photos(person))
        try:
            return self._start(person, run_id)
        except Busy:  # somebody was quicker
            self.workspace.remove(self.workspace.run(run_id))
            raise

    def estimate(self, person: str, wish: Wish) -> Job:
        """Measure what that training would take, named or not; the job finds an `Estimate`.

        Raises:
            OFTError: before anyone waits, where something is missing or wrong.
        """
        photos, wish = self.photos(person), dataclasses.replace(wish, name=wish.name or "nameless")
        self.runs.check(wish, photos)

        def work(job: Job) -> None:
            self.model.studio().rest()  # as before a training, which has the device to itself
            self.runs.estimate(wish, photos, job)

        return self.machine.start(person, "estimate", work)

    def resume(self, person: str, run_id: str) -> Job:
        """Go on with a run that was paused or cut off.

        Raises:
            OFTError: there is no such run of this person, or it was begun on another model, or another one is going on.
        """
        if run_id not in [run.id for run in self.unfinished(person)]:
            raise ConfigError("there is no such run", expected="one that can be gone on with", fix="choose one")
        self._check_free(person)
        if (begun_on := self.runs.model_of(run_id)) != self.model.name:
            raise ConfigError(
                f"this run was begun on {begun_on}, and this server has {self.model.name}",
                expected="the model that it was begun on", fix=f"start the app with --model {begun_on}",
            )  # fmt: skip
        return self._start(person, run_id)

    def unfinished(self, person: str) -> list[Earlier]:
        """This person's runs that were paused, or cut off with the server, newest first.

        Nobody else's: who goes on with a run can take its pictures along.
        """
        going = {job.about for job in self.machine.going("train")}
        return [run for run in self.mine(person) if not run.done and run.id not in going]

    def stop(self, person: str, *, pause: bool) -> str:
        """End this person's run after its step; paused, it can be gone on with. What will be, in a sentence."""
        job = self.machine.under_way(person, "train")
        if job is None:
            return "Nothing is being trained"
        if waits := job.progress.state == "waiting":
            self.machine.cancel(person, job.id)
        if not self.runs.stop(job, pause=pause) and not waits:
            return "Nothing is being trained"
        return "It pauses after this step" if pause else "It ends after this step, and the adapter is kept"

    def heeds(self, person: str) -> bool:
        """Whether stopping or pausing this person's last run, or asking it for something, does anything now.

        It does not once its steps are done, while the adapter's cover is drawn.
        """
        job = self.machine.under_way(person, "train")
        return job is not None and (job.progress.state == "waiting" or self.runs.takes_steps(job))

    def comparable(self, person: str) -> str:
        """This person's last run since the server started, where it has a checkpoint; else empty."""
        job = self.machine.newest(person, "train")
        return job.about if job is not None and self.runs.has_checkpoints(job.about) else ""

    def ask(self, person: str, what: Asked) -> str:
        """Have this person's run "save" or "sample" after its step. What will be, in a sentence."""
        job = self.machine.newest(person, "train")
        if job is None or not self.runs.ask(job, what):
            return "Nothing is being trained"
        return {
            "save": "Asked: a checkpoint is saved after this step",
            "sample": "Asked: pictures are drawn after this step",
        }[what]

    # -- elsewhere ---------------------------------------------------------------------------------------------------

    def mine(self, person: str) -> list[Earlier]:
        """This person's runs, newest first."""
        owner = self.workspace.person(person)
        return [run for run in self.runs.earlier() if run.owner == owner]

    def settings_of(self, person: str, what: Wish | str) -> Path:
        """The settings of what is filled in, or of a run, as a file for another machine.

        Raises:
            OFTError: a setting is unusable, or this person has no such run.
        """
        config, _ = self._config(person, what)
        return settings_file(self.workspace.fresh(), settings(config, self.model.name))

    def packed(self, person: str, what: Wish | str) -> Path:
        """The same with pictures and captions, as a ZIP that trains the same on another machine.

        Raises:
            OFTError: as `settings_of`, or there are no pictures.
        """
        config, pictures = self._config(person, what)
        folder = self.workspace.fresh()
        if pictures is None:
            photos, pictures = self.photos(person), folder / PHOTOS
            if photos.count() == 0:
                raise ConfigError("there are no pictures to pack", expected="3 to 8 of the subject", fix="drop some")
            photos.copy_to(pictures)
        return packed(folder, settings(config, self.model.name), pictures)

    def _config(self, person: str, what: Wish | str) -> tuple[TrainConfig, Path | None]:
        """A configuration, and where a run's pictures are."""
        if isinstance(what, Wish):
            config = self.runs.config(what, self.workspace.temporary)
            check_limits(config)
            return config, None
        if what not in [run.id for run in self.mine(person)]:
            raise ConfigError("there is no such run", expected="one of yours", fix="choose one")
        return self.runs.config_of(what), self.workspace.run(what) / PHOTOS

    def _cover(self, card: Card, job: Job) -> tuple[Card, list[str]]:
        return covered(self.shelf, self.model, card, job)

    def _check_free(self, person: str) -> None:
        """One run of a person at a time: the page shows, stops and pauses one."""
        if self.machine.under_way(person, "train") is not None:
            raise ConfigError("you are training already", expected="one run at a time", fix="stop or pause it first")

    def _start(self, person: str, run_id: str) -> Job:
        def work(job: Job) -> None:
            self.model.studio().rest()  # training holds the model once more
            self.runs.work(run_id, job)

        return self.machine.start(person, "train", work, run_id)
