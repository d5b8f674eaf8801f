"""The adapters of a drawing: a few places, one after another, each with its strength, to be switched off and moved."""

from __future__ import annotations

from typing import Any

import gradio as gr

from oft_diffusion.errors import OFTError

from .drawing import MOST_ADAPTERS, STRENGTHS
from .events import PRIVATE, as_it_came
from .prompts import Subject
from .session import Session
from .shelf import Card

NONE = ""
_ABOUT = "0 is the base, 1 as trained"
EMPTY: tuple[Any, ...] = (True, NONE, 1.0)  # of a place: whether it acts, the adapter's id, its strength


class AdapterSlots:
    """Its components, and what they do.

    Attributes:
        menus: where adapters are chosen.
        inputs: what `Session.stack` reads.
        chosen: of these, all but the strengths.
        more: the part with all places but the first.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._moves: list[gr.Button] = []
        rows = [self._row(0)]
        with gr.Accordion("More adapters, one after another", open=False) as self.more:
            rows += [self._row(index) for index in range(1, MOST_ADAPTERS)]
        self.menus = [menu for _, menu, _ in rows]
        self.inputs: list[Any] = [component for row in rows for component in row]
        self.chosen: list[Any] = [component for acts, menu, _ in rows for component in (acts, menu)]

    def _row(self, index: int) -> tuple[gr.Checkbox, gr.Dropdown, gr.Slider]:
        label = "then" if index else "Adapter"
        with gr.Group():
            with gr.Row(equal_height=True):
                menu = as_it_came(
                    gr.Dropdown(
                        choices=[("none", NONE)], value=NONE, label=label, scale=3, min_width=160,
                        elem_id=f"adapter-{index}",
                    )
                )  # fmt: skip
                strength = as_it_came(
                    gr.Slider(
                        *STRENGTHS, 1.0, step=0.05, label="Strength", info=_ABOUT if index == 0 else None, scale=4,
                        min_width=180, elem_id=f"strength-{index}",
                    )
                )  # fmt: skip
            with gr.Row(elem_classes="slot-tools"):
                acts = gr.Checkbox(
                    value=True, label="In use", elem_id=f"acts-{index}", container=False, min_width=100, scale=0
                )
                if index:
                    self._moves.append(gr.Button("Move up", size="sm", elem_id=f"up-{index}", min_width=100, scale=0))
        return acts, menu, strength

    def wire(self) -> None:
        """Connect everything."""
        rows = [self.inputs[i : i + 3] for i in range(0, len(self.inputs), 3)]
        for _, menu, strength in rows:
            menu.input(self.recommended, [menu], [strength], queue=False, **PRIVATE)
        for index, move in enumerate(self._moves):
            pair = [*rows[index], *rows[index + 1]]
            move.click(
                lambda *values: (*_shown(*values[3:]), *_shown(*values[:3])), pair, pair, queue=False, **PRIVATE
            )  # fmt: skip

    def recommended(self, adapter: str) -> float:
        """The strength that an adapter's author recommends."""
        cards = self._cards(True, adapter)
        return cards[0].strength if cards else 1.0

    def subjects(self, *values: Any) -> list[Subject]:
        """What the adapters that act were trained on, from the values of `chosen`."""
        return [Subject(card.trigger, card.class_word) for card in self._cards(*values)]

    @staticmethod
    def filled(adapters: tuple[tuple[Card, float], ...]) -> list[Any]:
        """Values of all components, for these adapters."""
        told = [(True, card.id, strength) for card, strength in adapters]
        return [value for place in [*told, *[EMPTY] * (MOST_ADAPTERS - len(told))] for value in place]

    def _cards(self, *values: Any) -> list[Card]:
        cards = []
        for acts, adapter in zip(values[::2], values[1::2], strict=True):
            try:
                cards += [self.session.shelf.card(adapter)] if acts and adapter else []
            except OFTError:  # deleted meanwhile
                continue
        return cards


def _shown(acts: Any, adapter: Any, strength: Any) -> tuple[bool, str, float]:
    """A place as a page can show it: what comes is not checked, and gradio fails to send back what is no such value."""
    least, most = STRENGTHS
    try:
        within = min(max(float(strength), least), most)
    except (TypeError, ValueError, OverflowError):
        within = 1.0
    return bool(acts), adapter if isinstance(adapter, str) else NONE, within
