from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from app import runs
from app.session import Session
from app.shelf import Card
from app.workspace import new_token
from oft_diffusion import OFTConfig
from tests.helpers.app_page import occupied
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import Maker


@pytest.fixture(autouse=True)
def told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a training as they come, not every other second: tests wait for them."""
    monkeypatch.setattr(runs, "_TELL_EVERY", 0.3)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def make(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Adapter files for the tiny base, far from the identity."""
    return Maker(StableDiffusionPipeline.from_pretrained(model_folder), tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def session(model_folder: Path, tmp_path: Path) -> Iterator[Session]:
    session = Session(tmp_path / "work", str(model_folder))
    yield session
    session.machine.stop()


@pytest.fixture
def busy(session: Session) -> Iterator[threading.Event]:
    """Somebody else's work, that goes on until the event is set."""
    with occupied(session.machine) as free:
        yield free


@pytest.fixture
def person() -> str:
    return new_token()


@pytest.fixture
def mug(session: Session, make: Maker) -> Card:
    return session.shelf.add(make("mug", seed=1, trigger="sks", class_word="mug"), "My mug")


@pytest.fixture
def style(session: Session, make: Maker) -> Card:
    return session.shelf.add(make("style", seed=2, parts=("unet",), config=OFTConfig(8)), "A style")
