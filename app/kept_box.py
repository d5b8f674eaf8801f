"""The part of the adapters tab that says what a person keeps on the server, and deletes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from oft_diffusion.errors import OFTError

from .events import PRIVATE
from .kept import ALL, MOST_BYTES, OLD, Kept
from .words import explained, told


class KeptBox:
    """Its components, and what they do.

    Attributes:
        shows: components elsewhere that show what can be deleted here, and what each then shows of a person.
    """

    def __init__(self, kept: Kept, person: gr.BrowserState) -> None:
        self.kept, self.person = kept, person
        self.shows: list[tuple[Any, Callable[[str], Any]]] = []
        with gr.Accordion("What you keep here", open=False) as self.box:
            self.told = gr.HTML(told(""), elem_id="kept")
            self.what = gr.Dropdown([], label="Delete", elem_id="kept-what")
            self.sure = gr.Checkbox(label="Yes, delete this for good", elem_id="kept-sure")
            self.go = gr.Button("Delete", variant="stop", interactive=False, elem_id="kept-delete")

    def wire(self) -> None:
        """Connect everything, once `shows` is complete."""
        looked = [self.told, self.what]
        self.box.expand(self.look, [self.person], looked, **PRIVATE)
        self.what.change(lambda: False, None, [self.sure], queue=False, **PRIVATE)  # what else was to be deleted
        self.sure.change(lambda sure: gr.update(interactive=bool(sure)), [self.sure], [self.go], **PRIVATE)
        deleted = [self.sure, *looked, *(component for component, _ in self.shows)]
        self.go.click(self.delete, [self.person, self.what, self.sure], deleted, **PRIVATE)

    def look(self, person: str, note: str = "") -> tuple[str, Any]:
        """How much there is, and what of it can be deleted."""
        usage = self.kept.usage(person)
        pictures = f"{_several(usage.pictures, 'picture')}, {_size(usage.picture_bytes)}"
        runs = f"{_several(len(usage.runs), 'training run')}, {_size(sum(size for _, size in usage.runs))}"
        of = f"{_size(usage.bytes)} of at most {MOST_BYTES / 1e9:.0f} GB"
        choices = [
            (f"{ALL}, {_size(usage.picture_bytes)}", ALL), (OLD, OLD),
            *((f"the run {run.name} of {run.steps} steps, {_size(size)}", run.id) for run, size in usage.runs),
        ]  # fmt: skip
        return told(note, f"{of}: {pictures}; {runs}"), gr.update(choices=choices, value=None)

    def delete(self, person: str, what: str | None, sure: bool) -> tuple[Any, ...]:
        """Delete what was chosen, where that was confirmed."""
        try:
            note = "" if not sure else self.kept.delete(person, what) if what else "Nothing is chosen"
        except OFTError as error:
            note = explained(error)
        return (False, *self.look(person, note), *(show(person) for _, show in self.shows))


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.0f} KB"


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
