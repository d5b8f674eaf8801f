"""What a training would take, measured through the app's session, before it starts."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from app.runs import Wish
from app.session import Session
from app.workspace import new_token
from oft_diffusion.errors import ConfigError
from oft_diffusion.training import Estimate
from tests.app.test_runs import QUICK, ended, filled, listened, wish

__all__ = ["filled"]


def kept(session: Session) -> list[str]:
    """All files of the workspace."""
    return sorted(str(path.relative_to(session.workspace.root)) for path in session.workspace.root.rglob("*"))


def test_time_and_memory_are_measured_and_nothing_is_left(
    filled: Session, person: str, busy: threading.Event
) -> None:  # fmt: skip
    before, told = kept(filled), list[str]()
    job = listened(filled.training.estimate(person, wish(name="")), told.append)
    busy.set()
    [found] = ended(job).found
    assert isinstance(found, Estimate)
    assert found.steps == 6
    assert found.pictures >= 3  # before the first step, after three and after six
    assert found.seconds > 0
    assert found.memory.peak > found.memory.base > 0
    assert [text for text in told if "step" in text] == [f"measuring: step {i} of 6" for i in range(1, 7)]
    assert kept(filled) == before


def test_the_device_is_free_before_it_is_measured(
    filled: Session, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    done: list[str] = []
    studio = filled.model.studio()
    monkeypatch.setattr(studio, "rest", lambda: done.append("the app's model rests"))
    monkeypatch.setattr(filled.training.runs, "estimate", lambda *_: done.append("measured"))
    ended(filled.training.estimate(person, wish()))
    assert done == ["the app's model rests", "measured"]


def test_it_waits_its_turn_and_can_be_cancelled_there(filled: Session, person: str, busy: threading.Event) -> None:
    before = kept(filled)
    job = filled.training.estimate(person, wish())
    assert len(job.progress.before) == 1
    assert filled.machine.newest(new_token(), "estimate") is None
    filled.machine.cancel_all(person, "estimate")
    *_, last = job.watch(timeout=60)
    assert last.state == "cancelled"
    assert last.found == ()
    assert kept(filled) == before


@pytest.mark.thinned(2)
@pytest.mark.parametrize("part", ["loading the base", "encoding pictures", "step 3 of 6", "drawing pictures"])
def test_it_is_cancelled_within_a_part(filled: Session, person: str, busy: threading.Event, part: str) -> None:
    before = kept(filled)
    job = filled.training.estimate(person, wish())
    listened(job, lambda text: job.cancel() if part in text else None)
    busy.set()
    *_, last = job.watch(timeout=60)
    assert (last.state, last.found) == ("cancelled", ())
    assert kept(filled) == before
    ended(filled.training.estimate(person, wish()))


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"trigger": ""}, "a trigger is missing"), ({"class_word": " "}, "a class word is missing")],
)
def test_what_is_missing_is_said_before_anyone_waits(
    filled: Session, person: str, changed: dict[str, str], words: str
) -> None:
    told: dict[str, Any] = {"name": "", "trigger": "zwx", "class_word": "thing", "settings": QUICK}
    with pytest.raises(ConfigError, match=words):
        filled.training.estimate(person, Wish(**told | changed))
    with pytest.raises(ConfigError, match="fewer than two pictures"):
        filled.training.estimate(new_token(), wish())


def test_what_a_run_would_refuse_is_told_in_words(filled: Session, person: str) -> None:
    with pytest.raises(ConfigError, match="learning_rate = -1"):
        filled.training.estimate(person, wish(learning_rate=-1.0))
