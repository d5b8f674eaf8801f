"""A self-contained HTML page about a training run: pictures, loss curve, settings, how to use the adapter."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
        captions: a short line above each image, in the same order; none where there are none.
    """

    heading: str
    text: str
    images: Mapping[str, Image.Image]
    captions: Sequence[str] = ()


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
        settings: the training settings, as a list of names and values.
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
        settings="".join(f"<div><dt>{html.escape(k)}</dt><dd>{_shown(v)}</dd></div>" for k, v in settings.items()),
        usage=html.escape(usage),
    )
    path = Path(path)
    write_atomically(path, page.encode())
    return path


def loss_curve(losses: Sequence[float], first: int = 1) -> str:
    """The losses as HTML: steps as dots, and a running mean over a tenth of the run as a line.

    Of a long run, `_MOST_DOTS` steps are drawn, evenly, the last one among them; the mean is that of all.

    Labels are texts around the drawing, whose size does not depend on its width. It needs no stylesheet, and has the
    colour of the text around it where none says otherwise. Steps whose loss was not finite have no dot.

    Args:
        losses: of steps one after another.
        first: the number of the first step.
    """
    steps = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    if not steps:
        return f"<p>{'No step had a finite loss' if losses else 'No step was made'}.</p>"
    finite = [losses[i] for i in steps]
    window = max(1, len(finite) // 10)
    sums = [0.0, *accumulate(finite)]
    means = [max(0.0, sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
    drawn = [*range(0, len(finite) - 1, math.ceil(len(finite) / _MOST_DOTS)), len(finite) - 1]
    levels = _levels(max(finite))

    def point(step: int, value: float) -> str:
        return f"{_SIDE * step / max(1, len(losses) - 1):.1f},{_SIDE * (1 - value / levels[-1]):.1f}"

    last = first + len(losses) - 1
    begun, ended = means[min(window, len(means)) - 1], means[-1]
    lines = "".join(f"M{point(0, level)}h{_SIDE}" for level in levels)
    dots = "".join(f"M{point(steps[i], finite[i])}h0" for i in drawn)
    return _CURVE.substitute(
        label=f"Loss over {len(losses)} steps, from a mean of {begun:.3g} to {ended:.3g}",
        side=_SIDE,
        drawing=_stroke("lines", lines, 1, 0.2)
        + _stroke("dots", dots, 4, 0.4)
        + _stroke("mean", "M" + " ".join(point(steps[i], means[i]) for i in drawn), 2, 1),
        levels="".join(f"<span>{level:g}</span>" for level in reversed(levels)),
        steps="<div>loss, and its running mean</div>".join(f"<span>step {i}</span>" for i in sorted({first, last})),
    )


def _levels(highest: float) -> list[float]:
    """Four or five round numbers, evenly from 0 to `highest` or a little above."""
    highest = highest if highest > 1e-12 else 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(power * part for part in (0.25, 0.5, 1, 2, 2.5) if 4 * power * part >= highest)
    return [step * i for i in range(math.ceil(highest / step) + 1)]


def _stroke(name: str, path: str, width: float, opacity: float) -> str:
    """A path whose strokes keep their width, and its points their roundness, however the drawing is stretched."""
    return (
        f'<path class="{name}" d="{path}" fill="none" stroke="currentColor" stroke-width="{width}" '
        f'stroke-linecap="round" stroke-linejoin="round" opacity="{opacity}" vector-effect="non-scaling-stroke"/>'
    )


def _pictures(section: Pictures) -> str:
    captions = section.captions or [""] * len(section.images)
    figures = "".join(
        f"<figure>{f'<figcaption>{html.escape(caption)}</figcaption>' if caption else ''}{_image(image, alt)}</figure>"
        for (alt, image), caption in zip(section.images.items(), captions, strict=True)
    )
    return f'{_opening(section.heading, section.text)}<div class="beside">{figures}</div></section>'


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
    body = "".join(_row(table.columns, row) for row in table.rows)
    return (
        f"{_opening(table.heading, table.text)}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        "</section>"
    )


def _row(columns: Sequence[str], row: Sequence[str]) -> str:
    """A row whose cells know their columns' names, which narrow screens show in front of them."""
    cells = "".join(
        f'<td data-column="{html.escape(column)}">{html.escape(cell)}</td>'
        for column, cell in zip(columns[1:], row[1:], strict=True)
    )
    return f'<tr><th scope="row">{html.escape(row[0])}</th>{cells}</tr>'


def _opening(heading: str, text: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2><p>{html.escape(text)}</p>"


def _shown(value: object) -> str:
    """A setting's value as HTML: a list item by item, and in words what could not be seen."""
    if isinstance(value, (list, tuple)) and value:
        return f"<ul>{''.join(f'<li>{_shown(item)}</li>' for item in value)}</ul>"
    if value == "":
        return "(empty)"
    return "(none)" if value is None or value in ((), []) else html.escape(str(value))


_SIDE = 1000  # of the curve's drawing, in its own units
_MOST_DOTS = 600  # about as many as can be told apart
_CURVE = Template("""<div class="curve" role="img" aria-label="$label"
style="display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .6rem; padding-top: .5rem;
font-size: .8rem; line-height: 1">
<div style="display: flex; flex-direction: column; justify-content: space-between; text-align: right; margin: -.5em 0">
$levels</div>
<svg viewBox="0 0 $side $side" preserveAspectRatio="none" aria-hidden="true"
style="width: 100%; height: 13rem; overflow: visible">
$drawing</svg>
<div style="grid-column: 2; display: flex; justify-content: space-between; gap: .6rem; text-align: center">
$steps</div></div>""")

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
.beside { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; flex: 0 1 auto; min-width: 0; } figcaption { font-size: .9rem; font-weight: 500; }
img { display: block; max-width: 100%; height: auto; border-radius: .5rem; border: 1px solid var(--line);
  background: #fff; }
.curve { color: var(--soft); } .dots, .mean { stroke: var(--mark); }
pre { background: var(--card); border-radius: .6rem; padding: 1rem; overflow-x: auto; font-size: .9rem; }
table { border-collapse: collapse; } table, dl { font-size: .9rem; margin: 0; }
th, td { text-align: left; padding: .25rem 1.6rem .25rem 0; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
th, dt { font-weight: 500; color: var(--soft); }
dl > div { display: flex; flex-wrap: wrap; column-gap: 1rem; padding: .25rem 0; border-bottom: 1px solid var(--line); }
dd { margin: 0; overflow-wrap: anywhere; }
ul { list-style: none; margin: .1rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem; }
li { background: var(--card); border-radius: .4rem; padding: 0 .45rem; }
@media (min-width: 48rem) { .beside { flex-wrap: nowrap; }
  dl > div { display: grid; grid-template-columns: 13rem minmax(0, 1fr); } }
@media (max-width: 47.99rem) { table, tbody, tr, th, td { display: block; } thead { display: none; }
  tr { padding: .4rem 0; border-bottom: 1px solid var(--line); } th, td { border: 0; padding: 0; }
  th, dt { color: var(--ink); font-weight: 600; } td::before { content: attr(data-column) ": "; color: var(--soft); } }
</style></head><body><main>
<h1>$title</h1><p>$lead</p><div class="facts">$facts</div>
$sections
<section><h2>Loss</h2><p>Dots are single steps: at random noise levels they scatter. The line is their running mean.</p>
$curve</section>
<section><h2>Use the adapter</h2><pre tabindex="0">$usage</pre></section>
<section><h2>Settings</h2><dl>$settings</dl></section>
</main></body></html>
""")
