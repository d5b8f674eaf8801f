"""Training in a real browser, on a tiny Stable Diffusion; on the pocket base in test_five_minutes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.runs import Earlier
from app.session import Session
from oft_diffusion.pocket import subjects_path
from tests.app.browser.conftest import served_session
from tests.helpers.app_page import choose, go_to, number, occupied, opened_part, reload, text, until

pytestmark = pytest.mark.browser
PICTURES = sorted(subjects_path("bow_cat").iterdir())


def filled(page: Any, name: str, steps: int) -> None:
    """Five pictures and the words that training wants."""
    go_to(page, "Train")
    page.locator("#photos-drop input[type=file]").set_input_files(PICTURES)
    page.wait_for_function("document.querySelectorAll('#photos img').length === 5")
    text(page, "run-name").fill(name)
    text(page, "run-trigger").fill("zwx")
    text(page, "run-class").fill("cat")
    opened_part(page, "Settings")
    choose(page, "run-preset", "Stable Diffusion, for 8 GB of memory")
    page.wait_for_timeout(500)
    number(page, "run-steps", steps)
    text(page, "run-prompts").fill("a {trigger} {class_word}")


def test_pictures_become_an_adapter_that_draws(opened: Any, small_server: Any) -> None:
    session, url = small_server
    page = opened(url)
    number(page, "strength-0", 0)  # as of an earlier trial
    page.locator("#acts-0 input").uncheck()
    filled(page, "Cat one", 6)
    caption = page.get_by_label("Caption of picture 2")
    assert caption.input_value() == PICTURES[3].read_text().strip()
    caption.fill("a white cat, as <b>I</b> say")
    until(lambda: any("<b>I</b>" in p.read_text() for p in session.workspace.people.glob("*/uploads/*.txt")))
    page.locator("#train").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#train-status .done", timeout=240_000)
    page.wait_for_function("document.querySelector('#train').innerText === 'Train'")
    assert page.evaluate("document.activeElement.id") == "train"
    assert "Cat one is on the shelf" in page.locator("#train-status").inner_text()
    assert str(page.locator("#curve .dots").get_attribute("d")).count("M") >= 2
    page.wait_for_selector("#train-grids img")
    captions = [p.read_text() for p in sorted(session.workspace.runs.glob("*/photos/*.txt"))[-5:]]
    assert captions[1] == "a white cat, as <b>I</b> say"
    opened_part(page, "Take it to another machine")
    choose(page, "along", "the run Cat one, 6 steps")
    page.get_by_role("button", name="Pack settings and pictures").click()
    page.wait_for_selector("#packed a")
    go_to(page, "Generate")
    assert page.locator("#adapter-0 input").input_value() == "Cat one"
    assert page.locator("#strength-0 input").first.input_value() == "1"
    assert page.locator("#acts-0 input").is_checked()
    text(page, "prompt").fill("a zwx cat")
    opened_part(page, "Settings")
    number(page, "count", 1)
    number(page, "steps", 1)
    page.locator("#generate").click()
    page.wait_for_selector("#status .done")
    newest = max(session.workspace.people.glob("*/pictures/*.png"), key=lambda path: path.name)  # anybody's
    assert session.settings_in(newest)["adapters"][0]["name"] == "Cat one"
    go_to(page, "Train")
    page.locator("#train-compare").click()
    page.locator("#compare").wait_for()
    assert page.get_by_role("tab", name="Compare").get_attribute("aria-selected") == "true"
    page.wait_for_function("document.querySelector('#compare-run input')?.value === 'Cat one, 6 checkpoints'")
    assert text(page, "compare-prompt").input_value() == "a zwx cat"
    number(page, "compare-count", 1)
    opened_part(page, "Settings")
    number(page, "compare-steps", 1)
    page.locator("#compare").click()
    page.wait_for_selector("#compare-status .done")
    page.wait_for_selector("#sheet img")
    assert "Compared 12 pictures." in page.locator("#compare-status").inner_text()
    sheet = max(session.workspace.people.glob("*/pictures/*.png"), key=lambda path: path.name)
    rows = [f"Cat one, step {step}, at {strength}" for step in range(1, 7) for strength in (0.75, 1)]
    assert session.settings_in(sheet)["rows"] == rows


@pytest.mark.slow
def test_a_run_is_found_after_a_reload_paused_gone_on_with_and_kept(opened: Any, small_server: Any) -> None:
    session, url = small_server
    page = opened(url)
    filled(page, "Cat two", 3000)
    page.locator("#train").click()
    page.wait_for_selector("#curve .dots", state="attached")
    reload(page, working=True)
    go_to(page, "Train")
    page.wait_for_selector("#train-status .working")
    page.wait_for_selector("#curve .dots", state="attached")
    page.wait_for_function("document.querySelectorAll('#photos img').length === 5")
    assert page.locator("#train").inner_text() == "Training …"
    page.locator("#train").click()  # one run at a time
    page.wait_for_function("document.querySelector('#train-note').innerText.includes('training already')")
    shown = page.locator("#train-grids img").count()
    page.locator("#train-sample:not([disabled])").click()
    page.wait_for_function("document.querySelector('#train-note').innerText.includes('Asked: pictures are drawn')")
    page.wait_for_function("document.querySelector('#train-note').innerText.includes('Drew pictures after step')")
    page.wait_for_function(f"document.querySelectorAll('#train-grids img').length > {shown}")
    page.locator("#train-pause:not([disabled])").click()
    page.wait_for_selector("#train-status .done", timeout=240_000)
    assert "Paused at step" in page.locator("#train-status").inner_text()
    [run] = [run for run in left_undone(session) if run.name == "Cat two"]
    go_on(page, run)
    page.wait_for_function(  # while it prepares, Stop ends it without a step more
        f"+(document.querySelector('#train-status').innerText.match(/tep (\\d+) of/) || [0, 0])[1] > {run.step}"
    )
    page.locator("#train-stop:not([disabled])").click()
    page.wait_for_function("document.querySelector('#train-status').innerText.includes('Cat two is on the shelf')")
    assert run.id not in {left.id for left in left_undone(session)}


def left_undone(session: Session) -> list[Earlier]:
    """Everybody's: only the browser knows who it is."""
    return [run for run in session.training.runs.earlier() if not run.done]


