"""Comparing in a real browser."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.app_page import choose, go_to, number, opened_part, reload, text

pytestmark = pytest.mark.browser


def test_with_and_without_and_strengths_by_keyboard_and_after_a_reload(opened: Any) -> None:
    page = opened()
    go_to(page, "Compare")
    text(page, "compare-prompt").fill("a mug")
    choose(page, "compare-adapter", "My mug")
    number(page, "compare-count", 2)
    opened_part(page, "Settings")
    number(page, "compare-steps", 1)
    page.wait_for_selector("#compare-triggers")
    page.wait_for_selector("#compare-trigger-warning")
    page.locator("#compare-triggers").get_by_text("sks mug", exact=True).click()
    page.wait_for_selector("#compare-trigger-warning:has-text('calls the subject')")
    page.locator("#compare").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#slider img")
    assert page.evaluate("document.activeElement.id") == "compare"
    page.wait_for_selector("#sheet img")
    before = page.locator("#slider img").first.get_attribute("src")
    page.locator("#which input[type=range]").press("ArrowRight")
    page.wait_for_function(f"document.querySelector('#slider img').src !== {before!r}")
    handle = page.get_by_role("slider", name="How much is shown without the adapter")
    for key, percent in {"Home": 0, "ArrowRight": 5, "End": 100, "ArrowDown": 95}.items():
        handle.press(key)
        page.wait_for_selector(f"#slider [role=slider][aria-valuenow='{percent}']")
        assert handle.evaluate("handle => handle === document.activeElement")
    assert page.locator("#slider img").last.evaluate("picture => picture.style.clipPath") != "inset(0px 0px 0px 50%)"
    sheet = page.locator("#sheet img").get_attribute("src")
    page.get_by_label("strengths", exact=True).press("Space")
    page.locator("#compare:text-is('Compare')").press("Enter")
    page.wait_for_function(
        f"![null, {sheet!r}].includes(document.querySelector('#sheet img')?.getAttribute('src') ?? null)"
    )
    with page.expect_download() as download:
        page.locator("#sheet [aria-label=Download], #sheet [title=Download], #sheet a[download]").first.click()
    assert download.value.suggested_filename.endswith(".png")
    reload(page)
    go_to(page, "Compare")
    page.wait_for_selector("#sheet img")
    assert "Compared 12 pictures." in page.locator("#compare-status").inner_text()


@pytest.mark.slow
def test_one_adapter_beside_another(opened: Any, server: Any, pictures: Any) -> None:
    session, _ = server
    other = session.shelf.add(session.shelf.cards()[-1].file, "Another")
    try:
        page = opened()
        go_to(page, "Compare")
        text(page, "compare-prompt").fill("a sks mug")
        page.get_by_label("adapters", exact=True).check()
        for name in ("Another", "My mug"):
            choose(page, "compare-adapters", name)
        number(page, "compare-count", 1)
        opened_part(page, "Settings")
        number(page, "compare-steps", 1)
        page.locator("#compare").click()
        page.wait_for_selector("#sheet img")
        assert session.settings_in(pictures()[-1])["rows"] == ["Another", "My mug"]
    finally:
        session.delete(other.id)


@pytest.mark.slow
def test_without_an_adapter_there_is_a_sentence(opened: Any) -> None:
    page = opened()
    go_to(page, "Compare")
    page.locator("#compare").click()
    page.wait_for_selector("#compare-status .problem")
    assert "Choose an adapter" in page.locator("#compare-status").inner_text()
