"""State and actions of the app. No gradio here: tabs lay out what this offers, and tests drive it without a browser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from oft_diffusion.errors import ConfigError, DataError, OFTError
from oft_diffusion.files import FILE_NAME, load_adapter_file
from oft_diffusion.generate import Picture
from oft_diffusion.images import labelled_grid, read_settings, save_png

from .drawing import Abilities, Request, check, newest_first
from .machine import Job, Machine
from .model import Model
from .shelf import Card, Shelf, read_card
from .training import Training
from .workshop import Workshop
from .workspace import Workspace, new_id

MOST_CELLS = 64  # of a grid
_SWEEP = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)


class Session:
    """One server: a model, a workspace, and a machine that does one thing at a time.

    Attributes:
        workspace: where everything is kept.
        machine: who waits, who works.
        shelf: the adapters.
        model: what draws.
        training: what becomes of pictures.
        workshop: what becomes of adapters.
    """

    def __init__(
        self, workspace: Path, model: str = "pocket", *, config_dir: str | None = None, device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.workspace = Workspace(workspace)
        self.workspace.clean()
        self.machine = Machine()
        self.shelf = Shelf(self.workspace)
        self.model = Model(model, config_dir, device, dtype)
        self.training = Training(self.workspace, self.shelf, self.machine, self.model)
        self.workshop = Workshop(self.workspace, self.shelf, self.machine, self.model)

    @property
    def abilities(self) -> Abilities:
        """What the model can be asked."""
        return self.model.abilities

    # -- drawing -----------------------------------------------------------------------------------------------------

    def draw(self, person: str, request: Request) -> Job:
        """Pictures, one by one: the job finds (path of a PNG, caption); the PNGs stay in this person's history.

        Raises:
            OFTError, Busy: before anyone waits, where the request cannot be right, or too much waits already.
        """
        check(request, self.abilities)
        self.training.kept.check_room(person)
        folder = self.workspace.pictures(person)
        return self.machine.start(person, "draw", lambda job: self.model.studio().draw(request, job, _keeper(folder)))

    def draw_for_program(self, caller: str, request: Request, connection: str = "") -> Job:
        """As `draw`, for a caller of the API: the PNG is kept as long as uploads are."""
        check(request, self.abilities)
        folder = self.workspace.fresh()
        return self.machine.start(
            f"api {caller}", "program", lambda job: self.model.studio().draw(request, job, _keeper(folder)), connection
        )

    def hang_up(self, connection: str) -> None:
        """Cancel what a program asked for that has gone: nobody waits for it."""
        for job in self.machine.going("program"):
            if connection and job.about == connection:
                self.machine.cancel(job.owner, job.id)

    def before_and_after(self, person: str, request: Request) -> Job:
        """Each seed without and with the adapters: the job finds pairs of pictures, then a labelled sheet of them."""
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
            OFTError, Busy: there is no such run, or it makes too many pictures.
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
            check(row, self.abilities)
        self.training.kept.check_room(person)
        folder = self.workspace.pictures(person)

        def work(job: Job) -> None:
            drawn = self._rows(job, rows, labels)
            seeds = [f"seed {seed}" for seed in rows[0].seeds]
            images = [[p.image for p in row] for row in drawn]
            grid = labelled_grid(images, row_labels=list(labels), column_labels=seeds)
            told = {"prompt": rows[0].prompt, "rows": list(labels), "seeds": list(rows[0].seeds)}
            job.tell(*(zip(*drawn, strict=True) if pairs else ()))
            job.tell(save_png(grid, folder / f"{new_id()}.png", told), text=f"compared {cells} pictures")

        return self.machine.start(person, "compare", work)

    def _rows(self, job: Job, rows: Sequence[Request], labels: Sequence[str]) -> list[list[Picture]]:
        drawn: list[list[Picture]] = []
        for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
            part = _Part(job, index, len(rows), label)
            self.model.studio().draw(row, part, part.pictures.append)
            drawn.append(part.pictures)
        return drawn

    # -- history -----------------------------------------------------------------------------------------------------

    def history(self, person: str) -> list[Path]:
        """This person's pictures, newest first; they outlive the server."""
        return newest_first(self.workspace.pictures(person))

    def settings_in(self, path: Path) -> dict[str, Any]:
        """What made a picture, read out of it.

        Raises:
            OFTError: it does not tell.
        """
        return read_settings(path)

    def request_from(self, settings: dict[str, Any]) -> tuple[Request, list[str]]:
        """The request that a picture's settings tell of, and sentences about what is not here any more.

        Raises:
            OFTError: they tell of what this app does not draw.
            ValueError, TypeError, AttributeError, OverflowError: they make no sense.
        """
        notes, adapters = [], []
        by_digest = {_digest(card): card for card in self.shelf.cards()}
        for told in settings.get("adapters") or ():
            if (card := by_digest.get(told.get("sha256"))) is None:
                notes.append(f"the adapter {told.get('name')} is not on this shelf")
            else:
                adapters.append((card, float(told["strength"])))
        if (model := settings.get("model")) is not None and not self.model.is_called(str(model)):
            notes.append(f"the picture was drawn by {model}, and this is {self.abilities.model}")
        own = self.abilities
        scheduler = settings.get("scheduler", "")
        width, height = (settings.get(side) and int(settings[side]) for side in ("width", "height"))
        request = Request(
            prompt=str(settings.get("prompt", "")),
            negative=str(settings.get("negative_prompt") or ""),
            seeds=(int(settings.get("seed", 0)),),
            steps=int(settings.get("steps", own.steps)),
            guidance=float(settings.get("guidance", own.guidance)),
            width=width,
            height=height,
            scheduler=scheduler if scheduler in own.schedulers else "",
            adapters=tuple(adapters),
        )
        check(request, own)
        return request, notes

    # -- adapters ----------------------------------------------------------------------------------------------------

    def missing_triggers(self, prompt: str, cards: Sequence[Card]) -> list[str]:
        """Triggers of adapters that a prompt lacks."""
        words = set(prompt.lower().replace(",", " ").split())
        return [card.trigger for card in cards if card.trigger and card.trigger.lower() not in words]

    def fits(self, card: Card) -> str:
        """Why an adapter cannot be used here; empty where it can."""
        return self.shelf.fits(card, self.model.parts())

    def known(self, card: Card) -> Card:
        """The card, with this model's name where it was trained on this one: its folder's says little."""
        return dataclasses.replace(card, base=self.abilities.model) if self.model.is_called(card.base) else card

    def cards(self) -> list[tuple[Card, str]]:
        """All adapters, newest first; beside each why it cannot be used here, or nothing."""
        return [(self.known(card), self.fits(card)) for card in self.shelf.cards()]

    def fitting(self) -> list[Card]:
        """The adapters that can be used here, newest first."""
        return [card for card, problem in self.cards() if not problem]

    def take_in(self, path: Path, component: str | None = None) -> tuple[Card, list[str]]:
        """A file of any tool onto the shelf; the card, and what a user should know.

        Raises:
            OFTError: it is broken, or cannot be used with this model.
        """
        return self.shelf.take_in(path, self.model.parts(), " ".join(path.stem.split())[:60] or "adapter", component)

    def delete(self, adapter_id: str) -> None:
        """Remove an adapter; what waits to be drawn with it will say that it is gone.

        Raises:
            OFTError: there is none.
        """
        self.shelf.delete(adapter_id)
        self.model.studio().forget(adapter_id)


class _Part(Job):
    """One of several drawings of a job: what it tells, the job tells as its share of the whole."""

    def __init__(self, job: Job, index: int, count: int, label: str) -> None:
        super().__init__(job.owner, job.kind)
        self.job, self.index, self.count, self.label = job, index, count, label
        self.pictures: list[Picture] = []

    def check(self) -> None:
        self.job.check()

    def tell(self, *found: Any, **changes: Any) -> None:
        if changes.get("total"):
            share = (self.index + changes["done"] / changes["total"]) / self.count
            changes |= {"done": round(100 * share), "total": 100, "seconds_left": None}
        if "text" in changes:
            changes["text"] = f"{self.label}: {changes['text']}"
        self.job.tell(**changes)


def _keeper(folder: Path) -> Callable[[Picture], tuple[Path, str]]:
    def keep(picture: Picture) -> tuple[Path, str]:
        path = save_png(picture.image, folder / f"{new_id()}.png", picture.settings)
        return path, f"seed {picture.settings['seed']}"

    return keep


def _digest(card: Card) -> str | None:
    try:
        return load_adapter_file(card.file).metadata.sha256
    except OFTError:
        return None
