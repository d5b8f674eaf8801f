"""Debian's Chromium, driven by playwright; what every page is held to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"narrow": 360, "wide": 1280}
SCHEMES = ("light", "dark")
# As root in a container, and without the requests that Chromium makes by itself.
_OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

# Texts whose contrast with what lies behind them is less than WCAG's AA asks for (4.5, or 3 for large ones).
_FAINT = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1)
    return [...canvas.getImageData(0, 0, 1, 1).data]
  }
  const luminance = c => {
    const [r, g, b] = c.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = rgba(getComputedStyle(e).backgroundColor)
      if (c[3] > 250) return c
    }
    return [255, 255, 255, 255]
  }
  const found = []
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
    if (!own || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue
    if (element.closest(':disabled, [aria-disabled=true]')) continue  // as WCAG has it
    const style = getComputedStyle(element)
    const colour = rgba(element instanceof SVGElement ? style.fill : style.color)
    const [a, b] = [luminance(colour), luminance(behind(element))].sort((x, y) => y - x)
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700)
    const ratio = (a + 0.05) / (b + 0.05)
    if (ratio < (large ? 3 : 4.5)) found.push(`${element.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`)
  }
  return found
}"""


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium; playwright's `Browser`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=next(filter(None, map(shutil.which, NAMES))), args=[*_OPTIONS])
        try:
            yield browser
        finally:
            browser.close()


def faint_texts(page: Any) -> list[str]:
    """Texts that are hard to read, with their contrast."""
    return list(page.evaluate(_FAINT))


def too_wide(page: Any) -> float:
    """Pixels by which the page is wider than its window."""
    return float(page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))
