from typing import Any

import numpy as np
import pytest
import torch

from oft_diffusion import list_oft_adapters, load_oft_weights, set_oft_adapters
from oft_diffusion.errors import AdapterError, ConfigError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.generate import compare, generate
from oft_diffusion.images import parameters_text, read_settings, save_png
from tests.library.support import PROMPT, assert_one_sentence


@pytest.fixture(scope="module")
def mug(make):
    return make("mug", seed=1, trigger="sks")


def pixels(pictures):
    return np.stack([np.asarray(p.image, dtype=int) for p in pictures])


def test_a_seed_is_the_same_picture_in_any_batch_and_company(pipe, mug):
    load_oft_weights(pipe, mug)
    seeds = [5, 6, 7, 8, 9]
    alone = pixels([generate(pipe, PROMPT, [seed], steps=2)[0] for seed in seeds])
    assert len(np.unique(alone, axis=0)) == len(seeds)
    for batch_size in (1, 2, 4, 8):
        # one level of 255: matrix products of another size round otherwise
        assert abs(pixels(generate(pipe, PROMPT, seeds, steps=2, batch_size=batch_size)) - alone).max() <= 1
    backwards = pixels(generate(pipe, PROMPT, seeds[::-1], steps=2))[::-1]
    assert abs(backwards - alone).max() <= 1


def test_the_same_call_gives_the_same_bits(pipe):
    first, second = (pixels(generate(pipe, PROMPT, [1, 2], steps=2)) for _ in range(2))
    assert np.array_equal(first, second)


def test_clip_skip_takes_an_earlier_layer_and_is_told_as_uis_count_it(pipe):
    (plain,), (skipped,) = (generate(pipe, PROMPT, [1], steps=2, clip_skip=skip) for skip in (None, 1))
    assert not np.array_equal(pixels([plain]), pixels([skipped]))
    assert skipped.settings["clip_skip"] == 1
    assert "clip_skip" not in plain.settings
    assert "Clip skip: 2" in parameters_text(skipped.settings)
    assert "text_model" not in {name for name, _ in pipe.text_encoder.named_modules()}


def test_the_callers_random_numbers_are_left_alone(pipe):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    generate(pipe, PROMPT, [1], steps=1)
    assert torch.equal(torch.rand(2), expected)


def test_settings_say_what_made_the_picture(pipe, mug, make, tmp_path):
    load_oft_weights(pipe, mug, adapter_name="mug", strength=0.5)
    load_oft_weights(pipe, make("idle", seed=2), adapter_name="idle", strength=0.0)
    (picture,) = generate(pipe, PROMPT, [9], steps=2, guidance=3.0, negative_prompt="blurry", width=16, height=32)
    assert picture.image.size == (16, 32)
    assert picture.settings == {
        "prompt": PROMPT,
        "negative_prompt": "blurry",
        "steps": 2,
        "guidance": 3.0,
        "scheduler": "DDIMScheduler",
        "model": "model",
        "adapters": [
            {"name": "mug", "strength": 0.5, "mode": "rotation", "sha256": load_adapter_file(mug).metadata.sha256}
        ],
        "seed": 9,
        "width": 16,
        "height": 32,
    }
    settings = read_settings(save_png(picture.image, tmp_path / "a.png", picture.settings))
    again = generate(
        pipe,
        settings["prompt"],
        [settings["seed"]],
        **{key: settings[key] for key in ("steps", "guidance", "negative_prompt", "width", "height")},
    )
    assert np.array_equal(pixels([picture]), pixels(again))


def test_settings_tell_how_a_strength_was_taken(pipe, mug):
    load_oft_weights(pipe, mug, adapter_name="mug")
    set_oft_adapters(pipe, "mug", 0.5, mode="linear")
    [picture] = generate(pipe, PROMPT, [1], steps=1)
    assert picture.settings["adapters"][0]["mode"] == "linear"


def test_every_setting_matters(pipe):
    base = pixels(generate(pipe, PROMPT, [1], steps=2))
    changes: tuple[dict[str, Any], ...] = ({"steps": 3}, {"guidance": 1.0}, {"negative_prompt": "red dog"})
    for change in changes:
        assert not np.array_equal(pixels(generate(pipe, PROMPT, [1], **{"steps": 2, **change})), base)
    assert not np.array_equal(pixels(generate(pipe, "a red dog", [1], steps=2)), base)


