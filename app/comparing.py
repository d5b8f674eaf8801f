"""Comparisons: the same seeds drawn in several ways, on one labelled sheet."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

from oft_diffusion.errors import ConfigError, DataError
from oft_diffusion.files import FILE_NAME, load_adapter_file
from oft_diffusion.generate import Picture
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.training import TrainConfig

from .drawing import Request, check
from .machine import Job, Machine, Progress
from .model import Model
from .prompts import Subject
from .runs import CONFIG
from .shelf import Card, read_card
from .training import Training
from .workspace import Workspace, new_id

MOST_CELLS = 64  # of a sheet
_SWEEP = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)


class Comparing:
    """What can be compared. Each comparison is a job; what it finds ends with the path of a labelled sheet."""

    def __init__(self, workspace: Workspace, machine: Machine, model: Model, training: Training) -> None:
        self.workspace, self.machine, self.model, self.training = workspace, machine, model, training

    def before_and_after(self, person: str, request: Request) -> Job:
        """Each seed without and with the adapters: the job finds pairs of pictures, then a labelled sheet of them.

        Raises:
            OFTError: as for `draw`, and for the comparisons below.
        """
        names = " and ".join(f"{card.name} at {strength:g}" for card, strength in request.adapters)
        rows = [dataclasses.replace(request, adapters=()), request]
        return self._sheet(person, rows, ["the base", names], pairs=True)

    def sweep(self, person: str, request: Request, strengths: Sequence[float] = _SWEEP) -> Job:
        """The same seeds at several strengths of the last adapter: the job finds one labelled sheet."""
        *others, (card, _) = request.adapters
        rows = [dataclasses.replace(request, adapters=(*others, (card, strength))) for strength in strengths]
        return self._sheet(person, rows, [f"{card.name} at {strength:g}" for strength in strengths])

    def side_by_side(self, person: str, request: Request, cards: Sequence[Card]) -> Job:
        """The same seeds with one adapter after another, each at what its author recommends."""
        rows = [dataclasses.replace(request, adapters=((card, card.strength),)) for card in cards]
        return self._sheet(person, rows, [card.name for card in cards])

    def run_grid(self, person: str, request: Request, run_id: str, strengths: Sequence[float] = (0.75, 1.0)) -> Job:
        """The same seeds with each checkpoint of a run at several strengths: the job finds one labelled sheet.

        Raises:
            OFTError: there is no such run, it makes too many pictures, or too much waits already.
        """
        run = next((run for run in self.training.runs.with_checkpoints() if run.id == run_id), None)
        if run is None:
            raise ConfigError("there is no such run", expected="one with checkpoints", fix="choose one")
        rows, labels = [], []
        for (step, folder), strength in product(run.checkpoints.items(), strengths):
            file = load_adapter_file(folder / FILE_NAME)
            card = dataclasses.replace(read_card(f"{run.id}-{step}", file), name=f"{run.name}, step {step}")
            rows.append(dataclasses.replace(request, adapters=((card, strength),)))
            labels.append(f"{card.name}, at {strength:g}")
        return self._sheet(person, rows, labels)

    def _sheet(
        self, person: str, rows: Sequence[Request], labels: Sequence[str], *, pairs: bool = False
    ) -> Job:  # fmt: skip
        cells = sum(len(row.seeds) for row in rows)
        if cells > MOST_CELLS:
            raise DataError(f"a sheet of {cells} pictures", expected=f"at most {MOST_CELLS}", fix="ask for fewer")
        for row in rows:
            check(row, self.model.abilities)
        self.training.kept.check_room(person)
        folder = self.workspace.pictures(person)

        def work(job: Job) -> None:
            drawn = self._rows(job, rows, labels)
            seeds = [f"seed {seed}" for seed in rows[0].seeds]
            images = [[p.image for p in row] for row in drawn]
            grid = labelled_grid(images, row_labels=list(labels), column_labels=seeds)
            alike = {key: value for key, value in drawn[0][0].settings.items() if key not in ("seed", "adapters")}
            told = {**alike, "rows": list(labels), "seeds": list(rows[0].seeds)}
            job.tell(*(zip(*drawn, strict=True) if pairs else ()))
            job.tell(save_png(grid, folder / f"{new_id()}.png", told), text=f"compared {cells} pictures")

        return self.machine.start(person, "compare", work)

    def subject_of_run(self, run_id: str) -> Subject:
        """What a run teaches.

        Raises:
            OFTError: there is no such run.
        """
        config = TrainConfig.from_toml(self.workspace.run(run_id) / CONFIG)
        return Subject(config.trigger, config.class_word)

    def _rows(self, job: Job, rows: Sequence[Request], labels: Sequence[str]) -> list[list[Picture]]:
        drawn: list[list[Picture]] = []
        for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
            part = Part(job, index, len(rows), label)
            self.model.studio().draw(row, part, part.pictures.append)
            drawn.append(part.pictures)
        return drawn


class Part(Job):
    """One of several drawings of a job: what it tells, the job tells as its share of the whole."""

    def __init__(self, job: Job, index: int, count: int, label: str) -> None:
        self.job, self.index, self.count, self.label = job, index, count, label
        super().__init__(job.owner, job.kind)
        self.pictures: list[Picture] = []

    @property
    def progress(self) -> Progress:
        return self.job.progress

    def check(self) -> None:
        self.job.check()

    def tell(self, *found: Any, **changes: Any) -> None:
        if changes.get("total"):
            share = (self.index + changes["done"] / changes["total"]) / self.count
            elapsed = time.monotonic() - (self.job.started or time.monotonic())
            changes |= {"done": round(100 * share), "total": 100}
            changes |= {"seconds_left": elapsed / share - elapsed if share else None}
        if "text" in changes:
            changes["text"] = f"{self.label}: {changes['text']}"
        self.job.tell(**changes)
