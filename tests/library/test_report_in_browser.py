"""The page of a training run in a real browser: light and dark, wide and narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from oft_diffusion.images import labelled_grid
from oft_diffusion.pocket import subjects_path
from oft_diffusion.report import Pictures, Table, write_report
from tests.helpers.browser import SCHEMES, WIDTHS, faint_texts, open_browser, too_wide

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that a run can have, and with long names."""
    pictures = [Image.open(p).convert("RGB") for p in sorted(subjects_path("party_car").glob("*.png"))]
    grid = labelled_grid(
        [pictures, pictures], row_labels=["a qzxjkvwpfh car", "a qzxjkvwpfh car on the beach"], cell=128
    )
    words = "with the adapter, without it, and the difference"
    return write_report(
        tmp_path_factory.mktemp("report") / "report.html",
        title="qzxjkvwpfh car: a DreamBooth run",
        lead="OFTv2 taught the base the words “qzxjkvwpfh car” from 5 pictures.",
        sections=[
            Pictures("Before and after", "The same prompts and seeds.", {"Before": grid, "After": grid}),
            Pictures("Strength", "One picture.", {"The prompt at strengths": grid}),
            Table(
                "Figures", "Per cent.", ["", *words.split(", ")], [["subject hit", "60.4 (51.9 to 69.1)", "0", "60"]]
            ),
        ],
        losses=[0.5 - 0.001 * i + 0.05 * (i % 7) for i in range(300)],
        facts={"adapter size": "0.77 MB", "orthogonality error": "6e-7", "steps": 300, "training": "112 s"},
        settings={"targets": [r".*attn2\.to_(q|k|v|out\.0)"] * 6, "output_dir": "runs/" + "long-name/" * 30},
        usage="load_oft_weights(pipe, " + repr("a/very/long/path/" * 12) + ")",
    )


@pytest.fixture(scope="module")
def browser() -> Any:
    with open_browser() as browser:
        yield browser


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
    page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
    page.close()


def test_what_is_hard_to_read_would_be_found(browser: Any) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 400})
    page.set_content("<body><p style='color:#999'>pale</p><p style='width:50rem'>wide</p><p>fine</p></body>")
    assert [text.split(":")[0] for text in faint_texts(page)] == ["pale"]
    assert too_wide(page) > 400
