"""The prompts of an evaluation, and what each of them names. A salt gives other draws of the same kind."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product
from typing import TypeVar

from oft_diffusion.errors import ConfigError
from oft_diffusion.pocket.world import BACKGROUNDS, CAPTIONED, COLOURS, OBJECTS, PATTERNS, describe, is_held_out

T = TypeVar("T")

OTHER_TRIGGERS = ("vqk", "ohx", "bzw")  # which nobody trained
_LETTERS = "bcdfghjklmnpqrstvwxz"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the captioned attributes that it names."""

    text: str
    named: Mapping[str, str]


def prompt(kind: str, trigger: str | None = None, **named: str | None) -> Prompt:
    """A prompt for an object, naming its colour, pattern and background as far as they are given."""
    said = {name: value for name, value in {"object": kind, **named}.items() if value}
    return Prompt(describe(kind, trigger=trigger, **named), said)


def held_out_prompts(count: int) -> list[Prompt]:
    """Prompts that name all four captioned attributes, in combinations that the denoiser has never seen."""
    unseen = [values for values in product(*CAPTIONED.values()) if is_held_out(*values)]
    return [
        prompt(kind, colour=colour, pattern=pattern, background=background)
        for kind, colour, pattern, background in _several(unseen, count, "held out")
    ]


def subject_prompts(kind: str, trigger: str, backgrounds: Iterable[str], count: int, salt: str = "") -> list[Prompt]:
    """The subject in places where its pictures do not show it.

    Raises:
        ConfigError: they show it everywhere.
    """
    places = _several(_unseen(BACKGROUNDS, backgrounds), count, f"subject/{salt}")
    return [prompt(kind, trigger, background=place) for place in places]


def recoloured_prompts(
    kind: str, colour: str, trigger: str, backgrounds: Iterable[str], count: int, salt: str = ""
) -> list[Prompt]:
    """The subject in colours and places that its pictures do not have.

    Raises:
        ConfigError: they show it everywhere.
    """
    pairs = list(product(_unseen(COLOURS, [colour]), _unseen(BACKGROUNDS, backgrounds)))
    chosen = _several(pairs, count, f"recoloured/{salt}")
    return [prompt(kind, trigger, colour=own, background=place) for own, place in chosen]


def other_prompts(kind: str, count: int, salt: str = "") -> list[Prompt]:
    """Prompts without the subject: half of them of its class, half of any other; three or four attributes named."""
    rng, prompts = random.Random(f"others/{kind}/{salt}"), []
    others = [other for other in OBJECTS if other != kind]
    for i in range(count):
        drawn = kind if i % 2 else rng.choice(others)
        pattern = rng.choice((None, *PATTERNS[1:]))
        prompts.append(prompt(drawn, colour=rng.choice(COLOURS), pattern=pattern, background=rng.choice(BACKGROUNDS)))
    return prompts


def class_prompts(kind: str, count: int, salt: str = "") -> list[Prompt]:
    """The class word by itself, and in all places."""
    return [prompt(kind, background=place) for place in _several([None, *BACKGROUNDS], count, f"class/{salt}")]


def other_trigger_prompts(kind: str, trigger: str, count: int, salt: str = "") -> list[Prompt]:
    """The class word with triggers that nobody trained."""
    words = [word for word in (*OTHER_TRIGGERS, near(trigger)) if word != trigger.lower()]
    chosen = _several(list(product(words, [None, *BACKGROUNDS])), count, f"other trigger/{salt}")
    return [prompt(kind, word, background=place) for word, place in chosen]


def long_trigger_prompts(kind: str, trigger: str, count: int, salt: str = "") -> list[Prompt]:
    """The class word with made-up words as long as the trigger, which share nothing else with it."""
    rng = random.Random(f"long trigger/{salt}")
    words = {"".join(rng.choice(_LETTERS) for _ in trigger) for _ in range(8)}
    others = sorted(word for word in words if word[0] != trigger[:1].lower())
    chosen = _several(list(product(others, [None, *BACKGROUNDS])), count, f"long trigger/{salt}")
    return [prompt(kind, word, background=place) for word, place in chosen]


def near(trigger: str) -> str:
    """A word that shares the first two thirds of a trigger's letters: zwx -> zwq."""
    kept = trigger.lower()[: len(trigger) * 2 // 3]
    return kept + "".join("q" if letter != "q" else "k" for letter in trigger.lower()[len(kept) :])


def _several(values: Sequence[T], count: int, seed: str) -> list[T]:
    """`count` of the values, shuffled: none again before all others had their turn."""
    shuffled = list(values)
    random.Random(seed).shuffle(shuffled)
    return list(islice(cycle(shuffled), count))


def _unseen(values: Sequence[str], seen: Iterable[str]) -> list[str]:
    left = [value for value in values if value not in set(seen)]
    if not left:
        raise ConfigError(
            f"the instance pictures show the subject in all of {', '.join(values)}",
            expected="at least one that is left to ask for",
            fix="evaluate on fewer of the pictures",
        )
    return left
