"""The app in a browser, as a person uses it: tabs, menus, numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TABS = ("Generate", "Compare", "Train", "Adapters")


def go_to(page: Any, tab: str) -> None:
    """A tab; on narrow screens some are in a menu."""
    button = page.get_by_role("tab", name=tab)
    if button.count() and button.first.is_visible():
        button.first.click()
    else:
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=tab).click()
    page.wait_for_timeout(300)


def reload(page: Any) -> None:
    """Load the page anew; what gradio's client logs of requests that are cut off by it is no error of ours."""
    page.leaving = True
    page.reload()
    page.wait_for_selector("#generate")
    page.wait_for_timeout(2000)
    page.leaving = False


def choose(page: Any, menu: str, name: str) -> None:
    """An entry of a menu."""
    page.locator(f"#{menu} input").first.click()
    page.get_by_role("option", name=name, exact=True).first.click()


def number(page: Any, field: str, value: float) -> None:
    """A number into its field."""
    page.locator(f"#{field} input").first.fill(str(value))
    page.keyboard.press("Tab")


def text(page: Any, field: str) -> Any:
    """A text field."""
    return page.locator(f"#{field} textarea, #{field} input").first


def opened_part(page: Any, title: str) -> None:
    """Open a part that is folded up."""
    page.get_by_role("button", name=title).locator("visible=true").first.click()


def quick(page: Any, steps: int = 3) -> None:
    """One picture of few steps."""
    opened_part(page, "Settings")
    number(page, "count", 1)
    number(page, "steps", steps)


def draw(page: Any, prompt: str) -> None:
    """Draw, and wait for the end."""
    text(page, "prompt").fill(prompt)
    page.locator("#generate").click()
    page.wait_for_selector("#cancel:not([disabled])")
    page.wait_for_selector("#generate:not([disabled])")
    page.wait_for_selector("#status .done")


def pixels(path: Path) -> Any:
    """A picture as integers, height x width x 3."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)
