"""The tab that compares: with and without an adapter, at several strengths, one adapter beside another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from oft_diffusion.errors import ConfigError, OFTError

from .drawing import STRENGTHS, Request, number, seeds_from, settings_of
from .events import EACH_TIME, LOOKING, PRIVATE, as_it_came
from .machine import Job
from .prompts import Subject, with_subject
from .session import Session
from .settings_box import SettingsBox, negative_prompt
from .trigger_box import TriggerBox
from .words import empty, explained, status_line

WITHOUT, BY_STRENGTH, BY_ADAPTER, BY_STEP = "with and without", "strengths", "adapters", "a training run"
WAYS = {
    WITHOUT: "The base, and the base with the adapter, on the same seeds.",
    BY_STRENGTH: "One row for each strength from -1 to 1.5.",
    BY_ADAPTER: "One row for each adapter, at the strength that its author recommends.",
    BY_STEP: "One row for each checkpoint of a run and each strength: which one is best?",
}
_OF_A_RUN = [0.5, 0.75, 1.0, 1.25, 1.5]  # strengths
_MOST = 8  # pictures in a row
_GO, _GOING = "Compare", "Comparing … press for more"


class CompareTab:
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
        self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="compare-prompt")
        self.triggers = TriggerBox(self.prompt, "compare-")
        self.negative = negative_prompt(own, "compare-")
        self.way = gr.Radio(list(WAYS), value=WITHOUT, label="Compare", elem_id="way")
        self.about = gr.Markdown(WAYS[WITHOUT], elem_classes="hint")
        with gr.Row(equal_height=True):
            self.adapter = gr.Dropdown([], label="Adapter", elem_id="compare-adapter", scale=3, min_width=160)
            self.strength = gr.Slider(
                *STRENGTHS, 1.0, step=0.05, label="Strength", elem_id="compare-strength", scale=4, min_width=180
            )
        self.others = gr.Dropdown([], multiselect=True, label="Adapters", visible=False, elem_id="compare-adapters")
        self.run = gr.Dropdown([], label="Run", visible=False, elem_id="compare-run")
        self.strengths = gr.CheckboxGroup(
            _OF_A_RUN, value=[0.75, 1.0], label="Strengths", visible=False, elem_id="compare-strengths"
        )
        with gr.Row():
            self.seed = gr.Number(value=0, precision=0, minimum=0, label="First seed", elem_id="compare-seed")
            self.count = gr.Slider(1, _MOST, 3, step=1, label="Seeds", elem_id="compare-count")
        with gr.Accordion("Settings", open=False, elem_id="compare-settings"):
            self.settings = SettingsBox(own, "compare-")
        for component in (self.adapter, self.others, self.run, self.strength, self.seed, self.count):
            as_it_came(component)

    def _results(self) -> None:
        with gr.Row():
            self.go = gr.Button(_GO, variant="primary", elem_id="compare", min_width=120)
            self.cancel = gr.Button(
                "Cancel", variant="stop", interactive=False, elem_id="compare-cancel", min_width=120
            )  # fmt: skip
        self.status = gr.HTML(status_line(None), elem_id="compare-status")
        gr.HTML(empty("What is compared will be here."), elem_id="compare-empty")
        with gr.Column(elem_id="compare-stage"):  # the last comparison stays until the next one is there
            self.preview = gr.Image(
                label="Unfinished", visible=False, interactive=False, height=320, alt_text="The picture so far",
                buttons=[], elem_id="compare-preview",
            )  # fmt: skip
            self.slider = gr.ImageSlider(
                label="Left without, right with", interactive=False, visible=False, max_height=520,
                elem_id="slider", buttons=["fullscreen"],
            )  # fmt: skip
            self.which = as_it_came(gr.Slider(1, 2, 1, step=1, label="Which pair", visible=False, elem_id="which"))
            self.sheet = gr.Image(
                type="filepath", interactive=False, visible=False, elem_id="sheet", show_label=False,
                alt_text="A row of pictures for each of what is compared", buttons=["download", "fullscreen"],
            )  # fmt: skip

    def _wire(self) -> None:
        self.asked = [
            self.person, self.way, self.prompt, self.negative, self.adapter, self.strength, self.others, self.run,
            self.strengths, self.seed, self.count, *self.settings.inputs,
        ]  # fmt: skip
        self.of_a_run = [self.way, self.run, self.prompt]
        self.shown = [self.status, self.preview, self.slider, self.which, self.sheet, self.go, self.cancel]
        self.cancel.click(self.stop, [self.person], None, queue=False, **PRIVATE)
        asking = [self.about, self.adapter, self.strength, self.others, self.run, self.strengths]
        self.way.change(self.choose, [self.way], asking, queue=False, **PRIVATE)
        self.which.change(self.pick, [self.person, self.which], [self.slider], queue=False, **PRIVATE)
        self.triggers.wire(self.subjects, [self.way, self.adapter, self.others, self.run])

    def begin(self, known: Any) -> None:
        """Connect Compare, and show, once it is known who looks, what that person is comparing, or has compared last.

        The button keeps the keyboard's focus, as Generate does.
        """
        resumed = known.then(self.resume, [self.person], self.shown, **LOOKING)
        compared = self.go.click(self.compare, self.asked, self.shown, **EACH_TIME)
        for going in (resumed, compared):
            going.then(self.rest, [self.person], [self.go, self.cancel], queue=False, **PRIVATE)

    # -- actions -----------------------------------------------------------------------------------------------------

    def choose(self, way: str) -> tuple[Any, ...]:
        """Show what this way asks for."""
        asks = (way in (WITHOUT, BY_STRENGTH), way == WITHOUT, way == BY_ADAPTER, way == BY_STEP, way == BY_STEP)
        return WAYS.get(way, ""), *(gr.update(visible=shown) for shown in asks)

    def runs(self) -> list[tuple[str, str]]:
        """Those that have checkpoints, for the menu."""
        runs = self.session.training.runs.with_checkpoints()
        return [(f"{run.name}, {len(run.checkpoints)} checkpoints", run.id) for run in runs]

    def asked_for(self, run: str, prompt: str) -> tuple[Any, ...]:
        """What compares a run's checkpoints, its subject in the prompt."""
        [subject] = self.subjects(BY_STEP, None, None, run) or [Subject("", "")]
        return BY_STEP, gr.update(choices=self.runs(), value=run), with_subject(prompt, subject)

    def subjects(self, way: str, adapter: str | None, others: list[str] | None, run: str | None) -> list[Subject]:
        """What that which is compared was trained on."""
        try:
            if way == BY_STEP:
                return [self.session.comparing.subject_of_run(run)] if run else []
            cards = [self.session.shelf.card(card) for card in _chosen(way, adapter, others)]
        except (OFTError, TypeError):  # deleted meanwhile, or nothing that this page sends
            return []
        return [Subject(card.trigger, card.class_word) for card in cards]

    def compare(self, person: str, way: str, prompt: str, *asked: Any) -> Iterator[tuple[Any, ...]]:
        """Draw what is to be compared, and show how it goes."""
        try:
            self._start(person, way, prompt or "", *asked)
        except (OFTError, TypeError, ValueError, OverflowError) as error:
            yield (status_line(None, explained(error)), *[gr.skip()] * 6)
            return
        yield from self._follow(person)

    def _start(
        self, person: str, way: str, prompt: str, negative: str, adapter: str | None, strength: float,
        others: list[str] | None, run: str | None, strengths: list[float] | None, seed: int, count: int,
        *settings: Any,
    ) -> Job:  # fmt: skip
        seeds = seeds_from(int(number("The first seed", seed)), int(number("The number of seeds", count)))
        request = Request(prompt, seeds, negative or "", **settings_of(*settings))
        if way == BY_STEP:
            if not run or not strengths:
                raise ConfigError("nothing to compare", expected="a run and at least one strength", fix="choose them")
            return self.session.comparing.run_grid(person, request, run, sorted(map(float, strengths)))
        cards = [self.session.shelf.card(card) for card in _chosen(way, adapter, others)]
        if not cards:
            raise ConfigError("no adapter to compare", expected="one", fix="choose an adapter")
        if way == BY_ADAPTER:
            return self.session.comparing.side_by_side(person, request, cards)
        request = replace(request, adapters=((cards[0], float(number("The strength", strength))),))
        comparing = self.session.comparing
        return (comparing.before_and_after if way == WITHOUT else comparing.sweep)(person, request)

    def resume(self, person: str) -> Iterator[tuple[Any, ...]]:
        """After a reload: the comparison that is being drawn, or the last one."""
        yield (gr.skip(),) * len(self.shown)  # of no answer, gradio would make empty ones
        yield from self._follow(person)

    def _follow(self, person: str) -> Iterator[tuple[Any, ...]]:
        for now in self.session.machine.watch_newest(person, "compare"):
            pairs = [found for found in now.found if isinstance(found, tuple)]
            sheets = [found for found in now.found if not isinstance(found, tuple)]
            no_pairs = gr.update(visible=False) if sheets else gr.skip()
            yield (
                status_line(now),
                gr.update(value=now.preview, visible=True) if now.preview is not None else gr.update(visible=False),
                gr.update(value=_images(pairs[0]), visible=True) if pairs else no_pairs,
                gr.update(maximum=max(2, len(pairs)), value=1, visible=len(pairs) > 1) if pairs else no_pairs,
                gr.update(value=str(sheets[0]), visible=True) if sheets else gr.skip(),
                gr.update(value=_GOING) if not now.ended else gr.skip(),
                gr.update(interactive=not now.ended),
            )

    def rest(self, person: str) -> tuple[Any, Any]:
        """The buttons as they are while nothing is compared."""
        if self.session.machine.under_way(person, "compare"):  # it was another event that has ended
            return gr.skip(), gr.skip()
        return gr.update(value=_GO), gr.update(interactive=False)

    def pick(self, person: str, which: float | None) -> Any:
        """Another seed's pair; of a field that is being typed in, nothing yet."""
        if not isinstance(which, (int, float)):
            return gr.skip()
        job = self.session.machine.newest(person, "compare")
        pairs = [found for found in job.progress.found if isinstance(found, tuple)] if job else []
        return _images(pairs[max(1, min(int(which), len(pairs))) - 1]) if pairs else gr.skip()

    def stop(self, person: str) -> None:
        """Cancel all of this person's comparisons, those that wait, too."""
        self.session.machine.cancel_all(person, "compare")


def _chosen(way: str, adapter: str | None, others: Sequence[str] | None) -> list[str]:
    """Ids of the adapters that a way compares."""
    return [card for card in (others or [] if way == BY_ADAPTER else [adapter]) if card]


def _images(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return pair[0].image, pair[1].image
