"""What the app says, and that nothing that a user typed becomes markup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.machine import Job, Progress
from app.shelf import Card
from app.words import caption, card_page, cards_page, duration, explained, roughly, status_line, told
from oft_diffusion.errors import ConfigError
from oft_diffusion.training import Estimate
from oft_diffusion.training.estimate import Memory, Times


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (None, "Ready."),
        (Progress(), "Starting."),
        (Progress(before=(Job("ada", "draw"),)), "Waiting for one other job: a drawing."),
        (Progress("working", text="step 2 of 4", done=1, total=2, seconds_left=75.2), "Step 2 of 4, 1 min 15 s left."),
        (Progress("done", found=(1,)), "Done: 1 picture."),
        (Progress("cancelled", found=(1, 2)), "Cancelled after 2 pictures."),
        (Progress("cancelled"), "Cancelled."),
        (Progress("cancelled", text="stopped before the first step"), "Stopped before the first step."),
        (Progress("failed", error="no paint"), "No paint."),
    ],
)
def test_every_state_is_one_sentence(now: Progress | None, text: str) -> None:
    assert f"<span>{text}</span>" in status_line(now)


def test_those_who_wait_are_told_of_what_and_how_long() -> None:
    first = Job("ada", "train")
    first.tell(seconds_left=560.0)
    waiting = status_line(Progress(before=(first,)))
    assert "<span>Waiting for one other job: a training. It has about 9 minutes left.</span>" in waiting
    many = Progress(before=(first, Job("bo", "draw"), Job("bo", "draw")))
    told = "Waiting for 3 other jobs: a training, 2 drawings. The first has about 9 minutes left."
    assert f"<span>{told}</span>" in status_line(many)


def test_a_bar_is_told_as_a_number() -> None:
    bar = status_line(Progress("working", text="step 1 of 4", done=1, total=4))
    assert 'role="progressbar"' in bar
    assert 'aria-valuenow="25"' in bar


def test_markup_is_shown_and_not_obeyed() -> None:
    hostile = "<script>alert(1)</script>"
    for shown in (status_line(Progress("failed", error=hostile)), told(hostile), status_line(None, hostile)):
        assert "<script" not in shown
        assert "&lt;script&gt;" in shown


def test_errors_are_told_with_what_was_expected_and_the_fix() -> None:
    error = ConfigError("steps = 0 is too small", expected="1 or more", fix="raise it")
    assert explained(error) == "Steps = 0 is too small. Expected: 1 or more. Raise it."


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_lack_of_memory_is_told_with_what_to_lower(error: Exception) -> None:
    assert "smaller pictures, or fewer" in explained(error)


def test_what_python_says_of_a_form_is_not_shown() -> None:
    with pytest.raises(TypeError) as caught:
        int(None)  # type: ignore[call-overload]
    assert explained(caught.value) == "Something in the form is empty, or makes no sense."


def test_an_adapters_table_and_cover_are_sound_html(mug: Card) -> None:
    assert '<th scope="row">Trigger</th>' in card_page(mug, "")
    shown = cards_page([(replace(mug, cover=Path("/my #1 folder/50%20.png")), "")])
    assert 'src="/gradio_api/file=/my%20%231%20folder/50%2520.png?0"' in shown


def test_pictures_are_called_by_what_made_them() -> None:
    assert caption({"seed": 3, "prompt": "a mug"}) == "seed 3: a mug"
    assert caption({"rows": ["the base"], "prompt": "a mug"}) == "a comparison: a mug"


def test_times_are_read_easily() -> None:
    assert [duration(seconds) for seconds in (-1, 0.4, 59.6, 61)] == ["0 s", "0 s", "1 min 0 s", "1 min 1 s"]
    assert [duration(seconds) for seconds in (3599, 3600, 7505)] == ["59 min 59 s", "1 h 0 min", "2 h 5 min"]
    assert [roughly(seconds) for seconds in (0, 44, 57, 560)] == ["10 seconds", "40 seconds", "1 minute", "9 minutes"]
    assert [roughly(seconds) for seconds in (3600, 5400, 90_000)] == ["1 h 0 min", "1 h 30 min", "25 h"]


GB = 10**9


def found(free: int | None) -> Estimate:
    """An estimate of nine minutes and two gigabytes."""
    memory = Memory(GB, 0, 0, 0, 0, GB, 0, 0)
    times = Times(1.0, 60.0, 9.0, 450.0, 40.0)
    return Estimate("a processor", 450, 1.0, times, memory, free, 10, 100, 760_000, 44, 1, (), ())


@pytest.mark.parametrize(
    ("free", "text"),
    [
        (8 * GB, "It takes 2.0 GB of memory, and 8.0 GB are free. The adapter has 0.8 MB."),
        (None, "It takes 2.0 GB of memory. The adapter has 0.8 MB."),
        (GB, "It will not fit: it takes 2.0 GB of memory, and 1.0 GB are free."),
    ],
)
def test_an_estimate_is_read_easily(free: int | None, text: str) -> None:
    told = status_line(Progress("done", found=(found(free),)))
    assert "About 9 minutes, for 450 steps and 45 pictures." in told
    assert text in told
    assert ('role="alert"' in told) is (free == GB)
