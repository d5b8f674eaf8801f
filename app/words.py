"""What the app says about jobs and errors, as text and as HTML that a screen reader is told of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch

from oft_diffusion.errors import OFTError
from oft_diffusion.training import Estimate

from .shelf import Card

if TYPE_CHECKING:
    from .machine import Progress

UNFORESEEN = "Something went wrong that nobody foresaw. Whoever runs the server finds in its log what it was."
_NO_MEMORY = (
    "There is not enough memory for this. Ask for smaller pictures, or fewer at once; for a training, choose settings "
    "for less memory. It also helps to close other programs."
)
_DISK_FULL = "The server's disk is full. Delete what you need no more, under Adapters, or tell whoever runs the server."
_NO_SENSE = "Something in the form is empty, or makes no sense."
_JOBS = {  # one, and several
    "draw": ("a drawing", "drawings"),
    "compare": ("a comparison", "comparisons"),
    "train": ("a training", "trainings"),
    "estimate": ("an estimate", "estimates"),
    "export": ("a file", "files"),
    "cover": ("a cover", "covers"),
    "combine": ("a merge of two adapters", "merges of two adapters"),
    "program": ("a program's drawing", "programs' drawings"),
}


def explained(error: BaseException) -> str:
    """An error in plain words."""
    if isinstance(error, OFTError):
        return f"{_sentence(error.problem)} Expected: {error.expected}. {_sentence(error.fix)}"
    if is_out_of_disk(error):
        return _DISK_FULL
    return _NO_MEMORY if is_out_of_memory(error) else _NO_SENSE


def is_foreseen(error: BaseException) -> bool:
    """Whether `explained` says what is wrong, where a job failed by it."""
    return isinstance(error, OFTError) or is_out_of_memory(error) or is_out_of_disk(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of whatever device."""
    told = isinstance(error, RuntimeError) and ("out of memory" in str(error) or "not enough memory" in str(error))
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def is_out_of_disk(error: BaseException) -> bool:
    """Whether the disk is full, for Python or for what writes tensors."""
    return "No space left on device" in str(error)


