"""What the app does, without a browser: drawing with adapters from the shelf, comparing, history, settings."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.comparing import Part
from app.drawing import MOST_ADAPTERS, Request, seeds_from, settings_of, size_like
from app.machine import Job
from app.session import Session
from app.shelf import Card
from app.words import status_line
from app.workspace import new_token
from oft_diffusion import load_oft_weights
from oft_diffusion.errors import ConfigError, DataError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.generate import generate
from oft_diffusion.load import load_pipeline
from oft_diffusion.pipeline import list_oft_adapters
from oft_diffusion.quantized import quantized_weight
from tests.library.support import PROMPT


def ended(job: Job) -> Any:
    *_, last = job.watch(timeout=60)
    assert last.state == "done", last.error
    return last


def drawn(session: Session, person: str, request: Request) -> list[Path]:
    return [path for path, _ in ended(session.draw(person, request)).found]


def pixels(path: Path) -> Any:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


def asked(*adapters: tuple[Card, float], **changes: Any) -> Request:
    return dataclasses.replace(Request(PROMPT, (3, 4), steps=2, adapters=adapters), **changes)


def test_pictures_are_those_of_the_library(
    session: Session, person: str, mug: Card, style: Card, model_folder: Path
) -> None:
    first, _ = drawn(session, person, asked((mug, 0.7), (style, 1.0)))
    pipe = load_pipeline(model_folder)
    load_oft_weights(pipe, mug.file, adapter_name="mug", strength=0.7)
    load_oft_weights(pipe, style.file, adapter_name="style")
    wanted = generate(pipe, PROMPT, [3, 4], steps=2)[0]
    assert np.array_equal(pixels(first), np.asarray(wanted.image, dtype=int))


def test_strength_0_is_the_base_and_order_matters(session: Session, person: str, mug: Card, style: Card) -> None:
    base, nothing, one, two = (
        pixels(drawn(session, person, request)[0])
        for request in (
            asked(), asked((mug, 0.0)), asked((mug, 1.0), (style, 1.0)), asked((style, 1.0), (mug, 1.0))
        )
    )  # fmt: skip
    assert np.array_equal(base, nothing)
    assert not np.array_equal(base, one)
    assert not np.array_equal(one, two)


def test_adapters_come_and_go_without_a_trace(session: Session, person: str, mug: Card, make: Any) -> None:
    before = pixels(drawn(session, person, asked((mug, 1.0)))[0])
    for seed in range(8):  # more than stay loaded
        card = session.shelf.add(make(f"other{seed}", seed=seed + 3), f"other {seed}")
        drawn(session, person, asked((card, 1.0)))
    assert np.array_equal(pixels(drawn(session, person, asked((mug, 1.0)))[0]), before)


def test_an_adapter_goes_whole_also_while_nobody_can_wait_any_more(
    session: Session, person: str, mug: Card, busy: threading.Event
) -> None:
    waiting = [session.draw(new_token(), asked((mug, 1.0))) for _ in range(session.machine.most_waiting)]
    session.delete(mug.id)
    assert not mug.file.parent.exists()
    assert session.shelf.cards() == []
    for job in waiting[1:]:
        session.machine.cancel(job.owner, job.id)
    busy.set()
    *_, last = waiting[0].watch(timeout=60)
    assert last.state == "failed"
    assert "adapter My mug was deleted meanwhile" in last.error
    drawn(session, person, asked())


def test_a_deleted_adapter_that_was_in_the_pipeline_leaves_it(session: Session, person: str, mug: Card) -> None:
    base = pixels(drawn(session, person, asked())[0])
    drawn(session, person, asked((mug, 1.0)))
    session.delete(mug.id)
    *_, last = session.draw(person, asked((mug, 1.0))).watch(timeout=60)
    assert "was deleted meanwhile" in last.error
    assert np.array_equal(pixels(drawn(session, person, asked())[0]), base)
    assert list_oft_adapters(session.model.studio().pipe) == []


def test_pictures_tell_their_settings_and_give_them_back(session: Session, person: str, mug: Card) -> None:
    request = asked((mug, 0.5), negative="blurry", guidance=3.0, scheduler=session.abilities.schedulers[1])
    path = drawn(session, person, request)[1]
    settings = session.settings_in(path)
    assert settings["adapters"][0]["name"] == "My mug"
    found, notes = session.request_from(settings)
    assert notes == []
    assert found == dataclasses.replace(request, seeds=(4,), width=found.width, height=found.height)
    assert np.array_equal(pixels(drawn(session, person, found)[0]), pixels(path))
    session.shelf.delete(mug.id)
    _, notes = session.request_from(settings)
    assert notes == ["the adapter My mug is not on this shelf"]


def test_everyone_has_a_history_of_their_own_that_outlives_the_server(
    session: Session, person: str, model_folder: Path
) -> None:
    paths = drawn(session, person, asked())
    again = Session(session.workspace.root, str(model_folder))
    assert sorted(again.history(person)) == sorted(paths)
    assert again.history(new_token()) == []
    assert person not in str(paths[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": ()}, "0 pictures"),
        ({"seeds": tuple(range(17))}, "17 pictures"),
        ({"steps": 151}, "151 steps"),
        ({"prompt": "x" * 4001}, "4001 letters of the prompt"),
        ({"width": 4096, "height": 8}, "4096 pixels of the width"),
        ({"scheduler": "os.system"}, "'os.system' is no scheduler"),
        ({"seeds": (-1,)}, "a seed out of range"),
        ({"guidance": float("nan")}, "nan as guidance"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"change": 0.0}, "0 as share that may change"),
    ],
)
def test_what_is_too_much_is_refused_at_once(session: Session, person: str, change: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        session.draw(person, asked(**change))


def test_what_makes_no_sense_of_adapters_is_refused_at_once(session: Session, person: str, mug: Card) -> None:
    for strength, words in ((1e30, "1e\\+30 as strength of My mug"), (float("nan"), "nan as strength of My mug")):
        with pytest.raises(ConfigError, match=words):
            session.draw_for_program("somebody", asked((mug, strength)))
    with pytest.raises(ConfigError, match="My mug is there twice"):
        session.draw(person, asked((mug, 1.0), (mug, 0.5)))
    with pytest.raises(ConfigError, match="4 adapters"):
        session.draw(person, asked(*[(dataclasses.replace(mug, id=f"{i}"), 1.0) for i in range(4)]))


def test_an_empty_number_is_named() -> None:
    for values, words in (
        ((None, 7.5, "", 64, 64), "Steps is no number, or empty"),
        ((20, float("inf"), "", 64, 64), "Guidance is no number"),
        ((20, 7.5, "", "wide", 64), "The width is no number"),
    ):
        with pytest.raises(ConfigError, match=words):
            settings_of(*values)
    with pytest.raises(ConfigError, match="1e\\+30 pictures"):
        seeds_from(0, 10**30)


def test_cancelling_ends_within_a_step_and_the_next_drawing_is_sound(session: Session, person: str, mug: Card) -> None:
    wanted = pixels(drawn(session, person, asked((mug, 1.0)))[0])
    job = session.draw(person, asked((mug, 1.0), steps=150))
    begun = next(now for now in job.watch(timeout=60) if now.text.startswith("step"))
    assert session.machine.cancel(person, job.id)
    assert not begun.ended
    assert list(job.watch(timeout=60))[-1].ended
    assert job.progress.state == "cancelled"
    assert job.progress.done < 30
    assert np.array_equal(pixels(drawn(session, person, asked((mug, 1.0)))[0]), wanted)


def test_previews_come_and_go(session: Session, person: str) -> None:
    seen = [now.preview for now in session.draw(person, asked(steps=8)).watch(timeout=60)]
    assert any(preview is not None and preview.size == (session.abilities.size,) * 2 for preview in seen)
    assert seen[-1] is None


def test_before_and_after_are_of_the_same_seeds(session: Session, person: str, mug: Card) -> None:
    compared = ended(session.comparing.before_and_after(person, asked((mug, 1.0))))
    *found, sheet = compared.found
    assert "Compared 4 pictures." in status_line(compared)
    assert session.settings_in(sheet)["rows"] == ["the base", "My mug at 1"]
    assert len(found) == 2
    for (before, after), seed in zip(found, (3, 4), strict=True):
        assert before.settings["seed"] == after.settings["seed"] == seed
        assert before.settings["adapters"] == []
        assert after.settings["adapters"][0]["strength"] == 1.0
    base = drawn(session, person, asked())
    assert np.array_equal(np.asarray(found[0][0].image, dtype=int), pixels(base[0]))


def test_sheets_of_strengths_and_of_adapters(session: Session, person: str, mug: Card, style: Card) -> None:
    [sheet] = ended(session.comparing.sweep(person, asked((style, 1.0), (mug, 1.0)), (-1.0, 0.0, 1.0))).found
    assert session.settings_in(sheet)["rows"] == ["My mug at -1", "My mug at 0", "My mug at 1"]
    [sheet] = ended(session.comparing.side_by_side(person, asked(), [mug, style])).found
    assert session.settings_in(sheet)["rows"] == ["My mug", "A style"]
    with pytest.raises(DataError, match="a sheet of 96 pictures"):
        session.comparing.sweep(person, asked((mug, 1.0), seeds=tuple(range(16))))


def test_adapters_of_this_model_are_told_by_its_name(session: Session, mug: Card, style: Card) -> None:
    studio = session.model.studio()
    studio.abilities = dataclasses.replace(studio.abilities, model="the model at hand")
    assert [(card.id, card.base, problem) for card, problem in session.cards()] == [
        (card.id, "the model at hand", "") for card in (style, mug)
    ]
    other = dataclasses.replace(mug, base="another one", classes={"transformer": "FluxTransformer2DModel"})
    assert session.known(other).base == "another one"
    assert "FluxTransformer2DModel" in session.fits(other)


def test_adapters_that_are_off_do_not_act_and_order_is_the_forms(
    session: Session, person: str, mug: Card, style: Card
) -> None:
    slots = (True, style.id, 0.5, False, mug.id, 0.7, True, "", 1.0)
    assert session.stack(slots) == ((style, 0.5),)
    both = session.stack((True, style.id, 0.5, True, mug.id, 0.7, True, "", 1.0))
    assert both == ((style, 0.5), (mug, 0.7))
    told = session.settings_in(drawn(session, person, asked(*both))[0])["adapters"]
    assert [(adapter["name"], adapter["strength"]) for adapter in told] == [("A style", 0.5), ("My mug", 0.7)]
    told = session.settings_in(drawn(session, person, asked(*session.stack(slots)))[0])["adapters"]
    assert [adapter["name"] for adapter in told] == ["A style"]
    with pytest.raises(ConfigError, match="The strength of A style is no number"):
        session.stack((True, style.id, None))


def test_what_a_picture_has_and_the_form_has_not_is_said(session: Session, person: str, mug: Card, make: Any) -> None:
    cards = [mug, *(session.shelf.add(make(f"more{i}", seed=i + 3), f"more {i}") for i in range(MOST_ADAPTERS))]
    adapters = [{"name": card.name, "strength": 1.0, "sha256": load_adapter_file(card.file).metadata.sha256}
                for card in cards]  # fmt: skip
    told = {"prompt": PROMPT, "seed": 1, "adapters": adapters, "scheduler": "Another", "clip_skip": 1, "change": 0.5}
    found, notes = session.request_from(told)
    assert [card.id for card, _ in found.adapters] == [card.id for card in cards[:MOST_ADAPTERS]]
    assert found.change == 0.5
    assert notes == [
        "the adapter more 2 is left out: here is room for 3",
        "there is no Another for this model: its own scheduler is chosen",
        "the picture was drawn with a clip skip, which is not taken over",
        "it began with another picture, which is not in it: drop that under Begin with a picture",
    ]
    plain = {"prompt": PROMPT, "seed": 2**53, "guidance": 20.0}
    assert session.request_from(plain)[1] == []
    assert session.request_from(plain | {"seed": 2**53 + 1, "guidance": 50})[1] == [
        "its seed is larger than a browser counts exactly: it is rounded, and gives another picture",
        "its guidance is 50, and the form's slider ends at 20",
    ]
    sheet = ended(session.comparing.sweep(person, asked((mug, 1.0)), (0.0, 1.0))).found[-1]
    with pytest.raises(DataError, match="not tell of one picture"):
        session.request_from(session.settings_in(sheet))


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("size", "shape"), [((300, 200), (20, 14)), ((200, 300), (14, 20)), ((64, 64), (16, 16))])
def test_a_picture_to_begin_with_decides_the_shape(
    session: Session, person: str, size: tuple[int, int], shape: tuple[int, int]
) -> None:
    own = session.abilities
    assert (own.size, own.multiple) == (16, 2)
    assert size_like(size, own) == shape
    path = drawn(session, person, asked(image=Image.new("RGB", size), seeds=(1,), steps=4))[0]
    assert (told := session.settings_in(path))["change"] == 0.6
    assert (told["width"], told["height"]) == shape


def test_a_picture_to_begin_with_is_cut_and_not_squashed(session: Session) -> None:
    wide = Image.new("RGB", (192, 64), "red")
    wide.paste("blue", (64, 0, 128, 64))  # a blue square in the middle
    begun, size = session.model.studio()._begun(asked(image=wide, width=64, height=64))
    assert size == (64, 64)
    assert begun is not None
    assert begun.getcolors() == [(64 * 64, (0, 0, 255))]


def test_a_part_of_a_comparison_tells_the_time_that_the_whole_takes() -> None:
    job = Job("ada", "compare")
    job.started = time.monotonic() - 10
    preview = Image.new("RGB", (8, 8))
    Part(job, 0, 4, "first").tell(text="step 1 of 2", done=50, total=100, seconds_left=10.0, preview=preview)
    assert job.progress.text == "first: step 1 of 2"
    assert job.progress.seconds_left == pytest.approx(70, abs=1)  # an eighth took ten seconds
    part = Part(job, 1, 4, "second")
    part.tell(text="preparing")
    assert part.progress.preview is preview  # until there is another one


def test_history_is_told_in_words(session: Session, person: str, mug: Card) -> None:
    [path, _] = drawn(session, person, asked())
    assert session.caption(path) == f"seed 3: {PROMPT}"
    sheet = ended(session.comparing.sweep(person, asked((mug, 1.0)), (0.0, 1.0))).found[-1]
    assert session.caption(sheet) == f"a comparison: {PROMPT}"
    assert session.settings_in(sheet)["steps"] == 2


def test_a_model_in_fewer_bits_draws_and_is_trained_so(model_folder: Path, tmp_path: Path, person: str) -> None:
    session = Session(tmp_path / "own", str(model_folder), quantized={"quantization": "nf4"})
    assert len(drawn(session, person, Request(PROMPT, (3,), steps=2))) == 1
    pipe = session.model.studio().pipe
    assert any(quantized_weight(layer) for layer in pipe.unet.modules())
    assert not any(quantized_weight(layer) for layer in pipe.text_encoder.modules())
    wanted = session.training.defaults()
    assert (wanted["quantization"], wanted["text_encoder_quantization"]) == ("nf4", None)
