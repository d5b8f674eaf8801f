"""A self-contained HTML page about a training run: pictures, loss curve, settings, how to use the adapter."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from oft_diffusion.disk import write_atomically

WIDEST = 1600  # pixels; wider sheets are scaled down, or a page about large pictures would have tens of megabytes


@dataclass(frozen=True)
class Pictures:
    """Pictures with a heading and a sentence about them; several stand side by side where there is room.

    Attributes:
        heading: above them.
        text: under the heading.
        images: each with its alternative text.
    """

    heading: str
    text: str
    images: Mapping[str, Image.Image]


@dataclass(frozen=True)
class Table:
    """Rows of short texts under a heading; the first cell of a row names it."""

    heading: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


Section = Pictures | Table


def write_report(
    path: str | Path,
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    losses: Sequence[float],
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    usage: str,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: the .html file.
        title: its heading.
        lead: one paragraph under it.
        sections: pictures, embedded as PNG, and tables, in this order.
        losses: one per step; drawn with a running mean.
        facts: short figures shown at the top, by label.
        settings: the training settings, as a table.
        usage: Python that loads the adapter.

    Returns:
        The file's path.

    Raises:
        AdapterFileError: the file cannot be written.
    """
    page = _PAGE.substitute(
        title=html.escape(title),
        lead=html.escape(lead),
        facts="".join(
            f"<div><b>{html.escape(str(v))}</b><span>{html.escape(k)}</span></div>" for k, v in facts.items()
        ),
        sections="".join(_pictures(s) if isinstance(s, Pictures) else _table(s) for s in sections),
        curve=loss_curve(losses),
        settings="".join(
            f"<tr><th>{html.escape(k)}</th><td>{html.escape(_shown(v))}</td></tr>" for k, v in settings.items()
        ),
        usage=html.escape(usage),
    )
    path = Path(path)
    write_atomically(path, page.encode())
    return path


def loss_curve(losses: Sequence[float]) -> str:
    """An SVG of the losses: every step as a dot, and a running mean over a tenth of the run as a line.

    Steps whose loss was not finite have no dot.
    """
    steps = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    if not steps:
        return f"<p>{'No step had a finite loss' if losses else 'No step was made'}.</p>"
    width, height, left, bottom = 720, 220, 52, 26
    finite = [losses[i] for i in steps]
    window = max(1, len(finite) // 10)
    means = [sum(finite[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(finite))]
    top = max(finite) * 1.05 or 1.0

    def point(step: int, value: float) -> tuple[float, float]:
        x = left + (width - left - 8) * step / max(1, len(losses) - 1)
        return round(x, 1), round((height - bottom) * (1 - value / top), 1)

    dots = "".join('<circle cx="{}" cy="{}" r="1.6"/>'.format(*point(i, v)) for i, v in zip(steps, finite, strict=True))
    line = " ".join("{},{}".format(*point(i, v)) for i, v in zip(steps, means, strict=True))
    labels = "".join(
        f'<text x="{left - 6}" y="{point(0, v)[1] + 4}" text-anchor="end">{v:.3g}</text>'
        for v in (0.0, top / 2, top * 0.95)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Loss over {len(losses)} steps, from a mean of '
        f'{means[min(window, len(means)) - 1]:.3g} to {means[-1]:.3g}"><g class="dots">{dots}</g>'
        f'<polyline points="{line}"/>{labels}<text x="{left}" y="{height - 6}">step 1</text>'
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">step {len(losses)}</text></svg>'
    )


def _pictures(section: Pictures) -> str:
    images = "".join(_image(image, alt) for alt, image in section.images.items())
    return f'{_opening(section.heading, section.text)}<div class="beside">{images}</div></section>'


def _image(image: Image.Image, alt: str) -> str:
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" '
        f'alt="{html.escape(alt)}">'
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in table.rows
    )
    return (
        f'{_opening(table.heading, table.text)}<div class="wide"><table class="figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _opening(heading: str, text: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>"


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "(none)"
    return "(none)" if value is None else str(value)


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #18181b; --soft: #52525b; --line: #e4e4e7; --card: #f4f4f5;
  --mark: #4f46e5; }
@media (prefers-color-scheme: dark) { :root { --paper: #131316; --ink: #f4f4f5; --soft: #a1a1aa; --line: #303036;
  --card: #1d1d21; --mark: #a5b4fc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; }
p { margin: .2rem 0 .9rem; color: var(--soft); max-width: 46rem; }
.facts { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0; }
.facts div { background: var(--card); border-radius: .6rem; padding: .6rem .9rem; }
.facts b { display: block; font-size: 1.15rem; }
.facts span { color: var(--soft); font-size: .85rem; }
.beside { display: flex; flex-wrap: wrap; gap: .8rem; } .beside img { flex: 0 1 auto; min-width: 0; }
@media (min-width: 48rem) { .beside { flex-wrap: nowrap; } }
img { max-width: 100%; height: auto; align-self: flex-start; border-radius: .5rem; border: 1px solid var(--line);
  background: #fff; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
.dots { fill: var(--mark); opacity: .3; } polyline { fill: none; stroke: var(--mark); stroke-width: 2; }
pre { background: var(--card); border-radius: .6rem; padding: 1rem; overflow-x: auto; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.figures td { font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; } td { overflow-wrap: anywhere; }
</style></head><body>
<h1>$title</h1><p>$lead</p><div class="facts">$facts</div>
$sections
<section><h2>Loss</h2><p>Dots are single steps: at random noise levels they scatter. The line is their running mean.</p>
$curve</section>
<section><h2>Use the adapter</h2><pre>$usage</pre></section>
<section><h2>Settings</h2><div class="wide"><table>$settings</table></div></section>
</body></html>
""")
