"""The picture that a new adapter gets: drawn by the job that made the adapter, which does not depend on it."""

from __future__ import annotations

import logging
from typing import Any

from .machine import Cancelled, Job
from .model import Model
from .shelf import Card, Shelf
from .words import UNFORESEEN, explained, is_foreseen

_LOG = logging.getLogger(__name__)


class Drawing(Job):
    """The drawing of a cover: what it does, the job of the adapter tells, and who cancels that ends this."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.owner, job.kind)
        self.job = job

    def check(self) -> None:
        self.job.check()

    def tell(self, *_: Any, **changes: Any) -> None:
        changes.pop("preview", None)
        if "text" in changes:
            changes["text"] = f"drawing a cover: {changes['text']}"
        self.job.tell(**changes)


def covered(shelf: Shelf, model: Model, card: Card, job: Job) -> tuple[Card, list[str]]:
    """The card with a cover, or, where drawing it fails or is cancelled, as it was and a sentence that says so."""
    job.tell(text="drawing a cover", seconds_left=None)
    try:
        return shelf.give_cover(card, model.portrait(card, Drawing(job))), []
    except Cancelled:
        why = "drawing it was cancelled"
    except Exception as error:  # noqa: BLE001 - whatever it is, the adapter is there
        if not is_foreseen(error):
            _LOG.exception("no cover of %s", card.id)
        why = explained(error) if is_foreseen(error) else UNFORESEEN
    return card, [f"{card.name} has no cover: {why}"]
