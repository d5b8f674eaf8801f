"""The adapters of a workspace: what each one is, and how they come, change their names and go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from oft_diffusion.disk import has_metadata, write_atomically
from oft_diffusion.errors import AdapterFileError, ConfigError, OFTError
from oft_diffusion.files import FILE_NAME, AdapterFile, load_adapter_file, save_adapter_file
from oft_diffusion.formats import read
from oft_diffusion.formats.writing import check_fit
from oft_diffusion.images import save_png
from oft_diffusion.inject import KEY_SUFFIX
from oft_diffusion.metadata import HEADER_KEY
from oft_diffusion.rotation import orthogonality_error, rotation_delta

from .workspace import Workspace, new_id

COVER = "cover.png"
_LABEL = "label.json"
LONGEST_NAME, LONGEST_WORD = 60, 100  # of adapters; of triggers and class words


@dataclass(frozen=True)
class Card:
    """What is shown of an adapter.

    Attributes:
        id: of its folder.
        name: as its owner calls it.
        trigger, class_word: what names the subject in a prompt; empty where neither the file nor anybody tells.
        base: what it was trained on.
        classes: component to class name, of that base.
        block_sizes: of its blocks, as text.
        layers: how many are adapted.
        bytes: of the file.
        created: date and time, UTC.
        strength: what its author recommends.
        training: settings.
        error: orthogonality error.
        cover: a picture, if there is one.
        drawn: when that was written, by which a browser knows that there is a new one.
        file: the adapter's.
    """

    id: str
    name: str
    trigger: str
    class_word: str
    base: str
    classes: Mapping[str, str]
    block_sizes: str
    layers: int
    bytes: int
    created: str
    strength: float
    training: Mapping[str, Any]
    error: float
    cover: Path | None
    drawn: int
    file: Path

    @property
    def phrase(self) -> str:
        """What a prompt should hold: trigger and class word."""
        return " ".join(filter(None, (self.trigger, self.class_word)))


class Shelf:
    """The adapters."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._known: dict[Path, tuple[int, Card]] = {}  # by file, with its time of change
        self._fits: dict[tuple[Any, ...], str] = {}  # by file, which never changes, and model

    def cards(self) -> list[Card]:
        """All that can be read, newest first."""
        found = []
        for folder in sorted(self.workspace.adapters.iterdir(), reverse=True):
            try:
                found.append(self.card(folder.name))
            except OFTError:  # a broken file is no reason to show nothing
                continue
        return found

    def card(self, adapter_id: str) -> Card:
        """One adapter.

        Raises:
            OFTError: there is none of that id, or its file is broken.
        """
        if not adapter_id:
            raise ConfigError("no adapter is chosen", expected="one on the shelf", fix="choose one")
        folder = self.workspace.adapter(adapter_id)
        file = folder / FILE_NAME
        if not file.is_file():
            raise AdapterFileError("this adapter is gone", expected="one on the shelf", fix="reload the page")
        changed = file.stat().st_mtime_ns
        known, card = self._known.get(file, (None, None))
        if card is None or known != changed:
            card = read_card(adapter_id, load_adapter_file(file))
            self._known[file] = (changed, card)
        return _labelled(card, folder)

    def holds(self, card: Card) -> bool:
        """Whether nobody has deleted it."""
        return card.file.is_file()

    def add(self, file: Path, name: str) -> Card:
        """Take a copy of a file of ours.

        Raises:
            OFTError: it is broken or another tool's.
        """
        loaded = load_adapter_file(file)
        return self.put(loaded, name)

    def put(self, file: AdapterFile, name: str) -> Card:
        """Write an adapter that is in memory.

        Raises:
            ConfigError: the name is empty or too long.
        """
        name, adapter_id = checked_name(name), new_id()
        folder = self.workspace.adapter(adapter_id)
        save_adapter_file(folder / FILE_NAME, file.components, file.metadata)
        _write_label(folder, name=name)
        return self.card(adapter_id)

    def give_cover(self, card: Card, picture: Image.Image) -> Card:
        """A picture for the card.

        Raises:
            OFTError: it is gone.
        """
        save_png(picture, self.card(card.id).file.parent / COVER)
        return self.card(card.id)

    def take_in(
        self, file: Path, parts: Mapping[str, nn.Module], name: str, component: str | None = None
    ) -> tuple[Card, list[str]]:
        """Take in a file of any tool, and say what a user should know of it.

        Raises:
            OFTError: it is broken, cannot be represented, or is for another base.
        """
        if has_metadata(file, HEADER_KEY):
            own = load_adapter_file(file)
            check_fit(own, parts)
            card = self.put(own, name)
            return card, [f"{card.layers} layers, a file of oft-diffusion"]
        imported = read(file, parts, component=component)
        card = self.put(imported.file, name)
        return card, [f"{card.layers} layers, a file of {imported.format}", *imported.notes]

    def label(self, adapter_id: str, name: str, trigger: str, class_word: str) -> None:
        """Give another name, and other words than the file tells, which stays as it is.

        Raises:
            OFTError: there is none, or the name is empty or too long, or a word is too long.
        """
        folder = self.card(adapter_id).file.parent
        words = {"trigger": checked_word(trigger), "class_word": checked_word(class_word)}
        _write_label(folder, name=checked_name(name), **words)

    def delete(self, adapter_id: str) -> None:
        """Remove an adapter for good, whole or not at all.

        Raises:
            OFTError: there is none.
        """
        file = self.card(adapter_id).file
        self.workspace.remove(self.workspace.adapter(adapter_id))
        self._known.pop(file, None)
        for key in [key for key in list(self._fits) if key[0] == file]:
            self._fits.pop(key, None)

    def fits(self, card: Card, parts: Mapping[str, nn.Module]) -> str:
        """Why an adapter cannot be used on these components; empty where it can."""
        for part, wanted in card.classes.items():
            here = type(parts[part]).__name__ if part in parts else None
            if here != wanted:
                has = f"its {part} is a {here}" if here else f"it has no {part}"
                return f"{card.name} was trained on a {wanted}; of this model {has}"
        key = (card.file, *(id(module) for module in parts.values()))
        if key not in self._fits:
            try:
                check_fit(load_adapter_file(card.file), parts)
                self._fits[key] = ""
            except OFTError as error:
                self._fits[key] = error.problem
        return self._fits[key]


