"""What is made of adapters: files for other tools, which hold the same, and one adapter of two."""

from __future__ import annotations

import copy
import threading
import zipfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from app.machine import Job
from app.session import Session
from app.shelf import Card
from app.words import cards_page
from app.workshop import FORMATS
from app.workspace import new_id
from oft_diffusion import OFTConfig, load_oft_weights
from oft_diffusion.errors import OFTError
from oft_diffusion.files import load_adapter_file
from oft_diffusion.load import load_pipeline
from tests.formats.test_carriers import assert_read_as_merged, merged, weights_of
from tests.helpers.app_page import occupied
from tests.helpers.single_files import write_single_file
from tests.library.support import Maker, distance, draw
from tests.peers.comfy_core import comfy_weight

ROTATIONS = ("oft", "peft", "onetrainer", "comfyui-oftv2", "sd-scripts")


def ended(job: Job) -> Any:
    *_, last = job.watch(timeout=120)
    assert last.state == "done", last.error
    return last


def handed_out(session: Session, person: str, card: Card, to: str, folder: Path) -> Path:
    """The file that somebody gets, unpacked where it is a ZIP."""
    found = ended(session.workshop.export(person, card.id, to)).found[-1]
    assert found.is_relative_to(session.workspace.temporary)
    if found.suffix != ".zip":
        return found
    with zipfile.ZipFile(found) as archive:
        archive.extractall(folder)
    return folder / found.stem


@pytest.fixture
def base(model_folder: Path) -> StableDiffusionPipeline:
    return load_pipeline(model_folder)


@pytest.fixture
def misfit(session: Session, tmp_path: Path) -> Card:
    """An adapter for a wider base."""
    wider = StableDiffusionPipeline.from_pretrained(session.model.source)
    wider.unet = UNet2DConditionModel.from_config({**wider.unet.config, "cross_attention_dim": 64})
    (tmp_path / "wider").mkdir()
    return session.shelf.add(Maker(wider, tmp_path / "wider")("other", parts=("unet",)), "for a wider one")


@pytest.mark.thinned(2)
@pytest.mark.parametrize("to", ROTATIONS)
def test_files_of_rotations_hold_the_same(
    session: Session, person: str, make: Maker, base: Any, tmp_path: Path, to: str
) -> None:
    series = OFTConfig(8, parametrisation="cayley_neumann", neumann_order=4)  # which all of them have
    card = session.shelf.add(make("series", seed=1, config=series), "A series")
    wanted, plain = load_pipeline(session.model.source), draw(base)
    load_oft_weights(wanted, card.file)
    load_oft_weights(base, handed_out(session, person, card, to, tmp_path))
    assert distance(draw(wanted), plain) > 1e-2
    assert distance(draw(base), draw(wanted)) < 1e-5


@pytest.mark.parametrize("to", ["diff", "glora"])
def test_changed_weights_are_read_as_other_tools_read_them(
    session: Session, person: str, mug: Card, base: Any, tmp_path: Path, to: str
) -> None:
    before, plain = weights_of(base), load_pipeline(session.model.source)
    load_oft_weights(base, mug.file)
    path = handed_out(session, person, mug, to, tmp_path)
    assert_read_as_merged(plain, path, [comfy_weight], before, merged(base), tolerance=1e-3)  # of float16


def test_diffusers_loads_the_lora_and_the_merged_model(
    session: Session, person: str, mug: Card, base: Any, tmp_path: Path
) -> None:
    wanted = load_pipeline(session.model.source)
    load_oft_weights(wanted, mug.file)
    whole = load_pipeline(handed_out(session, person, mug, "folder", tmp_path))
    assert distance(draw(whole), draw(wanted)) < 1e-5
    base.load_lora_weights(handed_out(session, person, mug, "lora", tmp_path))
    assert distance(draw(base), draw(wanted)) < 1e-2  # float16


def test_peft_itself_loads_what_is_for_it(session: Session, person: str, mug: Card, base: Any, tmp_path: Path) -> None:
    folder = handed_out(session, person, mug, "peft", tmp_path)
    wanted = copy.deepcopy(base)
    load_oft_weights(wanted, mug.file)
    theirs = peft.PeftModel.from_pretrained(base.unet, folder / "unet")
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, t, text)[0], wanted.unet(x, t, text)[0], rtol=0, atol=1e-5)


def test_a_single_file_is_handed_out_as_one_with_its_configuration(
    model_folder: Path, base: Any, make: Maker, person: str, tmp_path: Path
) -> None:
    file = write_single_file(base, tmp_path / "base.safetensors")
    session = Session(tmp_path / "single", str(file), config_dir=str(model_folder))
    assert set(session.workshop.formats()) == set(FORMATS)
    card = session.shelf.add(make("mug", seed=1), "My mug")
    load_oft_weights(base, card.file)
    whole = load_pipeline(
        handed_out(session, person, card, "checkpoint", tmp_path), config_dir=str(model_folder)
    )  # fmt: skip
    assert distance(draw(whole), draw(base)) < 1e-5
    assert handed_out(session, person, card, "onetrainer", tmp_path).is_file()
    session.machine.stop()


