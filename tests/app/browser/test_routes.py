"""The running server's routes against hostile requests, sent as they are, and many at once."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest

from app import room
from app.session import Session
from app.workspace import new_id, new_token
from tests.app.browser.conftest import APPS
from tests.app.browser.test_abuse import SECRET, harmless, outside, unharmed
from tests.helpers.app_calls import PERSON, call, config_of, join, pressed
from tests.helpers.app_page import occupied, until

__all__ = ["outside", "unharmed"]  # fixtures


def get(url: str, target: str) -> tuple[int, bytes]:
    """Status and beginning of what is answered to a target that nobody has tidied: httpx resolves `../` itself."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port), timeout=30) as wire:
        wire.sendall(f"GET {target} HTTP/1.1\r\nHost: {address.host}\r\nConnection: close\r\n\r\n".encode())
        answer = http.client.HTTPResponse(wire)
        answer.begin()
        endless = "event-stream" in (answer.getheader("content-type") or "")
        return answer.status, b"" if endless else answer.read(100_000)


def routes(app: Any) -> Iterator[str]:
    """Every route that can be got, and has a part for the asker to fill in; also those that gradio leaves empty."""
    for route in app.routes:
        if hasattr(route, "original_router"):  # a router within
            yield from routes(route.original_router)
        elif "{" in getattr(route, "path", "") and "GET" in route.methods:
            yield route.path
    yield from ("/file={path}", "/gradio_api/x/{path}", "/{path}") if hasattr(app, "router") else ()


# What else is filled in, where one part is hostile.
SOUND = {"environment": "client", "id": gr.Textbox.get_component_class_id(), "component_id": "1", "ext": "ts"}


def filled(route: str, hostile: str) -> Iterator[str]:
    """A route with each of its parts hostile in turn."""
    names = [part.partition("}")[0].partition(":")[0] for part in route.split("{")[1:]]
    plain = route.replace(":path}", "}")
    for name in names:
        yield plain.format(**{other: hostile if other == name else SOUND.get(other, "x") for other in names})


def test_no_file_outside_is_handed_out(small_server: tuple[Session, str], outside: Path) -> None:
    """By every route, with every spelling, from every folder that is served."""
    session, url = small_server
    served = session.workspace.fresh() / "served.txt"
    served.write_text("everyone's")
    assert get(url, f"/gradio_api/file={served}") == (200, b"everyone's")
    up, root = "../" * 12, session.workspace.root
    encoded = "%2e%2e%2f" * 12
    hostile = [
        *(f"{start}{up}{file}" for start in ("", "/", f"{served.parent}/", f"{root}/people/") for file in (
            "etc/passwd", "proc/self/environ", str(outside)[1:])),
        *(f"{encoded}{file}".replace("/", "%2f") for file in ("etc/passwd", str(outside)[1:])),
        f"{up}etc/passwd".replace("/", "\\"), f"{up}etc/passwd".replace(".", "%252e").replace("/", "%252f"),
        "....//" * 12 + "etc/passwd", "..;/" * 12 + "etc/passwd", "/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd",
        str(outside), f"{served.parent}/..%00/{outside}", f"/etc/passwd%00{served}", f"file://{outside}", "\0",
        f"{root}/people/%2e%2e/secret", "C:%5CWindows%5Cwin.ini", "http://127.0.0.1:9/etc/passwd", "\0/etc/passwd",
    ]  # fmt: skip
    session.workspace.token_of("ada")  # makes the file of that name
    tried = set(routes(APPS[url]))
    assert {"/gradio_api/file={path_or_url:path}", "/gradio_api/proxy={url_path:path}", "/static/{path:path}"} <= tried
    for route in tried:
        for word in hostile:
            for target in filled(route, word):
                status, content = get(url, target)
                harmless(content.decode(errors="replace"))
                assert status != 200 or b"<!doctype html" in content[:200].lower() or not content, (target, content)
                assert status < 500, target


def test_what_lies_in_the_workspace_but_is_nobodys_business_is_not_handed_out(
    unharmed: httpx.Client, small_server: tuple[Session, str]
) -> None:
    session, _ = small_server
    session.workspace.token_of("ada")
    run = session.workspace.run(new_id())
    (run / "photos").mkdir(parents=True)
    (run / "photos" / "01.png").write_bytes(b"private")
    for path in (session.workspace.root / "secret", run / "photos" / "01.png"):
        assert path.is_file()
        for route in ("/gradio_api/file=", "/file="):
            assert unharmed.get(f"{route}{path}").status_code in (403, 404)
    session.workspace.remove(run)


