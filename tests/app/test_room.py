"""The server's disk, which all share: nothing begins that has no room, and what is temporary goes for what is new."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from app import room
from app.drawing import Request
from app.machine import Job
from app.room import check_room
from app.session import Session
from app.shelf import Card
from app.words import explained
from app.workspace import Workspace, size_of
from oft_diffusion.errors import DataError
from tests.app.test_runs import ended, filled, wish
from tests.library.support import Maker

__all__ = ["filled"]  # a fixture
Acts = dict[str, Callable[[], object]]
ONE = Request("a mug", (1,), steps=1)


def temporary(workspace: Workspace, size: int) -> Path:
    """A file of so many bytes, in a folder of its own."""
    path = workspace.fresh() / "file"
    path.write_bytes(bytes(size))
    time.sleep(0.02)  # or the next would be as old
    return path


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.time()
    monkeypatch.setattr("app.workspace.time", SimpleNamespace(time=lambda: now + seconds, time_ns=time.time_ns))


@pytest.fixture
def acts(filled: Session, person: str, mug: Card, style: Card, make: Maker) -> Acts:
    """All that takes room."""
    file = make("other", seed=3)
    return {
        "draw": lambda: filled.draw(person, ONE),
        "program": lambda: filled.draw_for_program("a machine", ONE),
        "compare": lambda: filled.comparing.before_and_after(person, ONE),
        "train": lambda: filled.training.start(person, wish()),
        "export": lambda: filled.workshop.export(person, mug.id, "oft"),
        "combine": lambda: filled.workshop.combine(person, "compose", mug.id, mug.id),
        "cover": lambda: filled.workshop.cover(person, mug.id),
        "take in": lambda: filled.take_in(file),
    }


def refused(acts: Acts, words: str) -> set[str]:
    """Which of them are, with such words, before anyone waits."""
    found = set()
    for name, act in acts.items():
        try:
            act()
        except DataError as error:
            found |= {name} if words in explained(error) else {explained(error)}
    return found


def test_nothing_begins_on_a_disk_that_is_nearly_full(
    acts: Acts, filled: Session, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=room.LEAST_FREE - 1)
    monkeypatch.setattr(room, "shutil", SimpleNamespace(disk_usage=lambda path: usage))
    before = sorted(filled.workspace.root.rglob("*"))
    assert refused(acts, "nearly full") == set(acts)
    assert sorted(filled.workspace.root.rglob("*")) == before
    usage.free += 1
    ended(filled.draw(person, ONE))
    with pytest.raises(DataError, match="nearly full"):
        check_room(filled.workspace, 1)


def test_what_is_temporary_has_a_limit(
    acts: Acts, filled: Session, busy: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = temporary(filled.workspace, 1000), temporary(filled.workspace, 1000)
    monkeypatch.setattr(room, "MOST_TEMPORARY", 1500)
    assert refused(acts, "in an hour") == set(acts)
    later(monkeypatch, 2 * 3600)
    assert refused(acts, "in an hour") == set()
    assert not first.parent.exists()
    assert second.is_file()


def test_the_oldest_goes_and_the_rest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path)
    waiting = workspace.fresh()  # of a job
    old, used, new = (temporary(workspace, 1000) for _ in range(3))
    (old.parent / "more").write_bytes(bytes(500))  # so that it was changed last
    assert workspace.trim(0) == 3500  # all of the last hour
    later(monkeypatch, 2 * 3600)
    assert workspace.trim(3500) == 3500
    assert workspace.trim(2600) == 2500
    assert [path.exists() for path in (waiting, old, used, new)] == [True, True, False, True]
    assert workspace.trim(0) == 0
    assert list(workspace.temporary.iterdir()) == [waiting]
    assert size_of(workspace.root) == 0


def test_a_full_disk_takes_what_is_temporary_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path)
    left = temporary(workspace, 1000)

    def disk_usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=room.LEAST_FREE - size_of(workspace.temporary))

    monkeypatch.setattr(room, "shutil", SimpleNamespace(disk_usage=disk_usage))
    with pytest.raises(DataError, match="nearly full"):
        check_room(workspace)
    assert left.is_file()
    later(monkeypatch, 2 * 3600)
    check_room(workspace)
    assert not left.exists()


def test_the_shelf_has_a_limit(acts: Acts, filled: Session, style: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST_ADAPTERS", 2)
    adding = {name: acts[name] for name in ("train", "combine", "take in")}
    assert refused(adding, "There are 2 adapters. Expected: at most 2.") == set(adding)
    filled.delete(style.id)
    assert refused({"take in": acts["take in"]}, "") == set()
    assert len(filled.shelf.cards()) == 2


def test_a_disk_that_fills_up_meanwhile_is_told(session: Session, person: str, mug: Card) -> None:
    def work(job: Job) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    *_, last = session.machine.start(person, "export", work).watch(timeout=60)
    assert last.error.startswith("The server's disk is full. Delete")