@pytest.mark.parametrize(("to", "at"), [("folder", "writing the weights"), ("lora", "writing unet.")])
def test_what_cannot_be_handed_out_leaves_nothing(
    session: Session, person: str, mug: Card, busy: threading.Event, to: str, at: str
) -> None:
    for card, wrong in ((mug.id, "os.system"), (mug.id, "checkpoint"), (new_id(), "oft")):
        with pytest.raises(OFTError):
            session.workshop.export(person, card, wrong)
    gone, cancelled = (session.workshop.export(person, mug.id, to) for _ in range(2))
    tell, begun = cancelled.tell, list[str]()

    def stop(*found: Any, **changes: Any) -> None:
        tell(*found, **changes)
        if changes.get("text", "").startswith(at):
            begun.append(changes["text"])
            session.machine.cancel(person, cancelled.id)

    cancelled.tell = stop  # type: ignore[method-assign]
    session.machine.cancel(person, gone.id)
    busy.set()
    *_, last = cancelled.watch(timeout=60)
    assert (last.state, last.found, len(begun)) == ("cancelled", (), 1)
    assert list(session.workspace.temporary.iterdir()) == []
    with occupied(session.machine):
        waiting = session.workshop.export(person, mug.id, "oft")
        session.delete(mug.id)
    *_, last = waiting.watch(timeout=60)
    assert "This adapter is gone" in last.error


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("share", "same"), [(0.0, 0), (0.5, None), (1.0, 1)])
def test_between_two_lie_rotations_and_at_the_ends_the_two(
    session: Session, person: str, mug: Card, make: Maker, share: float, same: int | None
) -> None:
    dog = session.shelf.add(make("dog", seed=5, trigger="zwx", class_word="mug"), "My dog")
    card = ended(session.workshop.combine(person, "interpolate", mug.id, dog.id, share)).found[-1]
    assert (card.name, card.trigger, card.class_word) == ("My mug and My dog", "sks zwx", "mug")
    assert card.training["combined"] == "interpolate"
    assert [other["name"] for other in card.training["of"]] == ["My mug", "My dog"]
    assert card.cover is not None
    assert card.error < 1e-5
    made = load_adapter_file(card.file).components["unet"]
    for index, other in enumerate((mug, dog)):
        equal = all(
            torch.allclose(made[key], tensor, atol=1e-5)
            for key, tensor in load_adapter_file(other.file).components["unet"].items()
        )
        assert equal is (index == same)


def test_words_are_those_asked_for_and_notes_are_kept(session: Session, person: str, mug: Card, style: Card) -> None:
    now = ended(session.workshop.combine(person, "compose", mug.id, style.id))
    assert (now.found[-1].trigger, now.found[-1].class_word) == ("sks", "mug")
    assert now.text == "the adapter My mug and A style is on the shelf"
    now = ended(session.workshop.combine(person, "compose", mug.id, style.id, trigger=" new  word ", class_word="cup"))
    assert now.found[-1].phrase == "new word cup"
    for how, second, share in (("average", style.id, 0.5), ("compose", new_id(), 0.5), ("interpolate", style.id, 2.0)):
        with pytest.raises(OFTError):
            session.workshop.combine(person, how, mug.id, second, share)


def test_words_that_were_given_here_are_handed_out(
    session: Session, person: str, mug: Card, style: Card, tmp_path: Path
) -> None:
    session.label(style.id, "Ink", "zwx", "style")
    session.label(mug.id, "Mug", "", "")
    told = []
    for card in (style, mug):
        path = handed_out(session, person, card, "oft", tmp_path)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        told.append((load_adapter_file(path).metadata.trigger, load_adapter_file(path).metadata.class_word))
    assert told == [("zwx", "style"), (None, None)]
    made = ended(session.workshop.combine(person, "compose", mug.id, style.id)).found[-1]
    assert (made.trigger, made.class_word) == ("zwx", "style")


def test_a_cover_is_drawn_with_the_words_and_again(session: Session, person: str, mug: Card, misfit: Card) -> None:
    now = ended(session.workshop.cover(person, mug.id))
    first = session.shelf.card(mug.id)
    assert (now.text, len(now.found)) == ("the adapter My mug has a new cover", 1)
    assert first.cover is not None
    before = first.cover.read_bytes()
    session.label(mug.id, "My mug", "zwx", "cat")
    ended(session.workshop.cover(person, mug.id))
    second = session.shelf.card(mug.id)
    assert first.cover.read_bytes() != before
    assert cards_page([(first, "")]) != cards_page([(second, "")])  # or the browser would show the old one
    for other in (misfit.id, new_id(), ""):
        with pytest.raises(OFTError):
            session.workshop.cover(person, other)


def test_a_cover_that_waits_is_cancelled_and_of_what_is_gone_there_is_none(
    session: Session, person: str, mug: Card, style: Card, busy: threading.Event
) -> None:
    cancelled, gone = session.workshop.cover(person, style.id), session.workshop.cover(person, mug.id)
    assert session.machine.cancel(person, cancelled.id)
    session.delete(mug.id)
    busy.set()
    *_, last = gone.watch(timeout=60)
    assert "This adapter is gone" in last.error
    assert cancelled.progress.state == "cancelled"
    assert [card.cover for card in session.shelf.cards()] == [None]
    assert not mug.file.parent.exists()
