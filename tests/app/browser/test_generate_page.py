"""Drawing in a real browser."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from oft_diffusion.generate import generate
from oft_diffusion.images import read_settings
from oft_diffusion.pocket import GUIDANCE, pocket_pipeline
from tests.helpers.app_page import choose, draw, number, opened_part, pixels, quick, reload, text

pytestmark = pytest.mark.browser


def test_drawing_with_and_without_an_adapter(opened: Any, pictures: Any) -> None:
    page = opened()
    quick(page)
    page.get_by_label("Keep this seed").check()
    number(page, "seed", 7)
    choose(page, "adapter-0", "My mug")
    text(page, "prompt").fill("a mug")
    page.wait_for_selector("#trigger-warning")
    assert "sks" in page.locator("#trigger-warning").inner_text()
    page.get_by_text("sks mug", exact=True).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a sks mug'")
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
    [base] = generate(pipe, "a sks mug", [7], steps=3, guidance=GUIDANCE)
    assert np.array_equal(without, np.asarray(base.image, dtype=int))
    assert read_settings(drawn[0])["adapters"][0]["name"] == "My mug"
    assert page.locator("#pictures img").count() >= 1


def test_a_dropped_picture_gives_its_settings_back(opened: Any, pictures: Any) -> None:
    page = opened()
    quick(page)
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


def test_cancelling(opened: Any, pictures: Any) -> None:
    page = opened()
    quick(page, steps=150)
    text(page, "prompt").fill("a cat")
    page.locator("#generate").click()
    page.wait_for_selector("#status .working")
    page.wait_for_selector("#preview img")
    before = len(pictures())
    page.locator("#cancel:not([disabled])").click()
    page.wait_for_selector("#status .cancelled")
    assert len(pictures()) == before
    page.wait_for_selector("#generate:not([disabled])")


@pytest.mark.slow
def test_a_drawing_is_found_after_a_reload_and_cancelled(opened: Any, pictures: Any) -> None:
    page = opened()
    quick(page, steps=150)
    number(page, "count", 16)
    text(page, "prompt").fill("a cat")
    page.locator("#generate").click()
    page.wait_for_selector("#preview img")
    reload(page, working=True)
    page.wait_for_selector("#status .working")
    page.wait_for_selector("#preview img")
    assert page.locator("#generate").is_disabled()
    page.locator("#cancel:not([disabled])").click()
    page.wait_for_selector("#status .cancelled")
    page.wait_for_selector("#preview img", state="detached")
    before = len(pictures())
    quick(page, steps=2)
    draw(page, "a mug")
    assert len(pictures()) == before + 1
    assert read_settings(pictures()[-1])["steps"] == 2
    reload(page)
    assert "1 picture" in page.locator("#status").inner_text()
    page.wait_for_selector("#pictures img")


def test_two_people_do_not_meet(opened: Any) -> None:
    one, two = opened(), opened()
    quick(one, steps=150)
    quick(two)
    text(one, "prompt").fill("a cat")
    one.locator("#generate").click()
    one.wait_for_selector("#status .working")
    text(two, "prompt").fill("a mug")
    two.locator("#generate").click()
    two.wait_for_selector("#status .waiting")
    assert "one other job" in two.locator("#status").inner_text()
    assert two.locator("#cancel").is_enabled()
    one.locator("#cancel").click()
    two.wait_for_selector("#status .done")
    one.wait_for_selector("#status .cancelled")
    for page in (two, one):
        opened_part(page, "Earlier pictures")
    two.wait_for_selector("#history img")
    assert one.locator("#history img").count() == 0


def test_html_in_a_prompt_is_text(opened: Any, pictures: Any) -> None:
    page = opened()
    quick(page, steps=1)
    hostile = 'a mug <img src=x onerror="window.hurt=1"> <script>window.hurt=1</script>'
    draw(page, hostile)
    assert read_settings(pictures()[-1])["prompt"] == hostile
    reload(page)
    assert page.evaluate("window.hurt") is None
