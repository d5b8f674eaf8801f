"""The tab that draws."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from oft_diffusion.errors import DataError, OFTError

from .drawing import MOST_PICTURES, MOST_STEPS, Request, seeds_from
from .events import PRIVATE
from .machine import Busy, Job
from .photos import check_upload, uploaded
from .session import Session
from .shelf import Card
from .words import explained, status_line

SLOTS = 3
NONE = ""
HISTORY = 60  # pictures that are shown


class GenerateTab:
    """Its components, and what they do."""

    def __init__(self, session: Session, person: gr.BrowserState) -> None:
        self.session, self.person = session, person
        own = session.abilities
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self.prompt = gr.Textbox(
                    label="Prompt", lines=3, autofocus=True, elem_id="prompt",
                    placeholder="what to draw, for example: a red car on the beach",
                )  # fmt: skip
                self.triggers = gr.Dataset(
                    components=[gr.Textbox(visible=False)], samples=[], label="Click to name the subject",
                    visible=False, elem_id="triggers", type="index",
                )  # fmt: skip
                self.warning = gr.Markdown(visible=False, elem_id="trigger-warning")
                self.negative = gr.Textbox(
                    label="Negative prompt", lines=1, visible=own.negative, elem_id="negative",
                    placeholder="what not to draw",
                )  # fmt: skip
                first = self._slot(0)
                with gr.Accordion("More adapters, one after another", open=False):
                    self.slots = [first, *(self._slot(i) for i in range(1, SLOTS))]
                self.seed, self.fixed = self._seed()
                with gr.Accordion("Settings", open=False):
                    self.settings = self._settings()
                with gr.Accordion("Begin with a picture", open=False, visible=own.image):
                    self.image = gr.Image(
                        label="A picture to begin with",
                        type="filepath",
                        sources=["upload", "clipboard"],
                        height=220,
                        elem_id="begin",
                    )
                    # Gradio would decode whatever it is, and could not say what is wrong with it.
                    self.image.preprocess = _as_it_came  # type: ignore[method-assign]
                    self.change = gr.Slider(
                        0.05, 1.0, 0.6, step=0.05, label="How much of it may change", elem_id="change"
                    )
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    self.go = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
                    self.cancel = gr.Button(
                        "Cancel", variant="stop", interactive=False, elem_id="cancel", min_width=120
                    )  # fmt: skip
                self.status = gr.HTML(status_line(None), elem_id="status")
                self.preview = gr.Image(
                    label="Unfinished", visible=False, interactive=False, height=260, alt_text="The picture so far",
                    buttons=[], elem_id="preview",
                )  # fmt: skip
                self.pictures = gr.Gallery(
                    label="Pictures", columns=2, object_fit="contain", height=680, interactive=False,
                    elem_id="pictures", buttons=["download", "fullscreen"],
                )  # fmt: skip
                self.recall = gr.File(
                    label="Settings from a picture", file_types=[".png"], height=130,
                    elem_id="recall",
                )  # fmt: skip
                with gr.Accordion("Earlier pictures", open=False):
                    self.history = gr.Gallery(
                        show_label=False, columns=6, object_fit="cover", height=320, interactive=False,
                        elem_id="history", buttons=["download", "fullscreen"],
                    )  # fmt: skip
        self._wire()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _slot(self, index: int) -> tuple[gr.Dropdown, gr.Slider]:
        with gr.Row(equal_height=True):
            adapter = gr.Dropdown(
                choices=[("none", NONE)], value=NONE, label=("Adapter", "then", "then")[index], scale=3, min_width=160,
                elem_id=f"adapter-{index}",
            )  # fmt: skip
            strength = gr.Slider(
                -1.0, 2.0, 1.0, step=0.05, label="Strength", info="0 is the base, 1 as trained", scale=4,
                min_width=180, elem_id=f"strength-{index}",
            )  # fmt: skip
        return adapter, strength

    def _seed(self) -> tuple[gr.Number, gr.Checkbox]:
        with gr.Row(equal_height=True):
            seed = gr.Number(value=0, precision=0, minimum=0, label="First seed", elem_id="seed", min_width=120)
            fixed = gr.Checkbox(value=False, label="Keep this seed", elem_id="fixed", min_width=120)
        return seed, fixed

    def _settings(self) -> dict[str, Any]:
        own = self.session.abilities
        with gr.Row():
            count = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures", elem_id="count")
            steps = gr.Slider(1, MOST_STEPS, own.steps, step=1, label="Steps", elem_id="steps")
        with gr.Row():
            guidance = gr.Slider(0, 20, own.guidance, step=0.5, label="Guidance", elem_id="guidance")
            scheduler = gr.Dropdown(
                list(own.schedulers), value=own.schedulers[0], label="Scheduler", elem_id="scheduler"
            )
        with gr.Row():
            side: dict[str, Any] = {"minimum": own.multiple, "step": own.multiple, "precision": 0, "value": own.size}
            width = gr.Number(label="Width in pixels", elem_id="width", **side)
            height = gr.Number(label="Height in pixels", elem_id="height", **side)
        return {
            "count": count, "steps": steps, "guidance": guidance, "scheduler": scheduler, "width": width,
            "height": height,
        }  # fmt: skip

    def _wire(self) -> None:
        slots = [component for slot in self.slots for component in slot]
        asked = [
            self.person, self.prompt, self.negative, *slots, self.seed, self.fixed, *self.settings.values(), self.image,
            self.change,
        ]  # fmt: skip
        shown = [self.status, self.preview, self.pictures, self.history, self.seed, self.go, self.cancel]
        for event in (self.go.click, self.prompt.submit):
            event(self.draw, asked, shown, concurrency_limit=None, trigger_mode="once", **PRIVATE)
        self.cancel.click(self.stop, [self.person], None, queue=False, **PRIVATE)
        chosen = [self.prompt, *(adapter for adapter, _ in self.slots)]
        for component in chosen:
            component.change(  # type: ignore[attr-defined]
                self.look, chosen, [self.triggers, self.warning], queue=False, **PRIVATE
            )
        for adapter, strength in self.slots:
            adapter.input(self.recommended, [adapter], [strength], queue=False, **PRIVATE)
        self.triggers.click(self.insert, [self.triggers, *chosen], [self.prompt], queue=False, **PRIVATE)
        taken = [
            self.prompt, self.negative, *slots, self.seed, self.fixed,
            *(self.settings[name] for name in ("steps", "guidance", "scheduler", "width", "height")), self.recall,
        ]  # fmt: skip
        self.recall.upload(self.take_over, [self.recall], taken, **PRIVATE)
        self.shown = shown

    # -- actions -----------------------------------------------------------------------------------------------------

    def draw(self, person: str, prompt: str, negative: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Draw what the form says, and show how it goes."""
        slots, (seed, fixed, count, steps, guidance, scheduler, width, height, image, change) = (
            values[: 2 * SLOTS], values[2 * SLOTS :],
        )  # fmt: skip
        first = int(seed or 0) if fixed else random.randrange(2**31)
        try:
            begin = uploaded(Path(image)) if image else None
        except DataError as error:
            problem = f"{Path(image).name} cannot be used: {error.problem}. Take it out, or choose another one"
            yield (status_line(None, explained(ValueError(problem))), *[gr.skip()] * 6)
            return
        try:
            adapters = tuple(
                (self.session.shelf.card(adapter), float(strength))
                for adapter, strength in zip(slots[::2], slots[1::2], strict=True)
                if adapter
            )
            request = Request(
                prompt=prompt or "", negative=negative or "", seeds=seeds_from(first, int(count)), steps=int(steps),
                guidance=float(guidance), width=int(width), height=int(height), scheduler=scheduler or "",
                adapters=adapters, image=begin, change=float(change),
            )  # fmt: skip
            job = self.session.draw(person, request)
        except (OFTError, Busy, TypeError, ValueError) as error:
            yield (status_line(None, explained(error)), *[gr.skip()] * 6)
            return
        yield from self._follow(person, job, first)

    def resume(self, person: str) -> Iterator[tuple[Any, ...]]:
        """After a reload: the pictures that are being drawn, or those of before."""
        job = self.session.machine.newest(person, "draw")
        if job is not None:
            yield from self._follow(person, job, None)
        else:
            yield (gr.skip(), gr.skip(), gr.skip(), self._earlier(person), *[gr.skip()] * 3)

    def _follow(self, person: str, job: Job, seed: int | None) -> Iterator[tuple[Any, ...]]:
        shown = -1
        for now in job.watch(timeout=15):
            fresh = len(now.found) != shown
            shown = len(now.found)
            yield (
                status_line(now),
                gr.update(value=now.preview, visible=True) if now.preview is not None else gr.update(visible=False),
                [(str(path), caption) for path, caption in now.found] if fresh else gr.skip(),
                self._earlier(person) if now.ended else gr.skip(),
                gr.skip() if seed is None else seed,
                gr.update(interactive=now.ended),
                gr.update(interactive=not now.ended),
            )

    def stop(self, person: str) -> None:
        """Cancel this person's drawing."""
        self.session.machine.cancel_newest(person, "draw")

    def look(self, prompt: str, *adapters: str) -> tuple[Any, Any]:
        """Triggers to click, and a warning where the prompt lacks one."""
        cards = self._cards(adapters)
        missing = self.session.missing_triggers(prompt or "", cards)
        named = [[card.phrase] for card in cards if card.phrase]
        text = f"The prompt lacks **{', '.join(missing)}**: without it, the subject is not called." if missing else ""
        return gr.update(samples=named, visible=bool(named)), gr.update(value=text, visible=bool(text))

    def insert(self, index: int, prompt: str, *adapters: str) -> str:
        """The prompt with a clicked trigger in it."""
        phrases = [card.phrase for card in self._cards(adapters) if card.phrase]
        return insert_phrase(prompt or "", phrases[index])

    def recommended(self, adapter: str) -> float:
        """The strength that an adapter's author recommends."""
        [*cards] = self._cards([adapter])
        return cards[0].strength if cards else 1.0

    def take_over(self, path: str | None) -> tuple[Any, ...]:
        """Settings out of a dropped picture."""
        count = 2 + 2 * SLOTS + 2 + 5
        if path is None:
            return (*[gr.skip()] * count, gr.skip())
        try:
            request, notes = self.session.request_from(self.session.settings_in(check_upload(Path(path))))
        except (OFTError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            gr.Warning(explained(error) if isinstance(error, OFTError) else "That picture's settings make no sense.")
            return (*[gr.skip()] * count, None)
        for note in notes:
            gr.Warning(note)
        slots: list[Any] = [NONE, 1.0] * SLOTS
        for i, (card, strength) in enumerate(request.adapters[:SLOTS]):
            slots[2 * i : 2 * i + 2] = [card.id, strength]
        own = self.session.abilities
        return (
            request.prompt, request.negative, *slots, request.seeds[0], True, request.steps, request.guidance,
            request.scheduler or own.schedulers[0], request.width or own.size, request.height or own.size, None,
        )  # fmt: skip

    def _cards(self, adapters: Sequence[str]) -> list[Card]:
        cards = []
        for adapter in adapters:
            try:
                cards += [self.session.shelf.card(adapter)] if adapter else []
            except OFTError:  # deleted meanwhile
                continue
        return cards

    def _earlier(self, person: str) -> list[str]:
        return [str(path) for path in self.session.history(person)[:HISTORY]]


def _as_it_came(payload: Any) -> str | None:
    """The path of an upload, which gradio has checked to be one."""
    return None if payload is None else str(payload.path or "")


def insert_phrase(prompt: str, phrase: str) -> str:
    """A prompt that names the subject: in the class word's place where there is one, else in front."""
    trigger, _, class_word = phrase.partition(" ")
    words = prompt.split()
    if trigger.lower() in (word.strip(",.").lower() for word in words):
        return prompt
    for i, word in enumerate(words):
        if class_word and word.strip(",.").lower() == class_word.lower():
            return " ".join([*words[:i], trigger, *words[i:]])
    return f"a {phrase} {prompt}".strip()
