"""The tab that trains: pictures in, an adapter out, and what is going on meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from oft_diffusion.errors import OFTError
from oft_diffusion.report import loss_curve
from oft_diffusion.training import TrainStep

from .machine import Busy, Job
from .photos import MOST
from .runs import Wish
from .session import Session
from .words import explained, status_line, told


class TrainTab:
    """Its components, and what they do.

    Args:
        session: what is acted on.
        person: whose browser this is.
        refresh: gives what `changed` shows, once there is a new adapter.
        changed: components that list the adapters.
    """

    def __init__(
        self, session: Session, person: gr.BrowserState, refresh: Callable[[], tuple[Any, ...]], changed: list[Any]
    ) -> None:
        self.session, self.person, self.refresh, self.changed = session, person, refresh, changed
        defaults = session.defaults()
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self.drop = gr.File(
                    label="3 to 8 pictures of the subject, with captions (.txt) if you have them",
                    file_count="multiple", file_types=["image", ".txt"], height=130, elem_id="photos-drop",
                )  # fmt: skip
                self.photos = gr.Gallery(
                    label="Pictures: choose one to caption it", columns=4, height=260, object_fit="cover",
                    elem_id="photos", interactive=False, allow_preview=False, buttons=[],
                )  # fmt: skip
                self.note = gr.HTML(told(""), elem_id="photos-note")
                with gr.Row(equal_height=True):
                    self.caption = gr.Textbox(
                        label="Caption of the chosen picture", max_lines=2, scale=4, elem_id="caption",
                        placeholder="what it shows besides the subject: a red car in a room",
                    )  # fmt: skip
                    self.remove = gr.Button("Remove it", size="sm", scale=1, min_width=90, elem_id="remove-photo")
                self.name = gr.Textbox(label="Name of the adapter", max_lines=1, elem_id="run-name")
                with gr.Row():
                    self.trigger = gr.Textbox(
                        value=str(defaults["trigger"]), label="Trigger: a word that means nothing yet", max_lines=1,
                        elem_id="run-trigger",
                    )  # fmt: skip
                    self.class_word = gr.Textbox(label="Class word: what it is", max_lines=1, elem_id="run-class")
                with gr.Accordion("Settings", open=False):
                    with gr.Row():
                        self.steps = gr.Number(
                            value=int(defaults["steps"]), precision=0, minimum=1, label="Steps", elem_id="run-steps"
                        )
                        self.rate = gr.Number(
                            value=float(defaults["learning_rate"]),
                            label="Learning rate",
                            step=0.0001,
                            elem_id="run-rate",
                        )
                    with gr.Row():
                        self.block = gr.Dropdown(
                            [8, 16, 32, 64], value=int(defaults["block_size"]), label="Block size", elem_id="run-block"
                        )
                        self.seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", elem_id="run-seed")
                    self.prompts = gr.Textbox(
                        value="\n".join(defaults["validation_prompts"]), lines=3, elem_id="run-prompts",
                        label="Prompts to look at while it trains, one per line",
                    )  # fmt: skip
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    self.go = gr.Button("Train", variant="primary", elem_id="train")
                    self.stop = gr.Button("Stop and keep", interactive=False, elem_id="train-stop")
                    self.pause = gr.Button("Pause", interactive=False, elem_id="train-pause")
                with gr.Row():
                    self.sample = gr.Button("Draw now", size="sm", interactive=False, elem_id="train-sample")
                    self.save = gr.Button("Save now", size="sm", interactive=False, elem_id="train-save")
                self.status = gr.HTML(status_line(None), elem_id="train-status")
                self.curve = gr.HTML(elem_id="curve")
                self.grid = gr.Image(
                    label="As it draws now", type="filepath", interactive=False, visible=False, elem_id="train-grid",
                    alt_text="Rows of prompts, drawn by the model as far as it is trained",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
                self.command = gr.Code(label="The same on another machine", language="shell", visible=False, lines=2)
                with gr.Accordion("Go on with a run that was paused or cut off", open=False):
                    self.earlier = gr.Dropdown([], label="Run", elem_id="earlier")
                    self.resume = gr.Button("Go on", elem_id="train-resume")
        self.chosen = gr.State("")
        self._wire()

    def _wire(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        shown_photos = [self.photos, self.note]
        self.drop.upload(self.add, [self.person, self.drop], [self.drop, *shown_photos], **private)
        self.photos.select(self.choose, [self.person], [self.chosen, self.caption], **private)
        self.caption.blur(self.describe, [self.person, self.chosen, self.caption], shown_photos, **private)
        self.caption.submit(self.describe, [self.person, self.chosen, self.caption], shown_photos, **private)
        self.remove.click(
            self.take_out, [self.person, self.chosen], [self.chosen, self.caption, *shown_photos], **private
        )
        asked = [
            self.person, self.name, self.trigger, self.class_word, self.steps, self.rate, self.block, self.seed,
            self.prompts,
        ]  # fmt: skip
        self.shown = [
            self.status, self.curve, self.grid, self.command, self.go, self.stop, self.pause, self.sample, self.save,
            self.earlier, *self.changed,
        ]  # fmt: skip
        going: dict[str, Any] = {"concurrency_limit": None, "trigger_mode": "once", **private}
        self.go.click(self.train, asked, self.shown, **going)
        self.resume.click(self.go_on, [self.person, self.earlier], self.shown, **going)
        for button, act in (
            (self.stop, lambda person: self.session.stop_training(person, pause=False)),
            (self.pause, lambda person: self.session.stop_training(person, pause=True)),
            (self.sample, lambda person: self.session.ask_training(person, "sample")),
            (self.save, lambda person: self.session.ask_training(person, "save")),
        ):
            button.click(act, [self.person], None, queue=False, **private)

    # -- pictures ----------------------------------------------------------------------------------------------------

    def add(self, person: str, files: list[str] | None) -> tuple[Any, ...]:
        """Take pictures in."""
        problems = self.session.photos(person).add(map(Path, files or []))
        return (None, *self.look(person, problems))

    def look(self, person: str, problems: list[str] | None = None) -> tuple[Any, Any]:
        """The pictures, and what may be wrong with them."""
        photos = self.session.photos(person).look(self.session.resolution)
        notes = [f"{p}." for p in problems or []]
        notes += [f"Picture {i}: {note}." for i, photo in enumerate(photos, 1) for note in photo.notes]
        if not 3 <= len(photos) <= 8:
            notes.insert(0, f"{len(photos)} of {MOST} at most; 3 to 8 do best." if photos else "")
        shown = [(str(photo.path), photo.caption or f"picture {i}") for i, photo in enumerate(photos, 1)]
        return shown, told(" ".join(filter(None, notes)))

    def choose(self, person: str, event: gr.SelectData) -> tuple[str, str]:
        """The picture that was clicked."""
        photos = self.session.photos(person).look(self.session.resolution)
        index = int(event.index) if isinstance(event.index, int) else 0
        return (photos[index].id, photos[index].caption) if index < len(photos) else ("", "")

    def describe(self, person: str, chosen: str, caption: str) -> tuple[Any, Any]:
        """A caption for the chosen picture."""
        if not chosen:
            return gr.skip(), gr.skip()
        return self._changed(person, lambda: self.session.photos(person).describe(chosen, caption or ""))

    def take_out(self, person: str, chosen: str) -> tuple[Any, ...]:
        """Remove the chosen picture."""
        if not chosen:
            return "", "", gr.skip(), gr.skip()
        return ("", "", *self._changed(person, lambda: self.session.photos(person).remove(chosen)))

    def _changed(self, person: str, act: Callable[[], None]) -> tuple[Any, Any]:
        try:
            act()
        except OFTError as error:
            return self.look(person, [explained(error)])
        return self.look(person)

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, person: str, name: str, trigger: str, class_word: str, *knobs: Any) -> Iterator[tuple[Any, ...]]:
        """Train on the pictures, and show how it goes."""
        steps, rate, block, seed, prompts = knobs
        lines = [line.strip() for line in (prompts or "").splitlines() if line.strip()]
        try:
            settings = {
                "steps": int(steps), "learning_rate": float(rate), "block_size": int(block), "seed": int(seed or 0),
                "validation_prompts": lines, "validation_every": max(1, int(steps) // 3),
            }  # fmt: skip
            job = self.session.train(person, Wish(name or "", trigger or "", class_word or "", settings))
        except (OFTError, Busy, TypeError, ValueError) as error:
            yield self._problem(explained(error))
            return
        yield from self.follow(job)

    def go_on(self, person: str, run_id: str | None) -> Iterator[tuple[Any, ...]]:
        """Go on with an earlier run."""
        try:
            job = self.session.resume_training(person, run_id or "")
        except (OFTError, Busy) as error:
            yield self._problem(explained(error))
            return
        yield from self.follow(job)

    def again(self, person: str) -> Iterator[tuple[Any, ...]]:
        """After a reload: the run that is going on, and the runs that can be gone on with."""
        job = self.session.machine.newest(person, "train")
        if job is not None and not job.progress.ended:
            yield from self.follow(job)
        else:
            yield (*[gr.skip()] * 9, gr.update(choices=self._earlier()), *[gr.skip()] * len(self.changed))

    def follow(self, job: Job) -> Iterator[tuple[Any, ...]]:
        """Show a run's progress until it ends."""
        drawn, grid = -1, None
        for now in job.watch(timeout=15):
            steps = [found for found in now.found if isinstance(found, TrainStep)]
            fresh, drawn = len(steps) != drawn, len(steps)
            newest = next((step.pictures for step in reversed(steps) if step.pictures), None)
            moved, grid = newest != grid, newest
            busy = now.state == "working"
            yield (
                status_line(now),
                loss_curve([step.loss for step in steps]) if fresh and len(steps) > 1 else gr.skip(),
                gr.update(value=str(newest), visible=True) if moved and newest else gr.skip(),
                gr.update(value=self.session.training_command(job), visible=True) if fresh else gr.skip(),
                gr.update(interactive=now.ended),
                *[gr.update(interactive=busy)] * 4,
                gr.update(choices=self._earlier()) if now.ended else gr.skip(),
                *(self.refresh() if now.ended else [gr.skip()] * len(self.changed)),
            )

    def _problem(self, text: str) -> tuple[Any, ...]:
        return (status_line(None, text), *[gr.skip()] * (len(self.shown) - 1))

    def _earlier(self) -> list[tuple[str, str]]:
        return [(f"{run.name}: step {run.step} of {run.steps}", run.id) for run in self.session.runs.earlier()]
