"""How long until the app's page is there, can be used, and has drawn: benchmarks/data/app_page.csv.

python -m benchmarks.app_page            # measures and appends
python -m benchmarks.app_page --table    # the newest run as Markdown

The command is started as a user starts it, on the pocket base; each visit is of a browser of its own, that has cached
nothing, on the same machine. The first visit warms up and is not counted. Figures are medians, and their spread. At
last somebody trains, once, as the page suggests, on five pictures of a subject, and draws it on the beach.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.records import DATA, append, load
from oft_diffusion.pocket import SUBJECTS, subjects_path
from tests.helpers.app_command import APP, free_port, started
from tests.helpers.app_page import IDLE, draw, go_to, number, opened_part, text
from tests.helpers.browser import open_browser

FILE = DATA / "app_page.csv"
# In the order in which they come to pass.
MEASURES = {
    "started": "from the command to an answer",
    "first paint": "from the address to the first contentful paint",
    "usable": "from the address to menus that are filled and a button that can be pressed",
    "one picture": "from Generate to a picture, where one is asked for",
    "four pictures": "from Generate to the first picture, where four are drawn together, as the page suggests",
    "own subject": "from five pictures dropped to four of their subject on the beach, trained with the page's settings",
}
_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


@contextmanager
def visited(browser: Any, url: str) -> Iterator[tuple[Any, float]]:
    """The page in a browser that has cached nothing, once it can be used, and the seconds that this took."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        page = context.new_page()
        page.set_default_timeout(300_000)
        begun = time.perf_counter()
        page.goto(url, wait_until="commit")
        page.wait_for_selector(IDLE)
        page.wait_for_function("localStorage.getItem('oft-diffusion-person')")
        yield page, time.perf_counter() - begun
    finally:
        context.close()


def visit(browser: Any, url: str) -> dict[str, float]:
    """Seconds of one visit."""
    with visited(browser, url) as (page, usable):
        took = {"usable": usable, "first paint": page.evaluate(_PAINT) / 1000}
        text(page, "prompt").fill("a red car on the beach")
        opened_part(page, "Settings")
        for name, count in (("one picture", 1), ("four pictures", 4)):
            number(page, "count", count)
            page.wait_for_timeout(500)
            page.evaluate("document.querySelector('#status .status').dataset.before = 1")
            begun = time.perf_counter()
            page.locator(IDLE).click()
            page.wait_for_selector("#status .done:not([data-before])")
            took[name] = time.perf_counter() - begun
    return took


def own_subject(browser: Any, url: str) -> float:
    """Seconds until a subject of five pictures is drawn."""
    subject = SUBJECTS["captain_mug"]
    with visited(browser, url) as (page, _):
        go_to(page, "Train")
        begun = time.perf_counter()
        page.locator("#photos-drop input[type=file]").set_input_files(sorted(subjects_path(subject.name).iterdir()))
        page.wait_for_function("document.querySelectorAll('#photos img').length === 5")
        text(page, "run-name").fill("Captain")
        text(page, "run-class").fill(subject.object)
        page.locator("#train").click()
        page.wait_for_selector("#train-status .done", timeout=3_600_000)
        go_to(page, "Generate")  # where the new adapter is chosen
        draw(page, f"a {text(page, 'run-trigger').input_value()} {subject.object} on the beach")
        return time.perf_counter() - begun


def measure(repeats: int, file: Path) -> None:
    """Append one run."""
    times: dict[str, list[float]] = {name: [] for name in MEASURES}
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        port, begun = free_port(), time.perf_counter()
        with started([*APP, "--workspace", folder, "--port", str(port)], port) as url:
            times["started"].append(time.perf_counter() - begun)
            for turn in range(repeats + 1):
                for name, seconds in visit(browser, url).items():
                    if turn:
                        times[name].append(seconds)
            times["own subject"].append(own_subject(browser, url))
    rows = [
        {
            "measure": name, "repeats": len(values), "median": f"{statistics.median(values):.3f}",
            "least": f"{min(values):.3f}", "most": f"{max(values):.3f}",
        }
        for name, values in times.items()
    ]  # fmt: skip
    append(file, rows)


def table(file: Path = FILE) -> str:
    """The newest run."""
    newest = load(file)[-len(MEASURES) :]
    lines = ["| | seconds, median (least to most) |", "|---|---|"]
    for row in newest:
        spread = "" if row["repeats"] == "1" else f" ({float(row['least']):.2f} to {float(row['most']):.2f})"
        lines.append(f"| {row['measure']}: {MEASURES[row['measure']]} | {float(row['median']):.2f}{spread} |")
    told, visits = newest[-1], max(int(row["repeats"]) for row in newest)
    return "\n".join([*lines, "", f"{told['hardware']}, {visits} visits, torch {told['torch']}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the newest run, measure nothing")
    parser.add_argument("--repeats", type=int, default=7, help="visits that count (default: 7)")
    parser.add_argument("--file", type=Path, default=FILE, help="to append to (default: benchmarks/data/app_page.csv)")
    options = parser.parse_args()
    if not options.table:
        measure(options.repeats, options.file)
    print(table(options.file))


if __name__ == "__main__":
    main()
