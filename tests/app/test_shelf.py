"""Adapters on the shelf: what is told of them, files of other tools, names, and what does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from app.session import Session
from app.shelf import Card, Shelf
from app.words import card_page, cards_page
from app.workspace import new_id
from oft_diffusion.errors import OFTError
from oft_diffusion.formats.components import modules_of
from tests.library.support import Maker
from tests.peers import peft_oft


def test_a_card_tells_what_the_file_says(mug: Card, style: Card, session: Session) -> None:
    assert (mug.name, mug.trigger, mug.class_word, mug.phrase) == ("My mug", "sks", "mug", "sks mug")
    assert mug.block_sizes == "8"
    assert mug.bytes == mug.file.stat().st_size
    assert 0 <= mug.error < 1e-5
    assert {card.id for card in session.shelf.cards()} == {mug.id, style.id}


def test_names_change_and_adapters_go(mug: Card, style: Card, session: Session) -> None:
    session.shelf.label(mug.id, "  <b>Tea</b>\n cup ", "sks", "mug")
    assert session.shelf.card(mug.id).name == "<b>Tea</b> cup"
    for name in ("", "   ", "x" * 61):
        with pytest.raises(OFTError):
            session.shelf.label(mug.id, name, "", "")
    with pytest.raises(OFTError, match="no adapter is chosen"):
        session.delete("")
    assert session.fits(mug) == ""
    session.delete(mug.id)
    assert mug.file not in session.shelf._known
    assert not any(mug.file in key for key in session.shelf._fits)
    assert [card.id for card in session.shelf.cards()] == [style.id]
    for gone in (mug.id, new_id(), "../x"):
        for act in (session.shelf.card, session.shelf.delete, lambda i: session.shelf.label(i, "x", "", "")):
            with pytest.raises(OFTError):
                act(gone)


def test_words_are_given_and_taken_back_and_the_file_stays_as_it_is(session: Session, style: Card) -> None:
    before = style.file.read_bytes()
    assert style.phrase == ""
    [doubt] = session.label(style.id, "Ink", "  zwx \n one", "style")
    assert "may not know a style" in doubt
    card = Shelf(session.workspace).card(style.id)  # as after a restart
    assert (card.name, card.trigger, card.class_word, card.phrase) == ("Ink", "zwx one", "style", "zwx one style")
    with pytest.raises(OFTError, match="101 letters"):
        session.label(style.id, "Ink", "x" * 101, "")
    with pytest.raises(OFTError, match="101 letters"):
        session.label(style.id, "Ink", "", "x" * 101)
    assert session.shelf.card(style.id) == card
    _, note = session.label(style.id, "Ink", "style one", "style")
    assert "the trigger holds the class word" in note
    session.label(style.id, "Ink", "", "")
    assert session.shelf.card(style.id).phrase == ""
    assert style.file.read_bytes() == before


def test_files_of_other_tools_are_taken_in(session: Session, tmp_path: Path) -> None:
    parts = modules_of(session.model.studio().pipe)
    layers: Any = {
        name: tuple(module.weight.shape) for name, module in parts["unet"].named_modules() if name.endswith("to_q")
    }
    folder = peft_oft.write_peft(tmp_path / "peft", layers, block_size=8, norm=0.3)
    card, told = session.shelf.take_in(folder / "adapter_model.safetensors", parts, "from PEFT", "unet")
    assert told[0] == f"{len(layers)} layers, a file of PEFT"
    assert session.fits(card) == ""


def test_an_adapter_for_another_base_of_the_same_classes_is_refused(session: Session, tmp_path: Path) -> None:
    wider = StableDiffusionPipeline.from_pretrained(session.model.source)
    wider.unet = UNet2DConditionModel.from_config({**wider.unet.config, "cross_attention_dim": 64})
    (tmp_path / "wider").mkdir()
    file = Maker(wider, tmp_path / "wider")("other", parts=("unet",))
    with pytest.raises(OFTError, match="64"):
        session.shelf.take_in(file, modules_of(session.model.studio().pipe), "for a wider one")
    assert session.shelf.cards() == []
    card = session.shelf.add(file, "for a wider one")  # as a workspace has it that was used with the other base
    assert "64" in session.fits(card)
    assert session.fitting() == []


def test_broken_files_are_passed_over_and_refused(session: Session, mug: Card, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(mug.file.read_bytes()[:-1])
    with pytest.raises(OFTError):
        session.shelf.add(broken, "broken")
    with pytest.raises(OFTError):
        session.shelf.take_in(broken, {}, "broken")
    assert [card.id for card in session.shelf.cards()] == [mug.id]
    mug.file.write_bytes(broken.read_bytes())
    assert session.shelf.cards() == []


def test_covers_have_a_text_and_an_address_whatever_they_are_called(mug: Card) -> None:
    cover = Path("/a #place/of 100%/cover.png")
    shown = cards_page([(dataclasses.replace(mug, name='"Tea" <cup>', cover=cover), "")])
    assert 'src="/gradio_api/file=/a%20%23place/of%20100%25/cover.png?0"' in shown
    assert 'alt="cover of &quot;Tea&quot; &lt;cup&gt;"' in shown


def test_an_orthogonality_error_is_explained(mug: Card) -> None:
    assert "rotations, but for rounding" in card_page(mug, "")
    assert "not quite rotations" in card_page(dataclasses.replace(mug, error=0.02), "")
    assert '<th scope="row">Trigger</th>' in card_page(mug, "")
