"""Draws the evaluation's pictures and reads them: the edge between a pipeline and the figures."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oft_diffusion.errors import ConfigError
from oft_diffusion.evaluation.figures import Figure, Row, figures
from oft_diffusion.evaluation.prompts import (
    Prompt,
    leakage_prompts,
    other_prompts,
    recoloured_prompts,
    subject_prompts,
)
from oft_diffusion.evaluation.reading import draw, read
from oft_diffusion.files import write_atomically
from oft_diffusion.pipeline import set_oft_adapters
from oft_diffusion.pocket.classifier import AttributeClassifier
from oft_diffusion.pocket.world import SIZE, UNCAPTIONED

STEPS = 25
GUIDANCE = 2.5


@dataclass(frozen=True)
class Looks:
    """A subject as its instance pictures show it.

    Attributes:
        object: what it is.
        uncaptioned: its fixed accent, face, hat and badge.
        colour: its body's colour in the pictures.
        backgrounds: where the pictures show it.
        pictures: the instance pictures, float32 `(n, 128, 128, 3)` from 0 to 1.
    """

    object: str
    uncaptioned: dict[str, str]
    colour: str
    backgrounds: tuple[str, ...]
    pictures: np.ndarray

    def nearest(self, picture: Image.Image) -> float:
        """Root mean square distance of a picture to the nearest instance picture."""
        return float(np.sqrt(((self.pictures - _pixels(picture)) ** 2).mean(axis=(1, 2, 3))).min())

    def closest(self) -> float:
        """The same between the two instance pictures that are most alike."""
        distances = [np.sqrt(((a - b) ** 2).mean()) for a, b in combinations(self.pictures, 2)]
        return float(min(distances))


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: the figures, and a row per picture behind them."""

    figures: dict[str, Figure]
    rows: tuple[Row, ...]

    def save(self, path: str | Path) -> Path:
        """Write figures and rows as JSON, whole or not at all."""
        path = Path(path)
        shown = {
            name: {part: interval._asdict() for part, interval in figure._asdict().items()}
            for name, figure in self.figures.items()
        }
        content = {"figures": shown, "rows": [row.to_json() for row in self.rows]}
        write_atomically(path, json.dumps(content, indent=1).encode())
        return path

    def table(self) -> str:
        """The figures as lines of text: with the adapter, without it, and the difference, each with its interval."""
        lines = [f"{'':16}{'adapter':>24}{'base':>24}{'difference':>24}{'pictures':>10}"]
        for name, figure in self.figures.items():
            cells = "".join(f"{100 * i.mean:9.1f} [{100 * i.low:5.1f}, {100 * i.high:5.1f}]" for i in figure)
            lines.append(f"{name:16}{cells}{figure.adapted.pictures:10d}")
        return "\n".join(lines)


def looks_of(classifier: AttributeClassifier, pictures: Sequence[Image.Image]) -> Looks:
    """What a subject's instance pictures have in common, read by the classifier; the majority decides.

    Raises:
        ConfigError: fewer than two pictures, or they agree on no one subject.
    """
    readings = read(classifier, pictures) if len(pictures) >= 2 else []
    common = {
        name: Counter(r[name] for r in readings).most_common(1)[0]
        for name in ("object", "colour", *UNCAPTIONED)
        if readings
    }
    unclear = [name for name, (_, count) in common.items() if count <= len(readings) / 2]
    if not readings or unclear:
        raise ConfigError(
            f"the {len(pictures)} instance pictures do not show one subject of the pocket world"
            + (f" (they disagree on {', '.join(unclear)})" if unclear else ""),
            expected="two or more drawings of one subject, such as those in oft_diffusion/pocket/subjects/",
            fix="evaluate adapters that were trained on such pictures",
        )
    return Looks(
        object=common["object"][0],
        uncaptioned={name: common[name][0] for name in UNCAPTIONED},
        colour=common["colour"][0],
        backgrounds=tuple(sorted({r["background"] for r in readings})),
        pictures=np.stack([_pixels(picture) for picture in pictures]),
    )


def prompt_sets(looks: Looks, trigger: str, count: int) -> dict[str, list[Prompt]]:
    """The `count` prompts of each of `figures.SETS`."""
    return {
        "subject": subject_prompts(looks.object, trigger, looks.backgrounds, count),
        "recoloured": recoloured_prompts(looks.object, looks.colour, trigger, looks.backgrounds, count),
        "other": other_prompts(looks.object, count),
        "leakage": leakage_prompts(looks.object, count),
    }


def draw_rows(
    pipe: Any,
    classifier: AttributeClassifier,
    looks: Looks,
    sets: dict[str, list[Prompt]],
    *,
    group: str,
    adapted: bool,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    on_pictures: Callable[[int], object] | None = None,
) -> list[Row]:
    """Draw every prompt of the sets once with the pipeline as it is, and read the pictures.

    Seeds depend on a prompt's place in its set alone, so that pictures with and without an adapter, and of one subject
    trained twice, are pairs.
    """
    rows = []
    for name, prompts in sets.items():
        seeds = [zlib.crc32(f"{name}/{i}".encode()) for i in range(len(prompts))]
        done = 0
        for pictures in draw(pipe, [p.text for p in prompts], seeds, steps=steps, guidance=guidance):
            for picture, reading in zip(pictures, read(classifier, pictures), strict=True):
                asked = prompts[done]
                hit = reading["object"] == looks.object and all(reading[k] == v for k, v in looks.uncaptioned.items())
                faithful = all(reading[k] == v for k, v in asked.named.items())
                nearest = round(looks.nearest(picture), 5)
                rows.append(Row(group, name, asked.text, seeds[done], adapted, reading, hit, faithful, nearest))
                done += 1
            if on_pictures is not None:
                on_pictures(len(pictures))
    return rows


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
    on_pictures: Callable[[int], object] | None = None,
) -> Evaluation:
    """All figures of one adapter on the pocket base. Draws 8 x count pictures.

    Args:
        pipe: the pocket base with the adapter loaded; left with it alone, active at strength 1.
        adapter_name: which.
        classifier: from `load_classifier`.
        looks: the subject, from `looks_of`.
        trigger: the subject's word.
        count: pictures per set, with and without the adapter. A difference of two points needs some 500.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        on_pictures: called with the number of pictures drawn since the last call.

    Returns:
        Figures and rows.
    """
    sets, rows = prompt_sets(looks, trigger, count), []
    for strength in (0.0, 1.0):
        set_oft_adapters(pipe, adapter_name, strength)
        rows += draw_rows(
            pipe,
            classifier,
            looks,
            sets,
            group=adapter_name,
            adapted=strength > 0,
            steps=steps,
            guidance=guidance,
            on_pictures=on_pictures,
        )
    return Evaluation(figures(rows, {adapter_name: looks.closest()}), tuple(rows))


def _pixels(picture: Image.Image) -> np.ndarray:
    small = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255
