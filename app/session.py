"""State and actions of the app. No gradio here: tabs lay out what this offers, and tests drive it without a browser."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from oft_diffusion.arithmetic import compose, interpolate
from oft_diffusion.convert import convert
from oft_diffusion.errors import ConfigError, DataError, OFTError
from oft_diffusion.files import load_adapter_file, save_adapter_file
from oft_diffusion.formats.components import modules_of
from oft_diffusion.generate import Picture
from oft_diffusion.images import labelled_grid, read_settings, save_png
from oft_diffusion.load import load_pipeline
from oft_diffusion.pocket import GUIDANCE, STEPS, pocket_path

from .drawing import Abilities, Request, Studio, check, newest_first, seeds_from
from .machine import Job, Machine
from .photos import Photos
from .runs import Runs, Wish
from .shelf import Card, Shelf
from .workspace import Workspace, new_id

MOST_CELLS = 64  # of a grid
_SWEEP = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
EXPORTS = {
    "oft": "oft-diffusion",
    "onetrainer": "OneTrainer",
    "comfyui-oftv2": "ComfyUI with the OFTv2 node",
    "sd-scripts": "sd-scripts",
    "lora": "a LoRA that every tool loads (large)",
}


class Session:
    """One server: a model, a workspace, and a machine that does one thing at a time.

    Attributes:
        workspace: where everything is kept.
        machine: who waits, who works.
        shelf: the adapters.
    """

    def __init__(
        self, workspace: Path, model: str = "pocket", *, config_dir: str | None = None, device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.workspace = Workspace(workspace)
        self.workspace.clean()
        self.machine = Machine()
        self.shelf = Shelf(self.workspace)
        shipped = model == "pocket"
        self.runs = Runs(
            self.workspace, self.shelf, str(pocket_path()) if shipped else model, "pocket" if shipped else "sd15"
        )
        self.model, self.config_dir, self.device, self.dtype = model, config_dir, device, dtype
        self._studio: Studio | None = None
        self._loading = threading.Lock()
        self._run_of: dict[str, str] = {}  # job to run

    # -- the model ---------------------------------------------------------------------------------------------------

    def studio(self) -> Studio:
        """The pipeline, loaded at the first call.

        Raises:
            ConfigError: it cannot be loaded.
        """
        with self._loading:  # libraries patch torch while they load: never in two threads
            if self._studio is None:
                shipped = self.model == "pocket"
                source = pocket_path() if shipped else self.model
                pipe = load_pipeline(source, self.dtype, self.device, config_dir=self.config_dir)
                steps, guidance = (STEPS, GUIDANCE) if shipped else (25, 7.5)
                self._studio = Studio(pipe, Path(self.model).name, steps, guidance)
            return self._studio

    @property
    def abilities(self) -> Abilities:
        """What the model can be asked."""
        return self.studio().abilities

    # -- drawing -----------------------------------------------------------------------------------------------------

    def draw(self, person: str, request: Request) -> Job:
        """Pictures, one by one: the job finds (path of a PNG, caption); the PNGs stay in this person's history.

        Raises:
            OFTError, Busy: before anyone waits, where the request cannot be right, or too much waits already.
        """
        check(request, self.abilities)
        folder = self.workspace.pictures(person)
        return self.machine.start(person, "draw", lambda job: self.studio().draw(request, job, _keeper(folder)))

    def before_and_after(self, person: str, request: Request) -> Job:
        """Each seed without and with the adapters: the job finds pairs of pictures, then both are in the history."""
        check(request, self.abilities)

        def work(job: Job) -> None:
            kept = self._rows(job, [dataclasses.replace(request, adapters=()), request], ["the base", "with adapters"])
            job.tell(*zip(*kept, strict=True))

        return self.machine.start(person, "compare", work)

    def sweep(self, person: str, request: Request, strengths: Sequence[float] = _SWEEP) -> Job:
        """The same seeds at several strengths of the last adapter: the job finds one labelled sheet."""
        *others, (card, _) = request.adapters
        rows = [dataclasses.replace(request, adapters=(*others, (card, strength))) for strength in strengths]
        return self._sheet(person, rows, [f"{card.name} at {strength:g}" for strength in strengths])

    def side_by_side(self, person: str, request: Request, cards: Sequence[Card]) -> Job:
        """The same seeds with one adapter after another, each at what its author recommends."""
        rows = [dataclasses.replace(request, adapters=((card, card.strength),)) for card in cards]
        return self._sheet(person, rows, [card.name for card in cards])

    def _sheet(self, person: str, rows: Sequence[Request], labels: Sequence[str]) -> Job:
        cells = sum(len(row.seeds) for row in rows)
        if cells > MOST_CELLS:
            raise DataError(f"a sheet of {cells} pictures", expected=f"at most {MOST_CELLS}", fix="ask for fewer")
        for row in rows:
            check(row, self.abilities)
        folder = self.workspace.pictures(person)

        def work(job: Job) -> None:
            drawn = self._rows(job, rows, labels)
            grid = labelled_grid([[p.image for p in row] for row in drawn], row_labels=list(labels))
            told = {"prompt": rows[0].prompt, "rows": list(labels), "seeds": list(rows[0].seeds)}
            job.tell(save_png(grid, folder / f"{new_id()}.png", told))

        return self.machine.start(person, "compare", work)

    def _rows(self, job: Job, rows: Sequence[Request], labels: Sequence[str]) -> list[list[Picture]]:
        drawn: list[list[Picture]] = []
        for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
            part = _Part(job, index, len(rows), label)
            self.studio().draw(row, part, part.pictures.append)
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
        """The request that a picture's settings tell of, and sentences about what is not here any more."""
        notes, adapters = [], []
        by_digest = {_digest(card): card for card in self.shelf.cards()}
        for told in settings.get("adapters") or ():
            if (card := by_digest.get(told.get("sha256"))) is None:
                notes.append(f"the adapter {told.get('name')} is not on this shelf")
            else:
                adapters.append((card, float(told["strength"])))
        if (model := settings.get("model")) not in (None, self.model, _model_name(self.studio())):
            notes.append(f"the picture was drawn by {model}, and this is {self.abilities.model}")
        own = self.abilities
        scheduler = settings.get("scheduler", "")
        return Request(
            prompt=str(settings.get("prompt", "")),
            negative=str(settings.get("negative_prompt") or ""),
            seeds=(int(settings.get("seed", 0)),),
            steps=int(settings.get("steps", own.steps)),
            guidance=float(settings.get("guidance", own.guidance)),
            width=settings.get("width"),
            height=settings.get("height"),
            scheduler=scheduler if scheduler in own.schedulers else "",
            adapters=tuple(adapters),
        ), notes

    # -- training ----------------------------------------------------------------------------------------------------

    def photos(self, person: str) -> Photos:
        """This person's pictures for the next training."""
        return Photos(self.workspace, person)

    def defaults(self) -> dict[str, Any]:
        """The knobs of the preset that fits this model."""
        return dataclasses.asdict(self.runs.config(Wish("", "zwx", "thing", {}), self.workspace.temporary))

    @property
    def resolution(self) -> int:
        """At which the preset trains, in pixels."""
        return int(self.defaults()["resolution"])

    def train(self, person: str, wish: Wish) -> Job:
        """Train on this person's pictures; the job finds the steps that were told, and at last the adapter's card.

        Raises:
            OFTError, Busy: before anyone waits, where something is missing or wrong.
        """
        run_id = self.runs.prepare(wish, self.photos(person))
        return self._training(person, run_id)

    def resume_training(self, person: str, run_id: str) -> Job:
        """Go on with a run that was paused or cut off.

        Raises:
            OFTError, Busy: there is no such run.
        """
        if run_id not in {run.id for run in self.runs.earlier()}:
            raise ConfigError("there is no such run", expected="one that can be gone on with", fix="choose one")
        return self._training(person, run_id)

    def stop_training(self, person: str, *, pause: bool) -> None:
        """End this person's run after its step; paused, it can be gone on with."""
        if (job := self.machine.newest(person, "train")) is not None:
            if job.progress.state == "waiting":
                self.machine.cancel(person, job.id)
            self.runs.stop(job, pause=pause)

    def ask_training(self, person: str, what: str) -> None:
        """Have this person's run "save" or "sample" after its step."""
        if (job := self.machine.newest(person, "train")) is not None:
            self.runs.ask(job, what)

    def training_command(self, job: Job) -> str:
        """The command line that trains the same elsewhere."""
        return self.runs.command(self._run_of[job.id])

    def _training(self, person: str, run_id: str) -> Job:
        job = self.machine.start(person, "train", lambda job: self.runs.work(run_id, job))
        self._run_of[job.id] = run_id
        return job

    # -- adapters ----------------------------------------------------------------------------------------------------

    def missing_triggers(self, prompt: str, cards: Sequence[Card]) -> list[str]:
        """Triggers of adapters that a prompt lacks."""
        words = set(prompt.lower().replace(",", " ").split())
        return [card.trigger for card in cards if card.trigger and card.trigger.lower() not in words]

    def fits(self, card: Card) -> str:
        """Why an adapter cannot be used here; empty where it can."""
        return self.shelf.fits(card, self.parts())

    def parts(self) -> dict[str, nn.Module]:
        """The model's components that adapters are for."""
        return dict(modules_of(self.studio().pipe))

    def take_in(self, path: Path, component: str | None = None) -> tuple[Card, list[str]]:
        """A file of any tool onto the shelf; the card, and what a user should know.

        Raises:
            OFTError: it is broken, or cannot be used with this model.
        """
        return self.shelf.take_in(path, self.parts(), path.stem[:60] or "adapter", component)

    def combine(self, how: str, first: str, second: str, share: float) -> Card:
        """A new adapter of two: "interpolate" between them, or "compose" one after the other.

        Raises:
            OFTError: they are one, or cannot be one.
        """
        cards = [self.shelf.card(first), self.shelf.card(second)]
        files = [load_adapter_file(card.file) for card in cards]
        made = interpolate(files[0], files[1], share) if how == "interpolate" else compose(files)
        names = " and ".join(card.name for card in cards)[:50]
        folder = self.workspace.adapter(new_id())
        path = save_adapter_file(folder, made.components, made.metadata)
        self.shelf.rename(folder.name, names)
        return self.shelf.card(path.parent.name)

    def export(self, adapter_id: str, to: str) -> tuple[Path, list[str]]:
        """A file in another tool's format, in the workspace's temporary folder; and what a user should know.

        Raises:
            OFTError: that format cannot hold it, or there is no such format.
        """
        if to not in EXPORTS:
            raise ConfigError(f"there is no format {to!r}", expected=", ".join(EXPORTS), fix="choose one of these")
        card, folder = self.shelf.card(adapter_id), self.workspace.temporary / new_id()
        folder.mkdir()
        target = folder / f"{_file_name(card.name)}-{to}.safetensors"
        model = pocket_path() if self.model == "pocket" else self.model
        options = [str(card.file), str(target), "--to", to]
        if to != "oft":
            options += ["--model", str(model)]
        if to == "lora":
            options += ["--naming", "diffusers"]
        return target, convert(options)[:-1]

    def delete(self, adapter_id: str) -> None:
        """Remove an adapter, also from the pipeline when the machine is free.

        Raises:
            OFTError: there is none.
        """
        self.shelf.delete(adapter_id)
        if (studio := self._studio) is not None:
            self.machine.start("the server", "forget", lambda _: studio.forget(adapter_id))


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


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "adapter"


def _digest(card: Card) -> str | None:
    try:
        return load_adapter_file(card.file).metadata.sha256
    except OFTError:
        return None


def _model_name(studio: Studio) -> str:
    return str(getattr(studio.pipe.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2]


def opened(path: Path) -> Image.Image:
    """A picture in memory."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


__all__ = ["Session", "opened", "seeds_from"]
