"""Damage to adapter files, seeded: each kind is a function of a sound file's bytes and a seed, and of nothing else.

`FILE_KINDS` are of safetensors files, `CONFIG_KINDS` of JSON files such as PEFT's adapter_config.json.
"""

from __future__ import annotations

import random

from tests.helpers import damaged_bytes, damaged_contents

_BYTES = (
    damaged_bytes.cut,
    damaged_bytes.bit_flipped,
    damaged_bytes.bits_flipped,
    damaged_bytes.run_overwritten,
    damaged_bytes.bytes_lost,
    damaged_bytes.noise,
)
FILE_KINDS = {damage.__name__: damage for damage in (*damaged_bytes.KINDS, *damaged_contents.KINDS)}
CONFIG_KINDS = {damage.__name__: damage for damage in (*damaged_contents.CONFIG_KINDS, *_BYTES)}
# After these a file of another tool still says what it said.
SAME_MEANING = frozenset({"header_reordered", "header_spaced", "text_added", "config_spaced", "config_key_added"})


def mutate(kind: str, data: bytes, seed: int) -> bytes:
    """The file after damage of this kind."""
    return (FILE_KINDS | CONFIG_KINDS)[kind](data, random.Random(f"{kind}/{seed}"))
