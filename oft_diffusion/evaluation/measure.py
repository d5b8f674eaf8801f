"""Draws the evaluation's pictures and reads them: the edge between a pipeline and the figures."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oft_diffusion.disk import write_atomically
from oft_diffusion.evaluation.figures import Figure, Row, figures, is_difference
from oft_diffusion.evaluation.intervals import Interval
from oft_diffusion.evaluation.looks import Looks
from oft_diffusion.evaluation.prompts import (
    Prompt,
    class_prompts,
    long_trigger_prompts,
    other_prompts,
    other_trigger_prompts,
    recoloured_prompts,
    subject_prompts,
)
from oft_diffusion.evaluation.reading import read
from oft_diffusion.generate import generate
from oft_diffusion.pipeline import set_oft_adapters
from oft_diffusion.pocket import GUIDANCE, STEPS
from oft_diffusion.pocket.classifier import AttributeClassifier
from oft_diffusion.pocket.world import UNCAPTIONED

BATCH = 16  # pictures per call of the pipeline
_ONE_RUN = "evaluation"  # the group of all rows where one adapter is measured


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: the figures, and a row per picture behind them."""

    figures: dict[str, Figure]
    rows: tuple[Row, ...]

    def save(self, path: str | Path) -> Path:
        """Write figures and rows as JSON, whole or not at all."""
        path = Path(path)
        shown = {
            name: {part: interval and interval._asdict() for part, interval in figure._asdict().items()}
            for name, figure in self.figures.items()
        }
        content = {"figures": shown, "rows": [row.to_json() for row in self.rows]}
        write_atomically(path, json.dumps(content, indent=1).encode())
        return path

    def shares(self) -> list[list[str]]:
        """A header and a line per figure that is a share of pictures: how many of how many, per cent, 95 % interval."""
        lines = [["shares of pictures", "with the adapter", "without it", "difference, points"]]
        for name, figure in self.figures.items():
            if not is_difference(name):
                sides = [f"{_counted(side)}: {_per_cent(side, ' %')}" for side in (figure.adapted, figure.base)]
                lines.append([name, *sides, _per_cent(figure.difference)])
        return lines

    def differences(self) -> list[list[str]]:
        """A header and a line per figure that is a difference to the base: points, 95 % interval, and both sides."""
        lines = [["differences to the base", "points", "with the adapter", "without it"]]
        for name, figure in self.figures.items():
            if is_difference(name):
                kind, each = ("pictures", 1) if name == "preservation" else ("attributes", len(UNCAPTIONED))
                sides = [f"{_counted(side, each)} {kind}" for side in (figure.adapted, figure.base)]
                lines.append([name, _per_cent(figure.difference), *sides])
        return lines

    def text(self) -> str:
        """`shares` and `differences` in columns, for a terminal."""
        tables = [self.shares(), self.differences()]
        widths = [max(map(len, column)) for column in zip(*tables[0], *tables[1], strict=True)]
        return "\n\n".join(
            "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table) for table in tables
        )


def _counted(side: Interval, each: int = 1) -> str:
    """How many of how many counted, with `each` to be had in a picture."""
    return f"{round(side.mean * side.pictures * each)} of {side.pictures * each}"


def _per_cent(interval: Interval, unit: str = "") -> str:
    """Whole numbers where one picture is more than one of them."""
    places = int(interval.pictures > 100)
    mean, low, high = (f"{round(100 * x, places) + 0.0:.{places}f}" for x in interval[:3])  # no "-0"
    return f"{mean}{unit} ({low} to {high})"


def prompt_sets(looks: Looks, trigger: str, count: int, salt: str = "") -> dict[str, list[Prompt]]:
    """The `count` prompts of each of `figures.SETS`.

    Raises:
        ConfigError: the instance images leave no background or colour to ask for.
    """
    seen = looks.backgrounds
    return {
        "subject": subject_prompts(looks.object, trigger, seen, count, salt),
        "recoloured": recoloured_prompts(looks.object, looks.colour, trigger, seen, count, salt),
        "other": other_prompts(looks.object, count, salt),
        "other trigger": other_trigger_prompts(looks.object, trigger, count, salt),
        "long trigger": long_trigger_prompts(looks.object, trigger, count, salt),
        "class word": class_prompts(looks.object, count, salt),
    }


def draw_rows(
    pipe: Any,
    classifier: AttributeClassifier,
    looks: Looks,
    sets: Mapping[str, Sequence[Prompt]],
    *,
    group: str,
    adapted: bool,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    on_picture: Callable[[], object] | None = None,
) -> list[Row]:
    """Draw every prompt of the sets once with the pipeline as it is, and read the pictures.

    Seeds depend on group, set and place in it alone, so that pictures with and without an adapter are pairs, and no
    two runs share theirs.
    """
    rows = []
    for name, prompts in sets.items():
        seeds = [seed_of(group, name, i) for i in range(len(prompts))]
        drawn = generate(
            pipe,
            [p.text for p in prompts],
            seeds,
            steps=steps,
            guidance=guidance,
            batch_size=BATCH,
            on_picture=(lambda *_: on_picture()) if on_picture else None,
        )
        images = [picture.image for picture in drawn]
        for asked, seed, image, reading in zip(prompts, seeds, images, read(classifier, images), strict=True):
            shared = sum(reading[key] == value for key, value in looks.uncaptioned.items())
            rows.append(
                Row(
                    group=group,
                    set=name,
                    prompt=asked.text,
                    seed=seed,
                    adapted=adapted,
                    reading=reading,
                    hit=reading["object"] == looks.object and shared == len(looks.uncaptioned),
                    shared=shared,
                    faithful=all(reading[key] == value for key, value in asked.named.items()),
                    nearest=round(looks.nearest(image), 5),
                )
            )
    return rows


def seed_of(group: str, name: str, place: int) -> int:
    """The seed of a set's picture, in whichever run and on whichever side it is drawn."""
    return zlib.crc32(f"{group}/{name}/{place}".encode())


def evaluate(
    pipe: Any,
    adapter_name: str,
    *,
    classifier: AttributeClassifier,
    looks: Looks,
    trigger: str,
    count: int = 64,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    on_picture: Callable[[], object] | None = None,
) -> Evaluation:
    """All figures of one adapter on the pocket base. Draws `2 * count` pictures for each of `figures.SETS`.

    Every adapter is asked for pictures of the same seeds, whatever it is called.

    Args:
        pipe: the pocket base with the adapter loaded; left with it alone, active at strength 1.
        adapter_name: which.
        classifier: from `load_classifier`.
        looks: the subject, from `looks_of`.
        trigger: the subject's word.
        count: pictures per set, with and without the adapter.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        on_picture: called after each picture.

    Returns:
        Figures and rows.

    Raises:
        ConfigError: the instance images leave nothing to ask for, or the pipeline refuses a setting.
    """
    sets, rows = prompt_sets(looks, trigger, count), []
    how: dict[str, Any] = {"steps": steps, "guidance": guidance, "on_picture": on_picture}
    for adapted in (False, True):
        set_oft_adapters(pipe, adapter_name, float(adapted))
        rows += draw_rows(pipe, classifier, looks, sets, group=_ONE_RUN, adapted=adapted, **how)
    return Evaluation(figures(rows, {_ONE_RUN: looks.closest()}), tuple(rows))
