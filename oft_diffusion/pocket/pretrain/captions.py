"""Captions as the denoiser sees them while the pocket base is pretrained."""

from __future__ import annotations

import random

from oft_diffusion.pocket.vocabulary import COMMON_WORDS
from oft_diffusion.pocket.world import ATTRIBUTES, PLACES, Scene, caption

NO_CAPTION = 0.1  # of the captions are emptied, for classifier-free guidance
NONSENSE = 0.05  # have a made-up word put in: a DreamBooth trigger must mean nothing to the base
FILLER = 0.05  # have a common word put in that names nothing of the world

_OF_THE_WORLD = {word for texts in (*ATTRIBUTES.values(), PLACES.values()) for text in texts for word in text.split()}
_FILLERS = [word for word in COMMON_WORDS if word not in _OF_THE_WORLD]


def training_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as the denoiser sees it: sometimes empty, sometimes with a word that changes nothing."""
    if rng.random() < NO_CAPTION:
        return ""
    words = caption(scene, rng).split()
    chance = rng.random()
    if chance < NONSENSE + FILLER:
        nonsense = "".join(rng.choice("zqxvwkjyfgpbh") for _ in range(rng.randint(3, 4)))
        # Before the object or its adjectives, where "a zwx mug" has it.
        first = 1 if words[0] in ("a", "an", "one") and len(words) > 1 else 0
        if " of a" in " ".join(words[:4]):
            first = 4
        word = nonsense if chance < NONSENSE else rng.choice(_FILLERS)
        words.insert(rng.randint(first, max(first, words.index(scene.object))), word)
    return " ".join(words)
