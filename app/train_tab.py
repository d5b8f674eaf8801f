"""The tab that trains: pictures in, an adapter out, and what is going on meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from oft_diffusion.errors import OFTError
from oft_diffusion.report import loss_curve
from oft_diffusion.training import TrainStep

from .adapter_slots import AdapterSlots
from .drawing import number
from .events import EACH_TIME, LOOKING, PRIVATE, as_it_came
from .machine import Progress
from .packing import COMMAND, ZIP
from .photos_box import PhotosBox
from .runs import LIMITS, Wish
from .session import Session
from .shelf import LONGEST_NAME, LONGEST_WORD, Card
from .words import empty, explained, status_line, told

_GO, _GOING = "Train", "Training …"
_ASK, _ASKING = "How long will it take?", "Measuring …"
_FORM = ("what is filled in here", "")
# How long, as a share of the preset's steps.
LENGTHS = {"a quick look": 1 / 3, "as recommended": 1.0, "thorough": 2.0}


class TrainTab:
    """Its components, and what they do.

    Args:
        session: what is acted on.
        person: whose browser this is.
        refresh: gives what `changed` shows, once there is a new adapter.
        changed: components that list the adapters.
        slots: the adapters of a drawing, of which a new one takes the first place at once.
    """

    def __init__(
        self, session: Session, person: gr.BrowserState, refresh: Callable[[], tuple[Any, ...]], changed: list[Any],
        slots: AdapterSlots,
    ) -> None:  # fmt: skip
        self.training, self.machine, self.person = session.training, session.machine, person
        self.refresh, self.changed = refresh, changed
        acts, menu, strength = slots.inputs[:3]
        self.chosen, self.shelf = changed.index(menu), [*changed, acts, strength]
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self.photos = PhotosBox(session.training, person)
                self._words()
                with gr.Accordion("Settings", open=False):
                    self._settings()
                self._estimate()
            with gr.Column(scale=5, min_width=320):
                self._progress()
        self._wire()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _words(self) -> None:
        trigger = str(self.training.defaults()["trigger"])
        self.name = gr.Textbox(
            label="Name of the adapter", max_lines=1, max_length=LONGEST_NAME, elem_id="run-name", placeholder="my mug"
        )
        with gr.Row():
            self.trigger = gr.Textbox(
                value=trigger, label="Trigger", info="a word that means nothing yet: it will name the subject",
                max_lines=1, max_length=LONGEST_WORD, elem_id="run-trigger", min_width=150,
            )  # fmt: skip
            self.class_word = gr.Textbox(
                label="Class word", info="what the subject is, for example mug", max_lines=1, max_length=LONGEST_WORD,
                elem_id="run-class", min_width=150,
            )  # fmt: skip
        self.words_note = gr.HTML(told(""), elem_id="words-note")

    def _settings(self) -> None:
        defaults, presets = self.training.defaults(), self.training.model.presets()
        with gr.Row():
            self.preset = gr.Dropdown(
                [(preset.about, name) for name, preset in presets.items()], value=next(iter(presets)), label="For",
                elem_id="run-preset", visible=len(presets) > 1,
            )  # fmt: skip
            self.length = gr.Radio(list(LENGTHS), value="as recommended", label="How long", elem_id="run-length")
        with gr.Row():
            self.steps = gr.Number(
                value=int(defaults["steps"]),
                precision=0,
                minimum=1,
                maximum=LIMITS["steps"][1],
                label="Steps",
                elem_id="run-steps",
                min_width=120,
            )
            self.rate = gr.Number(
                value=float(defaults["learning_rate"]), label="Learning rate", step=0.0001, elem_id="run-rate",
                min_width=120,
            )  # fmt: skip
        with gr.Row():
            self.block = gr.Dropdown(
                [8, 16, 32, 64], value=int(defaults["block_size"]), label="Block size", elem_id="run-block",
                min_width=120,
            )  # fmt: skip
            self.seed = gr.Number(
                value=0, precision=0, minimum=0, label="Seed", elem_id="run-seed", min_width=120
            )  # fmt: skip
        for component in (self.steps, self.rate, self.seed):
            as_it_came(component)
        self.prompts = gr.Textbox(
            value=_prompts(defaults), lines=3, elem_id="run-prompts",
            label="Prompts to look at while it trains, one per line",
        )  # fmt: skip

    def _estimate(self) -> None:
        with gr.Row():
            self.ask = gr.Button(_ASK, elem_id="estimate", size="sm", min_width=120)
            self.cancel_ask = gr.Button(
                "Cancel", variant="stop", interactive=False, elem_id="estimate-cancel", size="sm", min_width=90
            )
        self.estimated = gr.HTML(visible=False, elem_id="estimated")

    def _progress(self) -> None:
        with gr.Row():
            self.go = gr.Button(_GO, variant="primary", elem_id="train", min_width=90)
            self.stop = gr.Button("Stop and keep", interactive=False, elem_id="train-stop", min_width=90)
            self.pause = gr.Button("Pause", interactive=False, elem_id="train-pause", min_width=90)
        with gr.Row():
            small: dict[str, Any] = {"size": "sm", "min_width": 90}
            self.sample = gr.Button("Draw now", interactive=False, elem_id="train-sample", **small)
            self.save = gr.Button("Save now", interactive=False, elem_id="train-save", **small)
            self.compare = gr.Button(
                "Compare its checkpoints", interactive=False, size="sm", min_width=160, elem_id="train-compare"
            )
        self.status = gr.HTML(status_line(None), elem_id="train-status")
        self.note = gr.HTML(told(""), elem_id="train-note")
        gr.HTML(empty("How the loss falls, and pictures drawn meanwhile, will be here."), elem_id="train-empty")
        self.curve = gr.HTML(elem_id="curve")
        self.grids = gr.Gallery(
            show_label=False, columns=1, height=420, object_fit="contain", interactive=False,
            visible=False, elem_id="train-grids", buttons=["download", "fullscreen"],
        )  # fmt: skip
        with gr.Accordion("Take it to another machine", open=False):
            self.along = as_it_came(gr.Dropdown([_FORM], value="", label="What", elem_id="along"))
            with gr.Row():
                self.pack = gr.Button("Pack settings and pictures", size="sm", elem_id="run-pack")
                self.alone = gr.Button("Settings alone", size="sm", elem_id="run-settings")
            self.packing = gr.HTML(told(""), elem_id="pack-note")
            self.packed = gr.File(label="File", interactive=False, height=90, visible=False, elem_id="packed")
            self.command = gr.Code(
                COMMAND, language=None, lines=1, interactive=False, wrap_lines=True, elem_id="run-command",
                label=f"There, in the folder that {ZIP} was unpacked to",
            )  # fmt: skip
        with gr.Accordion("Go on with an earlier run", open=False):
            self.earlier = as_it_came(gr.Dropdown([], label="Run", elem_id="earlier"))
            self.resume = gr.Button("Go on", elem_id="train-resume")

    def _wire(self) -> None:
        words = [self.trigger, self.class_word]
        for box in words:
            box.change(self.check_words, words, [self.words_note], queue=False, **PRIVATE)
        self.photos.on_example(self.name, self.class_word)
        chosen = [self.preset, self.length]
        self.preset.input(
            self.choose, [*chosen, self.prompts], [self.steps, self.rate, self.block, self.prompts], **PRIVATE
        )
        self.length.input(self.steps_for, chosen, [self.steps], **PRIVATE)
        self.asked = [
            self.person, self.name, self.trigger, self.class_word, self.preset, self.steps, self.rate, self.block,
            self.seed, self.prompts,
        ]  # fmt: skip
        self.looked = self.photos.looked
        self.look = self.photos.look
        self.shown = [
            self.status, self.note, self.curve, self.grids, self.go, self.stop, self.pause, self.sample, self.save,
            self.compare, self.earlier, self.along, *self.shelf,
        ]  # fmt: skip
        self.buttons = [self.go, self.stop, self.pause, self.sample, self.save]
        self.measured = [self.estimated, self.ask, self.cancel_ask]
        self.cancel_ask.click(self.stop_estimate, [self.person], None, queue=False, **PRIVATE)
        for button, act in (
            (self.stop, lambda person: self.training.stop(person, pause=False)),
            (self.pause, lambda person: self.training.stop(person, pause=True)),
            (self.sample, lambda person: self.training.ask(person, "sample")),
            (self.save, lambda person: self.training.ask(person, "save")),
        ):
            button.click(
                lambda person, act=act: told(act(person)), [self.person], [self.note], queue=False, **PRIVATE
            )  # fmt: skip
        taken = [self.person, self.along, *self.asked[1:]]
        for button, make in ((self.pack, self.training.packed), (self.alone, self.training.settings_of)):
            button.click(
                lambda person, what, *form, make=make: self.take_along(make, person, what, *form), taken,
                [self.packing, self.packed], **PRIVATE,
            )  # fmt: skip

    def begin(self, known: Any) -> None:
        """Connect Train, and show, once it is known who looks, what that person is training, or has trained last.

        The buttons keep the keyboard's focus, as Generate does.
        """
        measuring = known.then(self.estimate_again, [self.person], self.measured, **LOOKING)
        measured = self.ask.click(self.estimate, self.asked, self.measured, **LOOKING)
        for going in (measuring, measured):
            going.then(self.rest_estimate, [self.person], [self.ask, self.cancel_ask], queue=False, **PRIVATE)
        resumed = known.then(self.again, [self.person], self.shown, **LOOKING)
        trained = self.go.click(self.train, self.asked, self.shown, **EACH_TIME)  # a second one is answered
        gone_on = self.resume.click(self.go_on, [self.person, self.earlier], self.shown, **LOOKING)
        for going in (resumed, trained, gone_on):
            going.then(self.rest, [self.person], self.buttons, queue=False, **PRIVATE)

    # -- before ------------------------------------------------------------------------------------------------------

    def check_words(self, trigger: str, class_word: str) -> str:
        """What speaks against these words."""
        return told(*self.training.words_notes(trigger or "", class_word or ""))

    def choose(self, preset: str, length: str, prompts: str | None) -> tuple[Any, ...]:
        """A preset's settings; prompts that somebody has written stay."""
        try:
            found = self.training.defaults(preset)
        except OFTError:
            return (gr.skip(),) * 4
        given = {_prompts(self.training.defaults(name)) for name in self.training.runs.presets}
        return (
            self.steps_for(preset, length), found["learning_rate"], found["block_size"],
            _prompts(found) if (prompts or "") in given else gr.skip(),
        )  # fmt: skip

    def steps_for(self, preset: str, length: str) -> Any:
        """As many as a preset takes for a run that long."""
        try:
            return max(1, round(self.training.defaults(preset)["steps"] * LENGTHS[length]))
        except (OFTError, KeyError):
            return gr.skip()

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, person: str, name: str, trigger: str, class_word: str, *knobs: Any) -> Iterator[tuple[Any, ...]]:
        """Train on the pictures, and show how it goes."""
        try:
            self.training.start(person, self._wish(name, trigger, class_word, *knobs))
        except (OFTError, TypeError, ValueError) as error:
            yield self._problem(person, explained(error))
            return
        yield from self._follow(person)

    def estimate(
        self, person: str, name: str, trigger: str, class_word: str, *knobs: Any
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """What it would take, measured."""
        try:
            self.training.estimate(person, self._wish(name, trigger, class_word, *knobs))
        except (OFTError, TypeError, ValueError) as error:
            yield gr.update(value=status_line(None, explained(error)), visible=True), gr.skip(), gr.skip()
            return
        yield from self._follow_estimate(person)

    def estimate_again(self, person: str) -> Iterator[tuple[Any, ...]]:
        """After a reload: the estimate that is being made."""
        yield (gr.skip(),) * len(self.measured)  # of no answer, gradio would make empty ones
        if self._going(person, "estimate"):
            yield from self._follow_estimate(person)

    def _follow_estimate(self, person: str) -> Iterator[tuple[Any, ...]]:
        for now in self.machine.watch_newest(person, "estimate"):
            yield (
                gr.update(value=status_line(now), visible=True),
                gr.update(value=_ASKING) if not now.ended else gr.skip(),
                gr.update(interactive=not now.ended),
            )

    def rest_estimate(self, person: str) -> tuple[Any, Any]:
        """The buttons as they are while nothing is measured."""
        if self._going(person, "estimate"):  # it was another event that has ended
            return gr.skip(), gr.skip()
        return gr.update(value=_ASK), gr.update(interactive=False)

    def _going(self, person: str, kind: str) -> bool:
        return self.machine.under_way(person, kind) is not None

    def stop_estimate(self, person: str) -> None:
        """Cancel this person's estimate."""
        self.machine.cancel_all(person, "estimate")

    def go_on(self, person: str, run_id: str | None) -> Iterator[tuple[Any, ...]]:
        """Go on with an earlier run."""
        try:
            self.training.resume(person, run_id or "")
        except OFTError as error:
            yield self._problem(person, explained(error))
            return
        yield from self._follow(person)

    def again(self, person: str) -> Iterator[tuple[Any, ...]]:
        """After a reload: the run that is going on, or the last one, and the runs that can be gone on with."""
        menus = {self.earlier: self.unfinished(person), self.along: self.runs(person)}
        yield tuple(gr.update(choices=menus[part]) if part in menus else gr.skip() for part in self.shown)
        yield from self._follow(person)

    def rest(self, person: str) -> tuple[Any, ...]:
        """The buttons as they are while nothing is trained."""
        if self._going(person, "train"):  # it was another event that has ended
            return (gr.skip(),) * len(self.buttons)
        return gr.update(value=_GO), *[gr.update(interactive=False)] * (len(self.buttons) - 1)

    def _follow(self, person: str) -> Iterator[tuple[Any, ...]]:
        seen, drawn, said = -1, -1, -1
        for now in self.machine.watch_newest(person, "train"):
            steps = [found for found in now.found if isinstance(found, TrainStep)]
            grids = [(str(step.pictures), f"step {step.step}") for step in steps if step.pictures]
            notes = [found for found in now.found if isinstance(found, str)]
            fresh, seen = len(steps) != seen, len(steps)
            news, said = len(notes) != said, len(notes)
            moved, drawn = len(grids) != drawn, len(grids)
            heeded = not now.ended and self.training.heeds(person)
            yield (
                status_line(now),
                told(*notes[-1:]) if news or now.ended else gr.skip(),
                loss_curve([step.loss for step in steps], steps[0].step) if fresh and len(steps) > 1 else gr.skip(),
                gr.update(value=grids[::-1], visible=True) if moved and grids else gr.skip(),
                gr.update(value=_GOING) if not now.ended else gr.skip(),
                *[gr.update(interactive=heeded)] * 2,
                *[gr.update(interactive=heeded and now.state == "working")] * 2,
                gr.update(interactive=bool(self.training.comparable(person))) if fresh or now.ended else gr.skip(),
                gr.update(choices=self.unfinished(person), value=None) if now.ended else gr.skip(),
                gr.update(choices=self.runs(person)) if fresh or now.ended else gr.skip(),
                *(self._shelf(now) if now.ended else [gr.skip()] * len(self.shelf)),
            )

    def take_along(
        self, make: Callable[[str, Wish | str], Path], person: str, what: str, *form: Any
    ) -> tuple[str, Any]:  # fmt: skip
        """A file with what is filled in, or with a run's settings, for another machine."""
        try:
            path = make(person, what or self._wish(*form))
        except (OFTError, TypeError, ValueError) as error:
            return told(explained(error)), gr.update(value=None, visible=False)
        return told(""), gr.update(value=str(path), visible=True)

    def _wish(self, name: str, trigger: str, class_word: str, preset: str, *knobs: Any) -> Wish:
        steps, rate, block, seed, prompts = knobs
        lines = [line.strip() for line in (prompts or "").splitlines() if line.strip()]
        count = int(number("Steps", steps))
        settings = {
            "steps": count, "learning_rate": float(number("The learning rate", rate)),
            "block_size": int(number("The block size", block)), "seed": int(number("The seed", seed)),
            "validation_prompts": lines, "validation_every": max(1, count // 3),
        }  # fmt: skip
        return Wish(name or "", trigger or "", class_word or "", settings, preset or "")

    def _shelf(self, now: Progress) -> list[Any]:
        """The adapters, of which a new one is drawn with, if it is still there: a reload shows an old run."""
        shown, acts, strength = list(self.refresh()), gr.skip(), gr.skip()
        if now.found and isinstance(card := now.found[-1], Card) and self.training.shelf.holds(card):
            acts, adapter, strength, *_ = AdapterSlots.filled(((card, card.strength),))
            shown[self.chosen] = gr.update(**{**shown[self.chosen], "value": adapter})
        return [*shown, acts, strength]

    def _problem(self, person: str, text: str) -> tuple[Any, ...]:
        """What is wrong, where nothing that goes on writes over it."""
        first = (gr.skip(), told(text)) if self._going(person, "train") else (status_line(None, text), told(""))
        return *first, *[gr.skip()] * (len(self.shown) - 2)

    def runs(self, person: str) -> list[tuple[str, str]]:
        """What can be taken along, for the menu."""
        return [_FORM, *((f"the run {run.name}, {run.steps} steps", run.id) for run in self.training.mine(person))]

    def unfinished(self, person: str) -> list[tuple[str, str]]:
        """Runs that can be gone on with, for the menu."""
        unfinished = self.training.unfinished(person)
        return [(f"{run.name}: step {run.step} of {run.steps}", run.id) for run in unfinished]


def _prompts(settings: Mapping[str, Any]) -> str:
    """Those of a preset, as the form has them."""
    return "\n".join(settings["validation_prompts"])
