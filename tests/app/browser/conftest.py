from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from app.session import Session
from oft_diffusion.pocket import pocket_path
from tests.helpers.app_page import open_app
from tests.helpers.browser import open_browser
from tests.library.support import Maker


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@contextmanager
def served_session(
    session: Session, port: int | None = None, auth: list[tuple[str, str]] | None = None
) -> Iterator[str]:
    """The app on a port, or a free one, for everybody or for those with a password: its address."""
    before = os.environ.get("GRADIO_TEMP_DIR", "")
    os.environ["GRADIO_TEMP_DIR"] = str(session.workspace.temporary)
    from app.main import QUEUE, served
    from app.page import build

    page = build(session)
    page.queue(**QUEUE)
    app, url, _ = page.launch(**served(session, "127.0.0.1", port, auth), prevent_thread_lock=True, quiet=True)
    _COPIES[url], APPS[url] = session.workspace.temporary, app
    try:
        yield url
    finally:
        session.machine.stop()
        page.close()
        os.environ["GRADIO_TEMP_DIR"] = before


_COPIES: dict[str, Path] = {}  # by address; gradio looks for uploads in one folder of the whole process
APPS: dict[str, Any] = {}  # by address, gradio's


@pytest.fixture(scope="session")
def pocket_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Session, str]]:
    """The app on the pocket base, with one adapter on the shelf: the session, and the address."""
    session = Session(tmp_path_factory.mktemp("workspace"))
    pipe = StableDiffusionPipeline.from_pretrained(pocket_path())
    file = Maker(pipe, tmp_path_factory.mktemp("adapter"))("mug", seed=1, trigger="sks", class_word="mug")
    session.shelf.add(file, "My mug")
    with served_session(session) as url:
        yield session, url


@pytest.fixture(scope="session")
def small_server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Session, str]]:
    """The app on a tiny Stable Diffusion, on which training takes a moment."""
    session = Session(tmp_path_factory.mktemp("small"), str(model_folder))
    with served_session(session) as url:
        yield session, url


@pytest.fixture
def server(pocket_server: tuple[Session, str], monkeypatch: pytest.MonkeyPatch) -> tuple[Session, str]:
    """The app on the pocket base, with one adapter on the shelf: the session, and the address."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(_COPIES[pocket_server[1]]))
    return pocket_server


# Of a page that is left (`reload`), of a server that ends, and of a line that is cut.
_LEFT = re.compile(
    "AbortError|BodyStreamBuffer was aborted|Connection errored out|Server stopped unexpectedly|ERR_CONN"
    "|Unable to preload|ERR_INCOMPLETE|ERR_EMPTY|ERR_SOCKET|network error"
)
Opened = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, server: tuple[Session, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Opens the app in a browser of its own, as a user with a password where one is given.

    Any error that it logs fails the test, but for what gradio's client logs where a page is left while it listens
    (`reload`).
    """
    trouble: list[str] = []
    contexts = []

    def open_page(url: str = server[1], user: tuple[str, str] | None = None, **options: Any) -> Any:
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(_COPIES.get(url, server[0].workspace.temporary)))
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        if user:
            context.request.post(f"{url}login", form=dict(zip(("username", "password"), user, strict=True)))
        page = context.new_page()
        page.set_default_timeout(120_000)  # two cores may be shared with others

        def note(text: str) -> None:
            if not (getattr(page, "leaving", False) and _LEFT.search(text)):
                trouble.append(text)

        page.on("console", lambda message: note(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: note(str(error)))
        open_app(page, url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    server[0].machine.stop()  # what a failed test leaves at work would draw from the other tests' random numbers
    assert trouble == []


@pytest.fixture
def pictures(server: tuple[Session, str]) -> Callable[[], list[Path]]:
    """All pictures that were drawn so far, oldest first."""
    session, _ = server
    return lambda: sorted(session.workspace.people.glob("*/pictures/*.png"), key=lambda path: path.stat().st_mtime_ns)
