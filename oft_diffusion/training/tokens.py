"""What a base's tokenizer says about triggers and prompts, before the base is loaded."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import transformers

from oft_diffusion.errors import ConfigError, first_line
from oft_diffusion.training.base import Base

# Tokenizers number their words by frequency: ids past this one are words that hardly occur in captions.
COMMON_BELOW = 40_000


def load_tokenizer(base: Base) -> Any:
    """The base's first tokenizer alone.

    Raises:
        ConfigError: transformers cannot read it.
    """
    part = next(name for name in base.classes if name.startswith(("tokenizer", "processor")))
    kind: Any = getattr(transformers, base.classes[part], transformers.AutoTokenizer)
    try:
        found = kind.from_pretrained(str(base.configs / part), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(
            f"the tokenizer in {base.configs / part} cannot be read ({first_line(error)})",
            expected=f"the files of a {base.classes[part]}",
            fix="download or copy the model again",
        ) from error
    return getattr(found, "tokenizer", found)  # of a processor


def is_common(tokenizer: Any, word: str) -> bool:
    """Whether a word is one frequent token, at the beginning of a prompt or, where that differs, within it."""
    ways = (tokenizer(text, add_special_tokens=False).input_ids for text in (word, f" {word}"))
    return any(len(ids) == 1 and ids[0] < COMMON_BELOW for ids in ways)


def check_trigger(tokenizer: Any, trigger: str) -> None:
    """Refuse a trigger that the model knows as a word: each of its words one frequent token.

    Raises:
        ConfigError: training would have to unlearn that word's meaning.
    """
    if all(is_common(tokenizer, word) for word in trigger.split()):
        raise ConfigError(
            f"the trigger {trigger!r} is a common word to this model's tokenizer",
            expected="a rare word, which has no meaning yet that training would have to fight",
            fix="use a word such as sks or ohwx, or invent one, such as zwx",
        )


def most_tokens(base: Base, tokenizer: Any) -> int:
    """How many tokens of a prompt the base reads."""
    own = inspect.signature(getattr(diffusers, base.pipeline).__call__).parameters.get("max_sequence_length")
    return int(own.default if own is not None else tokenizer.model_max_length)


def too_long(tokenizer: Any, prompt: str, most: int) -> bool:
    """Whether the base would cut the prompt."""
    return len(tokenizer(prompt).input_ids) > most
