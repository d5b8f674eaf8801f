"""A person of the app who has something of everything, made without the page: what looks are judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from app.drawing import Request
from app.machine import Job
from app.runs import Wish
from app.session import Session
from oft_diffusion.pocket import subjects_path


def fill(session: Session, person: str, adapter: Path, misfit: Path) -> None:
    """Give a person pictures, a comparison, a finished run, photos, and a shelf with a cover and a misfit.

    Args:
        session: to act in.
        person: whose things they are.
        adapter: a file with a trigger for the session's model.
        misfit: a file for another model.
    """
    training = session.training
    training.photos(person).add(sorted(subjects_path("bow_cat").iterdir()))
    settings: dict[str, Any] = {
        "steps": 4, "prior_preservation": False, "prior_twins": 0, "validation_prompts": ["a {trigger} {class_word}"],
        "validation_every": 2, "validation_count": 2, "sampling_steps": 1,
    }  # fmt: skip
    _ended(training.start(person, Wish("Cat with a bow", "zwx", "cat", settings)))
    session.shelf.add(misfit, "For another model")
    card = session.shelf.add(adapter, "My mug")
    asked = Request(f"a {card.phrase} on the beach, with a word too long for one line", (1, 2, 3, 4), steps=2)
    [drawn, *_] = _ended(session.draw(person, asked))
    with Image.open(drawn[0]) as picture:
        session.shelf.give_cover(card, picture)
    pair = Request(f"a {card.phrase}", (1, 2), steps=1, adapters=((card, 1.0),))
    _ended(session.comparing.before_and_after(person, pair))


def _ended(job: Job) -> tuple[Any, ...]:
    """What a job has found.

    Raises:
        AssertionError: it failed.
    """
    *_, last = job.watch(timeout=300)
    assert last.state == "done", last.error
    return last.found
