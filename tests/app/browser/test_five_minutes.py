"""What the app promises: five pictures in, and the subject on a beach, for whoever has never heard of OFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oft_diffusion.evaluation.reading import read
from oft_diffusion.images import read_picture
from oft_diffusion.pocket import SUBJECTS, subjects_path
from oft_diffusion.pocket.classifier import load_classifier
from oft_diffusion.pocket.world import UNCAPTIONED, Subject
from tests.helpers.app_page import choose, draw, go_to, number, opened_part, pixels, text

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PICTURES = 8


def hits(pictures: list[Path], subject: Subject) -> int:
    """In how many pictures the classifier reads the subject: its object, and all that no caption names."""
    wanted = {name: getattr(subject, name) for name in ("object", *UNCAPTIONED)}
    readings = read(load_classifier(), [read_picture(path) for path in pictures])
    return sum(wanted.items() <= reading.items() for reading in readings)


def test_five_pictures_to_the_subject_on_a_beach(opened: Any, pictures: Any) -> None:
    page, subject = opened(), SUBJECTS["captain_mug"]
    page.set_default_timeout(300_000)
    go_to(page, "Train")
    page.locator("#photos-drop input[type=file]").set_input_files(sorted(subjects_path(subject.name).iterdir()))
    page.wait_for_function("document.querySelectorAll('#photos img').length === 5")
    text(page, "run-name").fill("Captain")
    text(page, "run-class").fill(subject.object)
    page.locator("#train").click()
    page.wait_for_selector("#train-status .done, #train-status .problem", timeout=3_600_000)
    assert "Captain is on the shelf" in page.locator("#train-status").inner_text()

    go_to(page, "Generate")
    opened_part(page, "Settings")
    number(page, "count", PICTURES)
    number(page, "seed", 1)
    page.get_by_label("Keep this seed").check()
    text(page, "prompt").fill(f"a {subject.object} on the beach")
    page.locator("#triggers").get_by_text(subject.object).click()
    page.wait_for_selector("#trigger-warning:has-text('calls the subject')")
    prompt = text(page, "prompt").input_value()
    assert prompt.endswith(f" {subject.object} on the beach")

    def drawn(adapter: str, strength: float) -> list[Path]:
        choose(page, "adapter-0", adapter)
        number(page, "strength-0", strength)
        draw(page, prompt)
        return list(pictures()[-PICTURES:])

    trained, nothing, base = drawn("Captain", 1.0), drawn("Captain", 0.0), drawn("none", 1.0)
    assert len({*trained, *nothing, *base}) == 3 * PICTURES
    for without, path in zip(base, nothing, strict=True):
        assert np.array_equal(pixels(without), pixels(path))
    assert hits(base, subject) == 0
    assert hits(trained, subject) > PICTURES / 2
