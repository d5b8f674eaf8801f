import pytest

from oft_diffusion.errors import ConfigError
from oft_diffusion.evaluation.prompts import (
    OTHER_TRIGGERS,
    class_prompts,
    held_out_prompts,
    long_trigger_prompts,
    near,
    other_prompts,
    other_trigger_prompts,
    recoloured_prompts,
    subject_prompts,
)
from oft_diffusion.pocket.world import BACKGROUNDS, CAPTIONED, COLOURS, PLACES, is_held_out

SEEN = ("beach", "city", "night", "room", "snow")


def test_prompts_say_what_they_name():
    prompts = [
        *held_out_prompts(300), *subject_prompts("mug", "zwx", SEEN, 20), *class_prompts("fish", 40),
        *recoloured_prompts("car", "red", "zwx", SEEN, 40), *other_prompts("cat", 100),
        *other_trigger_prompts("fish", "zwx", 40), *long_trigger_prompts("fish", "qzxjkvwpfh", 40),
    ]  # fmt: skip
    for p in prompts:
        words = p.text.split()
        assert words[0] == ("an" if words[1][0] in "aeiou" else "a")
        for name, values in CAPTIONED.items():
            said = [v for v in values if (PLACES[v] in p.text if name == "background" else v in words)]
            assert said == ([p.named[name]] if name in p.named else []), p


def test_held_out_prompts_are_of_combinations_that_the_denoiser_never_saw():
    prompts = held_out_prompts(100)
    assert all(set(p.named) == set(CAPTIONED) and is_held_out(**p.named) for p in prompts)
    assert len({p.text for p in prompts}) > 90
    assert len({p.named["object"] for p in prompts}) == len(CAPTIONED["object"])


def test_subject_prompts_avoid_what_the_instance_images_show():
    assert {p.named["background"] for p in subject_prompts("mug", "zwx", SEEN, 20)} == set(BACKGROUNDS) - set(SEEN)
    recoloured = recoloured_prompts("mug", "blue", "zwx", SEEN, 60)
    assert {p.named["colour"] for p in recoloured} == set(COLOURS) - {"blue"}
    assert not {p.named["background"] for p in recoloured} & set(SEEN)
    assert all("zwx mug" in p.text for p in recoloured)


def test_other_prompts_are_half_of_the_class_and_name_three_or_four_attributes():
    others = other_prompts("cat", 100)
    assert sum(p.named["object"] == "cat" for p in others) >= 50
    assert {len(p.named) for p in others} == {3, 4}
    assert len({p.text for p in others}) > 80


def test_another_trigger_is_never_the_trained_one():
    for trigger in OTHER_TRIGGERS:
        texts = [p.text for p in other_trigger_prompts("cat", trigger.upper(), 40)]
        assert all(f" {trigger} " not in text for text in texts)
        assert all(any(f" {other} cat" in text for other in (*OTHER_TRIGGERS, near(trigger))) for text in texts)
    assert not any(word in p.text.split() for p in class_prompts("cat", 40) for word in OTHER_TRIGGERS)


@pytest.mark.parametrize(("trigger", "word"), [("zwx", "zwq"), ("ZWQ", "zwk"), ("qzxjkv", "qzxjqq"), ("sks", "skq")])
def test_a_quarter_of_the_other_triggers_is_near_to_the_trained_one(trigger, word):
    assert near(trigger) == word
    texts = [p.text for p in other_trigger_prompts("cat", trigger, 36)]
    assert sum(f" {word} cat" in text for text in texts) == 9


@pytest.mark.parametrize("trigger", ["zwx", "qzxjkvwpfh", "SKS"])
def test_long_words_have_the_triggers_length_and_not_its_beginning(trigger):
    words = {p.text.split()[1] for p in long_trigger_prompts("cat", trigger, 60, "a")}
    assert len(words) >= 4
    assert all(len(word) == len(trigger) and word[0] != trigger[0].lower() for word in words)
    assert words != {p.text.split()[1] for p in long_trigger_prompts("cat", trigger, 60, "b")}


def test_runs_of_other_salts_have_other_prompts():
    for make in (
        lambda salt: recoloured_prompts("mug", "blue", "zwx", SEEN, 20, salt),
        lambda salt: other_prompts("mug", 20, salt),
        lambda salt: other_trigger_prompts("mug", "zwx", 20, salt),
    ):
        first, again, other = ([p.text for p in make(salt)] for salt in ("a/0", "a/0", "b/0"))
        assert first == again
        assert first != other


def test_a_subject_that_was_shown_everywhere_leaves_nothing_to_ask_for():
    with pytest.raises(ConfigError, match="in all of beach"):
        subject_prompts("mug", "zwx", BACKGROUNDS, 4)
