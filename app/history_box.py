"""The part of the drawing tab with a person's earlier pictures: looked through, taken up again, and deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from oft_diffusion.errors import OFTError

from .events import PRIVATE
from .session import Session
from .words import explained, told

AT_ONCE = 60  # pictures that are shown at first, and that each "Older ones" adds


class HistoryBox:
    """Its components, and what they do.

    Attributes:
        shown: what `look` fills.
    """

    def __init__(self, session: Session, person: gr.BrowserState) -> None:
        self.session, self.person = session, person
        self.picture = gr.State("")  # id of the chosen one
        self.count = gr.State(AT_ONCE)
        with gr.Accordion("Earlier pictures", open=False):
            self.pictures = gr.Gallery(
                show_label=False, columns=6, object_fit="cover", height=320, interactive=False,
                elem_id="history", buttons=["download", "fullscreen"],
            )  # fmt: skip
            small: dict[str, Any] = {"size": "sm", "min_width": 120}
            with gr.Row():
                self.take = gr.Button("Take its settings", interactive=False, elem_id="history-take", **small)
                self.delete = gr.Button("Delete this one", interactive=False, elem_id="history-delete", **small)
                self.more = gr.Button("Older ones", visible=False, elem_id="history-more", **small)
            self.note = gr.HTML(told(""), elem_id="history-note")
        self.shown = [self.pictures, self.more]

    def wire(self, take_over: Callable[[str, Path], tuple[Any, ...]], taken: list[Any]) -> None:
        """Connect everything.

        Args:
            take_over: fills a form with the settings of a picture, given what to call it and where it is.
            taken: what that fills.
        """
        acts = [self.take, self.delete]
        self.pictures.select(self.choose, None, [self.picture, *acts], queue=False, **PRIVATE)
        self.more.click(self.look_further, [self.person, self.count], [self.count, *self.shown], **PRIVATE)
        self.take.click(
            lambda person, picture: self._taken(take_over, len(taken), person, picture), [self.person, self.picture],
            [self.note, *taken], **PRIVATE,
        )  # fmt: skip
        self.delete.click(
            self.forget, [self.person, self.picture, self.count], [self.note, self.picture, *acts, *self.shown],
            **PRIVATE,
        )  # fmt: skip

    def look(self, person: str, count: int = AT_ONCE) -> tuple[Any, Any]:
        """This person's newest pictures, each with its caption, and whether there are older ones."""
        paths = self.session.history(person)
        pictures = [(str(path), self.session.caption(path)) for path in paths[:count]]
        return pictures, gr.update(visible=len(paths) > count)

    def look_further(self, person: str, count: int) -> tuple[Any, ...]:
        """The same, and as many more."""
        return count + AT_ONCE, *self.look(person, count + AT_ONCE)

    def choose(self, event: gr.SelectData) -> tuple[Any, ...]:
        """The picture that was clicked, by its name: what has come meanwhile has moved the places."""
        value = event.value if isinstance(event.value, dict) else {}
        path = (value.get("image") or {}).get("path")
        return Path(str(path or "")).stem, gr.update(interactive=True), gr.update(interactive=True)

    def forget(self, person: str, picture: str, count: int) -> tuple[Any, ...]:
        """Delete the chosen picture for good."""
        try:
            self.session.training.kept.delete_picture(person, picture)
            note = "The picture is deleted"
        except OFTError as error:
            note = explained(error)
        return told(note), "", *[gr.update(interactive=False)] * 2, *self.look(person, count)

    def _taken(
        self, take_over: Callable[[str, Path], tuple[Any, ...]], places: int, person: str, picture: str
    ) -> tuple[Any, ...]:  # fmt: skip
        try:
            path = self.session.training.kept.picture(person, picture)
        except OFTError as error:
            return told(explained(error)), *[gr.skip()] * places
        return told(""), *take_over("this picture", path)
