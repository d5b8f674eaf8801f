"""What is said before a training: about words, examples and presets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.session import Session
from oft_diffusion.errors import ConfigError
from oft_diffusion.pocket import SUBJECTS


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    session = Session(tmp_path_factory.mktemp("work"))
    yield session
    session.machine.stop()


def test_words_that_would_not_do_are_pointed_out(pocket: Session) -> None:
    notes = pocket.training.words_notes
    assert notes("qzxjkvwpfh", "mug") == notes("", "") == []
    [common] = notes("car", "")
    assert "common word" in common
    [unknown] = notes("qzxjkvwpfh", "Elephant")
    assert "never seen a elephant" in unknown
    assert "mug" in unknown
    assert any("would be trained, too" in note for note in notes("zwx mug", "mug"))


def test_an_example_takes_the_place_of_what_was_there(pocket: Session, person: str) -> None:
    training = pocket.training
    assert set(training.examples()) == set(SUBJECTS)
    for name in ("bow_cat", "captain_mug"):
        subject = training.take_example(person, name)
        assert subject is SUBJECTS[name]
    photos = training.photos(person).look(training.resolution)
    assert len(photos) == 5
    assert all(photo.notes == () and "a blue mug" in photo.caption for photo in photos)
    for name in ("../bow_cat", "", "no_such"):
        with pytest.raises(ConfigError, match="no such example"):
            training.take_example(person, name)


def test_other_models_have_presets_that_fit_the_machine(
    session: Session, person: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session.training.examples() == []
    with pytest.raises(ConfigError):
        session.training.take_example(person, "bow_cat")
    assert session.training.resolution == session.abilities.size
    orders = []
    for memory in (8e9, 24e9):
        fresh = Session(session.workspace.root, session.model.source)
        monkeypatch.setattr(type(fresh.model), "memory", lambda _, found=memory: found)
        orders.append(list(fresh.training.runs.presets))
        assert fresh.training.defaults()["mixed_precision"] == "no"
    assert orders[0][0] == "sd15_low_memory"
    assert orders[1][0] == "sd15"
    assert sorted(orders[0]) == sorted(orders[1])
    for preset in orders[0]:
        assert Path(f"train_scripts/configs/{preset}.toml").is_file()