def duration(seconds: float) -> str:
    """`75` as "1 min 15 s"."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def roughly(seconds: float) -> str:
    """A duration that was measured by a small part of it: `75` as "1 minute"."""
    if seconds < 55:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    minutes = round(seconds / 60)
    if minutes < 60:
        return _several(minutes, "minute")
    rest = f" {minutes % 60} min" if minutes < 600 else ""  # nobody plans a night by the minute
    return f"{minutes // 60} h{rest}"


def status_line(now: Progress | None, problem: str = "") -> str:
    """One line and a bar."""
    if problem:
        return _line(problem, "problem", 0)
    if now is None:
        return _line("Ready.", "ready", 0)
    if now.found and isinstance(now.found[-1], Estimate):
        return _estimate_line(now.found[-1])
    if now.state == "waiting":
        return _line(_queue(now) if now.before else "Starting.", "waiting", 0)
    if now.state == "working":
        left = "" if now.seconds_left is None else f", {duration(now.seconds_left)} left"
        return _line(f"{_sentence(now.text or 'working').rstrip('.')}{left}.", "working", now.done / max(1, now.total))
    if now.state == "failed":
        return _line(_sentence(now.error), "problem", 0)
    if now.text.startswith(("the adapter", "paused", "stopped", "compared")):
        return _line(_sentence(now.text), now.state, 1)
    what = _several(len(now.found), "picture")
    if now.state == "cancelled" and not now.found:
        return _line("Cancelled.", now.state, 1)
    return _line(f"Cancelled after {what}." if now.state == "cancelled" else f"Done: {what}.", now.state, 1)


def _queue(now: Progress) -> str:
    """What is ahead of a job, and how long the first of it still takes, where it tells."""
    kinds = Counter(_JOBS.get(job.kind, ("a small task", "small tasks")) for job in now.before)
    what = ", ".join(one if count == 1 else f"{count} {several}" for (one, several), count in kinds.items())
    left = now.before[0].progress.seconds_left
    known = "" if left is None else f" {'It' if len(now.before) == 1 else 'The first'} has about {roughly(left)} left."
    others = "one other job" if len(now.before) == 1 else f"{len(now.before)} other jobs"
    return f"Waiting for {others}: {what}.{known}"


def _estimate_line(found: Estimate) -> str:
    """What a training would take."""
    pictures = found.class_images + found.pictures
    time = f"About {roughly(found.seconds)}, for {_several(found.steps, 'step')} and {_several(pictures, 'picture')}."
    needed = f"{found.memory.peak / 1e9:.1f} GB of memory"
    if found.fits is False:
        short = f"It will not fit: it takes {needed}, and {(found.free or 0) / 1e9:.1f} GB are free."
        return _line(f"{short} Close other programs, or choose settings for less memory. {time}", "problem", 0)
    free = "" if found.free is None else f", and {found.free / 1e9:.1f} GB are free"
    return _line(f"{time} It takes {needed}{free}. The adapter has {found.file_bytes / 1e6:.1f} MB.", "done", 0)


def _line(text: str, kind: str, share: float) -> str:
    percent = round(100 * min(1.0, max(0.0, share)))
    return (
        f'<div class="status {kind}" role="{"alert" if kind == "problem" else "status"}"><span>{escape(text)}</span>'
        f'<div class="bar" role="progressbar" aria-label="how far it is" aria-valuenow="{percent}" aria-valuemin="0" '
        f'aria-valuemax="100"><div style="width:{percent}%"></div></div></div>'
    )


def _sentence(text: str) -> str:
    text = text.strip()
    if text.partition(" ")[0].rstrip(":").isalpha():  # not a file's name, nor a knob's
        text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def told(*notes: str) -> str:
    """Notes that a screen reader is told of: a sentence, or a list of them."""
    sentences = [escape(_sentence(note)) for note in notes if note]
    listed = "".join(f"<li>{sentence}</li>" for sentence in sentences)
    text = f"<ul>{listed}</ul>" if len(sentences) > 1 else "".join(sentences)
    return f'<div class="note" role="status">{text}</div>'


def caption(settings: Mapping[str, Any]) -> str:
    """A picture in words, for those who do not see it: its seed, or that it is a comparison, and its prompt."""
    what = f"seed {settings['seed']}" if "seed" in settings else "a comparison"
    return f"{what}: {_shown(settings.get('prompt'))}"


def empty(text: str) -> str:
    """In the place of what is not there yet."""
    return f'<p class="empty">{escape(text)}</p>'


def cards_page(cards: Sequence[tuple[Card, str]]) -> str:
    """All adapters, as cards; beside each why it cannot be used here, or nothing."""
    if not cards:
        return empty("No adapters yet: train one, or take in a file.")
    return f'<div class="cards">{"".join(_card(card, problem) for card, problem in cards)}</div>'


def card_page(card: Card, problem: str) -> str:
    """Everything about one adapter."""
    rows = {
        "Trigger": card.phrase or "none",
        "Trained on": card.base or "unknown",
        "Blocks": f"of size {card.block_sizes}, on {card.layers} layers",
        "Orthogonality error": f"{card.error:.0e}: {_how_far(card.error)}",
        "Recommended strength": f"{card.strength:g}",
        "File": f"{card.bytes / 1e6:.2f} MB",
        "Made": card.created[:16].replace("T", " "),
    }
    warning = f'<p class="status problem">{escape(_sentence(problem))}</p>' if problem else ""
    settings = {name.replace("_", " "): text for name, value in card.training.items() if (text := _shown(value))}
    more = f"<details><summary>How it was trained</summary>{_table(settings)}</details>" if settings else ""
    return f"{warning}{_table(rows)}{more}"


def _how_far(error: float) -> str:
    """What an orthogonality error means."""
    return "rotations, but for rounding" if error < 1e-4 else "not quite rotations: what the base knows may suffer"


def _table(rows: Mapping[str, str]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows.items()
    )
    return f'<table class="about">{lines}</table>'


def _card(card: Card, problem: str) -> str:
    source = f"/gradio_api/file={quote(card.cover.as_posix())}?{card.drawn}" if card.cover else ""
    cover = f'<img src="{escape(source)}" alt="cover of {escape(card.name)}">' if source else "<span></span>"
    facts = f"{escape(card.phrase or 'no trigger')}<br>on {escape(card.base or 'an unknown base')}"
    made = f"<time>{escape(card.created[:10])}</time>"
    sizes = f"{card.bytes / 1e6:.2f} MB, block {escape(card.block_sizes)}, {made}"
    misfit = f'<br><span class="misfit">{escape(problem)}</span>' if problem else ""
    return (
        f'<button type="button" class="card" data-id="{escape(card.id)}">{cover}<span><b>{escape(card.name)}</b><br>'
        f"{facts}<br><small>{sizes}</small>{misfit}</span></button>"
    )


def _shown(value: object) -> str:
    """Empty where there is nothing."""
    if value is None:
        return ""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 200 else f"{text[:199]}…"
