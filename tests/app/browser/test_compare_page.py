"""Comparing in a real browser."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.app_page import choose, go_to, number, text

pytestmark = pytest.mark.browser


def test_with_and_without_and_strengths(opened: Any) -> None:
    page = opened()
    go_to(page, "Compare")
    text(page, "compare-prompt").fill("a sks mug")
    choose(page, "compare-adapter", "My mug")
    number(page, "compare-count", 2)
    number(page, "compare-steps", 1)
    page.locator("#compare").click()
    page.wait_for_selector("#slider img")
    page.wait_for_selector("#sheet img")
    before = page.locator("#slider img").first.get_attribute("src")
    number(page, "which", 2)
    page.wait_for_function(f"document.querySelector('#slider img').src !== {before!r}")
    sheet = page.locator("#sheet img").get_attribute("src")
    page.get_by_label("strengths", exact=True).check()
    page.locator("#compare:not([disabled])").click()
    page.wait_for_function(
        f"![null, {sheet!r}].includes(document.querySelector('#sheet img')?.getAttribute('src') ?? null)"
    )
    with page.expect_download() as download:
        page.locator("#sheet [aria-label=Download], #sheet [title=Download], #sheet a[download]").first.click()
    assert download.value.suggested_filename.endswith(".png")


def test_without_an_adapter_there_is_a_sentence(opened: Any) -> None:
    page = opened()
    go_to(page, "Compare")
    page.locator("#compare").click()
    page.wait_for_selector("#compare-status .problem")
    assert "Choose an adapter" in page.locator("#compare-status").inner_text()
