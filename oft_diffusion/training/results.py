"""What a run tells its caller: a record per step, a result at the end, the loss history on disk, the progress bar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from oft_diffusion.disk import write_atomically

# What a run writes into output_dir, beside checkpoint-* and the adapter.
LOSSES = "losses.json"
SETTINGS = "config.toml"
GRIDS = "samples"
PAGE = "report.html"
EVALUATION = "evaluation.json"

_HISTORY = ("step", "loss", "instance_loss", "prior_loss", "learning_rate", "grad_norm", "applied")


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step.

    Attributes:
        step, steps: this step's number, from 1, and the run's total.
        loss: what was descended: instance_loss + prior_weight * prior_loss, averaged over accumulation and processes.
        instance_loss, prior_loss: its parts; prior_loss is None without prior preservation.
        learning_rate: the denoiser's, as used in this step.
        grad_norm: before clipping.
        applied: False where the step was skipped, because the loss was not finite or float16 overflowed.
        seconds_per_step, seconds_left: mean over the last steps, and what that makes of the rest.
        pictures: the validation grid that was made after this step, if any.
        checkpoint: the checkpoint that was written after this step, if any.
    """

    step: int
    steps: int
    loss: float
    instance_loss: float
    prior_loss: float | None
    learning_rate: float
    grad_norm: float
    applied: bool
    seconds_per_step: float
    seconds_left: float
    pictures: Path | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a finished or stopped run leaves.

    Attributes:
        adapter: the adapter file.
        steps: optimizer steps in it.
        losses: loss of every step, those before a resume included.
        pictures: validation grids, oldest first.
        checkpoint: the newest checkpoint.
        interrupted: whether Ctrl-C or a signal ended it.
        silent_layers: `component.layer` of layers that had no gradient over the first steps.
        seconds: of training, without loading and caching.
        report: the HTML page about the run; None where it was interrupted or cannot be written.
    """

    adapter: Path
    steps: int
    losses: tuple[float, ...]
    pictures: tuple[Path, ...]
    checkpoint: Path
    interrupted: bool
    silent_layers: tuple[str, ...]
    seconds: float
    report: Path | None = None


class History:
    """The losses of all steps so far, as `losses.json` and checkpoints hold them."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self.rows = list(rows)

    def add(self, step: TrainStep) -> None:
        """Note one step; of its fields those that describe the learning, not the clock."""
        record = asdict(step)
        self.rows.append({name: record[name] for name in _HISTORY})

    @property
    def losses(self) -> tuple[float, ...]:
        """One per step."""
        return tuple(float(row["loss"]) for row in self.rows)

    def write(self, output_dir: Path) -> None:
        """Write `losses.json`: a list of steps. Losses that are not finite are the strings "nan" and "inf".

        Raises:
            AdapterFileError: the disk is full or the folder cannot be written.
        """
        write_atomically(output_dir / LOSSES, json.dumps(self.to_json(), indent=0).encode())

    def to_json(self) -> list[dict[str, Any]]:
        """Rows that every JSON reader takes."""
        return [{k: str(v) if isinstance(v, float) and v - v != 0 else v for k, v in row.items()} for row in self.rows]


class Console:
    """Progress bars and notes on the terminal, or silence."""

    def __init__(
        self,
        shown: bool,
        on_note: Callable[[str], None] | None = None,
        on_item: Callable[[str, int, int], object] | None = None,
    ) -> None:
        self.shown = shown
        self.notes: list[str] = []
        self._on_note, self._on_item = on_note, on_item
        self._bar: tqdm[Any] | None = None

    def say(self, note: str) -> None:
        """A line above the bar; kept in `notes` in any case."""
        self.notes.append(note)
        if self._on_note is not None:
            self._on_note(note)
        elif self.shown:
            tqdm.write(note)

    def track(self, items: Iterable[Any], title: str) -> Iterable[Any]:
        """The items, with a bar of their own while they pass."""
        kept: Sequence[Any] = list(items)
        bar = tqdm(kept, desc=title, disable=not self.shown or not kept, leave=False)
        return bar if self._on_item is None else self._told(bar, title, len(kept), self._on_item)

    @staticmethod
    def _told(
        items: Iterable[Any], title: str, count: int, on_item: Callable[[str, int, int], object]
    ) -> Iterator[Any]:
        for index, item in enumerate(items):
            on_item(title, index, count)
            yield item

    def start(self, step: int, steps: int) -> None:
        """Begin the bar of the run."""
        self._bar = tqdm(total=steps, initial=step, desc="training", unit="step", disable=not self.shown)

    def advance(self, step: TrainStep) -> None:
        """One more step: its loss and rate; tqdm adds the time left."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{step.loss:.4f}", lr=f"{step.learning_rate:.1e}", refresh=False)
            self._bar.update(1)

    def stop(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


assert set(_HISTORY) <= {f.name for f in fields(TrainStep)}
