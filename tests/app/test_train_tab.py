"""What the training tab says and fills in, without a browser."""

from __future__ import annotations

from typing import Any

import gradio as gr
import pytest

from app.adapter_slots import AdapterSlots
from app.session import Session
from app.train_tab import TrainTab

FORM = ("My thing", "zwx", "thing", "", 6, 1e-3, 8, 0, "")


def laid_out(session: Session) -> TrainTab:
    """The tab, beside the places of a drawing's adapters."""
    with gr.Blocks():
        slots = AdapterSlots(session)
        changed = slots.menus[:1]
        return TrainTab(session, gr.BrowserState(None), lambda: (gr.update(),), changed, slots)


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("place", "words"),
    [(4, "Steps is no number, or empty"), (5, "The learning rate is no number"), (7, "The seed is no number")],
)
@pytest.mark.parametrize("value", [None, "many", float("nan")])
def test_the_field_that_is_wrong_is_named(
    session: Session, person: str, place: int, words: str, value: Any
) -> None:  # fmt: skip
    tab = laid_out(session)
    form: list[Any] = [*FORM]
    form[place] = value
    [shown] = tab.train(person, *form)
    assert words in shown[0]
    [(estimated, *_)] = tab.estimate(person, *form)
    assert words in estimated["value"]
    assert words in tab.take_along(session.training.packed, person, "", *form)[0]


def test_gradio_leaves_numbers_of_the_form_to_the_sentence(session: Session) -> None:
    tab = laid_out(session)
    assert [part.preprocess(None) for part in (tab.steps, tab.rate, tab.seed)] == [None] * 3
    assert tab.steps.preprocess(0) == 0


def test_written_prompts_outlive_another_preset_and_another_length(session: Session) -> None:
    with gr.Blocks() as page:
        tab = laid_out(session)
    first, second, *_ = session.training.model.presets()
    given = "\n".join(session.training.defaults(first)["validation_prompts"])
    assert isinstance(tab.choose(second, "thorough", given)[3], str)
    steps, _, _, prompts = tab.choose(second, "thorough", "a {trigger} of my own")
    assert prompts == gr.skip()
    assert steps == tab.steps_for(second, "thorough") == 2 * session.training.defaults(second)["steps"]
    [told] = [event.outputs for event in page.fns.values() if (tab.length._id, "input") in event.targets]
    assert told == [tab.steps]
