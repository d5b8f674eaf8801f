"""Triggers in prompts: which ones are missing, and where a clicked one goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from oft_diffusion.metadata import has_trigger


class Subject(NamedTuple):
    """What names a subject in a prompt; either may be empty."""

    trigger: str
    class_word: str

    @property
    def phrase(self) -> str:
        """Both."""
        return " ".join(filter(None, self))


def missing_triggers(prompt: str, subjects: Sequence[Subject]) -> list[str]:
    """Triggers that a prompt lacks, each once."""
    missing = [s.trigger for s in subjects if s.trigger and not has_trigger(prompt, s.trigger)]
    return list(dict.fromkeys(missing))


def with_subject(prompt: str, subject: Subject) -> str:
    """A prompt that names the subject: in the class word's place where there is one, else in front."""
    if subject.trigger and has_trigger(prompt, subject.trigger):
        return prompt
    words = prompt.split()
    for i, word in enumerate(words):
        if subject.class_word and word.strip(",.").lower() == subject.class_word.lower():
            return " ".join([*words[:i], subject.trigger, *words[i:]])
    return f"a {subject.phrase} {prompt}".strip()
