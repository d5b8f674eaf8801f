"""The running server against hostile requests: nothing outside the workspace is read or written, and it goes on."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.workspace import new_id, new_token
from tests.helpers.app_page import occupied, until

OUTSIDE = Path(__file__)  # a file that nobody may read
SECRET = "that nobody may read"
PATHS = [
    str(OUTSIDE), f"file://{OUTSIDE}", "/etc/passwd", "../" * 12 + "etc/passwd", "..%2f" * 12 + "etc%2fpasswd",
    "%2e%2e/" * 12 + "etc/passwd", "....//" * 8 + "etc/passwd", "/proc/self/environ", "C:\\Windows\\win.ini",
]  # fmt: skip
WORDS: list[Any] = [
    "../../../etc/passwd", "<script>alert(1)</script>", "' OR 1=1 --", "\0", "x" * 100_000, "$(id)", -1, 10**30, None,
    [],
    {"path": str(OUTSIDE), "meta": {"_type": "gradio.FileData"}},
    [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}, "orig_name": "../../evil.png"}],
    {"path": "http://127.0.0.1:1/x", "url": "http://127.0.0.1:1/x", "meta": {"_type": "gradio.FileData"}},
]  # fmt: skip


@pytest.fixture
def client(server: tuple[Any, str]) -> Any:
    with httpx.Client(base_url=server[1], timeout=60) as client:
        yield client


def serves(client: httpx.Client) -> None:
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_no_file_outside_is_handed_out(client: httpx.Client, server: tuple[Any, str], path: str) -> None:
    session, _ = server
    inside = [session.workspace.runs / "x", session.workspace.root / "runs", session.workspace.root]
    for asked in (path, *(f"{folder}/{path}" for folder in inside)):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/proxy=", "/static/", "/assets/", "/gradio_api/x/"):
            answer = client.get(f"{route}{asked}")
            assert answer.status_code != 200 or b"<!doctype html" in answer.content[:200].lower(), (route, asked)
            assert b"root:x" not in answer.content
            assert SECRET.encode() not in answer.content
    serves(client)


PERSON = object()


def pressed(config: Any, button: str) -> tuple[int, list[Any]]:
    """The function behind a button, and what the page shows at first for its inputs; `PERSON` for who asks."""
    components = {c["id"]: c for c in config["components"]}
    [function] = [
        d
        for d in config["dependencies"]
        if any(i in components and components[i]["props"].get("elem_id") == button for i, _ in d["targets"])
    ]
    return function["id"], values_of(config, function)


def values_of(config: Any, function: Any) -> list[Any]:
    components = {c["id"]: c for c in config["components"]}
    inputs = [components[i] for i in function["inputs"]]
    return [PERSON if c["type"] == "browserstate" else c.get("props", {}).get("value") for c in inputs]


def call(client: httpx.Client, index: int, data: list[Any]) -> str:
    """What the server answers to a call of a function, by its number, that no page would make."""
    session_hash = uuid.uuid4().hex
    body = {"fn_index": index, "data": data, "session_hash": session_hash, "event_data": {"index": 10**9}}
    joined = client.post("/gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return joined.text
    told = []
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session_hash}) as answer:
        for line in answer.iter_lines():
            told.append(line)
            if "process_completed" in line or "unexpected_error" in line or "close_stream" in line:
                break
    return "\n".join(told)


def test_every_input_of_every_function_withstands_what_no_page_would_send(small_server: tuple[Any, str]) -> None:
    """One input is hostile, the others are what the page shows at first, and the person is somebody."""
    session, url = small_server
    around = sorted(path.name for path in session.workspace.root.parent.iterdir())
    words, person = cycle(WORDS), new_token()
    with httpx.Client(base_url=url, timeout=60) as client:
        config = client.get("/config").json()
        functions = [d for d in config["dependencies"] if d.get("backend_fn")]
        assert len(functions) > 20
        for function in functions:
            sound = [person if value is PERSON else value for value in values_of(config, function)]
            for index in range(len(sound)):
                told = call(client, function["id"], [*sound[:index], next(words), *sound[index + 1 :]])
                assert "root:x" not in told
                assert SECRET not in told
                assert "Traceback" not in told
        serves(client)
    assert sorted(path.name for path in session.workspace.root.parent.iterdir()) == around
    assert not list(session.workspace.root.rglob("evil*"))


def test_what_lies_in_the_workspace_but_is_nobodys_business_is_not_handed_out(
    client: httpx.Client, server: tuple[Any, str]
) -> None:
    session, _ = server
    session.workspace.token_of("ada")
    run = session.workspace.run(new_id())
    (run / "photos").mkdir(parents=True)
    (run / "photos" / "01.png").write_bytes(b"private")
    for path in (session.workspace.root / "secret", run / "photos" / "01.png"):
        assert path.is_file()
        for route in ("/gradio_api/file=", "/file="):
            assert client.get(f"{route}{path}").status_code in (403, 404)


def test_those_who_look_on_keep_nobody_from_acting(small_server: tuple[Any, str]) -> None:
    """Sixty browsers wait for pictures, more than gradio has threads by itself; Cancel works all the same."""
    session, url = small_server
    with httpx.Client(base_url=url, timeout=60) as client, occupied(session.machine):
        config = client.get("/config").json()
        draw, values = pressed(config, "generate")
        people = [new_token() for _ in range(60)]
        for person in people:
            data = [person, "a mug", *values[2:]]
            body = {"fn_index": draw, "data": data, "session_hash": uuid.uuid4().hex}
            assert client.post("/gradio_api/queue/join", json=body).status_code == 200
        until(lambda: all(session.machine.newest(person, "draw") for person in people))
        cancel, _ = pressed(config, "cancel")
        call(client, cancel, people[:1])
        job = session.machine.newest(people[0], "draw")
        assert job is not None
        until(lambda: job.progress.state == "cancelled")
        for person in people:
            session.machine.cancel_all(person, "draw")


def test_uploads_of_any_name_stay_in_the_workspace(client: httpx.Client, server: tuple[Any, str]) -> None:
    session, _ = server
    for name in ("../../evil.png", "/tmp/evil.png", "evil\0.png", "a" * 300 + ".png", "con.png", "evil.html"):
        answer = client.post("/gradio_api/upload", files={"files": (name, b"<script>alert(1)</script>", "text/html")})
        if answer.status_code == 200:
            for path in json.loads(answer.text):
                assert Path(path).resolve().is_relative_to(session.workspace.root.resolve())
    huge = client.post("/gradio_api/upload", files={"files": ("huge.png", b"0" * 53_000_000, "image/png")})
    assert huge.status_code != 200
    serves(client)


def test_two_hundred_at_once(client: httpx.Client) -> None:
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: client.get("/config").status_code, range(200)))
    assert set(answers) == {200}
    serves(client)
