"""What programs may ask of the app, by name: everything else on the page is private."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio import events

from oft_diffusion.errors import OFTError

from .drawing import Request
from .session import Session
from .words import explained

NAMES = ("adapters", "draw")


class Api:
    """`/adapters` and `/draw`, as `gradio_client` calls them (docs/app.md)."""

    def __init__(self, session: Session) -> None:
        self.session = session
        adapters, draw = NAMES
        events.api(self.adapters, api_name=adapters, api_description="The adapters that fit this model.")
        events.api(self.draw, api_name=draw, api_description="One picture.", concurrency_limit=None)

    def adapters(self) -> list[dict[str, Any]]:
        """Id, name, trigger, class word and recommended strength of each."""
        told = ("id", "name", "trigger", "class_word", "strength")
        return [{key: getattr(card, key) for key in told} for card in self.session.fitting()]

    def draw(
        self, prompt: str, adapter: str = "", strength: float = 1.0, seed: int = 0, steps: int = 0,
        guidance: float = -1.0, negative: str = "", request: gr.Request | None = None,
    ) -> tuple[gr.FileData, dict[str, Any]]:  # fmt: skip
        """A picture as a file that the client fetches, and the settings that are written in it.

        Args:
            prompt: what to draw.
            adapter: an id; empty for the base.
            strength: of the adapter.
            seed: from 0.
            steps: 0 for the model's own.
            guidance: below 0 for the model's own.
            negative: what not to draw.
            request: whose call it is; gradio fills it in.
        """
        own = self.session.abilities
        try:
            cards = ((self.session.shelf.card(adapter), float(strength)),) if adapter else ()
            asked = Request(
                prompt, (int(seed),), negative, int(steps) or own.steps,
                own.guidance if guidance < 0 else float(guidance), adapters=cards,
            )  # fmt: skip
            job = self.session.draw_for_program(_caller(request), asked, _connection(request))
        except (OFTError, TypeError, ValueError, OverflowError) as error:
            raise gr.Error(explained(error), print_exception=False) from error
        *_, ended = job.watch()
        if ended.state != "done":
            raise gr.Error(ended.error or "cancelled", print_exception=False)
        [(path, _)] = ended.found
        return gr.FileData(path=str(path)), self.session.settings_in(path)

    def gone(self, request: gr.Request) -> None:
        """A page or a program has closed its connection."""
        self.session.hang_up(_connection(request))


def _connection(request: gr.Request | None) -> str:
    return str(getattr(request, "session_hash", None) or "")


def _caller(request: gr.Request | None) -> str:
    """Whose turn a call takes: the user's, or that of the machine that it comes from. No name that a caller chooses."""
    if request is None:
        return ""
    return str(request.username or (request.client.host if request.client else ""))
