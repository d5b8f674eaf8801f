"""What a tokenizer says about triggers and prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from oft_diffusion.errors import ConfigError
from oft_diffusion.training.find import find_base
from oft_diffusion.training.tokens import check_trigger, load_tokenizer, most_tokens, too_long


def test_long_prompts_are_recognised(tiny_sd: Path) -> None:
    base = find_base(str(tiny_sd))
    tokenizer = load_tokenizer(base)
    most = most_tokens(base, tokenizer)
    assert most == tokenizer.model_max_length
    assert not too_long(tokenizer, "a photo of sks dog", most)
    assert too_long(tokenizer, "a red dog " * 30, most)


@pytest.mark.parametrize("trigger", ["dog", "photo", "red mug", "x"])
def test_common_words_are_refused_as_trigger(trigger: str, tiny_sd: Path) -> None:
    with pytest.raises(ConfigError, match="is a common word to this model's tokenizer"):
        check_trigger(load_tokenizer(find_base(str(tiny_sd))), trigger)


@pytest.mark.parametrize("trigger", ["sks", "zwx", "red sks", "<sks>"])
def test_rare_words_are_accepted(trigger: str, tiny_sd: Path) -> None:
    check_trigger(load_tokenizer(find_base(str(tiny_sd))), trigger)
