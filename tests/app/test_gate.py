"""The gate before gradio's routes: uploads for which there is no room are refused before they are read."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from app import room
from app.gate import Gate
from app.workspace import Workspace

UPLOAD = "/gradio_api/upload"
Answer = TypeVar("Answer")


def finished(work: Coroutine[Any, Any, Answer]) -> Answer:
    """What comes of it, in a thread of its own: in this one a browser's loop may be running."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def asked(gate: Gate, size: object, path: str = UPLOAD) -> tuple[int, str]:
    """Status and text of the answer to a request of such a length."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    headers = [] if size is None else [(b"content-length", str(size).encode())]
    await gate({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
    return sent[0]["status"], sent[1]["body"].decode()


async def answer(send: Any, text: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text})


async def gradio(scope: Any, receive: Any, send: Any) -> None:
    await answer(send, b"taken")


@pytest.mark.parametrize("size", [None, "", "-1", "a", 10**10, 10**30])
def test_what_is_too_much_at_once_or_of_no_size_is_refused(tmp_path: Path, size: object) -> None:
    gate = Gate(gradio, Workspace(tmp_path))
    status, text = finished(asked(gate, size))
    assert status == 413
    assert text.endswith("Expected: at most 40 files of 50 MB. Send fewer, or smaller ones.")
    assert finished(asked(gate, 50_000_000)) == (200, "taken")
    assert gate.coming == 0


def test_uploads_that_are_under_way_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST_TEMPORARY", 1000)
    begun, end = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await end.wait()
        await answer(send, b"taken")

    async def both() -> None:
        gate = Gate(slow, Workspace(tmp_path))
        first = asyncio.create_task(asked(gate, 600))
        await begun.wait()
        status, text = await asked(gate, 600)
        assert (status, text.partition(".")[0]) == (413, "Uploads and files to be fetched take 0")
        end.set()
        assert await first == (200, "taken")
        assert await asked(gate, 600) == (200, "taken")

    finished(both())


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("file=/a/b.png", 200), ("file=https://example.com/a", 403), ("file=http://127.0.0.1/a", 403),
        ("file/https://example.com/a", 403), ("proxy=https://example.hf.space/a", 403), ("process_recording", 403),
        ("deep_link", 403), ("call/draw", 200), ("call/draw/7", 200), ("call/v2/draw", 200), ("call/adapters", 200),
        ("call/take_over", 403), ("call/v2/take_over", 403), ("call/draw_1", 403), ("run/predict", 200),
        ("run/stop", 403), ("api/stop", 403), ("queue/join", 200), ("heartbeat/7", 200),
    ],
)  # fmt: skip
def test_what_the_page_never_asks_for_is_refused(tmp_path: Path, path: str, status: int) -> None:
    assert finished(asked(Gate(gradio, Workspace(tmp_path)), None, f"/gradio_api/{path}"))[0] == status
