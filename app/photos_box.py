"""The part of the training tab that takes pictures in: dropped or by example, each with its caption under it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from oft_diffusion.errors import OFTError

from .events import PRIVATE
from .photos import MOST, Photos
from .training import Training
from .words import explained, told


class PhotosBox:
    """Its components, and what they do.

    Attributes:
        looked: what `look` fills.
    """

    def __init__(self, training: Training, person: gr.BrowserState) -> None:
        self.training, self.person = training, person
        self.drop = gr.File(
            label="3 to 8 pictures of the subject", file_count="multiple",
            file_types=["image", ".txt"], height=160, elem_id="photos-drop",
        )  # fmt: skip
        examples = training.examples()
        with gr.Row(visible=bool(examples)):
            self.example = gr.Dropdown(
                [(name.replace("_", " "), name) for name in examples], value=None, scale=3, min_width=150,
                label="Nothing at hand? Try an example", elem_id="photos-example",
            )  # fmt: skip
            self.clear = gr.Button("Take all out", size="sm", scale=1, min_width=100, elem_id="photos-clear")
        self.note = gr.HTML(told(""), elem_id="photos-note")
        self.count = gr.State(0)  # counts changes, each of which lays the pictures out anew
        self.looked = [self.note, self.count]
        self.drop.upload(self.add, [person, self.drop, self.count], [self.drop, *self.looked], **PRIVATE)
        self.clear.click(self.take_all_out, [person, self.count], self.looked, **PRIVATE)
        # By nothing but the count: gradio fails where a page is laid out twice at once.
        lay_out = gr.render([person, self.count], [self.count.change], queue=False, show_progress="hidden")
        lay_out(self._lay_out)

    def on_example(self, name: gr.Textbox, class_word: gr.Textbox) -> None:
        """Let an example fill in its words, too."""
        self.example.select(
            self.take_example, [self.person, self.example, self.count], [name, class_word, *self.looked], **PRIVATE
        )

    def _lay_out(self, person: str, count: int) -> None:
        photos = self._of(person).look(self.training.resolution) if person else []
        with gr.Row(elem_id="photos"):
            for number, photo in enumerate(photos, 1):
                with gr.Column(min_width=150, elem_classes="photo-tools"):
                    gr.Image(
                        str(photo.path), label=f"Picture {number}", height=150, interactive=False, buttons=[],
                        alt_text=photo.caption or f"Picture {number} of the subject, without a caption",
                    )  # fmt: skip
                    caption = gr.Textbox(
                        photo.caption, label=f"Caption of picture {number}", lines=2, max_lines=3,
                        placeholder="what it shows besides the subject: a red car in a room", interactive=True,
                    )  # fmt: skip
                    remove = gr.Button(f"Remove picture {number}", size="sm")
                caption.change(self._describer(photo.id), [self.person, caption], None, queue=False, **PRIVATE)
                remove.click(self._remover(photo.id), [self.person, self.count], self.looked, **PRIVATE)

    # -- actions -----------------------------------------------------------------------------------------------------

    def look(self, person: str, count: int = 0, problems: list[str] | None = None) -> tuple[str, int]:
        """What may be wrong with the pictures; and one change more."""
        photos = self._of(person).look(self.training.resolution)
        notes = list(problems or [])
        if photos and not 3 <= len(photos) <= 8:
            notes.append(f"{len(photos)} of {MOST} at most; 3 to 8 do best")
        notes += [f"picture {i}: {note}" for i, photo in enumerate(photos, 1) for note in photo.notes]
        return told(*notes), (count or 0) + 1

    def add(self, person: str, files: list[str] | None, count: int) -> tuple[Any, ...]:
        """Take pictures in."""
        problems = self._of(person).add(map(Path, files or []))
        return (None, *self.look(person, count, problems))

    def take_example(self, person: str, name: str, count: int) -> tuple[Any, ...]:
        """An example's pictures, and its words."""
        try:
            subject = self.training.take_example(person, name)
        except OFTError as error:
            return (gr.skip(), gr.skip(), *self.look(person, count, [explained(error)]))
        return (subject.name.replace("_", " "), subject.object, *self.look(person, count))

    def take_all_out(self, person: str, count: int) -> tuple[str, int]:
        """No pictures any more."""
        self._of(person).clear()
        return self.look(person, count)

    def _describer(self, photo_id: str) -> Callable[[str, str], None]:
        def describe(person: str, caption: str) -> None:
            try:
                self._of(person).describe(photo_id, caption or "")
            except OFTError as error:  # it was taken out meanwhile
                gr.Warning(explained(error))

        return describe

    def _remover(self, photo_id: str) -> Callable[[str, int], tuple[str, int]]:
        def remove(person: str, count: int) -> tuple[str, int]:
            try:
                self._of(person).remove(photo_id)
            except OFTError as error:
                return self.look(person, count, [explained(error)])
            return self.look(person, count)

        return remove

    def _of(self, person: str) -> Photos:
        return self.training.photos(person)
