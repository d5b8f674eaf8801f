"""What people keep on the disk: counted, limited, and deleted by themselves alone."""

from __future__ import annotations

import os
import threading
import time

import pytest

from app import kept
from app.drawing import Request
from app.kept import ALL, OLD
from app.machine import Busy
from app.session import Session
from app.workspace import new_id, new_token
from oft_diffusion.errors import ConfigError, DataError
from tests.app.test_runs import after, ended, filled, wish

__all__ = ["filled"]  # a fixture


def test_pictures_are_counted_and_deleted_by_age(session: Session, person: str) -> None:
    job = session.draw(person, Request("a mug", (1, 2), steps=1))
    paths = [path for path, _ in ended(job).found]
    other = ended(session.draw(new_token(), Request("a mug", (1,), steps=1))).found
    usage = session.training.kept.usage(person)
    assert usage.pictures == 2
    assert usage.bytes == usage.picture_bytes == sum(path.stat().st_size for path in paths)
    os.utime(paths[0], (time.time() - 8 * 24 * 3600,) * 2)
    assert session.training.kept.delete(person, OLD) == "Deleted 1 picture"
    assert session.history(person) == [paths[1]]
    assert session.machine.newest(person, "draw") is None  # whose pictures a page would look for
    assert session.training.kept.delete(person, ALL) == "Deleted 1 picture"
    assert session.history(person) == []
    assert all(path.is_file() for path, _ in other)


def test_one_picture_is_deleted_by_whoever_drew_it(session: Session, person: str) -> None:
    path, left = (path for path, _ in ended(session.draw(person, Request("a mug", (1, 2), steps=1))).found)
    kept_here = session.training.kept
    for whose, picture in ((new_token(), path.stem), (person, new_id()), (person, f"../{path.stem}"), (person, "")):
        with pytest.raises(DataError):
            kept_here.delete_picture(whose, picture)
    kept_here.delete_picture(person, path.stem)
    assert session.history(person) == [left]
    assert session.machine.newest(person, "draw") is None


def test_a_run_is_deleted_by_whoever_began_it_once_it_has_ended(filled: Session, person: str) -> None:
    training = filled.training
    job = training.start(person, wish(steps=400, checkpoint_every=1000, validation_every=1000))
    after(job, 2)
    with pytest.raises(ConfigError, match="is under way"):
        training.kept.delete(person, job.about)
    training.stop(person, pause=True)
    ended(job)
    [(run, size)] = training.kept.usage(person).runs
    assert size > 0
    for whose, what in ((new_token(), run.id), (person, new_id()), (person, "../adapters"), (person, "")):
        with pytest.raises(ConfigError, match="no such run"):
            training.kept.delete(whose, what)
    assert training.kept.delete(person, run.id) == "Deleted the run My thing"
    assert list(filled.workspace.runs.iterdir()) == []
    assert training.unfinished(person) == []


def test_whoever_keeps_too_much_is_told_where_to_delete(
    filled: Session, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST_BYTES", 1000)  # less than the uploaded pictures
    request = Request("a mug", (1,), steps=1)
    for act in (
        lambda: filled.draw(person, request),
        lambda: filled.comparing.before_and_after(person, request),
        lambda: filled.training.start(person, wish()),
    ):
        with pytest.raises(DataError, match="GB here") as told:
            act()
        assert "What you keep here" in told.value.fix
    assert list(filled.workspace.runs.iterdir()) == []


def test_nothing_is_copied_for_a_run_that_cannot_wait(filled: Session, person: str, busy: threading.Event) -> None:
    for _ in range(filled.machine.most_of_one):
        filled.machine.start(person, "draw", lambda job: None)
    with pytest.raises(Busy):
        filled.training.start(person, wish())
    assert list(filled.workspace.runs.iterdir()) == []
