"""The running server against hostile calls: nothing outside the workspace is read or written, and it goes on."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import matplotlib
import pytest
from gradio import processing_utils
from PIL import Image

from app.session import Session
from app.workspace import new_token
from tests.helpers.app_calls import PERSON, call, call_all, config_of, join, pressed, values_of
from tests.helpers.app_page import occupied, until
from tests.helpers.watched import watched

SECRET = "that nobody may read"
SYSTEM = ("/etc/passwd", "/proc/self/environ")  # whose contents nobody may read either
WORDS: list[Any] = [
    "../../../etc/passwd", "<script>alert(1)</script>", "' OR 1=1 --", "\0", "x" * 100_000, "$(id)", -1, 10**30, None,
    [], {}, [{"path": 1}], {"path": "/etc/passwd", "meta": 1}, {"path": "x", "meta": {"_type": "gradio.FileData"}},
]  # fmt: skip


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A picture outside the workspace."""
    path = tmp_path / "outside.png"
    Image.new("RGB", (64, 48)).save(path)
    path.write_bytes(path.read_bytes() + SECRET.encode())
    return path


@pytest.fixture(autouse=True)
def unharmed(
    small_server: tuple[Session, str], outside: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[httpx.Client]:
    """A client of the server, which at the end has kept to its workspace, asked nobody, run nothing, and serves."""
    session, url = small_server
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(session.workspace.temporary))
    around = sorted(session.workspace.root.parent.iterdir())
    # Matplotlib makes its own folders where it is imported, which gradio does at the first call.
    may_change = [session.workspace.root, Path(matplotlib.get_configdir()), Path(matplotlib.get_cachedir())]
    with (
        httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=200)) as client,
        watched(may_change, [outside, *map(Path, SYSTEM)], [httpx.URL(url).port or 80]) as seen,
    ):
        yield client
        assert client.get("/").status_code == 200
    session.machine.stop()
    assert seen.trouble == []
    assert sorted(session.workspace.root.parent.iterdir()) == around
    for path in session.workspace.root.rglob("*"):
        assert not path.name.startswith("evil")
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def harmless(told: str) -> str:
    """An answer, unless it tells what it must not."""
    assert not any(word in told for word in ("root:x", "PATH=", SECRET, "Traceback")), told
    return told


def functions(client: httpx.Client, of: Callable[[str], bool]) -> Iterator[tuple[int, list[Any], int]]:
    """Each input of each function, if it is of such a type: number, what the page shows at first, and which it is."""
    config, person = config_of(client), new_token()
    kinds = {c["id"]: c["type"] for c in config["components"]}
    for function in config["dependencies"]:
        if function.get("backend_fn"):
            sound = [person if value is PERSON else value for value in values_of(config, function)]
            for index, component in enumerate(function["inputs"]):
                if of(kinds[component]):
                    yield function["id"], sound, index


def test_every_input_of_every_function_withstands_what_no_page_would_send(unharmed: httpx.Client) -> None:
    """One input is hostile, the others are what the page shows at first, and the person is somebody."""
    words = cycle(WORDS)
    calls = [(n, [*sound[:i], next(words), *sound[i + 1 :]]) for n, sound, i in functions(unharmed, lambda kind: True)]
    assert len(calls) > 200
    for start in range(0, len(calls), 40):
        harmless(call_all(unharmed, calls[start : start + 40]))


def as_files(path: str) -> list[Any]:
    """What a browser could send to name a file, and what it could not."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "../../evil.png", "size": 1}
    return [path, file, [file], {"path": path, "url": path}, {"value": {"path": path}}]


@pytest.mark.slow
def test_no_input_for_files_takes_one_that_was_not_uploaded(
    unharmed: httpx.Client, small_server: tuple[Session, str], outside: Path
) -> None:
    temporary = small_server[0].workspace.temporary
    paths = [
        str(outside), *SYSTEM, f"{temporary}/../../..{outside}", "../" * 12 + "etc/passwd", f"file://{outside}",
        "http://127.0.0.1:9/x", "\0",
    ]  # fmt: skip
    inputs = list(functions(unharmed, lambda kind: kind in ("file", "image", "gallery", "uploadbutton")))
    assert len(inputs) >= 5
    words = [word for path in paths for word in as_files(path)]
    for number, sound, i in inputs:
        harmless(call_all(unharmed, [(number, [*sound[:i], word, *sound[i + 1 :]]) for word in words]))


def test_nobody_begins_with_a_picture_of_somebody_else(unharmed: httpx.Client, outside: Path) -> None:
    """Any picture of this machine could be had, by drawing with hardly a change of it."""
    for number, sound, i in functions(unharmed, lambda kind: kind == "image"):
        said = call(unharmed, number, [*sound[:i], {"path": str(outside)}, *sound[i + 1 :]])
        assert "Upload the file itself" in said


def test_no_file_is_fetched_from_an_address(unharmed: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an upload, a browser sends the address at this server, which is no such file."""
    asked: list[Any] = []

    async def fetch(*of: Any, **more: Any) -> str:
        asked.append(of)
        raise OSError

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    monkeypatch.setattr("gradio.routes.secure_url_stream_response", fetch)
    url = "https://example.invalid/large.safetensors"
    config = config_of(unharmed)
    take_in, values = next(
        (d["id"], values_of(config, d)) for d in config["dependencies"] if d["api_name"] == "take_in"
    )
    for word in as_files(url):
        said = harmless(call(unharmed, take_in, [word, *values[1:]]))
        assert isinstance(word, str) or "Upload the file itself" in said
    unharmed.get(f"/gradio_api/file={url}")
    assert asked == []
    [path] = unharmed.post("/gradio_api/upload", files={"files": ("a.safetensors", b"no weights")}).json()
    file = {"path": path, "url": f"{unharmed.base_url}gradio_api/file={path}", "meta": {"_type": "gradio.FileData"}}
    said = call(unharmed, take_in, [file, *values[1:]])
    assert "a.safetensors" in said
    assert "Upload the file itself" not in said


@pytest.mark.slow
def test_those_who_look_on_keep_nobody_from_acting(unharmed: httpx.Client, small_server: tuple[Session, str]) -> None:
    """Sixty people wait for pictures, more than gradio has threads by itself; Cancel works all the same."""
    session, _ = small_server
    with occupied(session.machine):
        config = config_of(unharmed)
        draw, values = pressed(config, "generate")
        people, page = [new_token() for _ in range(60)], uuid.uuid4().hex
        for person in people:
            assert join(unharmed, page, draw, [person, "a mug", *values[2:]]).status_code == 200
        until(lambda: all(session.machine.newest(person, "draw") for person in people))
        cancel, _ = pressed(config, "cancel")
        call(unharmed, cancel, people[:1])
        job = session.machine.newest(people[0], "draw")
        assert job is not None
        until(lambda: job.progress.state == "cancelled")
        for person in people:
            session.machine.cancel_all(person, "draw")
