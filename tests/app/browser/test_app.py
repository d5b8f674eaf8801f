"""The app in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oft_diffusion.generate import generate
from oft_diffusion.images import read_settings
from oft_diffusion.pocket import pocket_pipeline
from tests.helpers.browser import SCHEMES, WIDTHS, faint_texts, too_wide

pytestmark = pytest.mark.browser
TABS = ("Generate", "Compare", "Train", "Adapters")


def go_to(page: Any, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()


def choose(page: Any, menu: str, name: str) -> None:
    """An entry of a menu."""
    page.locator(f"#{menu} input").click()
    page.get_by_role("option", name=name).click()


def number(page: Any, field: str, value: float) -> None:
    page.locator(f"#{field} input").first.fill(str(value))
    page.keyboard.press("Tab")


def ready(page: Any) -> None:
    """Settings that are quick."""
    page.get_by_text("Settings", exact=True).first.click()
    number(page, "count", 1)
    number(page, "steps", 3)


def draw(page: Any, prompt: str = "a mug") -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#generate").click()
    page.wait_for_selector("#status .working, #status .waiting, #status .done")
    page.wait_for_selector("#status .done")


def pixels(path: Path) -> Any:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


def test_drawing_with_and_without_an_adapter(opened: Any, pictures: Any) -> None:
    page = opened()
    ready(page)
    page.get_by_label("Keep this seed").check()
    number(page, "seed", 7)
    choose(page, "adapter-0", "My mug")
    page.locator("#prompt textarea").fill("a mug")
    assert "sks" in page.locator("#trigger-warning").inner_text()
    page.get_by_text("sks mug", exact=True).click()
    assert page.locator("#prompt textarea").input_value() == "a sks mug"
    page.wait_for_selector("#trigger-warning", state="hidden")
    drawn = []
    for strength in (1, 0):
        number(page, "strength-0", strength)
        draw(page, "a sks mug")
        drawn.append(pictures()[-1])
    with_it, without = map(pixels, drawn)
    assert not np.array_equal(with_it, without)
    pipe = pocket_pipeline()
    pipe.set_progress_bar_config(disable=True)
    [base] = generate(pipe, "a sks mug", [7], steps=3, guidance=4.0)
    assert np.array_equal(without, np.asarray(base.image, dtype=int))
    assert read_settings(drawn[0])["adapters"][0]["name"] == "My mug"
    assert page.locator("#pictures img").count() >= 1


def test_a_dropped_picture_gives_its_settings_back(opened: Any, pictures: Any) -> None:
    page = opened()
    ready(page)
    choose(page, "adapter-0", "My mug")
    number(page, "strength-0", 0.5)
    draw(page, "a teal sks mug at night")
    path = pictures()[-1]
    other = opened()
    other.locator("#recall input[type=file]").set_input_files(path)
    other.wait_for_function("document.querySelector('#prompt textarea').value.includes('teal')")
    assert other.locator("#strength-0 input").first.input_value() == "0.5"
    assert other.locator("#seed input").input_value() == str(read_settings(path)["seed"])
    assert other.locator("#adapter-0 input").input_value() == "My mug"
    assert other.get_by_label("Keep this seed").is_checked()


def test_cancelling_and_coming_back_after_a_reload(opened: Any, pictures: Any) -> None:
    page = opened()
    page.get_by_text("Settings", exact=True).first.click()
    number(page, "steps", 150)
    page.locator("#prompt textarea").fill("a cat")
    page.locator("#generate").click()
    page.wait_for_selector("#status .working")
    page.reload()
    page.wait_for_selector("#status .working")
    before = len(pictures())
    page.locator("#cancel").click()
    page.wait_for_selector("#status .cancelled")
    assert len(pictures()) == before
    assert page.locator("#generate").is_enabled()
    ready(page)
    draw(page)
    assert len(pictures()) == before + 1


def test_two_people_do_not_meet(opened: Any, pictures: Any) -> None:
    one, two = opened(), opened()
    for page in (one, two):
        ready(page)
    number(one, "steps", 150)
    one.locator("#prompt textarea").fill("a cat")
    one.locator("#generate").click()
    one.wait_for_selector("#status .working")
    two.locator("#prompt textarea").fill("a mug")
    two.locator("#generate").click()
    two.wait_for_selector("#status .waiting")
    assert "one other job" in two.locator("#status").inner_text()
    assert two.locator("#cancel").is_enabled()
    one.locator("#cancel").click()
    two.wait_for_selector("#status .done")
    one.wait_for_selector("#status .cancelled")
    two.get_by_text("Earlier pictures").click()
    one.get_by_text("Earlier pictures").click()
    two.wait_for_selector("#history img")
    assert one.locator("#history img").count() == 0


def test_comparing(opened: Any) -> None:
    page = opened()
    go_to(page, "Compare")
    page.locator("#compare-prompt textarea").fill("a sks mug")
    choose(page, "compare-adapter", "My mug")
    number(page, "compare-count", 2)
    number(page, "compare-steps", 2)
    page.locator("#compare").click()
    page.wait_for_selector("#compare-status .done")
    page.wait_for_selector("#slider img")
    page.get_by_label("strengths").check()
    page.locator("#compare").click()
    page.wait_for_selector("#sheet img")


def test_adapters_are_renamed_combined_handed_out_and_deleted(opened: Any, server: Any, tmp_path: Path) -> None:
    session, _ = server
    page = opened()
    go_to(page, "Adapters")
    choose(page, "shelf-adapter", "My mug")
    page.wait_for_selector("#about table")
    assert "sks mug" in page.locator("#about").inner_text()
    page.get_by_text("Hand out").click()
    with page.expect_download() as download:
        page.locator("#export").click()
        page.locator("#exported a").first.click()
    page.locator("#take-in input[type=file]")
    path = tmp_path / "back.safetensors"
    download.value.save_as(path)
    page.get_by_text("Take in a file, of any tool").click()
    page.locator("#take-in input[type=file]").set_input_files(path)
    page.wait_for_function("document.querySelectorAll('#cards .card').length === 2")
    choose(page, "shelf-adapter", "back")
    page.get_by_text("Name, and delete").click()
    page.locator("#name input").fill("<b>bold</b>")
    page.locator("#rename").click()
    page.wait_for_function("document.querySelector('#cards').innerText.includes('<b>bold</b>')")
    assert not page.locator("#delete").is_enabled()
    page.get_by_label("Yes, delete it for good").check()
    page.locator("#delete").click()
    page.wait_for_function("document.querySelectorAll('#cards .card').length === 1")
    assert [card.name for card in session.shelf.cards()] == ["My mug"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_tab_can_be_read(opened: Any, width: str, scheme: Any) -> None:
    page = opened(viewport={"width": WIDTHS[width], "height": 800}, color_scheme=scheme)
    for tab in TABS:
        go_to(page, tab)
        page.wait_for_timeout(300)
        assert too_wide(page) <= 0, tab
        assert faint_texts(page) == [], tab
