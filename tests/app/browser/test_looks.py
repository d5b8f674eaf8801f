"""Every tab, light and dark, wide and narrow, and without a mouse."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from app.session import Session
from oft_diffusion.pocket import pocket_path
from tests.app.browser.conftest import served_session
from tests.helpers.app_full import fill
from tests.helpers.app_page import TABS, choose, go_to, number, quick, text
from tests.helpers.browser import SCHEMES, WIDTHS, faint_texts, too_wide
from tests.library.support import Maker

pytestmark = pytest.mark.browser
ACCENT = (15, 118, 110)  # teal 700
USER = ("ada", "first")  # whose things are the same in every browser
# The least that each tab has of pictures, or there would be nothing to judge.
PICTURES = {"Generate": 4 + 1 + 4 + 5, "Compare": 2 + 1, "Train": 5 + 2, "Adapters": 2}
UNFOLD = """() => {
  const folded = document.querySelectorAll('button.label-wrap:not(.open)')
  for (const part of folded) if (part.checkVisibility()) part.click()
  for (const part of document.querySelectorAll('details')) part.open = true
}"""
# All that are shown, and those without words. Below a picture that is shown alone, the small ones say nothing more.
LOOKED_AT = """() => {
  const shown = [...document.querySelectorAll('img')].filter(picture => picture.checkVisibility())
  const silent = shown.filter(picture => !picture.alt.trim() && !picture.closest('.thumbnails'))
  return [shown.length, silent.map(picture => picture.outerHTML)]
}"""
COVERED = """() => {
  const shown = [...document.querySelectorAll('.caption-label')].filter(caption => caption.checkVisibility())
  const foot = caption => caption.parentElement.querySelector('img').getBoundingClientRect().bottom
  return shown.filter(caption => caption.getBoundingClientRect().top < foot(caption)).map(text => text.textContent)
}"""


@pytest.fixture(scope="module")
def full(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an app whose user has something of everything."""
    session = Session(tmp_path_factory.mktemp("full"), str(model_folder))
    files = [
        Maker(StableDiffusionPipeline.from_pretrained(base), tmp_path_factory.mktemp("adapter"))(
            "mug", trigger="sks", class_word="mug"
        )
        for base in (model_folder, pocket_path())
    ]
    fill(session, session.workspace.token_of(USER[0]), *files)
    with served_session(session, auth=[USER]) as url:
        yield url


def fully_shown(page: Any, tab: str) -> None:
    """A tab with all that it can show: folded parts, a problem, a picture alone, and what is known of an adapter."""
    go_to(page, tab)
    page.evaluate(UNFOLD)
    if tab == "Generate":
        choose(page, "adapter-0", "My mug")
        page.wait_for_selector("#trigger-warning")
        page.locator("#generate").click()
        page.wait_for_selector("#status .problem")
        page.locator("#pictures .thumbnail-lg").first.click()
        page.wait_for_selector("#pictures .preview")
    if tab == "Adapters":
        page.locator("#cards .card", has_text="For another model").click()
        page.wait_for_selector("#about .problem")
    page.wait_for_function("least => document.querySelectorAll('img').length >= least", arg=PICTURES[tab])


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        pytest.param(width, scheme, marks=[pytest.mark.slow] * ((width == "wide") == (scheme == "dark")))
        for width in WIDTHS
        for scheme in SCHEMES
    ],
)
def test_every_tab_can_be_read(opened: Any, full: str, width: str, scheme: Any) -> None:
    page = opened(full, USER, viewport={"width": WIDTHS[width], "height": 800}, color_scheme=scheme)
    for tab in TABS:
        fully_shown(page, tab)
        assert too_wide(page) <= 0, tab
        assert faint_texts(page) == [], tab
        count, silent = page.evaluate(LOOKED_AT)
        assert count >= PICTURES[tab], tab
        assert silent == [], tab
        assert page.evaluate(COVERED) == [], tab


def test_a_phone_shows_all_tabs(opened: Any) -> None:
    page = opened(viewport={"width": WIDTHS["narrow"], "height": 800})
    for tab in TABS:
        assert page.get_by_role("tab", name=tab).is_visible(), tab
        go_to(page, tab)
        assert not page.locator(".overflow-menu").is_visible()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("width", [pytest.param(360, marks=pytest.mark.slow), 1280, 1920])
def test_the_page_stays_in_its_place_from_tab_to_tab(opened: Any, width: int) -> None:
    page = opened(viewport={"width": width, "height": 800})
    places = set()
    for tab in TABS:
        go_to(page, tab)
        box = page.locator("main").bounding_box()
        places.add((round(box["x"]), round(box["width"])))
    [(left, wide)] = places
    assert wide >= min(width - 64, 1320)
    assert abs(width - 2 * left - wide) <= 16  # in the middle, but for a scroll bar


@pytest.mark.slow
def test_without_a_mouse(opened: Any, pictures: Any) -> None:
    page = opened()
    quick(page, steps=1)
    number(page, "count", 1)
    slider = Image.open(io.BytesIO(page.locator("#steps input[type=range]").screenshot())).convert("RGB")
    ringed = np.abs(np.asarray(slider, dtype=int) - ACCENT).max(axis=-1) < 30
    assert ringed.sum() > 20  # or its thumb is white on white
    before = len(pictures())
    text(page, "prompt").focus()
    page.keyboard.type("a red car")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#status .done")
    assert len(pictures()) == before + 1
    go_to(page, "Adapters")
    page.locator("#cards .card").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#about table")