def test_progress_is_told(pipe):
    calls = []
    pictures = generate(pipe, PROMPT, range(5), steps=1, batch_size=2, on_picture=lambda *told: calls.append(told))
    assert calls == [(picture, 5) for picture in pictures]
    assert generate(pipe, PROMPT, [], steps=1) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 32}, ["width=32", "height=None"]),
        ({"height": 32}, ["height=32"]),
        ({"width": 0, "height": 0}, ["width=0"]),
        ({"width": -16, "height": -16}, ["width=-16"]),
        ({"width": 17, "height": 17}, ["17"]),
        ({"steps": 1001}, ["1001"]),
        ({"seeds": [2**64]}, []),
    ],
)
def test_settings_that_no_pipeline_can_take(pipe, options, words):
    seeds = options.pop("seeds", [1])
    with pytest.raises(ConfigError) as error:
        generate(pipe, PROMPT, seeds, **{"steps": 1, **options})
    assert_one_sentence(error, *words)


# compare


def test_comparing_strengths(pipe, mug, make):
    untouched = pixels(generate(pipe, PROMPT, [1, 2], steps=2))
    load_oft_weights(pipe, mug, adapter_name="mug")
    load_oft_weights(pipe, make("other", seed=2), adapter_name="other")
    calls = []
    rows = compare(
        pipe, "mug", [PROMPT, "a red dog"], [1, 2], strengths=(0, 0.5, 1), steps=2, on_row=lambda *n: calls.append(n)
    )
    assert calls == [(1, 2), (2, 2)]
    assert [len(row) for row in rows] == [6, 6]
    assert [p.settings["seed"] for p in rows[0]] == [1, 2] * 3
    assert [p.settings["prompt"] for p in rows[1]] == ["a red dog"] * 6
    told = [[(a["name"], a["strength"]) for a in p.settings["adapters"]] for p in rows[0][::2]]
    assert told == [[], [("mug", 0.5)], [("mug", 1.0)]]
    assert np.array_equal(pixels(rows[0][:2]), untouched)
    for a, b in ((0, 2), (2, 4), (0, 4)):
        assert not np.array_equal(pixels(rows[0][a : a + 2]), pixels(rows[0][b : b + 2]))
    assert [(a.name, a.strength) for a in list_oft_adapters(pipe)] == [("mug", 1.0), ("other", None)]
    set_oft_adapters(pipe, "mug")
    assert np.array_equal(pixels(rows[0][4:]), pixels(generate(pipe, PROMPT, [1, 2], steps=2)))
    with pytest.raises(AdapterError) as error:
        compare(pipe, "cup", [PROMPT], [1])
    assert_one_sentence(error, "'cup'")


# steps and pictures to begin with


def test_steps_are_told_with_their_latents(pipe):
    told: list[Any] = []
    plain = pixels(generate(pipe, PROMPT, [1, 2, 3], steps=3, batch_size=2))
    watched = pixels(generate(pipe, PROMPT, [1, 2, 3], steps=3, batch_size=2, on_step=told.append))
    assert np.array_equal(watched, plain)
    assert [(s.step, s.steps, s.first, s.pictures) for s in told] == [
        (step, 3, first, 3) for first in (0, 2) for step in (1, 2, 3)
    ]
    assert [len(s.latents) for s in told] == [2] * 3 + [1] * 3
    assert not torch.equal(told[0].latents, told[1].latents)


def test_what_a_step_raises_ends_the_call_and_no_more(pipe, mug):
    load_oft_weights(pipe, mug)
    wanted = pixels(generate(pipe, PROMPT, [1], steps=3))
    steps = []

    def stop(step):
        steps.append(step.step)
        raise KeyError("stop")

    with pytest.raises(KeyError):
        generate(pipe, PROMPT, [1], steps=3, on_step=stop)
    assert steps == [1]
    assert np.array_equal(pixels(generate(pipe, PROMPT, [1], steps=3)), wanted)


def test_a_picture_to_begin_with_is_kept_the_more_the_less_changes(pipe, mug):
    load_oft_weights(pipe, mug)
    [start] = generate(pipe, PROMPT, [1], steps=4)

    def drawn(**options):
        [picture] = generate(pipe, "a red dog", [2], steps=10, image=start.image, **options)
        return picture

    off = [float(abs(pixels([drawn(change=share)]) - pixels([start])).mean()) for share in (0.1, 0.9)]
    assert off[0] < off[1]
    assert drawn(change=0.5).settings["change"] == 0.5
    assert drawn(change=0.5, width=32, height=16).image.size == (32, 16)
    assert drawn().settings["adapters"][0]["strength"] == 1.0
    assert "change" not in start.settings


def test_pictures_to_begin_with_that_are_refused(pipe):
    [start] = generate(pipe, PROMPT, [1], steps=1)
    for change in (0.0, 1.5):
        with pytest.raises(ConfigError) as error:
            generate(pipe, PROMPT, [1], steps=2, image=start.image, change=change)
        assert_one_sentence(error, f"change={change}")
    pipe.__class__ = type("NewPipeline", (type(pipe),), {})  # of which diffusers knows no twin
    with pytest.raises(ConfigError) as error:
        generate(pipe, PROMPT, [1], steps=2, image=start.image)
    assert_one_sentence(error, "NewPipeline", "cannot begin with a picture")
