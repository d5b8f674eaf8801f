"""The page of a training run in a real browser: light and dark, wide and narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from oft_diffusion.images import labelled_grid
from oft_diffusion.pocket import subjects_path
from oft_diffusion.report import Pictures, Table, loss_curve, write_report
from tests.helpers.browser import SCHEMES, WIDTHS, faint_texts, open_browser, too_wide

pytestmark = pytest.mark.browser

# Cells and list items of more than 12 letters and less than 90 pixels.
_SQUEEZED = """[...document.querySelectorAll('th, td, dt, dd, li')].filter(e => e.checkVisibility()
    && e.textContent.trim().length > 12 && e.getBoundingClientRect().width < 90).map(e => e.textContent.trim())"""
# Of each label of the curve, its height on the screen and the size of its letters, in CSS pixels.
_LABELS = """[...document.querySelectorAll('.curve span')].map(
    e => [e.getBoundingClientRect().height, parseFloat(getComputedStyle(e).fontSize)])"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that a run can have, and with long names."""
    pictures = [Image.open(p).convert("RGB") for p in sorted(subjects_path("party_car").glob("*.png"))]
    grid = labelled_grid([pictures, pictures], row_labels=["a qzxjkv car", "a qzxjkv car on the beach"], cell=128)
    words = "with the adapter, without it, and the difference"
    return write_report(
        tmp_path_factory.mktemp("report") / "report.html",
        title="qzxjkv car: a DreamBooth run",
        lead="OFTv2 taught the base the words “qzxjkv car” from 5 pictures.",
        sections=[
            Pictures(
                "Before and after", "The same prompts and seeds.", {"Before": grid, "After": grid}, ["Before", "After"]
            ),
            Pictures("Strength", "One picture.", {"The prompt at strengths": grid}),
            Table(
                "Figures",
                "Per cent.",
                ["", *words.split(", ")],
                [["attribute drift, other trigger", "39 of 64: 61 % (49 to 72)", "0 of 64: 0 % (0 to 6)", "61"]],
            ),
        ],
        losses=[0.5 - 0.001 * i + 0.05 * (i % 7) for i in range(300)],
        facts={"adapter size": "0.77 MB", "orthogonality error": "6e-7", "steps": 300, "training": "112 s"},
        settings={
            "targets": [r".*attn2\.to_(q|k|v|out\.0)"] * 6,
            "output_dir": "runs/" + "long-name/" * 30,
            "steps": 300,
            "class_prompts": ["", *(f"a {{class_word}} in place number {i}" for i in range(40))],
            "text_encoder_learning_rate": "a setting's name as long as any, and a value of some words",
        },
        usage="load_oft_weights(pipe, " + repr("a/very/long/path/" * 12) + ")",
    )


@pytest.fixture(scope="module")
def browser() -> Any:
    with open_browser() as browser:
        yield browser


def squeezed(page: Any) -> list[str]:
    """Texts of cells and list items that have more letters than there is room for on a line of some words."""
    return list(page.evaluate(_SQUEEZED))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_screen_reader_meets_tables_lists_and_the_curve_at_every_width(
    browser: Any, report: Path, width: str
) -> None:
    page = browser.new_page(viewport={"width": WIDTHS[width], "height": 800})
    page.goto(report.as_uri())
    table, told = page.locator("table").aria_snapshot(), "39 of 64: 61 % (49 to 72)"
    assert 'rowheader "attribute drift, other trigger"' in table
    assert f'cell "{told if width == "wide" else f"with the adapter: {told}"}"' in table
    assert ('columnheader "with the adapter"' in table) == (width == "wide")
    settings = page.locator("dl").aria_snapshot()
    assert "term: output_dir" in settings
    assert "listitem: (empty)" in settings
    assert page.get_by_role("img", name="Loss over 300 steps").count() == 1
    page.close()


def test_the_curve_lays_itself_out_without_the_pages_stylesheet(browser: Any) -> None:
    """As in the app, which has no rules for it."""
    page = browser.new_page(viewport={"width": 360, "height": 400})
    page.set_content(f"<body style='background: #222; color: #eee'>{loss_curve([0.5, 0.1, 0.4])}</body>")
    assert faint_texts(page) == []
    assert too_wide(page) <= 0
    rows = page.evaluate(
        "[...document.querySelectorAll('.curve span')].map(s => [s.textContent, s.getBoundingClientRect()])"
    )
    tops = [box["top"] for text, box in rows if not text.startswith("step")]
    assert tops == sorted(tops)
    first, last = (box for text, box in rows if text.startswith("step"))
    assert first["top"] == last["top"] > max(tops)
    drawing = page.locator("svg").bounding_box()
    assert first["left"] == pytest.approx(drawing["x"], abs=1)
    assert last["right"] == pytest.approx(drawing["x"] + drawing["width"], abs=1)
    middles = [(box["top"] + box["bottom"]) / 2 for text, box in rows if not text.startswith("step")]
    assert middles[0] == pytest.approx(drawing["y"], abs=1.5)
    assert middles[-1] == pytest.approx(drawing["y"] + drawing["height"], abs=1.5)
    paths = page.evaluate(
        "[...document.querySelectorAll('path')].map(p => [getComputedStyle(p).fill, getComputedStyle(p).vectorEffect])"
    )
    assert {tuple(path) for path in paths} == {("none", "non-scaling-stroke")}, "or dots are no longer round"
    page.close()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_can_be_read(browser: Any, report: Path, tmp_path: Path, width: str, scheme: Any) -> None:
    page = browser.new_page(viewport={"width": WIDTHS[width], "height": 800}, color_scheme=scheme)
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url) if request.url.startswith("http") else None)
    page.goto(report.as_uri())
    assert trouble == []
    assert too_wide(page) <= 0  # long lines scroll in their own boxes
    assert faint_texts(page) == []
    images = page.evaluate("[...document.images].map(i => [i.complete && i.naturalWidth, i.alt, i.clientWidth])")
    assert len(images) == 3
    assert all(natural > 0 and alt and shown >= 200 for natural, alt, shown in images)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (scheme == "light")
    side_by_side = page.evaluate(
        "(([a, b]) => a.getBoundingClientRect().top === b.getBoundingClientRect().top)([...document.images])"
    )
    assert side_by_side == (width == "wide")
    assert squeezed(page) == []
    sizes = page.evaluate(_LABELS)
    assert len(sizes) >= 6
    assert min(min(size) for size in sizes) >= 11
    page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
    page.close()


def test_what_is_hard_to_read_would_be_found(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 400})
    page.set_content("<body><p style='color:#999'>pale</p><p style='width:50rem'>wide</p><p>fine</p></body>")
    assert [text.split(":")[0] for text in faint_texts(page)] == ["pale"]
    assert too_wide(page) > 400
    page.set_content("<dl><dd style='width:4rem'>one word under the other</dd><dd style='width:4rem'>short</dd></dl>")
    assert squeezed(page) == ["one word under the other"]
