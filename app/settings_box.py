"""How a picture is drawn, as Generate and Compare ask for it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .drawing import FORM_GUIDANCE, MOST_STEPS, Abilities
from .events import as_it_came


def negative_prompt(own: Abilities, prefix: str = "") -> gr.Textbox:
    """Shown where the model knows such."""
    return gr.Textbox(
        label="Negative prompt", lines=1, visible=own.negative, elem_id=f"{prefix}negative",
        placeholder="what not to draw",
    )  # fmt: skip


class SettingsBox:
    """Steps, guidance, scheduler and size.

    Attributes:
        inputs: what `drawing.settings_of` reads.
    """

    def __init__(self, own: Abilities, prefix: str = "") -> None:
        with gr.Row():
            steps = gr.Slider(1, MOST_STEPS, own.steps, step=1, label="Steps", elem_id=f"{prefix}steps")
            guidance = gr.Slider(
                0, FORM_GUIDANCE, own.guidance, step=0.5, label="Guidance", elem_id=f"{prefix}guidance"
            )
        self.scheduler = gr.Dropdown(
            list(own.schedulers), value=own.schedulers[0], label="Scheduler", elem_id=f"{prefix}scheduler"
        )
        with gr.Row():
            side: dict[str, Any] = {"minimum": own.multiple, "step": own.multiple, "precision": 0, "value": own.size}
            self.width = gr.Number(label="Width in pixels", elem_id=f"{prefix}width", **side)
            self.height = gr.Number(label="Height in pixels", elem_id=f"{prefix}height", **side)
        numbers = [as_it_came(component) for component in (steps, guidance, self.width, self.height)]
        self.inputs = [*numbers[:2], self.scheduler, *numbers[2:]]
