"""The prompts of an evaluation, and what each of them names."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product

from oft_diffusion.pocket.world import BACKGROUNDS, CAPTIONED, COLOURS, OBJECTS, PATTERNS, describe, is_held_out

OTHER_TRIGGER = "vqk"  # a trigger that nobody trained


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
    """Prompts that name all four captioned attributes, in combinations that pretraining never showed."""
    unseen = [values for values in product(*CAPTIONED.values()) if is_held_out(*values)]
    random.Random("held out").shuffle(unseen)
    prompts = (prompt(kind, colour=c, pattern=p, background=b) for kind, c, p, b in cycle(unseen))
    return list(islice(prompts, count))


def subject_prompts(kind: str, trigger: str, backgrounds: Iterable[str], count: int) -> list[Prompt]:
    """The subject in places where nobody has seen it."""
    prompts = (prompt(kind, trigger=trigger, background=b) for b in cycle(_unseen(BACKGROUNDS, backgrounds)))
    return list(islice(prompts, count))


def recoloured_prompts(kind: str, colour: str, trigger: str, backgrounds: Iterable[str], count: int) -> list[Prompt]:
    """The subject in colours and places that its pictures do not have."""
    pairs = list(product(_unseen(COLOURS, [colour]), _unseen(BACKGROUNDS, backgrounds)))
    random.Random("recoloured").shuffle(pairs)
    prompts = (prompt(kind, colour=c, trigger=trigger, background=b) for c, b in cycle(pairs))
    return list(islice(prompts, count))


def other_prompts(kind: str, count: int) -> list[Prompt]:
    """Prompts without the subject: half of them of its class, half of any other; two or three attributes named."""
    rng, prompts = random.Random("others"), []
    others = _unseen(OBJECTS, [kind])
    for i in range(count):
        drawn = kind if i % 2 else rng.choice(others)
        pattern = rng.choice((None, *PATTERNS[1:]))
        prompts.append(prompt(drawn, colour=rng.choice(COLOURS), pattern=pattern, background=rng.choice(BACKGROUNDS)))
    return prompts


def leakage_prompts(kind: str, count: int) -> list[Prompt]:
    """The class word, half of the time with a trigger that nobody trained, and half without any."""
    places = cycle((None, *BACKGROUNDS))
    triggers = cycle((OTHER_TRIGGER, None))
    prompts = (prompt(kind, trigger=t, background=b) for t, b in zip(triggers, places, strict=False))
    return list(islice(prompts, count))


def _unseen(values: Sequence[str], seen: Iterable[str]) -> list[str]:
    return [value for value in values if value not in set(seen)]
