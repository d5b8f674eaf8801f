"""Under a prompt: the chosen adapters' triggers to click, and a warning where the prompt lacks one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from .events import PRIVATE
from .prompts import Subject, missing_triggers, with_subject
from .words import told


class TriggerBox:
    """Its components, and what they do.

    Args:
        prompt: the text above it.
        prefix: of its components' ids.
    """

    def __init__(self, prompt: gr.Textbox, prefix: str = "") -> None:
        self.prompt = prompt
        self.samples = gr.Dataset(
            components=[gr.Textbox(visible=False)], samples=[], label="Click to name the subject",
            visible=False, elem_id=f"{prefix}triggers", type="index",
        )  # fmt: skip
        self.warning = gr.HTML(visible=False, elem_id=f"{prefix}trigger-warning")

    def wire(self, subjects: Callable[..., Sequence[Subject]], chosen: Sequence[Any]) -> None:
        """Connect it.

        Args:
            subjects: the subjects of what is chosen, from the values of these components.
            chosen: what the choice depends on.
        """
        inputs = [self.prompt, *chosen]

        def look(prompt: str | None, *values: Any) -> tuple[Any, Any]:
            named = [subject for subject in subjects(*values) if subject.phrase]
            missing = missing_triggers(prompt or "", named)
            lacks = f"the prompt lacks {', '.join(missing)}: without it, the subject is not called"
            note = told(lacks if missing else "the prompt calls the subject")  # always a line: nothing moves
            phrases = [[subject.phrase] for subject in named]
            return gr.update(samples=phrases, visible=bool(named)), gr.update(value=note, visible=bool(named))

        def insert(index: int, prompt: str | None, *values: Any) -> str:
            named = [subject for subject in subjects(*values) if subject.phrase]
            return with_subject(prompt or "", named[index]) if index < len(named) else prompt or ""

        for component in inputs:
            component.change(look, inputs, [self.samples, self.warning], queue=False, **PRIVATE)
        self.samples.click(insert, [self.samples, *inputs], [self.prompt], queue=False, **PRIVATE)
