"""The tab for the adapters themselves: what each is, taking in and handing out files, names, and one made of two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from oft_diffusion.errors import OFTError

from .adapter_slots import NONE
from .events import LOOKING, PRIVATE, as_it_came
from .kept_box import KeptBox
from .machine import Job
from .session import Session
from .shelf import LONGEST_NAME, LONGEST_WORD, Card
from .words import card_page, cards_page, explained, status_line, told

# A card is a button; which one was clicked, its id tells.
_CLICKED = """element.addEventListener('click', event => {
  const card = event.target.closest('[data-id]')
  if (!card) return
  trigger('click', {id: card.dataset.id})
  const about = document.getElementById('shelf-adapter') // on a phone it lies below the cards
  if (about.getBoundingClientRect().top > innerHeight) about.scrollIntoView({behavior: 'smooth'})
})"""


_KINDS = ("export", "combine", "cover")  # of jobs that this tab shows
Cards = Sequence[tuple[Card, str]]  # adapters, and beside each why it cannot be used, or nothing
Choices = list[tuple[str, str]]  # name and id


def all_of(cards: Cards) -> Choices:
    """Every adapter."""
    return [(card.name, card.id) for card, _ in cards]


def usable(cards: Cards) -> Choices:
    """Those that can be used with this model."""
    return [(card.name, card.id) for card, problem in cards if not problem]


class AdaptersTab:
    """Its components, and what they do.

    Attributes:
        menus: components whose choices depend on the adapters, here and in other tabs: `refresh` fills them, and
            `forget` empties those whose choice is gone.
        working: what shows how a file or an adapter is made.
    """

    def __init__(
        self, session: Session, person: gr.BrowserState, menus: list[tuple[Any, Callable[[Cards], Choices]]]
    ) -> None:  # fmt: skip
        self.session, self.workshop, self.person = session, session.workshop, person
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self.all = gr.HTML(elem_id="cards", js_on_load=_CLICKED, apply_default_css=False)
            with gr.Column(scale=4, min_width=320):
                self.chosen = as_it_came(gr.Dropdown([], label="Adapter", elem_id="shelf-adapter"))
                self.about = gr.HTML(elem_id="about", apply_default_css=False)
                self.note = gr.HTML(told(""), elem_id="shelf-note")
                self.status = gr.HTML(visible=False, elem_id="shelf-status")
                self.made = gr.File(label="File", interactive=False, height=90, visible=False, elem_id="exported")
                self.cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="shelf-cancel", size="sm")
                with gr.Accordion("Import a file, of any tool", open=False):
                    self.file = gr.File(
                        label="A .safetensors file", file_types=[".safetensors"], height=130, elem_id="take-in"
                    )
                    self.component = gr.Dropdown(
                        [("as the file says", ""), *((part, part) for part in session.model.parts())], value="",
                        label="For", elem_id="take-in-component",
                    )  # fmt: skip
                with gr.Accordion("Export", open=False):
                    self.format = gr.Dropdown(
                        [(text, key) for key, text in self.workshop.formats().items()], value="oft", label="As",
                        elem_id="export-format",
                    )  # fmt: skip
                    self.export = gr.Button("Make the file", elem_id="export")
                with gr.Accordion("Merge two", open=False):
                    self._two()
                with gr.Accordion("Name, trigger and cover", open=False):
                    self._label()
                with gr.Accordion("Delete", open=False):
                    self.sure = gr.Checkbox(label="Yes, delete it for good", elem_id="sure")
                    self.delete = gr.Button("Delete", variant="stop", interactive=False, elem_id="delete")
                self.kept = KeptBox(session.training.kept, person)
        self.menus = [(self.chosen, all_of), (self.second, all_of), *menus]

    def _label(self) -> None:
        one: dict[str, Any] = {"max_lines": 1, "min_width": 150}
        self.name = gr.Textbox(label="Name", max_length=LONGEST_NAME, elem_id="name", **one)
        with gr.Row():
            self.words = [
                gr.Textbox(label=label, max_length=LONGEST_WORD, elem_id=elem_id, **one)
                for label, elem_id in (("Trigger", "own-trigger"), ("Class word", "own-class"))
            ]
        with gr.Row():
            self.save = gr.Button("Save", elem_id="label", min_width=120)
            self.cover = gr.Button("Draw a cover", elem_id="cover", min_width=120)

    def _two(self) -> None:
        self.second = as_it_came(gr.Dropdown([], label="And", elem_id="second"))
        self.share = gr.Slider(
            0, 1, 0.5, step=0.05, label="How far towards the second", elem_id="share",
            info="along the way of the rotations; 0 is the first, 1 the second",
        )  # fmt: skip
        with gr.Row():
            word: dict[str, Any] = {"max_lines": 1, "max_length": LONGEST_WORD, "min_width": 200}
            self.trigger = gr.Textbox(label="Its trigger", placeholder="those of both", elem_id="both-trigger", **word)
            self.class_word = gr.Textbox(
                label="Its class word", placeholder="what both have", elem_id="both-class", **word
            )
        with gr.Row():
            self.interpolate = gr.Button("Between the two", elem_id="interpolate", min_width=180)
            self.compose = gr.Button("One after the other", elem_id="compose", min_width=180)

    def wire(self) -> None:
        """Connect everything, once all menus are known."""
        menus = [menu for menu, _ in self.menus]
        changed = [self.note, self.all, *menus]
        look = [self.about, self.name, *self.words, self.sure]
        self.all.click(self.choose, None, [self.chosen], queue=False, **PRIVATE)
        self.all.change(self.forget, menus, menus, queue=False, **PRIVATE)
        self.chosen.change(self.look, [self.chosen], look, queue=False, **PRIVATE)
        self.sure.change(lambda sure: gr.update(interactive=bool(sure)), [self.sure], [self.delete], **PRIVATE)
        self.file.upload(self.take_in, [self.file, self.component], [self.file, *changed], **PRIVATE)
        self.save.click(self.label, [self.chosen, self.name, *self.words], changed, **PRIVATE).then(
            self.look, [self.chosen], look, **PRIVATE
        )
        self.delete.click(self.remove, [self.chosen, self.sure], [self.sure, *changed], **PRIVATE)
        self.making = [self.export, self.interpolate, self.compose, self.cover]
        self.working = [self.status, self.cancel, self.made, *self.making, *changed]
        two = [self.person, self.chosen, self.second, self.share, self.trigger, self.class_word]
        for button, act in ((self.interpolate, self.between), (self.compose, self.in_order)):
            button.click(act, two, self.working, **LOOKING)
        self.export.click(self.hand_out, [self.person, self.chosen, self.format], self.working, **LOOKING)
        self.cover.click(self.portray, [self.person, self.chosen], self.working, **LOOKING)
        self.cancel.click(self.stop, [self.person], None, queue=False, **PRIVATE)
        self.changed = changed

    # -- actions -----------------------------------------------------------------------------------------------------

    def refresh(self, *notes: str) -> tuple[Any, ...]:
        """Notes, the cards, and every menu of adapters."""
        cards = self.session.cards()
        return told(*notes), cards_page(cards), *(gr.update(choices=choices(cards)) for _, choices in self.menus)

    def forget(self, *chosen: Any) -> tuple[Any, ...]:
        """Menus without what is gone, whoever has deleted it; the others as they are."""
        cards = self.session.cards()
        return tuple(
            _without_gone(value, [key for _, key in choices(cards)])
            for value, (_, choices) in zip(chosen, self.menus, strict=True)
        )

    def choose(self, event: gr.EventData) -> Any:
        """The adapter whose card was clicked."""
        clicked = str(getattr(event, "id", ""))
        return clicked if clicked in {card.id for card in self.session.shelf.cards()} else gr.skip()

    def look(self, adapter: str | None) -> tuple[str, str, str, str, bool]:
        """What the chosen adapter is. That another one was to be deleted does not count for it."""
        try:
            card = self.session.shelf.card(adapter or "")
        except OFTError:
            return "", "", "", "", False
        about = card_page(self.session.known(card), self.session.fits(card))
        return about, card.name, card.trigger, card.class_word, False

    def take_in(self, path: str | None, component: str) -> tuple[Any, ...]:
        """A file of any tool, and what is to be known of it."""
        if path is None:
            return (gr.skip(), *self.refresh())
        try:
            _, notes = self.session.take_in(Path(path), component or None)
            return (None, *self.refresh(*notes))
        except OFTError as error:
            return (None, *self.refresh(explained(error)))

    def label(self, adapter: str | None, name: str, trigger: str, class_word: str) -> tuple[Any, ...]:
        """Another name, and other words."""
        return self._done(
            lambda: self.session.label(adapter or "", name or "", trigger or "", class_word or ""), "Saved."
        )

    def remove(self, adapter: str | None, sure: bool) -> tuple[Any, ...]:
        """Delete, where that was confirmed."""
        if not sure:
            return (False, *self.refresh())
        return (False, *self._done(lambda: self.session.delete(adapter or ""), "Deleted."))

    def between(self, person: str, first: str, second: str, share: float, *words: str) -> Iterator[tuple[Any, ...]]:
        """A new adapter on the way between two."""
        yield from self._combine(person, "interpolate", first, second, share, *words)

    def in_order(self, person: str, first: str, second: str, share: float, *words: str) -> Iterator[tuple[Any, ...]]:
        """A new adapter of two, one after the other."""
        yield from self._combine(person, "compose", first, second, share, *words)

    def _combine(
        self, person: str, how: str, first: str, second: str, share: float, trigger: str, class_word: str
    ) -> Iterator[tuple[Any, ...]]:
        yield from self._follow(
            lambda: self.workshop.combine(
                person, how, first or "", second or "", float(share), trigger=trigger or "", class_word=class_word or ""
            )
        )

    def hand_out(self, person: str, adapter: str, to: str) -> Iterator[tuple[Any, ...]]:
        """A file in another format."""
        yield from self._follow(lambda: self.workshop.export(person, adapter or "", to))

    def portray(self, person: str, adapter: str) -> Iterator[tuple[Any, ...]]:
        """A new cover."""
        yield from self._follow(lambda: self.workshop.cover(person, adapter or ""))

    def again(self, person: str) -> Iterator[tuple[Any, ...]]:
        """After a reload: what is being made."""
        jobs = (self.session.machine.under_way(person, kind) for kind in _KINDS)
        if going := [job for job in jobs if job is not None]:
            yield from self._follow(lambda: going[0])
        else:
            yield (gr.skip(),) * len(self.working)

    def stop(self, person: str) -> None:
        """Cancel what this person has made."""
        for kind in _KINDS:
            self.session.machine.cancel_all(person, kind)

    def _follow(self, start: Callable[[], Job]) -> Iterator[tuple[Any, ...]]:
        """Show how something is made, until it is, or will not be."""
        try:
            job = start()
        except (OFTError, TypeError, ValueError) as error:
            nothing = [gr.skip()] * (len(self.working) - 1)
            yield gr.update(value=status_line(None, explained(error)), visible=True), *nothing
            return
        for now in job.watch(timeout=15):
            *notes, made = now.found or (None,)
            shown = list(self.refresh(*notes)) if now.ended else [told(""), *[gr.skip()] * (len(self.changed) - 1)]
            if isinstance(made, Card):
                shown[self.changed.index(self.chosen)]["value"] = made.id
            yield (
                gr.update(value=status_line(now), visible=True),
                gr.update(visible=not now.ended),
                gr.update(value=str(made) if isinstance(made, Path) else None, visible=isinstance(made, Path)),
                *[gr.update(interactive=now.ended)] * len(self.making),
                *shown,
            )

    def _done(self, act: Callable[[], Sequence[str] | None], note: str) -> tuple[Any, ...]:
        """Act, and show that it is done and what is to be said of it, or what was wrong."""
        try:
            return self.refresh(note, *(act() or ()))
        except OFTError as error:
            return self.refresh(explained(error))


def _without_gone(value: Any, offered: Sequence[str]) -> Any:
    """What a menu is to show, of what was chosen in it and what can be."""
    if isinstance(value, list):
        left = [part for part in value if part in offered]
        return gr.skip() if left == value else left
    if not value or value in offered:
        return gr.skip()
    return NONE if NONE in offered else None
