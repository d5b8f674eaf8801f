from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from oft_diffusion.pocket import pocket_path
from tests.helpers.browser import open_browser
from tests.library.support import Maker


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """The app on the pocket base, with one adapter on the shelf: the session, and the address."""
    workspace = tmp_path_factory.mktemp("workspace")
    os.environ["GRADIO_TEMP_DIR"] = str(workspace / "temporary")
    from app.main import served
    from app.page import build
    from app.session import Session

    session = Session(workspace)
    pipe = StableDiffusionPipeline.from_pretrained(pocket_path())
    file = Maker(pipe, tmp_path_factory.mktemp("adapter"))("mug", seed=1, trigger="sks", class_word="mug")
    session.shelf.add(file, "My mug")
    page = build(session)
    page.queue(max_size=64, default_concurrency_limit=16, api_open=False)
    _, url, _ = page.launch(**served(session, "127.0.0.1", None, None), prevent_thread_lock=True, quiet=True)
    yield session, url
    session.machine.stop()
    page.close()


Opened = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, server: tuple[Any, str]) -> Iterator[Opened]:
    """Opens the app in a browser of its own; any error that it logs fails the test."""
    trouble: list[str] = []
    contexts = []

    def open_page(context: Any = None, **options: Any) -> Any:
        if context is None:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(server[1])
        page.wait_for_selector("#generate")
        page.wait_for_timeout(2500)  # menus are filled after the page is there
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.fixture
def pictures(server: tuple[Any, str]) -> Callable[[], list[Path]]:
    """All pictures that were drawn so far, oldest first."""
    session, _ = server
    return lambda: sorted(session.workspace.people.glob("*/pictures/*.png"), key=lambda path: path.stat().st_mtime_ns)
