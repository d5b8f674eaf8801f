"""What is made of adapters on the shelf: files for other tools, one adapter of two, and covers."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from oft_diffusion.arithmetic import compose, interpolate
from oft_diffusion.convert import convert
from oft_diffusion.errors import ConfigError
from oft_diffusion.files import FILE_NAME, AdapterFile, load_adapter_file, save_adapter_file
from oft_diffusion.generate import Picture

from .covers import covered
from .machine import Job, Machine
from .model import Model
from .room import check_room, check_shelf
from .shelf import Card, Shelf, checked_name, checked_word
from .workspace import Workspace

WAYS = ("interpolate", "compose")


@dataclass(frozen=True)
class Format:
    """A format that `oft-diffusion convert` writes.

    Attributes:
        about: for whom it is, in words.
        options: of the command, beside the format.
        folder: whether it is a folder, which is handed out as a ZIP.
    """

    about: str
    options: tuple[str, ...] = ()
    folder: bool = False


FORMATS = {
    "oft": Format("oft-diffusion"),
    "peft": Format("PEFT and diffusers (ZIP)", folder=True),
    "onetrainer": Format("OneTrainer"),
    "comfyui-oftv2": Format("ComfyUI with the OFTv2 node"),
    "sd-scripts": Format("sd-scripts"),
    "lora": Format("a LoRA that every tool loads (large)", ("--naming", "diffusers")),
    "diff": Format("differences, for ComfyUI, Forge and A1111 (large)"),
    "glora": Format("GLoRA, for ComfyUI and Forge (large)"),
    "folder": Format("the whole model with it, for everything (ZIP)", folder=True),
    "checkpoint": Format("the same as one file"),
}


class Workshop:
    """Makes things of adapters, each in its turn."""

    def __init__(self, workspace: Workspace, shelf: Shelf, machine: Machine, model: Model) -> None:
        self.workspace, self.shelf, self.machine, self.model = workspace, shelf, machine, model

    def formats(self) -> dict[str, str]:
        """Those that an adapter can be handed out in, and what they are for."""
        single = Path(self.model.source).suffix == ".safetensors"  # else there is no single file to write anew
        return {name: known.about for name, known in FORMATS.items() if single or name != "checkpoint"}

    def export(self, person: str, adapter_id: str, to: str) -> Job:
        """A file in another tool's format; the job finds what a user should know, then its path.

        Raises:
            OFTError: before anyone waits: there is no such adapter or format, no room, or too much waits already. That
                a format cannot hold the adapter, the job tells.
        """
        if to not in self.formats():
            raise ConfigError(f"there is no format {to!r}", expected=", ".join(self.formats()), fix="choose one")
        card = self.shelf.card(adapter_id)
        check_room(self.workspace)
        return self.machine.start(person, "export", lambda job: self._export(card, to, job))

    def combine(
        self, person: str, how: str, first: str, second: str, share: float = 0.5, *, trigger: str = "",
        class_word: str = "",
    ) -> Job:  # fmt: skip
        """A new adapter of two; the job finds what a user should know, then its card.

        Args:
            person: who asks.
            how: "interpolate" between them, or "compose": one after the other.
            first: an adapter's id.
            second: likewise.
            share: how far to interpolate, from 0 to 1.
            trigger: of the new one; where it is empty, those of both.
            class_word: of the new one; where it is empty, the one that both have.

        Raises:
            OFTError: before anyone waits: there is no such adapter or way, no room, or too much waits already. That
                the two cannot be one, the job tells.
        """
        if how not in WAYS or not 0 <= share <= 1:
            raise ConfigError("that is no way to combine", expected=f"{' or '.join(WAYS)}, from 0 to 1", fix="reload")
        cards = (self.shelf.card(first), self.shelf.card(second))
        check_shelf(self.workspace)
        name = checked_name(" and ".join(card.name for card in cards)[:60])
        words = (checked_word(trigger) or _both([c.trigger for c in cards]),
                 checked_word(class_word) or _shared([c.class_word for c in cards]))  # fmt: skip

        def work(job: Job) -> None:
            job.tell(text=f"making {name}")
            files = [_called(self.shelf.card(card.id), *words) for card in cards]
            job.check()
            made = interpolate(files[0], files[1], share) if how == "interpolate" else compose(files)
            job.check()
            card = self.shelf.put(made, name)
            card, notes = covered(self.shelf, self.model, card, job)
            job.tell(*made.notes, *notes, card, text=f"the adapter {card.name} is on the shelf")

        return self.machine.start(person, "combine", work)

    def cover(self, person: str, adapter_id: str) -> Job:
        """A new cover for an adapter, with its words in the prompt; the job finds the picture.

        Raises:
            OFTError: before anyone waits: there is no such adapter, or it does not fit this model, no room, or too much
                waits already.
        """
        card = self.shelf.card(adapter_id)
        if problem := self.shelf.fits(card, self.model.parts()):
            raise ConfigError(problem, expected="an adapter for this model", fix="choose another one")
        check_room(self.workspace)

        def keep(picture: Picture) -> Image.Image:
            self.shelf.give_cover(card, picture.image)
            return picture.image

        def work(job: Job) -> None:
            self.model.studio().draw(self.model.portrayed(self.shelf.card(card.id)), job, keep)
            job.tell(text=f"the adapter {card.name} has a new cover")

        return self.machine.start(person, "cover", work)

    def _export(self, card: Card, to: str, job: Job) -> None:
        card = self.shelf.card(card.id)  # or it is gone, which is said better than by whoever reads it
        known, name = FORMATS[to], f"{_file_name(card.name)}-{to}"
        with ExitStack() as unless_done:
            folder = self.workspace.fresh()
            unless_done.callback(shutil.rmtree, folder, ignore_errors=True)
            target = folder / (name if known.folder else f"{name}.safetensors")

            def tell(part: str) -> None:
                job.check()
                job.tell(text=part)

            own = _called(card, card.trigger, card.class_word)
            source = save_adapter_file(folder / FILE_NAME, own.components, own.metadata)
            *notes, _ = convert([str(source), str(target), "--to", to, *self._options(to)], tell)
            source.unlink()
            found = _zipped(target, job) if known.folder else target
            job.check()
            unless_done.pop_all()
        job.tell(*notes, found, text=f"the adapter {card.name} is in {found.name}, {found.stat().st_size / 1e6:.1f} MB")

    def _options(self, to: str) -> list[str]:
        if to == "oft":
            return []
        model = ["--model", self.model.source]
        if self.model.config_dir is not None:
            model += ["--config-dir", self.model.config_dir]
        base = ["--checkpoint", self.model.source] if to == "checkpoint" else []
        return [*model, *base, *FORMATS[to].options]


def _zipped(folder: Path, job: Job) -> Path:
    """A ZIP of a folder, in its place. Not compressed: weights hardly shrink."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    target = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for number, path in enumerate(files, 1):
            job.check()
            job.tell(text=f"packing {path.name}", done=number, total=len(files))
            archive.write(path, path.relative_to(folder.parent))
    shutil.rmtree(folder)
    return target


def _called(card: Card, trigger: str, class_word: str) -> AdapterFile:
    """By its own name, and with other words, which arithmetic keeps where both adapters agree on them."""
    file = load_adapter_file(card.file)
    words = replace(file.metadata, trigger=trigger or None, class_word=class_word or None)
    return replace(file, path=Path(card.name.replace("/", " ")), metadata=words)


def _both(triggers: Sequence[str]) -> str:
    return " ".join(dict.fromkeys(filter(None, triggers)))


def _shared(words: Sequence[str]) -> str:
    said = set(filter(None, words))
    return said.pop() if len(said) == 1 else ""


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "adapter"
