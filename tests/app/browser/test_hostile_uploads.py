"""Hostile files, dropped wherever the page takes any: each is answered in words, and nothing is left of it."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.drawing import size_like
from oft_diffusion.images import read_settings
from tests.helpers.app_page import IDLE, draw, go_to, opened_part, quick, reload, text, until
from tests.helpers.hostile_files import HURT, hostile_adapters, hostile_pictures, hostile_settings

pytestmark = pytest.mark.browser
CLEAR = "#begin [aria-label='Remove Image']"
Kept = Callable[[], set[str]]


@pytest.fixture
def kept(server: Any) -> Kept:
    """What lies in the workspace and beside it, without gradio's copies of uploads and what was drawn."""
    session, _ = server
    root = session.workspace.root

    def files() -> set[str]:
        found = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        inside = {name for name in found if not re.search("^temporary/|/pictures/", name)}
        return inside | {str(path) for path in root.parent.iterdir()}

    return files


@pytest.fixture(autouse=True)
def unharmed(server: Any) -> Iterator[None]:
    """Memory does not explode, and nothing was run."""
    before = _most_megabytes()
    yield
    assert _most_megabytes() - before < 700
    assert not Path("hurt").exists()


def _most_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def test_training_pictures(opened: Any, kept: Kept, tmp_path: Path) -> None:
    page, before = opened(), kept()
    good = tmp_path / "good.png"
    Image.effect_noise((128, 128), 60).save(good)
    files = hostile_pictures(tmp_path)
    go_to(page, "Train")
    page.locator("#photos-drop input[type=file]").set_input_files([*files, good])
    page.wait_for_function("document.querySelectorAll('#photos img').length === 1")
    told = page.locator("#photos-note li").all_inner_texts()
    assert sum("was left out" in note for note in told) == len(files)
    assert page.locator("#photos-note img").count() == 0  # the name that is markup is text
    assert page.evaluate("window.hurt") is None
    [photo] = kept() - before
    assert re.fullmatch(r".*/uploads/[0-9a-f]{16}\.png", photo)
    page.get_by_role("button", name="Remove picture 1").click()
    page.wait_for_function("document.querySelectorAll('#photos img').length === 0")
    assert kept() == before


@pytest.mark.slow
def test_two_hundred_training_pictures(opened: Any, server: Any, tmp_path: Path) -> None:
    session, _ = server
    page = opened()
    files = [tmp_path / f"{i}.png" for i in range(200)]
    for i, path in enumerate(files):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(path)
    go_to(page, "Train")
    page.locator("#photos-drop input[type=file]").set_input_files(files)
    page.wait_for_selector("#photos-note li")
    assert "160 pictures" not in page.locator("#photos-note").inner_text()
    assert "and 159 more were left out" in page.locator("#photos-note").inner_text()
    assert len(list(session.workspace.people.glob("*/uploads/*.png"))) == 40
    page.locator("#photos-clear").click()
    until(lambda: not list(session.workspace.people.glob("*/uploads/*.png")))


@pytest.mark.slow
def test_a_picture_to_begin_with(opened: Any, server: Any, kept: Kept, pictures: Any, tmp_path: Path) -> None:
    page, before, drawn = opened(), kept(), len(pictures())
    quick(page, steps=2)
    opened_part(page, "Begin with a picture")
    text(page, "prompt").fill("a mug")
    for path in hostile_pictures(tmp_path):
        page.locator("#begin input[type=file]").set_input_files(path)
        page.wait_for_selector(CLEAR)
        page.locator(IDLE).click()
        name = re.escape(path.stem) if path.stem.isalpha() and len(path.stem) < 99 else ""
        told = page.locator("#status .problem").filter(has_text=re.compile(f"^{name}.*cannot be used"))
        told.wait_for()
        assert re.search("picture|pixels|decoded", told.inner_text())
        page.locator(CLEAR).click()
        page.wait_for_selector(CLEAR, state="detached")
    assert len(pictures()) == drawn
    good = tmp_path / "good.jpg"
    Image.effect_noise((300, 200), 60).convert("RGB").save(good)
    page.locator("#begin input[type=file]").set_input_files(good)
    page.wait_for_selector(CLEAR)
    page.locator("#begin-note .note").filter(has_text="Width and height are now").wait_for()
    draw(page, "a mug")
    assert len(pictures()) == drawn + 1
    settings = read_settings(pictures()[-1])
    assert (settings["width"], settings["height"]) == size_like((300, 200), server[0].abilities)
    assert kept() == before


@pytest.mark.slow
def test_settings_out_of_a_picture(opened: Any, kept: Kept, tmp_path: Path) -> None:
    page, before = opened(), kept()
    text(page, "prompt").fill("as it was")
    for path in [*hostile_settings(tmp_path), *hostile_pictures(tmp_path)]:
        page.locator("#recall input[type=file]").set_input_files(path)
        name = f"^{path.stem}.png: " if path.stem.isalpha() and len(path.stem) < 99 else ""
        told = page.locator("#recall-note .note").filter(has_text=re.compile(f"{name}.{{9,}}"))
        if path.suffix != ".png":  # gradio says so
            told = page.locator(".toast-body").first
        told.wait_for()
        assert "/temporary/" not in told.inner_text()
        if path.suffix != ".png":
            page.locator(".toast-close").first.click()
            told.wait_for(state="detached")
        page.wait_for_selector("#recall input[type=file]", state="attached")
    assert text(page, "prompt").input_value() == "as it was"
    assert page.evaluate("window.hurt") is None
    assert kept() == before


def test_adapters(opened: Any, server: Any, kept: Kept, pictures: Any, tmp_path: Path) -> None:
    session, _ = server
    page, before, drawn = opened(), kept(), len(pictures())
    [card] = session.shelf.cards()
    go_to(page, "Adapters")
    opened_part(page, "Import a file, of any tool")
    for path in hostile_adapters(tmp_path, card.file.read_bytes()):
        page.locator("#take-in input[type=file]").set_input_files(path)
        page.wait_for_function(f"document.querySelector('#shelf-note').innerText.includes({path.name!r})")
        page.wait_for_selector("#take-in input[type=file]", state="attached")
    assert kept() == before
    hostile = tmp_path / f"{HURT}.safetensors"
    hostile.write_bytes(card.file.read_bytes())
    page.locator("#take-in input[type=file]").set_input_files(hostile)
    page.wait_for_function("document.querySelectorAll('#cards .card').length === 2")
    assert page.evaluate("window.hurt") is None
    for other in session.shelf.cards():
        if other.id != card.id:
            session.delete(other.id)
    reload(page)
    quick(page, steps=1)
    draw(page, "a mug")
    assert len(pictures()) == drawn + 1
    assert kept() == before
