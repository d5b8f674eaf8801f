"""The app in a browser, as a person uses it: tabs, menus, numbers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.machine import Job, Machine

IDLE = "#generate:has-text('Generate')"  # it says something else while it draws
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


_QUIET = 0.4  # seconds without a request, after which a page has all it asked for
_ENDLESS = 10.0  # seconds after which a request is none that ends, or was lost with the page that asked


def open_app(page: Any, url: str) -> None:
    """Load the app, and wait until it has what it asks for at the beginning: menus, pictures, jobs."""
    page.asked = {}  # request to when

    def note(request: Any) -> None:
        if "/gradio_api/" in request.url:
            page.asked[request] = time.monotonic()

    page.on("request", note)
    for end in ("requestfinished", "requestfailed"):
        page.on(end, lambda request: page.asked.pop(request, None))
    page.goto(url)
    _wait_until_ready(page, ("/heartbeat/",))


def reload(page: Any, *, working: bool = False) -> None:
    """Load the page anew; what gradio's client logs of requests that are cut off by it is no error of ours.

    Args:
        page: which `open_app` has opened.
        working: whether a job of this person goes on, of which there is no end of news.
    """
    page.leaving = True
    page.asked.clear()
    page.reload()
    _wait_until_ready(page, ("/heartbeat/", "/queue/data") if working else ("/heartbeat/",))
    page.leaving = False


def _wait_until_ready(page: Any, endless: tuple[str, ...]) -> None:
    page.wait_for_selector("#generate")
    page.wait_for_function("localStorage.getItem('oft-diffusion-person')")
    wait_until_settled(page, endless)


def wait_until_settled(page: Any, endless: tuple[str, ...] = ("/heartbeat/",)) -> None:
    """Wait until nothing that the page asked for is still to come: an answer would replace what was typed meanwhile.

    Args:
        page: which `open_app` has opened.
        endless: parts of addresses whose answers have no end.
    """
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < _QUIET:
        page.wait_for_timeout(50)
        now = time.monotonic()
        if any(
            now - since < _ENDLESS and not any(part in request.url for part in endless)
            for request, since in list(page.asked.items())
        ):
            quiet_since = now


@contextmanager
def occupied(machine: Machine) -> Iterator[threading.Event]:
    """Somebody else's work, that goes on until the event is set, or to the end of the block."""
    free, begun = threading.Event(), threading.Event()

    def work(_: Job) -> None:
        begun.set()
        free.wait(120)

    machine.start("somebody else", "draw", work)
    assert begun.wait(60)
    try:
        yield free
    finally:
        free.set()


def until(true: Callable[[], Any]) -> None:
    """Wait for what the server does, a minute at most."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def choose(page: Any, menu: str, name: str) -> None:
    """An entry of a menu."""
    page.locator(f"#{menu} input").first.click()
    page.get_by_role("option", name=name, exact=True).first.click()


def number(page: Any, field: str, value: float) -> None:
    """A number into its field, again where a part that has just been opened puts its first values in late."""
    inputs = page.locator(f"#{field} input")

    def taken() -> bool:
        fields = inputs.all()
        return bool(fields) and all(float(field.input_value() or "nan") == value for field in fields)

    for _ in range(20):
        if not taken():
            inputs.first.fill(str(value))
            page.keyboard.press("Tab")
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        page.wait_for_timeout(50)
        if taken():
            return
    raise AssertionError(f"{field} does not take {value}")


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
    page.evaluate("document.querySelector('#status .status').dataset.before = 1")  # of an earlier drawing
    page.locator(IDLE).click()
    page.wait_for_selector("#status .done:not([data-before])")
    page.wait_for_selector(IDLE)


def pixels(path: Path) -> Any:
    """A picture as integers, height x width x 3."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)
