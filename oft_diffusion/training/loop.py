"""DreamBooth with OFT, from top to bottom: `train(config)` gives a run; entering it loads, iterating it learns.

One step is: take a batch by its number, add noise, ask the adapted denoiser, compare, descend (`step.py`). What comes
before the first step is in `prepare.py`; what is family-specific in `families/`, what is random in `data.py`, what a
checkpoint holds in `state.py`.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch

from oft_diffusion.errors import OFTError, TrainingError
from oft_diffusion.files import FILE_NAME, save_adapter_file
from oft_diffusion.images import labelled_grid, save_png
from oft_diffusion.report import Section
from oft_diffusion.training.checkpoint import save_checkpoint
from oft_diffusion.training.config import TrainConfig
from oft_diffusion.training.interrupts import on_interrupt
from oft_diffusion.training.page import write_page
from oft_diffusion.training.preflight import Plan, preflight
from oft_diffusion.training.prepare import Parts, accelerated, prepare
from oft_diffusion.training.results import EVALUATION, GRIDS, PAGE, SETTINGS, Console, History, TrainResult, TrainStep
from oft_diffusion.training.state import adapter_metadata, adapter_tensors, resume, snapshot
from oft_diffusion.training.step import Stepper

_RATE_WINDOW = 20  # steps over which the rate is averaged


def train(
    config: TrainConfig,
    *,
    progress: bool = True,
    on_note: Callable[[str], None] | None = None,
    on_item: Callable[[str, int, int], object] | None = None,
    program: str = "oft-diffusion train",
    sections: Callable[[TrainResult], Sequence[Section]] | None = None,
) -> TrainingRun:
    """Check everything that can be checked without loading a model, and return a run.

    ```python
    with train(TrainConfig.from_toml("mug.toml")) as run:
        for step in run:
            print(step.step, step.loss)
    print(run.result.adapter)
    ```

    Args:
        config: the settings.
        progress: whether to draw bars and print notes on the terminal.
        on_note: called with each note instead of printing it.
        on_item: called before each item of what takes long besides training (class images, caches), with what they are,
            how many are done and how many there are. What it raises ends the run.
        program: how the command that resumes this run begins.
        sections: makes more sections for the run's page from its result, once training is over.

    Returns:
        A run, to be used in a `with` statement and iterated.

    Raises:
        OFTError: one problem, or all of them in one message. Nothing has been loaded or written then.
    """
    return TrainingRun(config, preflight(config), Console(progress, on_note, on_item), program, sections)


class TrainingRun:
    """A DreamBooth run: enter it to load and prepare, iterate it to train, then read `result`.

    `stop()` may be called from any thread. `save()` and `sample()` belong into the body of the loop.

    Attributes:
        step: optimizer steps done.
        history: the losses so far.
        silent_layers: layers that had no gradient over the first applied steps, as `component.layer`.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        console: Console,
        program: str,
        sections: Callable[[TrainResult], Sequence[Section]] | None = None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.console = console
        self.program = program
        self.sections = sections
        self.output_dir = Path(config.output_dir)
        self.step = 0
        self.history = History()
        self.silent_layers: tuple[str, ...] = ()
        self.interrupted = False
        self.parts: Parts | None = None
        self._result: TrainResult | None = None
        self._opened = ExitStack()
        self._stepper: Stepper | None = None
        self._stop = threading.Event()
        self._durations: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._seconds = 0.0  # of training in this process, and before it was resumed
        self._earlier = 0.0

    def __enter__(self) -> TrainingRun:
        self.accelerator = self._opened.enter_context(accelerated(self.config, self.plan.base))
        self.console.shown = self.console.shown and self.accelerator.is_main_process
        try:
            for note in self.plan.notes:
                self.console.say(note)
            self.parts = prepare(self.config, self.plan, self.accelerator, self.console)
            self._stepper = Stepper(self.config, self.parts, self.accelerator, self.console.say)
            if self.plan.resume_from is not None:
                self._restore(self.plan.resume_from)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        try:
            if kind is None and self._seconds and self._result is None:
                self._finish()  # the caller left the loop with break, which is as good as stop()
        finally:
            self._release()

    # -- the loop ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[TrainStep]:
        config = self.config
        self._require_parts()
        with on_interrupt(self._interrupt):
            if self.step == 0 and draws_after(0, config):
                self._draw_grid()
            self.console.start(self.step, config.steps)
            while self.step < config.steps and not self._stop_everywhere():
                record = self._optimizer_step()
                self.history.add(record)
                self.console.advance(record)
                if draws_after(self.step, config):
                    record = replace(record, pictures=self._draw_grid())
                last = self.step == config.steps
                if config.checkpoint_every and not last and self.step % config.checkpoint_every == 0:
                    record = replace(record, checkpoint=self.save())
                yield record
            self._finish()

    def _optimizer_step(self) -> TrainStep:
        """Forward and backward over `accumulation` batches, then one step of AdamW."""
        config, stepper = self.config, self._stepper
        assert stepper is not None
        started = time.perf_counter()
        totals = torch.zeros(3, device=self.accelerator.device)
        for i in range(config.accumulation):
            totals += stepper.learn(self.step * config.accumulation + i, last=i == config.accumulation - 1)
        found = stepper.descend(totals, self.step + 1)
        self.step += 1
        self.silent_layers = stepper.silent_layers
        self._durations.append(time.perf_counter() - started)
        self._seconds += self._durations[-1]
        seconds = sum(self._durations) / len(self._durations)
        return TrainStep(
            step=self.step,
            steps=config.steps,
            loss=found.loss,
            instance_loss=found.instance_loss,
            prior_loss=found.prior_loss if config.prior_preservation else None,
            learning_rate=found.learning_rate,
            grad_norm=found.grad_norm,
            applied=found.applied,
            seconds_per_step=seconds,
            seconds_left=seconds * (config.steps - self.step),
        )

    # -- stopping ----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Finish after the step in progress: adapter and checkpoint are written. From any thread."""
        self._stop.set()

    def _stop_everywhere(self) -> bool:
        """Whether any process wants to stop; all must agree, or the others would wait for it forever."""
        if self.accelerator.num_processes == 1:
            return self._stop.is_set()
        flag = torch.tensor([float(self._stop.is_set())], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _interrupt(self) -> None:
        self.interrupted = True
        self.stop()
        self.console.say("stopping after this step (once more to stop at once)")

    def _finish(self) -> None:
        """Write adapter, checkpoint and losses; say how to go on where the run was cut short."""
        parts = self._require_parts()
        checkpoint = self.save()  # even at step 0: Ctrl-C while the first grid is drawn is to be resumable too
        if self.accelerator.is_main_process:
            tensors = adapter_tensors(parts)
            metadata = adapter_metadata(parts, self.config, self.step, tensors)
            save_adapter_file(self.output_dir / FILE_NAME, tensors, metadata)
            self.history.write(self.output_dir)
        self.accelerator.wait_for_everyone()
        self.console.stop()
        self._result = TrainResult(
            adapter=self.output_dir / FILE_NAME,
            steps=self.step,
            losses=self.history.losses,
            pictures=tuple(sorted((self.output_dir / GRIDS).glob("step-*.png"))),
            checkpoint=checkpoint,
            interrupted=self.interrupted,
            silent_layers=self.silent_layers,
            seconds=self._earlier + self._seconds,
        )
        if self.accelerator.is_main_process:
            self._result = replace(self._result, report=self._write_page(parts, self._result))
        self.accelerator.wait_for_everyone()
        if self.step < self.config.steps:
            self.console.say(
                f"stopped at step {self.step} of {self.config.steps}; to go on:\n  {self.resume_command()}"
            )

    def _write_page(self, parts: Parts, result: TrainResult) -> Path | None:
        """The page about the run, unless it was interrupted. Training is over and saved: nothing here may undo that."""
        for name in (PAGE, EVALUATION):
            (self.output_dir / name).unlink(missing_ok=True)
        if self.interrupted:
            return None
        self.console.say("drawing the report")
        try:
            sections = self.sections(result) if self.sections else ()
            with parts.family.whole():
                return write_page(
                    parts, self.config, result, self.plan.pictures, sections,
                    looks=self.plan.looks, console=self.console, stopped=lambda: self.interrupted,
                )  # fmt: skip
        except (OFTError, OSError, RuntimeError) as error:
            self.console.say(f"the adapter is saved, but its report cannot be written: {error}")
            return None

    def resume_command(self) -> str:
        """The command line that goes on from the newest checkpoint."""
        return f"{self.program} --config {shlex.quote(str(self.output_dir / SETTINGS))} --resume latest"

    @property
    def result(self) -> TrainResult:
        """What the run left.

        Raises:
            TrainingError: it is not finished yet.
        """
        if self._result is None:
            raise TrainingError(
                "the run has no result yet", expected="a run whose loop has ended", fix="iterate it to the end first"
            )
        return self._result

    # -- saving, restoring, sampling ---------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far, and the losses.

        Raises:
            TrainingError: the disk is full or the folder cannot be written.
        """
        parts, accelerator = self._require_parts(), self.accelerator
        checkpoint = snapshot(parts, accelerator, self.config, self.step, self.history, self._earlier + self._seconds)
        path = self.output_dir / f"checkpoint-{self.step:06d}"
        if accelerator.is_main_process:
            tensors = adapter_tensors(parts)
            metadata = adapter_metadata(parts, self.config, self.step, tensors)
            save_checkpoint(self.output_dir, checkpoint, tensors, metadata, self.config.keep_checkpoints)
            self.history.write(self.output_dir)
        accelerator.wait_for_everyone()
        return path

    def _restore(self, folder: Path) -> None:
        checkpoint = resume(self._require_parts(), self.accelerator, folder)
        self.step = checkpoint.step
        self.history = History(checkpoint.state["history"])
        self._earlier = float(checkpoint.state.get("seconds", 0.0))
        self.console.say(f"resumed from {folder}, step {self.step}")

    def sample(self, prompts: Sequence[str] | None = None) -> Path:
        """Write a grid of pictures as the model draws them now: a row per prompt, a column per seed, always the same.

        Args:
            prompts: `validation_prompts` if None; `{trigger}` and `{class_word}` are filled in.

        Returns:
            The PNG's path, `samples/step-<step>.png` in output_dir, or `step-<step>-own.png` where prompts are given.
        """
        parts, config = self._require_parts(), self.config
        path = self.output_dir / GRIDS / f"step-{self.step:06d}{'-own' if prompts else ''}.png"
        if self.accelerator.is_main_process:
            filled = [
                config.fill(prompt) for prompt in prompts or config.validation_prompts or [config.instance_prompt]
            ]
            seeds = [config.seed + i for i in range(config.validation_count)]
            how = (config.resolution, config.sampling_steps, config.guidance_scale)
            with parts.family.whole():
                rows = [parts.family.sample([prompt] * len(seeds), seeds, *how) for prompt in filled]
            grid = labelled_grid(rows, row_labels=filled, cell=max(config.resolution, 128))
            save_png(grid, path, {"step": self.step, "prompts": filled, "seeds": seeds})
        self.accelerator.wait_for_everyone()
        return path

    def _draw_grid(self) -> Path | None:
        """A grid on the way. One that cannot be drawn, as where a dropped encoder's file is gone, ends no training."""
        try:
            return self.sample()
        except OFTError as error:
            self.console.say(f"no pictures after step {self.step}: {error}")
            self.accelerator.wait_for_everyone()  # the others, who draw nothing, wait in `sample`
            return None

    # -- housekeeping ------------------------------------------------------------------------------------------------

    def _require_parts(self) -> Parts:
        if self.parts is None:
            raise TrainingError(
                "the run is not open", expected="a run that was entered", fix="use `with train(config) as run:`"
            )
        return self.parts

    def _release(self) -> None:
        self.parts = self._stepper = None
        self.console.stop()
        self._opened.close()


def draws_after(step: int, config: TrainConfig) -> bool:
    """Whether a grid is drawn after a step, 0 for before the first."""
    return bool(config.validation_prompts) and (step in (0, config.steps) or step % config.validation_every == 0)
