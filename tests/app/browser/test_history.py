"""Earlier pictures in a real browser."""

from __future__ import annotations

from typing import Any

import pytest

from app import history_box
from tests.helpers.app_page import draw, number, opened_part, quick, reload, text, until

pytestmark = pytest.mark.browser


@pytest.mark.slow
def test_an_earlier_picture_gives_its_settings_and_is_deleted(
    opened: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_box.HistoryBox.look, "__defaults__", (2,))
    page, before = opened(), len(pictures())
    quick(page, steps=1)
    number(page, "count", 3)
    draw(page, "a teal mug at night")
    text(page, "prompt").fill("a cat")
    number(page, "steps", 5)
    opened_part(page, "Earlier pictures")
    page.wait_for_function("document.querySelectorAll('#history .thumbnail-lg').length === 2")
    page.locator("#history-more").click()
    page.wait_for_function("document.querySelectorAll('#history .thumbnail-lg').length === 3")
    page.wait_for_selector("#history-more", state="hidden")
    assert page.locator("#history-take").is_disabled()
    page.locator("#history .thumbnail-lg").nth(1).click()
    page.locator("#history-take:not([disabled])").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a teal mug at night'")
    assert page.locator("#steps input").first.input_value() == "1"
    page.locator("#history-delete").click()
    until(lambda: len(pictures()) == before + 2)
    page.wait_for_selector("#history-delete[disabled]")
    assert "deleted" in page.locator("#history-note").inner_text()
    reload(page)
    opened_part(page, "Earlier pictures")
    page.wait_for_function("document.querySelectorAll('#history .thumbnail-lg').length === 2")
