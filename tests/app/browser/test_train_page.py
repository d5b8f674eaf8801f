"""Training in a real browser, on a tiny Stable Diffusion; on the pocket base in test_five_minutes.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from oft_diffusion.pocket import subjects_path
from tests.helpers.app_page import choose, go_to, number, opened_part, text

pytestmark = pytest.mark.browser
PICTURES = sorted(subjects_path("bow_cat").iterdir())


def until(true: Callable[[], bool]) -> None:
    """Wait for what the server does, half a minute at most."""
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def filled(page: Any, name: str, steps: int) -> None:
    """Five pictures and the words that training wants."""
    go_to(page, "Train")
    page.locator("#photos-drop input[type=file]").set_input_files(PICTURES)
    page.wait_for_function("document.querySelectorAll('#photos img').length === 5")
    text(page, "run-name").fill(name)
    text(page, "run-trigger").fill("zwx")
    text(page, "run-class").fill("cat")
    opened_part(page, "Settings")
    choose(page, "run-preset", "Stable Diffusion, where memory is short")
    page.wait_for_timeout(500)
    number(page, "run-steps", steps)
    text(page, "run-prompts").fill("a {trigger} {class_word}")


def test_pictures_become_an_adapter_that_draws(opened: Any, small_server: Any) -> None:
    session, url = small_server
    page = opened(url)
    filled(page, "Cat one", 6)
    caption = page.get_by_label("Caption of picture 2")
    assert caption.input_value() == PICTURES[3].read_text().strip()
    caption.fill("a white cat, as <b>I</b> say")
    until(lambda: any("<b>I</b>" in p.read_text() for p in session.workspace.people.glob("*/uploads/*.txt")))
    page.locator("#train").click()
    page.wait_for_selector("#train-status .done")
    assert "Cat one is on the shelf" in page.locator("#train-status").inner_text()
    assert str(page.locator("#curve .dots").get_attribute("d")).count("M") >= 2
    page.wait_for_selector("#train-grids img")
    captions = [p.read_text() for p in sorted(session.workspace.runs.glob("*/photos/*.txt"))[-5:]]
    assert captions[1] == "a white cat, as <b>I</b> say"
    opened_part(page, "Take this run to another machine")
    page.get_by_role("button", name="Pack settings and pictures").click()
    page.wait_for_selector("#packed a")
    go_to(page, "Generate")
    assert page.locator("#adapter-0 input").input_value() == "Cat one"
    text(page, "prompt").fill("a zwx cat")
    opened_part(page, "Settings")
    number(page, "count", 1)
    number(page, "steps", 1)
    page.locator("#generate").click()
    page.wait_for_selector("#status .done")
    [*_, newest] = sorted(session.workspace.people.glob("*/pictures/*.png"))
    assert session.settings_in(newest)["adapters"][0]["name"] == "Cat one"


def test_what_is_missing_or_wrong_is_said_in_words(opened: Any, small_server: Any, tmp_path: Path) -> None:
    _, url = small_server
    page = opened(url)
    go_to(page, "Train")
    page.locator("#train").click()
    page.wait_for_selector("#train-status .problem")
    assert "name is missing" in page.locator("#train-status").inner_text()
    fake = tmp_path / "fake.png"
    fake.write_bytes(b"no picture")
    small = tmp_path / "small.png"
    Image.new("RGB", (8, 8), "red").save(small)
    page.locator("#photos-drop input[type=file]").set_input_files([fake, small])
    page.wait_for_function("document.querySelector('#photos-note').innerText.includes('no picture')")
    assert "smaller than" in page.locator("#photos-note").inner_text()
    page.get_by_role("button", name="Remove picture 1").click()
    page.wait_for_function("document.querySelectorAll('#photos img').length === 0")
