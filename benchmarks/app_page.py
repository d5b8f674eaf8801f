"""How long until the app's page is there, can be used, and has drawn: benchmarks/data/app_page.csv.

python -m benchmarks.app_page            # measures and appends
python -m benchmarks.app_page --table    # the newest run as Markdown

The command is started as a user starts it, on the pocket base; each visit is of a browser of its own, that has cached
nothing, on the same machine. The first visit warms up and is not counted. Figures are medians, and their spread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.records import DATA, append, load
from tests.helpers.app_command import APP, free_port, started
from tests.helpers.app_page import IDLE, number, opened_part, text
from tests.helpers.browser import open_browser

FILE = DATA / "app_page.csv"
# In the order in which they come to pass.
MEASURES = {
    "started": "from the command to an answer",
    "first paint": "from the address to the first contentful paint",
    "usable": "from the address to menus that are filled and a button that can be pressed",
    "one picture": "from Generate to a picture, where one is asked for",
    "four pictures": "from Generate to the first picture, where four are drawn together, as the page suggests",
}
_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def visit(browser: Any, url: str) -> dict[str, float]:
    """Seconds of one visit."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        page = context.new_page()
        page.set_default_timeout(300_000)
        begun = time.perf_counter()
        page.goto(url, wait_until="commit")
        page.wait_for_selector(IDLE)
        page.wait_for_function("localStorage.getItem('oft-diffusion-person')")
        took = {"usable": time.perf_counter() - begun, "first paint": page.evaluate(_PAINT) / 1000}
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
    finally:
        context.close()


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
    told = newest[-1]
    return "\n".join([*lines, "", f"{told['hardware']}, {told['repeats']} visits, torch {told['torch']}."])


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
