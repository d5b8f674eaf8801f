"""Drawing in a real browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oft_diffusion.files import load_adapter_file, save_adapter_file
from oft_diffusion.generate import generate
from oft_diffusion.images import read_settings, save_png
from oft_diffusion.pocket import GUIDANCE, pocket_pipeline
from tests.helpers.app_line import lined
from tests.helpers.app_page import IDLE, choose, draw, number, opened_part, pixels, quick, reload, text, until

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
    page.wait_for_selector("#trigger-warning:has-text('calls the subject')")
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


@pytest.mark.slow
def test_a_picture_that_was_downloaded_gives_its_settings_back(opened: Any, pictures: Any, tmp_path: Path) -> None:
    page = opened()
    quick(page)
    choose(page, "adapter-0", "My mug")
    number(page, "strength-0", 0.5)
    draw(page, "a teal sks mug at night")
    page.locator("#pictures .thumbnail-lg").first.click()
    with page.expect_download() as download:
        page.locator("#pictures").get_by_label("Download").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.read_bytes() == pictures()[-1].read_bytes()
    other = opened()
    other.locator("#recall input[type=file]").set_input_files(path)
    other.wait_for_function("document.querySelector('#prompt textarea').value.includes('teal')")
    assert other.locator("#strength-0 input").first.input_value() == "0.5"
    assert other.locator("#seed input").input_value() == str(read_settings(path)["seed"])
    assert other.locator("#adapter-0 input").input_value() == "My mug"
    assert other.get_by_label("Keep this seed").is_checked()


@pytest.mark.slow
def test_adapters_are_switched_off_and_change_places(opened: Any, pictures: Any) -> None:
    page = opened()
    quick(page, steps=1)
    opened_part(page, "More adapters, one after another")
    choose(page, "adapter-1", "My mug")
    number(page, "strength-1", 0.5)
    page.wait_for_selector("#triggers")
    page.locator("#up-1").click()
    page.wait_for_function("document.querySelector('#adapter-0 input').value === 'My mug'")
    assert page.locator("#strength-0 input").first.input_value() == "0.5"
    page.locator("#acts-0 input").uncheck()
    page.wait_for_selector("#triggers", state="hidden")
    draw(page, "a mug")
    assert read_settings(pictures()[-1])["adapters"] == []
    assert page.locator("#strength-0 input").first.input_value() == "0.5"
    page.locator("#seed input").fill("")
    page.get_by_label("Keep this seed").check()
    page.locator(IDLE).click()
    page.wait_for_selector("#status .problem")
    assert "The first seed is no number, or empty" in page.locator("#status").inner_text()


def test_cancelling(opened: Any, pictures: Any, server: Any) -> None:
    """By keyboard: nothing moves as the unfinished picture comes and goes, and the focus stays where it was."""
    page = opened()
    quick(page, steps=150)
    text(page, "prompt").fill("a cat")
    places = {page.locator("#recall").bounding_box()["y"]}
    page.locator("#generate").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#status .working")
    page.wait_for_selector("#preview img")
    places.add(page.locator("#recall").bounding_box()["y"])
    assert page.evaluate("document.activeElement.id") == "generate"
    before = len(pictures())
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")  # once more, while it draws
    page.wait_for_selector("#status .waiting")  # Cancel ends what the server has heard of
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "cancel"
    page.keyboard.press("Enter")
    page.wait_for_selector("#status .cancelled")
    until(lambda: not server[0].machine.going("draw"))
    assert len(pictures()) == before
    page.wait_for_selector(IDLE)
    places.add(page.locator("#recall").bounding_box()["y"])
    assert len(places) == 1


@pytest.mark.slow
def test_a_drawing_is_found_after_a_reload_and_cancelled(opened: Any, pictures: Any, server: Any) -> None:
    page = opened()
    quick(page, steps=150)
    number(page, "count", 16)
    text(page, "prompt").fill("a cat")
    page.locator("#generate").click()
    page.wait_for_selector("#preview img")
    reload(page, working=True)
    page.wait_for_selector("#status .working")
    page.wait_for_selector("#preview img")
    assert page.locator(IDLE).count() == 0
    text(page, "prompt").fill("a dog")
    page.locator("#generate").click()  # the page shows the newest, and Cancel ends both
    page.wait_for_selector("#status .waiting")
    page.wait_for_timeout(1000)
    assert "Waiting for one other job: a drawing." in page.locator("#status").inner_text()
    page.locator("#cancel:not([disabled])").click()
    page.wait_for_selector("#status .cancelled")
    until(lambda: server[0].machine._working is None)
    page.wait_for_selector("#preview img", state="detached")
    before = len(pictures())
    quick(page, steps=2)
    draw(page, "a mug")
    assert len(pictures()) == before + 1
    assert read_settings(pictures()[-1])["steps"] == 2
    reload(page)
    assert "1 picture" in page.locator("#status").inner_text()
    page.wait_for_selector("#pictures img")


@pytest.mark.slow  # gradio asks every two seconds whether the server is there again
def test_a_drawing_is_found_after_the_line_was_cut(opened: Any, server: Any) -> None:
    """Nobody reloads the page: gradio does, once the server answers again."""
    with lined(server[1]) as line:
        page = opened(line.url)
        quick(page, steps=150)
        number(page, "count", 16)
        text(page, "prompt").fill("a cat")
        page.locator("#generate").click()
        page.wait_for_selector("#preview img")
        page.leaving = True  # for the line does
        page.evaluate("window.before = true")
        line.cut()
        page.wait_for_timeout(3000)
        seen = page.locator("#status").inner_text()
        page.wait_for_timeout(1000)
        assert page.locator("#status").inner_text() == seen
        line.mend()
        page.wait_for_function("!window.before")
        page.wait_for_selector("#status .working")
        page.wait_for_function("seen => document.querySelector('#status').innerText !== seen", arg=seen)
        page.wait_for_selector("#preview img")
        page.locator("#cancel:not([disabled])").click()
        page.wait_for_selector("#status .cancelled")


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


def test_html_in_prompts_pictures_and_triggers_is_text(opened: Any, pictures: Any, server: Any, tmp_path: Path) -> None:
    page = opened()
    quick(page, steps=1)
    hostile = 'a mug <img src=x onerror="window.hurt=1"> <script>window.hurt=1</script>'
    draw(page, hostile)
    path = pictures()[-1]
    assert read_settings(path)["prompt"] == hostile
    assert page.locator("#pictures img").first.get_attribute("alt").endswith(hostile)
    told = {**read_settings(path), "adapters": [{"name": hostile, "strength": 1.0}]}
    dropped = tmp_path / "dropped.png"
    save_png(Image.new("RGB", (8, 8)), dropped, told)
    session, _ = server
    file = load_adapter_file(session.shelf.cards()[-1].file)
    metadata = replace(file.metadata, trigger="<img src=x onerror=window.hurt=1>")
    named = session.shelf.add(save_adapter_file(tmp_path, file.components, metadata), "named by markup")
    try:
        reload(page)
        page.locator("#recall input[type=file]").set_input_files(dropped)
        page.wait_for_function("document.querySelector('#recall-note').innerText.includes('is not on this shelf')")
        choose(page, "adapter-0", "named by markup")
        page.wait_for_selector("#trigger-warning")
        assert "<img" in page.locator("#trigger-warning").inner_text()
        assert page.locator("#recall-note img, #trigger-warning img, #triggers img").count() == 0
        assert page.evaluate("window.hurt") is None
    finally:
        session.shelf.delete(named.id)