UNKNOWN = ("unknown", "", "take_over", "take_in", "remove", "delete", "draw_1", "..%2fdraw", "predict", "__init__")


def test_what_has_no_name_for_programs_cannot_be_called_by_one(unharmed: httpx.Client) -> None:
    for name in UNKNOWN:
        for route in ("call", "call/v2", "run", "api"):
            answer = unharmed.post(f"/gradio_api/{route}/{name}", json={"data": [], "session_hash": "x"})
            assert 400 <= answer.status_code < 500, (route, name, answer.text)
            harmless(answer.text)
    for route in ("component_server", "process_recording", "deep_link?session_hash=x", "vibe-edit", "cancel"):
        body = {"data": [], "component_id": 10**9, "fn_name": "__init__", "session_hash": "x", "fn_index": -1}
        assert unharmed.post(f"/gradio_api/{route}", json=body).status_code < 500
        assert unharmed.get(f"/gradio_api/{route}").status_code < 500


@pytest.mark.parametrize("number", [None, -1, 10**6, 10**30, 1.5, "0; DROP", "take_over", [], {}, "missing"])
def test_a_number_of_no_function_is_refused(unharmed: httpx.Client, number: Any) -> None:
    body = {"fn_index": number, "data": [], "session_hash": uuid.uuid4().hex, "trigger_id": -1}
    if number == "missing":
        del body["fn_index"]
    for route in ("queue/join", "run/predict", "call/draw"):
        answer = unharmed.post(f"/gradio_api/{route}", json=body)
        if route == "call/draw":  # takes no numbers, and too few values are told in the answer
            assert answer.status_code == 200
            continue
        assert 400 <= answer.status_code < 500, (route, answer.text)
        harmless(answer.text)


def test_uploads_of_any_name_stay_in_the_workspace(
    unharmed: httpx.Client, small_server: tuple[Session, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, _ = small_server
    for name in ("../../x.png", "/tmp/x.png", "x\0.png", "a" * 300 + ".png", "con.png", "x.html", ".."):
        answer = unharmed.post("/gradio_api/upload", files={"files": (name, b"<script>alert(1)</script>", "text/html")})
        if answer.status_code == 200:
            for path in json.loads(answer.text):
                assert Path(path).resolve().is_relative_to(session.workspace.temporary.resolve())
    field = {"files": "no file"}
    assert unharmed.post("/gradio_api/upload", data=field, files={"other": b"x"}).text == "This request makes no sense."
    huge = unharmed.post("/gradio_api/upload", files={"files": ("huge.png", b"0" * 53_000_000, "image/png")})
    assert huge.status_code == 413
    monkeypatch.setattr(room, "MOST_TEMPORARY", 1000)
    refused = unharmed.post("/gradio_api/upload", files={"files": ("x.png", b"0" * 1001, "image/png")})
    assert refused.status_code == 413
    assert refused.text.startswith("Uploads and files to be fetched take")


@pytest.mark.slow
def test_two_hundred_at_once(unharmed: httpx.Client, small_server: tuple[Session, str], outside: Path) -> None:
    """Of four kinds, all sent in one moment; then one picture is drawn."""
    session, _ = small_server
    config = config_of(unharmed)
    draw, values = pressed(config, "generate")
    start, people = threading.Barrier(200), [new_token() for _ in range(50)]

    def ask(number: int) -> int:
        kind, person = number % 4, people[number // 4]
        start.wait(60)
        if kind == 0:
            return join(unharmed, person, draw, [person, "a mug", *values[2:]]).status_code
        if kind == 1:
            return unharmed.post("/gradio_api/upload", files={"files": (f"{number}.png", b"x" * 10_000)}).status_code
        return unharmed.get("/config" if kind == 2 else f"/gradio_api/file={outside}").status_code

    with occupied(session.machine), ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
        assert answers == [200, 200, 200, 403] * 50
        until(lambda: all(session.machine.newest(person, "draw") for person in people))
        for person in people:
            session.machine.cancel_all(person, "draw")
    person = new_token()
    told = call(unharmed, draw, [person if value is PERSON else value for value in (values[0], "a mug", *values[2:])])
    assert "Done: " in told
    assert SECRET not in told
    assert session.history(person)
