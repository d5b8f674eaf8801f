"""The shelf in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.app_page import choose, draw, go_to, opened_part, quick, reload, text, until, wait_until_settled
from tests.library.support import Maker
from tests.peers.peft_oft import write_peft

pytestmark = pytest.mark.browser


def test_adapters_are_shown_renamed_handed_out_taken_in_and_deleted(opened: Any, server: Any, tmp_path: Path) -> None:
    session, _ = server
    page = opened()
    go_to(page, "Adapters")
    page.locator("#cards .card", has_text="My mug").click()
    page.wait_for_selector("#about table")
    assert "sks mug" in page.locator("#about").inner_text()
    opened_part(page, "Export")
    page.locator("#export").click()
    with page.expect_download() as download:
        page.locator("#exported a").first.click()
    path = tmp_path / "back.safetensors"
    download.value.save_as(path)
    opened_part(page, "Import a file, of any tool")
    page.locator("#take-in input[type=file]").set_input_files(path)
    page.locator("#cards .card", has_text="back").click()
    page.wait_for_function("document.querySelector('#shelf-adapter input').value === 'back'")
    opened_part(page, "Name, trigger and cover")
    for field, value in (("name", "back"), ("own-trigger", "sks"), ("own-class", "mug")):  # which comes in late
        page.wait_for_function(f"document.querySelector('#{field} input, #{field} textarea')?.value === '{value}'")
    wait_until_settled(page)  # the file that was taken in and the card that was clicked each have the fields filled
    text(page, "name").fill("<b onclick='x'>bold</b>")
    text(page, "own-trigger").fill("zwx")
    page.locator("#label").click()
    page.wait_for_function("document.querySelector('#cards').innerText.includes('<b onclick=')")
    page.wait_for_function("document.querySelector('#about').innerText.includes('zwx mug')")
    page.locator("#cover").click()
    page.wait_for_function("document.querySelector('#shelf-status').innerText.includes('has a new cover')")
    page.wait_for_function("document.querySelector('#cards img')?.naturalWidth > 0")
    opened_part(page, "Delete")
    page.get_by_label("Yes, delete it for good").check()
    page.wait_for_selector("#delete:not([disabled])")
    page.locator("#cards .card", has_text="My mug").click()  # which nobody was sure of
    page.wait_for_selector("#delete[disabled]")
    page.locator("#cards .card", has_text="<b onclick=").click()
    page.wait_for_function("document.querySelector('#shelf-adapter input').value.startsWith('<b')")
    assert not page.get_by_label("Yes, delete it for good").is_checked()
    page.get_by_label("Yes, delete it for good").check()
    page.locator("#delete:not([disabled])").click()
    page.wait_for_function("!document.querySelector('#cards').innerText.includes('<b onclick=')")
    assert [card.name for card in session.shelf.cards()] == ["My mug"]


@pytest.mark.slow
def test_what_is_deleted_is_chosen_nowhere_any_more(opened: Any, server: Any, pictures: Any) -> None:
    session, _ = server
    [mug] = session.shelf.cards()
    here, elsewhere = (session.shelf.add(mug.file, name) for name in ("Gone from here", "Gone elsewhere"))
    page = opened()
    quick(page, 1)
    choose(page, "adapter-0", here.name)
    opened_part(page, "More adapters, one after another")
    choose(page, "adapter-1", elsewhere.name)
    go_to(page, "Compare")
    choose(page, "compare-adapter", here.name)
    go_to(page, "Adapters")
    page.locator("#cards .card", has_text=here.name).click()
    opened_part(page, "Delete")
    page.get_by_label("Yes, delete it for good").check()
    page.locator("#delete:not([disabled])").click()
    for menu, left in (("shelf-adapter", ""), ("compare-adapter", ""), ("adapter-0", "none")):
        page.wait_for_function(f"document.querySelector('#{menu} input').value === '{left}'")
    assert page.locator("#adapter-1 input").input_value() == elsewhere.name
    session.delete(elsewhere.id)  # of which this page is not told
    go_to(page, "Generate")
    text(page, "prompt").fill("a mug")
    page.locator("#generate").click()
    page.wait_for_selector("#status .problem")
    assert "This adapter is gone." in page.locator("#status").inner_text()
    choose(page, "adapter-1", "none")
    draw(page, "a mug")
    assert session.settings_in(pictures()[-1])["adapters"] == []
    [*_, drawn] = [job for job in session.machine._jobs.values() if job.kind == "draw"]
    trained = session.machine.start(drawn.owner, "train", lambda job: job.tell(here, text="the adapter is here"))
    until(lambda: trained.progress.ended)
    reload(page)
    assert page.locator("#adapter-0 input").input_value() == "none"


def test_what_is_no_adapter_is_refused_with_a_sentence(opened: Any, tmp_path: Path) -> None:
    page = opened()
    go_to(page, "Adapters")
    opened_part(page, "Import a file, of any tool")
    pickled = tmp_path / "evil.safetensors"
    pickled.write_bytes(b"\x80\x04\x95cos\nsystem\n(S'touch hurt'\ntR.")
    page.locator("#take-in input[type=file]").set_input_files(pickled)
    page.wait_for_function("document.querySelector('#shelf-note').innerText.includes('evil.safetensors')")
    assert page.locator("#cards .card").count() == 1


def test_a_file_of_another_tool_is_taken_in_and_one_for_another_base_is_not(
    opened: Any, server: Any, make: Maker, tmp_path: Path
) -> None:
    session, _ = server
    unet = session.model.parts()["unet"]
    layers: Any = {name: tuple(m.weight.shape) for name, m in unet.named_modules() if name.endswith("attn2.to_q")}
    file = write_peft(tmp_path / "peft", layers, block_size=8, norm=0.3) / "adapter_model.safetensors"
    page = opened()
    go_to(page, "Adapters")
    opened_part(page, "Import a file, of any tool")
    choose(page, "take-in-component", "unet")
    page.locator("#take-in input[type=file]").set_input_files(file)
    page.locator("#cards .card", has_text="adapter_model").wait_for()
    assert f"{len(layers)} layers, a file of PEFT" in page.locator("#shelf-note").inner_text()
    [taken] = [card for card in session.fitting() if card.name == "adapter_model"]
    misfit = make("misfit", seed=5)
    page.locator("#take-in input[type=file]").set_input_files(misfit)
    page.wait_for_function("document.querySelector('#shelf-note').innerText.includes('does not fit the model')")
    assert page.locator("#cards .card").count() == 2
    session.delete(taken.id)


@pytest.mark.slow
def test_two_become_one(opened: Any, server: Any) -> None:
    session, _ = server
    page = opened()
    go_to(page, "Adapters")
    page.locator("#cards .card").first.click()
    opened_part(page, "Merge two")
    choose(page, "second", "My mug")
    page.locator("#compose").click()
    page.wait_for_function("document.querySelectorAll('#cards .card').length === 2")
    page.wait_for_function("[...document.querySelectorAll('#cards img')].every(cover => cover.naturalWidth > 0)")
    for card in session.shelf.cards():
        if card.name != "My mug":
            session.delete(card.id)


@pytest.mark.slow  # as test_kept.py, through the page
def test_what_is_kept_is_told_and_deleted(opened: Any, pictures: Any) -> None:
    before = set(pictures())
    page = opened()
    quick(page, 1)
    draw(page, "a mug")
    [drawn] = set(pictures()) - before
    opened_part(page, "Earlier pictures")
    page.wait_for_selector("#history img")
    go_to(page, "Adapters")
    opened_part(page, "What you keep here")
    page.wait_for_function("document.querySelector('#kept').innerText.includes('1 picture,')")
    choose(page, "kept-what", f"all pictures, {drawn.stat().st_size / 1e3:.0f} KB")
    page.get_by_label("Yes, delete this for good").check()
    page.locator("#kept-delete:not([disabled])").click()
    page.wait_for_function("document.querySelector('#kept').innerText.includes('Deleted 1 picture')")
    assert set(pictures()) == before
    page.wait_for_selector("#history img", state="detached")
    reload(page)
