"""Training through the app's session: to an adapter on the shelf, stopped, paused, gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.machine import Job
from app.runs import Wish
from app.session import Session
from oft_diffusion.errors import ConfigError, OFTError
from oft_diffusion.training import TrainConfig, TrainStep
from tests.app.test_photos import noise

QUICK: dict[str, Any] = {
    "steps": 6, "resolution": 32, "validation_prompts": ["a {trigger} {class_word}"], "validation_every": 3,
    "validation_count": 1, "sampling_steps": 1, "mixed_precision": "no", "batch_size": 1, "checkpoint_every": 2,
    "block_size": 8,
}  # fmt: skip


@pytest.fixture
def filled(session: Session, person: str, tmp_path: Path) -> Session:
    session.photos(person).add([noise(tmp_path / f"{i}.png", seed=i) for i in range(3)])
    return session


def wish(**settings: Any) -> Wish:
    return Wish("My thing", "zwx", "thing", QUICK | settings)


def ended(job: Job) -> Any:
    *_, last = job.watch(timeout=120)
    assert last.state == "done", last.error
    return last


def test_pictures_become_an_adapter_on_the_shelf(filled: Session, person: str) -> None:
    job = filled.train(person, wish())
    now = ended(job)
    *steps, card = now.found
    assert {type(step) for step in steps} == {TrainStep}
    assert steps[-1].step == 6
    assert (card.name, card.trigger, card.class_word) == ("My thing", "zwx", "thing")
    assert card.cover is not None
    assert [c.id for c in filled.shelf.cards()] == [card.id]
    assert filled.fits(card) == ""
    assert filled.runs.earlier() == []
    command = filled.training_command(job)
    assert command.startswith("oft-diffusion train --config ")
    assert TrainConfig.from_toml(Path(command.split()[-1])).steps == 6


def after(job: Job, step: int) -> None:
    """Wait until a step was told."""
    for now in job.watch(timeout=120):
        assert not now.ended, now.error
        if any(isinstance(found, TrainStep) and found.step >= step for found in now.found):
            return


def test_a_paused_run_goes_on_after_the_server_was_gone(filled: Session, person: str, model_folder: Path) -> None:
    job = filled.train(person, wish(steps=400, checkpoint_every=1000, validation_every=1000))
    after(job, 2)
    filled.stop_training(person, pause=True)
    assert ended(job).text.startswith("paused at step")
    assert filled.shelf.cards() == []
    [run] = filled.runs.earlier()
    assert (run.name, run.steps) == ("My thing", 400)
    again = Session(filled.workspace.root, str(model_folder))
    [same] = again.runs.earlier()
    assert same == run
    going = again.resume_training(person, run.id)
    after(going, run.step + 1)
    again.stop_training(person, pause=False)
    *steps, card = ended(going).found
    assert steps[0].step > run.step
    assert card.name == "My thing"
    assert again.runs.earlier() == []


def test_saving_and_drawing_when_asked(filled: Session, person: str) -> None:
    job = filled.train(person, wish(steps=400, checkpoint_every=1000, validation_every=1000))
    after(job, 2)
    for what in ("sample", "save"):
        filled.ask_training(person, what)
    after(job, job.progress.found[-1].step + 10)
    filled.stop_training(person, pause=False)
    ended(job)
    folder = next(filled.workspace.runs.iterdir()) / "run"
    assert len(list((folder / "samples").glob("*.png"))) >= 2
    assert len(list(folder.glob("checkpoint-*"))) == 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"name": " "}, "a name is missing"),
        ({"trigger": ""}, "a trigger is missing"),
        ({"class_word": ""}, "a class word is missing"),
    ],
)
def test_what_is_not_filled_in_is_said_at_once(filled: Session, person: str, changed: Any, words: str) -> None:
    told = {"name": "My thing", "trigger": "zwx", "class_word": "thing", "settings": QUICK} | changed
    with pytest.raises(ConfigError, match=words):
        filled.train(person, Wish(**told))


def test_without_pictures_there_is_no_run(session: Session, person: str) -> None:
    with pytest.raises(ConfigError, match="fewer than two pictures"):
        session.train(person, wish())
    for run in ("", "../x", "0" * 16):
        with pytest.raises(OFTError):
            session.resume_training(person, run)


def test_settings_that_cannot_be_are_told_in_words(filled: Session, person: str) -> None:
    job = filled.train(person, wish(learning_rate=-1.0))
    *_, last = job.watch(timeout=60)
    assert last.state == "failed"
    assert "learning_rate" in last.error
