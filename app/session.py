"""State and actions of the app. No gradio here: tabs lay out what this offers, and tests drive it without a browser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from oft_diffusion.errors import DataError, OFTError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.generate import Picture
from oft_diffusion.images import read_settings, save_png

from .comparing import Comparing
from .drawing import FORM_GUIDANCE, MOST_ADAPTERS, Abilities, Request, check, newest_first, number
from .machine import Job, Machine
from .model import Model
from .room import check_room, check_shelf
from .shelf import Card, Shelf
from .training import Training
from .words import caption
from .workshop import Workshop
from .workspace import Workspace, new_id

_EXACT = 2**53  # JavaScript's numbers count so far


class Session:
    """One server: a model, a workspace, and a machine that does one thing at a time.

    Attributes:
        workspace: where everything is kept.
        machine: who waits, who works.
        shelf: the adapters.
        model: what draws.
        training: what becomes of pictures.
        comparing: several drawings on one sheet.
        workshop: what becomes of adapters.
    """

    def __init__(
        self, workspace: Path, model: str = "pocket", *, config_dir: str | None = None, device: str = "cpu",
        dtype: torch.dtype = torch.float32, quantized: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.workspace = Workspace(workspace)
        self.workspace.clean()
        self.machine = Machine()
        self.shelf = Shelf(self.workspace)
        self.model = Model(model, config_dir, device, dtype, quantized or {})
        self._captions: dict[Path, str] = {}  # of pictures, which never change
        self.training = Training(self.workspace, self.shelf, self.machine, self.model)
        self.comparing = Comparing(self.workspace, self.machine, self.model, self.training)
        self.workshop = Workshop(self.workspace, self.shelf, self.machine, self.model)

    @property
    def abilities(self) -> Abilities:
        """What the model can be asked."""
        return self.model.abilities

    # -- drawing -----------------------------------------------------------------------------------------------------

    def stack(self, slots: Sequence[Any]) -> tuple[tuple[Card, float], ...]:
        """The adapters that act, in order, of a form's places: for each whether it acts, an id, and the strength.

        Raises:
            OFTError: an adapter is gone, or its strength is no number.
        """
        return tuple(
            (card := self.shelf.card(adapter), float(number(f"The strength of {card.name}", strength)))
            for acts, adapter, strength in zip(slots[::3], slots[1::3], slots[2::3], strict=True)
            if acts and adapter
        )

    def draw(self, person: str, request: Request) -> Job:
        """Pictures, one by one: the job finds (path of a PNG, caption); the PNGs stay in this person's history.

        Raises:
            OFTError: before anyone waits, where the request cannot be right, or too much waits already.
        """
        check(request, self.abilities)
        self.training.kept.check_room(person)
        folder = self.workspace.pictures(person)
        return self.machine.start(person, "draw", lambda job: self.model.studio().draw(request, job, _keeper(folder)))

    def draw_for_program(self, caller: str, request: Request, connection: str = "") -> Job:
        """As `draw`, for a caller of the API: the PNG is kept as long as uploads are.

        Raises:
            OFTError: before anyone waits, where the request cannot be right, or too much waits already.
        """
        check(request, self.abilities)
        check_room(self.workspace)
        folder = self.workspace.fresh()
        return self.machine.start(
            f"api {caller}", "program", lambda job: self.model.studio().draw(request, job, _keeper(folder)), connection
        )

    def hang_up(self, connection: str) -> None:
        """Cancel what a program asked for that has gone: nobody waits for it."""
        for job in self.machine.going("program"):
            if connection and job.about == connection:
                self.machine.cancel(job.owner, job.id)

    # -- history -----------------------------------------------------------------------------------------------------

    def history(self, person: str) -> list[Path]:
        """This person's pictures, newest first; they outlive the server."""
        return newest_first(self.workspace.pictures(person))

    def caption(self, path: Path) -> str:
        """What a picture of the history is called: by what its settings tell."""
        if path not in self._captions:
            try:
                self._captions[path] = caption(read_settings(path))
            except OFTError:  # somebody has put it there
                self._captions[path] = path.name
        return self._captions[path]

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
        if "seed" not in settings:
            raise DataError("it does not tell of one picture", expected="one picture's settings", fix="drop another")
        notes: list[str] = []
        adapters: list[tuple[Card, float]] = []
        by_digest = {_digest(card): card for card in self.shelf.cards()}
        for told in settings.get("adapters") or ():
            if (card := by_digest.get(told.get("sha256"))) is None:
                notes.append(f"the adapter {told.get('name')} is not on this shelf")
            elif len(adapters) == MOST_ADAPTERS:
                notes.append(f"the adapter {card.name} is left out: here is room for {MOST_ADAPTERS}")
            else:
                adapters.append((card, float(told["strength"])))
        if (model := settings.get("model")) is not None and not self.model.is_called(str(model)):
            notes.append(f"the picture was drawn by {model}, and this is {self.abilities.model}")
        own = self.abilities
        scheduler = settings.get("scheduler", "")
        if scheduler and scheduler not in own.schedulers:
            notes.append(f"there is no {scheduler} for this model: its own scheduler is chosen")
        if settings.get("clip_skip") is not None:
            notes.append("the picture was drawn with a clip skip, which is not taken over")
        if (change := settings.get("change")) is not None:
            notes.append("it began with another picture, which is not in it: drop that under Begin with a picture")
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
            change=0.6 if change is None else float(change),
        )
        check(request, own)
        if request.seeds[0] > _EXACT:
            notes.append("its seed is larger than a browser counts exactly: it is rounded, and gives another picture")
        if request.guidance > FORM_GUIDANCE:
            notes.append(f"its guidance is {request.guidance:g}, and the form's slider ends at {FORM_GUIDANCE:g}")
        return request, notes

    # -- adapters ----------------------------------------------------------------------------------------------------

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
            OFTError: it is broken, or cannot be used with this model, or there is no room for it.
        """
        check_shelf(self.workspace)
        return self.shelf.take_in(path, self.model.parts(), " ".join(path.stem.split())[:60] or "adapter", component)

    def label(self, adapter_id: str, name: str, trigger: str, class_word: str) -> list[str]:
        """Give an adapter another name and other words; what speaks against these, in sentences.

        Raises:
            OFTError: there is none, or the name is empty or too long, or a word is too long.
        """
        self.shelf.label(adapter_id, name, trigger, class_word)
        return self.training.words_notes(trigger, class_word)

    def delete(self, adapter_id: str) -> None:
        """Remove an adapter; what waits to be drawn with it will say that it is gone.

        Raises:
            OFTError: there is none.
        """
        self.shelf.delete(adapter_id)
        self.model.studio().forget(adapter_id)


def _keeper(folder: Path) -> Callable[[Picture], tuple[Path, str]]:
    def keep(picture: Picture) -> tuple[Path, str]:
        path = save_png(picture.image, folder / f"{new_id()}.png", picture.settings)
        return path, caption(picture.settings)

    return keep


def _digest(card: Card) -> str | None:
    try:
        return load_adapter_file(card.file).metadata.sha256
    except OFTError:
        return None