def checked_name(name: str) -> str:
    """The name of an adapter, without spaces too many.

    Raises:
        ConfigError: it is empty or too long.
    """
    name = " ".join(name.split())
    if not name:
        raise ConfigError("the name is missing", expected=f"1 to {LONGEST_NAME} letters", fix="write one")
    if len(name) > LONGEST_NAME:
        raise ConfigError(f"a name of {len(name)} letters", expected=f"1 to {LONGEST_NAME}", fix="choose another name")
    return name


def checked_word(text: str) -> str:
    """A trigger or a class word, of one word or several, or none, without spaces too many.

    Raises:
        ConfigError: it is too long.
    """
    text = " ".join(text.split())
    if len(text) > LONGEST_WORD:
        raise ConfigError(
            f"a trigger or class word of {len(text)} letters", expected=f"at most {LONGEST_WORD}", fix="shorten it"
        )
    return text


def read_card(adapter_id: str, file: AdapterFile) -> Card:
    """What a file says of itself."""
    metadata = file.metadata
    configs = metadata.components
    packed = [
        (configs[part], tensor)
        for part, state in file.components.items()
        for key, tensor in state.items()
        if key.endswith(KEY_SUFFIX)
    ]
    sizes = dict.fromkeys(str(config.block_size) for config in configs.values())
    errors = (float(orthogonality_error(rotation_delta(tensor.float(), config))) for config, tensor in packed)
    return Card(
        id=adapter_id,
        name=metadata.trigger or "adapter",
        trigger=metadata.trigger or "",
        class_word=metadata.class_word or "",
        base=str(metadata.base.get("name", "")),
        classes=metadata.base.get("components", {}),
        block_sizes=", ".join(sizes),
        layers=len(packed),
        bytes=file.path.stat().st_size,
        created=metadata.created,
        strength=metadata.strength,
        training=metadata.training,
        error=max(errors),
        cover=None,
        drawn=0,
        file=file.path,
    )


def _write_label(folder: Path, **told: str) -> None:
    write_atomically(folder / _LABEL, json.dumps(told).encode())


def _labelled(card: Card, folder: Path) -> Card:
    """With the name, the words and the cover, which may change."""
    try:
        told = dict(json.loads((folder / _LABEL).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        told = {}
    own: dict[str, Any] = {key: str(told[key]) for key in ("name", "trigger", "class_word") if key in told}
    cover = folder / COVER
    with suppress(FileNotFoundError):
        own |= {"cover": cover, "drawn": cover.stat().st_mtime_ns}
    return replace(card, **own)
