"""Every tab, light and dark, wide and narrow, and without a mouse."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.app_page import TABS, go_to, number, quick, text
from tests.helpers.browser import SCHEMES, WIDTHS, faint_texts, too_wide

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_tab_can_be_read(opened: Any, width: str, scheme: Any) -> None:
    page = opened(viewport={"width": WIDTHS[width], "height": 800}, color_scheme=scheme)
    for tab in TABS:
        go_to(page, tab)
        assert too_wide(page) <= 0, tab
        assert faint_texts(page) == [], tab
        unnamed = page.evaluate(
            "[...document.querySelectorAll('img')].filter(i => i.checkVisibility() && !i.hasAttribute('alt')).length"
        )
        assert unnamed == 0, tab


def test_a_phone_shows_all_tabs(opened: Any) -> None:
    page = opened(viewport={"width": WIDTHS["narrow"], "height": 800})
    for tab in TABS:
        assert page.get_by_role("tab", name=tab).is_visible(), tab
        go_to(page, tab)
        assert not page.locator(".overflow-menu").is_visible()


@pytest.mark.parametrize("width", [360, 1280, 1920])
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


def test_without_a_mouse(opened: Any, pictures: Any) -> None:
    page = opened()
    quick(page, steps=1)
    number(page, "count", 1)
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
