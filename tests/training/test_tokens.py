"""What a tokenizer says about triggers and prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oft_diffusion.errors import ConfigError
from oft_diffusion.training.find import find_base
from oft_diffusion.training.tokens import check_trigger, is_common, load_tokenizer, most_tokens, too_long


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


def test_a_word_is_common_that_is_one_token_after_a_space_alone() -> None:
    """As of Qwen's tokenizer, to which a word without a space before it is the end of another one."""
    inner = Tokenizer(models.BPE(vocab={"Ġ": 0, "m": 1, "u": 2, "Ġm": 3, "Ġmu": 4}, merges=[("Ġ", "m"), ("Ġm", "u")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert is_common(tokenizer, "mu")
    assert not is_common(tokenizer, "um")
