"""What the app promises: five pictures in, and the subject on a beach, for whoever has never heard of OFT."""

from __future__ import annotations

from typing import Any

import pytest

from oft_diffusion.pocket import SUBJECTS, subjects_path
from tests.helpers.app_page import go_to, text

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_five_pictures_to_the_subject_on_a_beach(opened: Any, server: Any) -> None:
    session, _ = server
    page, subject = opened(), SUBJECTS["captain_mug"]
    go_to(page, "Train")
    page.locator("#photos-drop input[type=file]").set_input_files(sorted(subjects_path(subject.name).iterdir()))
    page.wait_for_function("document.querySelectorAll('#photos img').length === 5")
    text(page, "run-name").fill("Captain")
    text(page, "run-class").fill("mug")
    page.locator("#train").click()
    page.wait_for_selector("#train-status .done", timeout=1_200_000)
    go_to(page, "Generate")
    page.locator("#triggers").get_by_text("mug").click()
