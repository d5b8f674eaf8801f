"""The tab that draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from oft_diffusion.errors import DataError, OFTError

from .adapter_slots import AdapterSlots
from .drawing import MOST_ADAPTERS, MOST_PICTURES, Request, number, seeds_from, settings_of, size_like
from .events import EACH_TIME, LOOKING, PRIVATE, as_it_came
from .history_box import HistoryBox
from .photos import check_upload, uploaded
from .session import Session
from .settings_box import SettingsBox, negative_prompt
from .trigger_box import TriggerBox
from .words import explained, status_line, told

_GO, _GOING = "Generate", "Drawing … press for more"


class GenerateTab:
    """Its components, and what they do."""

    def __init__(self, session: Session, person: gr.BrowserState) -> None:
        self.session, self.person = session, person
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self._form()
            with gr.Column(scale=5, min_width=320):
                self._results()
        self._wire()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _form(self) -> None:
        own = self.session.abilities
        self.prompt = gr.Textbox(
            label="Prompt", lines=3, autofocus=True, elem_id="prompt",
            placeholder="what to draw, for example: a red car on the beach",
        )  # fmt: skip
        self.triggers = TriggerBox(self.prompt)
        self.negative = negative_prompt(own)
        self.slots = AdapterSlots(self.session)
        with gr.Row(equal_height=True):
            self.seed = gr.Number(value=0, precision=0, minimum=0, label="First seed", elem_id="seed", min_width=120)
            self.fixed = gr.Checkbox(value=False, label="Keep this seed", elem_id="fixed", min_width=120)
        with gr.Accordion("Settings", open=False):
            self.count = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures", elem_id="count")
            self.settings = SettingsBox(own)
        with gr.Accordion("Begin with a picture", open=False, visible=own.image):
            self.image = gr.Image(
                label="A picture to begin with", type="filepath", sources=["upload", "clipboard"], height=220,
                elem_id="begin",
            )  # fmt: skip
            # Gradio would decode whatever it is, and could not say what is wrong with it.
            self.image.preprocess = _path_of  # type: ignore[method-assign]
            self.about_image = gr.HTML(told(""), elem_id="begin-note")
            self.change = as_it_came(
                gr.Slider(0.05, 1.0, 0.6, step=0.05, label="How much of it may change", elem_id="change")
            )
        for component in (self.seed, self.count):
            as_it_came(component)

    def _results(self) -> None:
        with gr.Row():
            self.go = gr.Button(_GO, variant="primary", elem_id="generate", min_width=120)
            self.cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel", min_width=120)
        self.status = gr.HTML(status_line(None), elem_id="status")
        with gr.Column(elem_id="stage"):  # the unfinished picture lies over the finished ones: nothing moves
            self.preview = gr.Image(
                label="Unfinished", visible=False, interactive=False, alt_text="The picture so far", buttons=[],
                elem_id="preview",
            )  # fmt: skip
            self.pictures = gr.Gallery(
                label="Pictures", columns=2, object_fit="contain", height=680, interactive=False,
                elem_id="pictures", buttons=["download", "fullscreen"],
            )  # fmt: skip
        self.recall = gr.File(
            label="Settings from a picture drawn here", file_types=[".png"], height=130, elem_id="recall"
        )  # fmt: skip
        self.recalled = gr.HTML(told(""), elem_id="recall-note")
        self.history = HistoryBox(self.session, self.person)

    def _wire(self) -> None:
        self.asked = [
            self.person, self.prompt, self.negative, *self.slots.inputs, self.seed, self.fixed, self.count, self.image,
            self.change, *self.settings.inputs,
        ]  # fmt: skip
        self.shown = [
            self.status, self.preview, self.pictures, *self.history.shown, self.seed, self.go, self.cancel
        ]  # fmt: skip
        self.cancel.click(self.stop, [self.person], None, queue=False, **PRIVATE)
        self.slots.wire()
        self.triggers.wire(self.slots.subjects, self.slots.chosen)
        sides = [self.settings.width, self.settings.height]
        self.image.change(self.look_at, [self.image], [self.about_image, *sides], queue=False, **PRIVATE)
        taken = [
            self.prompt, self.negative, *self.slots.inputs, self.slots.more, self.seed, self.fixed, self.change,
            *self.settings.inputs, self.recall, self.recalled,
        ]  # fmt: skip
        self.recall.upload(self.recall_from, [self.recall], taken, **PRIVATE)
        self.history.wire(self.take_over, taken)

    def begin(self, known: Any) -> None:
        """Connect Generate, and show, once it is known who looks, what that person is drawing.

        The button keeps the keyboard's focus while it works, and changes its words: pressed again, it draws once more.
        """
        resumed = known.then(self.resume, [self.person], self.shown, **LOOKING)
        drawn = gr.on([self.go.click, self.prompt.submit], self.draw, self.asked, self.shown, **EACH_TIME)
        for going in (resumed, drawn):
            going.then(self.rest, [self.person], [self.go, self.cancel], queue=False, **PRIVATE)

    # -- actions -----------------------------------------------------------------------------------------------------

    def draw(self, person: str, prompt: str, negative: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Draw what the form says, and show how it goes."""
        places = 3 * MOST_ADAPTERS
        slots, (seed, fixed, count, image, change, *settings) = values[:places], values[places:]
        try:
            first = int(number("The first seed", seed)) if fixed else random.randrange(2**31)
            request = Request(
                prompt or "", seeds_from(first, int(number("The number of pictures", count))), negative or "",
                adapters=self.session.stack(slots), image=_begun_with(image),
                change=float(number("How much may change", change)), **settings_of(*settings),
            )  # fmt: skip
            self.session.draw(person, request)
        except (OFTError, TypeError, ValueError, OverflowError) as error:
            yield (status_line(None, explained(error)), *[gr.skip()] * (len(self.shown) - 1))
            return
        yield from self._follow(person, first)

    def resume(self, person: str) -> Iterator[tuple[Any, ...]]:
        """After a reload: the pictures that are being drawn, or those of before."""
        yield (*[gr.skip()] * 3, *self.history.look(person), *[gr.skip()] * 3)
        yield from self._follow(person, None)

    def _follow(self, person: str, seed: int | None) -> Iterator[tuple[Any, ...]]:
        shown: tuple[Any, ...] | None = None
        for now in self.session.machine.watch_newest(person, "draw"):
            fresh, shown = now.found != shown, now.found
            yield (
                status_line(now),
                gr.update(value=now.preview, visible=True) if now.preview is not None else gr.update(visible=False),
                [(str(path), caption) for path, caption in now.found] if fresh else gr.skip(),
                *(self.history.look(person) if now.ended else [gr.skip()] * 2),
                gr.skip() if seed is None else seed,  # once: the next drawing's seed is another
                gr.update(value=_GOING) if not now.ended else gr.skip(),
                gr.update(interactive=not now.ended),
            )
            seed = None

    def rest(self, person: str) -> tuple[Any, Any]:
        """The buttons as they are while nothing is drawn."""
        if self.session.machine.under_way(person, "draw"):  # it was another event that has ended
            return gr.skip(), gr.skip()
        return gr.update(value=_GO), gr.update(interactive=False)

    def stop(self, person: str) -> None:
        """Cancel all of this person's drawings, those that wait, too."""
        self.session.machine.cancel_all(person, "draw")

    def look_at(self, image: str | None) -> tuple[Any, Any, Any]:
        """What is to be known of a picture to begin with, and a size of its shape."""
        own = self.session.abilities
        if not image:
            return told(""), own.size, own.size
        try:
            picture = uploaded(Path(image))
        except DataError as error:
            return told(_unusable(image, error).problem), gr.skip(), gr.skip()
        width, height = size_like(picture.size, own)
        return told(f"width and height are now {width} and {height}, its shape; others cut it"), width, height

    def recall_from(self, path: str | None) -> tuple[Any, ...]:
        """Settings out of a dropped picture."""
        if path is None:
            return (gr.skip(),) * (self._form_parts + 2)
        return self.take_over(Path(path).name, Path(path))

    def take_over(self, name: str, path: Path) -> tuple[Any, ...]:
        """Settings out of a picture."""
        nothing = [gr.skip()] * self._form_parts
        try:
            request, notes = self.session.request_from(self.session.settings_in(check_upload(path)))
        except OFTError as error:
            return (*nothing, None, told(f"{name}: {explained(error)}"))
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            return (*nothing, None, told(f"{name}: its settings make no sense"))
        own = self.session.abilities
        return (
            request.prompt, request.negative, *self.slots.filled(request.adapters),
            gr.update(open=len(request.adapters) > 1), request.seeds[0], True, request.change,
            request.steps, request.guidance, request.scheduler or own.schedulers[0],
            request.width or own.size, request.height or own.size,
            None, told(f"the settings of {name} are in the form", *notes),
        )  # fmt: skip

    @property
    def _form_parts(self) -> int:
        """How many components settings fill."""
        return 2 + 3 * MOST_ADAPTERS + 4 + len(self.settings.inputs)


def _path_of(payload: Any) -> str | None:
    """The path of an upload, which gradio has checked to be one."""
    return None if payload is None else str(payload.path or "")


def _begun_with(image: str | None) -> Any:
    """The picture to begin with.

    Raises:
        DataError: it is none.
    """
    try:
        return uploaded(Path(image)) if image else None
    except DataError as error:
        raise _unusable(str(image), error) from error


def _unusable(image: str, error: DataError) -> DataError:
    problem = f"{Path(image).name} cannot be used: {error.problem}"
    return DataError(problem, expected=error.expected, fix="take it out, or choose another one")
