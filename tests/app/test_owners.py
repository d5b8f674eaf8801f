"""Whose a run is: nobody else goes on with it, or takes its pictures along."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.runs import Wish
from app.session import Session
from app.workspace import new_token
from oft_diffusion.errors import ConfigError
from tests.app.test_photos import noise
from tests.app.test_runs import QUICK, ended


@pytest.fixture
def filled(session: Session, person: str, tmp_path: Path) -> Session:
    session.training.photos(person).add([noise(tmp_path / f"{i}.png", seed=i) for i in range(3)])
    return session


def test_a_run_is_gone_on_with_by_whoever_began_it_alone(filled: Session, person: str) -> None:
    job = filled.training.start(person, Wish("Mine", "zwx", "thing", QUICK | {"steps": 60}))
    for now in job.watch(timeout=120):
        if now.found and now.found[-1].step >= 12:  # the first checkpoint
            filled.training.stop(person, pause=True)
            break
    *_, last = job.watch(timeout=120)
    assert last.state == "done"
    [run] = filled.training.unfinished(person)
    other = new_token()
    assert filled.training.unfinished(other) == []
    with pytest.raises(ConfigError, match="no such run"):
        filled.training.resume(other, run.id)
    assert filled.training.packed(other) is None
    assert ended(filled.training.resume(person, run.id)).found[-1].name == "Mine"


def test_a_name_that_no_adapter_can_have_is_refused_before_anything_is_trained(filled: Session, person: str) -> None:
    with pytest.raises(ConfigError, match="a name of 61 letters"):
        filled.training.start(person, Wish("x" * 61, "zwx", "thing", QUICK))
    assert filled.training.runs.earlier() == []
    assert filled.shelf.cards() == []
