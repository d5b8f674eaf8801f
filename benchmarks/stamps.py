"""Of which commits and days the rows of a table are: a table shows the newest of each, which are not all of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def commits(rows: Iterable[Mapping[str, str]]) -> str:
    """Each commit once, with its day, in the order of the rows. A `+` is a tree that differed from its commit."""
    return ", ".join(dict.fromkeys(f"{row['commit'] or 'unknown'} of {row['date']}" for row in rows))
