"""The running server against hostile requests: nothing outside the workspace is read or written, and it goes on."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

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


def test_every_function_withstands_what_no_page_would_send(client: httpx.Client, server: tuple[Any, str]) -> None:
    session, _ = server
    around = sorted(path.name for path in session.workspace.root.parent.iterdir())
    config = client.get("/config").json()
    functions = [d for d in config["dependencies"] if d.get("backend_fn")]
    assert len(functions) > 20
    for function in functions:
        for word in WORDS[:: max(1, len(WORDS) // 4)]:
            told = call(client, function["id"], [word] * len(function["inputs"]))
            assert "root:x" not in told
            assert SECRET not in told
            assert "Traceback" not in told
    assert sorted(path.name for path in session.workspace.root.parent.iterdir()) == around
    assert not list(session.workspace.root.rglob("evil*"))
    serves(client)


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
