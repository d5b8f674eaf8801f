"""Triggers in prompts, by the command line's own rule."""

from __future__ import annotations

import pytest

from app.prompts import Subject, missing_triggers, with_subject
from oft_diffusion.cli import _warn_without_trigger

MUG = Subject("sks", "mug")


@pytest.mark.parametrize(
    ("prompt", "there"),
    [("a photo of sks.", True), ("SKS, at night", True), ("a sksy mug", False), ("a mug", False), ("(sks:1.2)", True)],
)
def test_the_page_and_the_command_line_agree_on_triggers(
    prompt: str, there: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    _warn_without_trigger(prompt, MUG.trigger)
    assert (capsys.readouterr().err == "") is there
    assert missing_triggers(prompt, [MUG, Subject("", "cat"), MUG]) == ([] if there else ["sks"])
    assert (with_subject(prompt, MUG) == prompt) is there


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("", "a zwx mug"),
        ("on the beach", "a zwx mug on the beach"),
        ("a red mug, at night", "a red zwx mug, at night"),
        ("a zwx mug", "a zwx mug"),
        ("ZWX in snow", "ZWX in snow"),
    ],
)
def test_a_trigger_goes_where_the_class_word_is(prompt: str, wanted: str) -> None:
    assert with_subject(prompt, Subject("zwx", "mug")) == wanted


def test_a_trigger_of_two_words_stays_whole() -> None:
    assert with_subject("a mug on the beach", Subject("blue zwx", "mug")) == "a blue zwx mug on the beach"