def go_on(page: Any, run: Earlier) -> None:
    """Go on with a run that was paused."""
    opened_part(page, "Go on with an earlier run")
    choose(page, "earlier", f"{run.name}: step {run.step} of {run.steps}")
    page.get_by_role("button", name="Go on", exact=True).click()


@pytest.mark.slow
def test_a_run_outlives_its_server(opened: Any, model_folder: Path, tmp_path: Path) -> None:
    session = Session(tmp_path / "work", str(model_folder))
    with served_session(session) as url:
        page = opened(url)
        filled(page, "Cat three", 3000)
        page.locator("#train").click()
        page.wait_for_selector("#curve .dots", state="attached")
        page.leaving = True  # for the server does
    again = Session(tmp_path / "work", str(model_folder))
    [run] = left_undone(again)
    assert 0 < run.step < 3000
    with served_session(again, int(url.rstrip("/").rpartition(":")[2])):
        reload(page)
        go_to(page, "Train")
        page.wait_for_function("document.querySelectorAll('#photos img').length === 5")
        go_on(page, run)
        page.wait_for_selector("#train-status .working")
        page.wait_for_selector("#curve .dots", state="attached")
        page.locator("#train-stop:not([disabled])").click()
        page.wait_for_function(
            "document.querySelector('#train-status').innerText.includes('Cat three is on the shelf')"
        )
        page.leaving = True
    [card] = again.shelf.cards()
    assert card.name == "Cat three"
    assert int(card.training["steps"]) == 3000
    assert left_undone(again) == []


def test_what_training_takes_is_told_before_it_starts(opened: Any, small_server: Any) -> None:
    session, url = small_server
    runs = sorted(session.workspace.runs.iterdir())
    page = opened(url)
    filled(page, "", 6)
    page.locator("#estimate").click()
    page.wait_for_selector("#estimated .done")
    told = page.locator("#estimated").inner_text()
    for words in ("About ", "6 steps", "GB of memory", "The adapter has"):
        assert words in told
    assert sorted(session.workspace.runs.iterdir()) == runs
    text(page, "run-class").fill("")
    page.locator("#estimate:has-text('How long')").click()
    page.wait_for_selector("#estimated .problem")
    assert "A class word is missing" in page.locator("#estimated").inner_text()


@pytest.mark.slow
def test_an_estimate_that_waits_is_found_after_a_reload_and_cancelled(opened: Any, small_server: Any) -> None:
    session, url = small_server
    page = opened(url)
    filled(page, "", 6)
    with occupied(session.machine):
        page.locator("#estimate").click()
        page.wait_for_selector("#estimated .waiting")
        assert "one other job" in page.locator("#estimated").inner_text()
        reload(page, working=True)
        go_to(page, "Train")
        page.wait_for_selector("#estimated .waiting")
        assert page.locator("#estimate").inner_text() == "Measuring …"
        page.locator("#estimate-cancel:not([disabled])").click()
        page.wait_for_selector("#estimated .cancelled")
    page.wait_for_selector("#estimate:has-text('How long')")


def test_what_is_missing_or_wrong_is_said_in_words(opened: Any, small_server: Any, tmp_path: Path) -> None:
    session, url = small_server
    page = opened(url)
    go_to(page, "Train")
    page.locator("#train").click()
    page.wait_for_selector("#train-status .problem")
    assert "name is missing" in page.locator("#train-status").inner_text()
    opened_part(page, "Take it to another machine")
    page.get_by_role("button", name="Pack settings and pictures").click()
    page.wait_for_function("document.querySelector('#pack-note').innerText.includes('no pictures to pack')")
    page.get_by_role("button", name="Settings alone").click()
    page.wait_for_selector("#packed a")
    fake = tmp_path / "fake.png"
    fake.write_bytes(b"no picture")
    small = tmp_path / "small.png"
    Image.new("RGB", (8, 8), "red").save(small)
    page.locator("#photos-drop input[type=file]").set_input_files([fake, small])
    page.wait_for_function("document.querySelector('#photos-note').innerText.includes('no PNG, JPEG or WebP picture')")
    assert "smaller than" in page.locator("#photos-note").inner_text()
    hostile = 'a cat <img src=x onerror="window.hurt=1"> <script>window.hurt=1</script>'
    page.get_by_label("Caption of picture 1").fill(hostile)
    until(lambda: any(hostile in path.read_text() for path in session.workspace.people.glob("*/uploads/*.txt")))
    page.locator("#photos-drop input[type=file]").set_input_files(PICTURES[0])  # all are laid out anew
    page.get_by_label("Caption of picture 2").wait_for()
    assert page.get_by_label("Caption of picture 1").input_value() == hostile
    assert page.locator("#photos img").count() == 2
    assert page.locator("#photos img").first.get_attribute("alt") == hostile
    assert page.evaluate("window.hurt") is None
    page.get_by_role("button", name="Remove picture 2").click()
    page.get_by_label("Caption of picture 2").wait_for(state="detached")
    page.get_by_role("button", name="Remove picture 1").click()
    page.wait_for_function("document.querySelectorAll('#photos img').length === 0")
