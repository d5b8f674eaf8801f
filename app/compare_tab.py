"""The tab that compares: with and without an adapter, at several strengths, one adapter beside another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from oft_diffusion.errors import OFTError

from .drawing import Request, seeds_from
from .events import PRIVATE
from .machine import Busy, Job
from .session import Session
from .words import empty, explained, status_line

WAYS = {
    "with and without": "The base, and the base with the adapter, on the same seeds.",
    "strengths": "One row for each strength from -1 to 1.5.",
    "adapters": "One row for each adapter, at the strength that its author recommends.",
    "a training run": "One row for each checkpoint of a run and each strength: which one is best?",
}
_STRENGTHS = [0.5, 0.75, 1.0, 1.25, 1.5]
_MOST = 8  # pictures in a row


class CompareTab:
    """Its components, and what they do."""

    def __init__(self, session: Session, person: gr.BrowserState) -> None:
        self.session, self.person = session, person
        own = session.abilities
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="compare-prompt")
                self.way = gr.Radio(list(WAYS), value="with and without", label="Compare", elem_id="way")
                self.about = gr.Markdown(WAYS["with and without"], elem_classes="hint")
                self.adapter = gr.Dropdown([], label="Adapter", elem_id="compare-adapter")
                self.others = gr.Dropdown(
                    [], multiselect=True, label="Adapters", visible=False, elem_id="compare-adapters"
                )
                self.run = gr.Dropdown([], label="Run", visible=False, elem_id="compare-run")
                self.strengths = gr.CheckboxGroup(
                    _STRENGTHS, value=[0.75, 1.0], label="Strengths", visible=False, elem_id="compare-strengths"
                )
                with gr.Row():
                    self.seed = gr.Number(value=0, precision=0, minimum=0, label="First seed", elem_id="compare-seed")
                    self.count = gr.Slider(1, _MOST, 3, step=1, label="Seeds", elem_id="compare-count")
                with gr.Row():
                    self.steps = gr.Slider(1, 150, own.steps, step=1, label="Steps", elem_id="compare-steps")
                    self.guidance = gr.Slider(0, 20, own.guidance, step=0.5, label="Guidance")
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    self.go = gr.Button("Compare", variant="primary", elem_id="compare", min_width=120)
                    self.cancel = gr.Button(
                        "Cancel", variant="stop", interactive=False, elem_id="compare-cancel", min_width=120
                    )  # fmt: skip
                self.status = gr.HTML(status_line(None), elem_id="compare-status")
                gr.HTML(empty("What is compared will be here."), elem_id="compare-empty")
                self.slider = gr.ImageSlider(
                    label="Left without, right with the adapter", interactive=False, visible=False, max_height=520,
                    elem_id="slider", buttons=["fullscreen"],
                )  # fmt: skip
                self.which = gr.Slider(1, 2, 1, step=1, label="Which pair", visible=False, elem_id="which")
                self.sheet = gr.Image(
                    type="filepath", interactive=False, visible=False, elem_id="sheet", show_label=False,
                    alt_text="A row of pictures for each of what is compared", buttons=["download", "fullscreen"],
                )  # fmt: skip
        self._wire()

    def _wire(self) -> None:
        asked = [
            self.person, self.way, self.prompt, self.adapter, self.others, self.run, self.strengths, self.seed,
            self.count, self.steps, self.guidance,
        ]  # fmt: skip
        self.shown = [self.status, self.slider, self.which, self.sheet, self.go, self.cancel]
        self.go.click(self.compare, asked, self.shown, concurrency_limit=None, trigger_mode="once", **PRIVATE)
        self.cancel.click(self.stop, [self.person], None, queue=False, **PRIVATE)
        asking = [self.about, self.adapter, self.others, self.run, self.strengths]
        self.way.change(self.choose, [self.way], asking, queue=False, **PRIVATE)
        self.which.release(self.pick, [self.person, self.which], [self.slider], queue=False, **PRIVATE)

    def choose(self, way: str) -> tuple[Any, ...]:
        """Show what this way asks for."""
        one, several, run = way in ("with and without", "strengths"), way == "adapters", way == "a training run"
        return WAYS.get(way, ""), *(gr.update(visible=shown) for shown in (one, several, run, run))

    def runs(self) -> list[tuple[str, str]]:
        """Those that have checkpoints, for the menu."""
        runs = self.session.training.runs.with_checkpoints()
        return [(f"{run.name}, {len(run.checkpoints)} checkpoints", run.id) for run in runs]

    def compare(self, person: str, way: str, prompt: str, *asked: Any) -> Iterator[tuple[Any, ...]]:
        """Draw what is to be compared, and show how it goes."""
        try:
            job = self._start(person, way, prompt or "", *asked)
        except (OFTError, Busy, TypeError, ValueError, KeyError) as error:
            yield (status_line(None, explained(error)), *[gr.skip()] * 5)
            return
        yield from self._follow(job)

    def _start(
        self, person: str, way: str, prompt: str, adapter: str | None, others: list[str] | None, run: str | None,
        strengths: list[float] | None, *numbers: float,
    ) -> Job:  # fmt: skip
        seed, count, steps, guidance = numbers
        request = Request(
            prompt, seeds_from(int(seed or 0), int(count)), steps=int(steps), guidance=float(guidance)
        )  # fmt: skip
        if way == "a training run":
            if not run or not strengths:
                raise ValueError("Choose a run and at least one strength.")
            return self.session.run_grid(person, request, run, sorted(map(float, strengths)))
        cards = [self.session.shelf.card(card) for card in (others or [] if way == "adapters" else [adapter]) if card]
        if not cards:
            raise ValueError("Choose an adapter to compare.")
        request = replace(request, adapters=((cards[0], cards[0].strength),))
        if way == "adapters":
            return self.session.side_by_side(person, request, cards)
        return (self.session.before_and_after if way == "with and without" else self.session.sweep)(person, request)

    def _follow(self, job: Job) -> Iterator[tuple[Any, ...]]:
        for now in job.watch(timeout=15):
            pairs = [found for found in now.found if isinstance(found, tuple)]
            sheets = [found for found in now.found if not isinstance(found, tuple)]
            hidden = gr.update(visible=False) if not now.ended else gr.skip()
            yield (
                status_line(now),
                gr.update(value=_images(pairs[0]), visible=True) if pairs else hidden,
                gr.update(maximum=max(2, len(pairs)), value=1, visible=len(pairs) > 1) if pairs else hidden,
                gr.update(value=str(sheets[0]), visible=True) if sheets else hidden,
                gr.update(interactive=now.ended),
                gr.update(interactive=not now.ended),
            )

    def pick(self, person: str, which: float) -> Any:
        """Another seed's pair."""
        job = self.session.machine.newest(person, "compare")
        pairs = [found for found in job.progress.found if isinstance(found, tuple)] if job else []
        return _images(pairs[min(int(which), len(pairs)) - 1]) if pairs else gr.skip()

    def stop(self, person: str) -> None:
        """Cancel this person's comparison."""
        self.session.machine.cancel_all(person, "compare")


def _images(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return pair[0].image, pair[1].image
