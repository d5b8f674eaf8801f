"""The page: its tabs, what they show each other, and whose it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from .adapter_slots import NONE
from .adapters_tab import AdaptersTab, Cards, Choices, usable
from .api import Api
from .compare_tab import CompareTab
from .events import PRIVATE
from .generate_tab import GenerateTab
from .session import Session
from .train_tab import TrainTab
from .workspace import is_token, new_token


class Page(gr.Blocks):
    """Blocks whose events trust no browser to say who somebody with a password is, nor where a file lies.

    Attributes:
        person: the component that says who somebody without one is.
        token_of: gives the token of a user.
        uploads: the folder of what was uploaded.
    """

    person: gr.BrowserState
    token_of: Callable[[str], str]
    uploads: Path

    async def process_api(
        self, block_fn: Any, inputs: list[Any], state: Any = None, request: Any = None, *rest: Any, **more: Any
    ) -> dict[str, Any]:
        """As gradio's; each event passes here, those of parts that are laid out later, too.

        Raises:
            gr.Error: an input names a file that nobody has uploaded. Gradio would fetch one of another address, and
                open any picture of this machine whose input says less of it than a browser does.
        """
        if _names_other_files(inputs, self.uploads.resolve()):
            raise gr.Error("Upload the file itself: its path or address will not do.", print_exception=False)
        user = getattr(request[0] if isinstance(request, list) else request, "username", None)
        if user:
            event = self.fns[block_fn] if isinstance(block_fn, int) else block_fn
            own = self.token_of(str(user))
            inputs = [
                own if block is self.person else value for block, value in zip(event.inputs, inputs, strict=False)
            ]
        return await super().process_api(block_fn, inputs, state, request, *rest, **more)


def build(session: Session) -> Page:
    """The page as gradio Blocks."""
    with Page(title="oft-diffusion", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        programs = Api(session)  # first, so that its names are not taken
        page.unload(programs.gone)
        person = gr.BrowserState(None, storage_key="oft-diffusion-person", secret="oft-diffusion")
        page.person, page.token_of, page.uploads = person, session.workspace.token_of, session.workspace.temporary
        gr.Markdown(
            f"# oft-diffusion\nTeach **{session.abilities.model}** your own subject under *Train*, then draw it "
            f"anywhere under *Generate*. {_where(session.model.device)}",
            elem_id="title",
        )
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                drawing = GenerateTab(session, person)
            compare_place = gr.Tab("Compare", id="compare")
            train_place = gr.Tab("Train", id="train")
            with gr.Tab("Adapters", id="adapters"):
                shelf = AdaptersTab(session, person, [(menu, _or_none) for menu in drawing.slots.menus])
            with compare_place:
                comparing = CompareTab(session, person)
                shelf.menus += [(comparing.adapter, usable), (comparing.others, usable)]
                shelf.menus.append((comparing.run, lambda _: comparing.runs()))
            shelf.wire()
            with train_place:
                training = TrainTab(session, person, shelf.refresh, shelf.changed, drawing.slots)
        training.compare.click(
            lambda person, prompt: _shown_in_compare(comparing, session.training.comparable(person), prompt),
            [person, comparing.prompt], [tabs, *comparing.of_a_run], queue=False, **PRIVATE,
        )  # fmt: skip
        shelf.kept.shows = [
            (comparing.run, lambda _: gr.update(choices=comparing.runs(), value=None)),
            (training.earlier, lambda person: gr.update(choices=training.unfinished(person), value=None)),
            (training.along, lambda person: gr.update(choices=training.runs(person), value="")),
            (drawing.history.pictures, lambda person: drawing.history.look(person)[0]),
            (drawing.history.more, lambda person: drawing.history.look(person)[1]),
        ]
        shelf.kept.wire()

        def who(token: object) -> str:
            """A token for a browser that has none; a user with a password has one already (`Page`)."""
            return str(token) if is_token(token) else new_token()

        known = page.load(who, [person], [person], **PRIVATE)
        known.then(shelf.refresh, None, shelf.changed, **PRIVATE)
        known.then(shelf.again, [person], shelf.working, concurrency_limit=None, **PRIVATE)
        known.then(training.look, [person], training.looked, **PRIVATE)
        drawing.begin(known)
        comparing.begin(known)
        training.begin(known)
    return page


def _names_other_files(value: Any, uploads: Path) -> bool:
    """Whether a file that it names lies elsewhere. A browser tells the `url` of an upload, too, which nobody reads."""
    if isinstance(value, dict):
        elsewhere = value.get("path") is not None and not _lies_in(uploads, str(value["path"]))
        return elsewhere or any(_names_other_files(part, uploads) for part in value.values())
    return isinstance(value, list) and any(_names_other_files(part, uploads) for part in value)


def _lies_in(folder: Path, path: str) -> bool:
    try:
        return Path(path).resolve().is_relative_to(folder)
    except (OSError, ValueError):  # no path of any file
        return False


def _shown_in_compare(comparing: CompareTab, run: str, prompt: str | None) -> tuple[Any, ...]:
    """The tab that compares, asked for this run's checkpoints; nothing where there are none any more."""
    found = comparing.asked_for(run, prompt or "") if run else None
    return (gr.skip(),) * (1 + len(comparing.of_a_run)) if found is None else (gr.update(selected="compare"), *found)


def _or_none(cards: Cards) -> Choices:
    return [("none", NONE), *usable(cards)]


def _where(device: str) -> str:
    return "Works on the processor." if device == "cpu" else f"Works on {device}."
