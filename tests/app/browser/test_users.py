"""Users with passwords, through the running server: each is who they logged in as, whatever their browser sends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.session import Session
from app.workspace import new_token
from tests.app.browser.conftest import served_session
from tests.app.test_photos import noise
from tests.helpers.app_calls import PERSON, call, pressed
from tests.helpers.app_page import occupied, until

USERS = [("ada", "first"), ("bo", "second")]


@pytest.fixture(scope="module")
def guarded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Session, str]]:
    session = Session(tmp_path_factory.mktemp("guarded"), str(model_folder))
    with served_session(session, auth=USERS) as url:
        yield session, url


@contextmanager
def entered(url: str, user: str, password: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/login", data={"username": user, "password": password}).status_code == 200
        yield client


def press(client: httpx.Client, button: str, token: Any) -> str:
    """What a button answers to somebody who says that a token is theirs."""
    index, values = pressed(client.get("/config").json(), button)
    return call(client, index, [token if value is PERSON else value for value in values])


def test_nobody_is_somebody_else_by_sending_their_token(guarded: tuple[Session, str]) -> None:
    session, url = guarded
    ada, bo = (session.workspace.token_of(name) for name, _ in USERS)
    assert httpx.get(f"{url}config").status_code == 401
    with entered(url, *USERS[0]) as first, entered(url, *USERS[1]) as second, occupied(session.machine):
        job = session.machine.start(ada, "train", lambda job: None)
        press(second, "train-stop", ada)
        assert job.progress.text != "stopping"
        assert "Nothing is being trained" in press(second, "train-pause", ada)
        press(first, "train-stop", new_token())  # any browser of hers is hers
        until(lambda: job.progress.state == "cancelled")  # one that waits wakes up to be told
        waiting = session.machine.start(bo, "estimate", lambda job: None)
        press(first, "estimate-cancel", bo)
        assert waiting.progress.text != "stopping"
        press(second, "estimate-cancel", None)
        until(lambda: waiting.progress.state == "cancelled")


def test_what_is_laid_out_for_a_page_is_guarded_too(guarded: tuple[Session, str], tmp_path: Path) -> None:
    session, url = guarded
    photos = [session.training.photos(session.workspace.token_of(name)) for name, _ in USERS]
    for seed, own in enumerate(photos):
        own.add([noise(tmp_path / f"{seed}.png", seed=seed)])
        own.describe(own.look(32)[0].id, f"of number {seed}")
    ada = session.workspace.token_of("ada")
    with entered(url, *USERS[1]) as bo:
        config = bo.get("/config").json()
        kinds = {component["id"]: component["type"] for component in config["components"]}
        [layout] = [
            event["id"]
            for event in config["dependencies"]
            if [kinds[i] for i in event["inputs"]] == ["browserstate", "state"]
            and [(kinds.get(i), name) for i, name in event["targets"]] == [("state", "change")]  # once at a time
        ]
        told = call(bo, layout, [ada, None])
    assert "of number 1" in told
    assert "of number 0" not in told
