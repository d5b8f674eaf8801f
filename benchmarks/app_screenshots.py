"""Pictures of every tab of the app with something in it: light, dark and on a phone, in docs/images/app/.

Beside them how a training looks while it runs, and each checkpoint of a run compared.

python -m benchmarks.app_screenshots
python -m benchmarks.app_screenshots --steps 20 --adapter "Tired robot=runs/robot/oft_adapter.safetensors"

Everything is done through the page, in a workspace that is thrown away: five pictures of an example subject are trained
on, four are drawn, an adapter is compared with the base. Adapters that are given fill the shelf, and the first of them
is drawn with, so that few steps will do; without any, the trained one is, after as many steps as the preset has.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from app.compare_tab import BY_STEP
from app.shelf import Card, Shelf
from app.workspace import Workspace
from tests.helpers.app_command import APP, free_port, started
from tests.helpers.app_page import TABS, choose, draw, go_to, number, opened_part, text
from tests.helpers.browser import WIDTHS, open_browser

OUT = Path(__file__).parent.parent / "docs" / "images" / "app"
EXAMPLE = "captain mug"
MANY = 200  # pixels of one colour
# What each is called, the window's width, and whether the page is dark.
LOOKS = (("light", WIDTHS["wide"], False), ("dark", WIDTHS["wide"], True), ("narrow", WIDTHS["narrow"], False))


def fill_shelf(page: Any, adapters: Sequence[str]) -> None:
    """Take in adapters given as NAME=FILE, each with that name and a cover."""
    go_to(page, "Adapters")
    opened_part(page, "Import a file, of any tool")
    opened_part(page, "Name, trigger and cover")
    for index, given in enumerate(adapters):
        name, _, file = given.rpartition("=")
        page.locator("#take-in input[type=file]").set_input_files(file)
        page.wait_for_function(f"document.querySelectorAll('#cards .card').length === {index + 1}")
        page.locator("#cards .card").first.click()  # the newest
        page.wait_for_function(f"document.querySelector('#shelf-adapter input').value === '{Path(file).stem}'")
        page.wait_for_timeout(1000)  # for what is known of it
        text(page, "name").fill(name or Path(file).parent.name)
        page.locator("#label").click()
        page.wait_for_function("document.querySelector('#shelf-note').innerText.includes('Saved')")
        page.locator("#cover:not([disabled])").click()
        page.wait_for_function(f"document.querySelectorAll('#cards img').length === {index + 1}")
    opened_part(page, "Import a file, of any tool")
    opened_part(page, "Name, trigger and cover")


def train(page: Any, steps: int | None, out: Path) -> None:
    """A run on an example's pictures, to its end, and how the page looks meanwhile."""
    go_to(page, "Train")
    choose(page, "photos-example", EXAMPLE)
    page.wait_for_function("document.querySelectorAll('#photos img').length === 5")
    text(page, "run-name").fill(EXAMPLE.capitalize())
    if steps is not None:
        opened_part(page, "Settings")
        number(page, "run-steps", steps)
        opened_part(page, "Settings")
    page.locator("#train").click()
    page.wait_for_selector("#train-grids img", timeout=3_600_000)
    page.wait_for_timeout(3000)  # of steps
    shoot(page, out / "train-running.png")
    page.wait_for_selector("#train-status .done", timeout=3_600_000)


def use(page: Any, card: Card) -> None:
    """Pictures, a comparison, and what is known of the adapter."""
    go_to(page, "Generate")
    choose(page, "adapter-0", card.name)
    page.get_by_label("Keep this seed").check()
    draw(page, f"a {card.phrase} on the beach")
    go_to(page, "Compare")
    choose(page, "compare-adapter", card.name)
    text(page, "compare-prompt").fill(f"a {card.phrase} in the snow")
    page.locator("#compare").click()
    page.wait_for_selector("#sheet img", timeout=600_000)
    page.wait_for_selector("#compare-status .done")
    go_to(page, "Adapters")
    page.locator("#cards .card", has_text=card.name).first.click()
    page.wait_for_selector("#about table")


def compare_run(page: Any, out: Path) -> None:
    """Each checkpoint of the run at two strengths."""
    go_to(page, "Compare")
    page.get_by_label(BY_STEP, exact=True).check()
    page.locator("#compare-run input").first.click()
    page.get_by_role("option").first.click()
    text(page, "compare-prompt").fill(f"a {text(page, 'run-trigger').input_value()} {EXAMPLE.split()[-1]} in the snow")
    page.locator("#compare").click()
    page.wait_for_selector("#slider", state="hidden")
    page.wait_for_selector("#compare-status .done", timeout=600_000)
    page.wait_for_selector("#sheet img")
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(700)
    shoot(page, out / "compare-run.png")


def take(page: Any, out: Path) -> None:
    """Each tab in each look, as a small PNG."""
    for look, width, dark in LOOKS:
        page.set_viewport_size({"width": width, "height": 800})
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
        for tab in TABS:
            page.evaluate("window.scrollTo(0, 0)")
            go_to(page, tab)
            page.mouse.move(0, 0)
            page.wait_for_timeout(700)  # for what moves
            shoot(page, out / f"{tab.lower()}-{look}.png")


def shoot(page: Any, path: Path) -> None:
    """The whole page, as a small PNG."""
    with Image.open(BytesIO(page.screenshot(full_page=True))) as shot:
        small(shot.convert("RGB")).save(path, optimize=True)


def small(picture: Image.Image) -> Image.Image:
    """With the page's own colours to the bit, which are those of many pixels, and the others to five bits."""
    values = np.asarray(picture)
    _, which, counts = np.unique(values.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    frequent = (counts[which.ravel()] > MANY).reshape(*values.shape[:2], 1)
    rounded = np.minimum((values.astype(int) + 4) // 8 * 8, 255)
    return Image.fromarray(np.where(frequent, values, rounded).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the pictures (default: docs/images/app)")
    parser.add_argument("--steps", type=int, help="of the training (default: the preset's)")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FILE", help="may be repeated")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        with started([*APP, "--workspace", folder, "--port", str(port)], port) as url, open_browser() as browser:
            page = browser.new_page(viewport={"width": WIDTHS["wide"], "height": 800}, color_scheme="light")
            page.set_default_timeout(120_000)
            page.goto(url)
            page.wait_for_function("localStorage.getItem('oft-diffusion-person')")
            page.wait_for_timeout(2000)
            fill_shelf(page, options.adapter)
            given = Shelf(Workspace(Path(folder))).cards()[::-1]
            train(page, options.steps, options.out)
            use(page, (given or Shelf(Workspace(Path(folder))).cards())[0])
            take(page, options.out)
            page.set_viewport_size({"width": WIDTHS["wide"], "height": 800})
            compare_run(page, options.out)
    for path in sorted(options.out.glob("*.png")):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
