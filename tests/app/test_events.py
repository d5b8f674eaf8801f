"""Components that take what a browser sends as it comes, also after they were changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from app import events
from app.adapter_slots import NONE, _shown
from app.drawing import STRENGTHS
from app.events import as_it_came


@pytest.mark.parametrize(
    ("component", "sent"),
    [
        (gr.Dropdown(["here"]), "gone"), (gr.Dropdown(["here"], multiselect=True), ["gone"]),
        (gr.Slider(0, 1, 0.5), None), (gr.Number(minimum=0, precision=0), -1.5),
    ],
)  # fmt: skip
def test_values_come_as_they_are_before_and_after_an_update(component: Any, sent: Any) -> None:
    kind = type(component)
    unchecked = as_it_came(component)
    anew = unchecked.__class__(**unchecked.constructor_args)  # as gradio does of each `gr.update`
    for made in (unchecked, anew):
        assert made.preprocess(sent) == sent
        assert isinstance(made, kind)
        assert made.get_block_name() == kind.__name__.lower()
        assert made.component_class_id == kind.get_component_class_id()
    assert not Path(str(events.__file__)).with_suffix(".pyi").exists()


def test_a_place_that_moves_is_one_that_can_be_shown() -> None:
    assert _shown(False, "an id", 0.5) == (False, "an id", 0.5)
    for adapter, strength in ((10**30, 10**30), ([], None), ({}, "x"), (None, 10**400)):
        acts, menu, within = _shown(True, adapter, strength)
        assert (acts, menu) == (True, NONE)
        assert STRENGTHS[0] <= within <= STRENGTHS[1]
