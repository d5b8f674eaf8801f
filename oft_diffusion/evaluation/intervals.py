"""Bootstrap intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean with the bounds of its 95 % interval, and the number of pictures behind it."""

    mean: float
    low: float
    high: float
    pictures: int


def bootstrap(values: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0) -> Interval:
    """Mean and percentile-bootstrap 95 % interval.

    Args:
        values: one per picture; for a paired difference, the differences.
        groups: what each picture belongs to, such as the training run that drew it. Given, whole groups are drawn with
            replacement first and pictures within them second, so that the interval is about new groups, not only new
            pictures.
        seed: of the resampling.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("a bootstrap needs at least one value")
    rng, data = np.random.default_rng(seed), np.asarray(values, dtype=np.float64)
    labels = list(groups) if groups is not None else [0] * len(data)
    members = [data[[i for i, own in enumerate(labels) if own == label]] for label in dict.fromkeys(labels)]
    if len(members) == 1:
        means = data[rng.integers(len(data), size=(RESAMPLES, len(data)))].mean(axis=1)
    else:
        means = np.array([_resampled(members, rng) for _ in range(RESAMPLES)])
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(data.mean()), float(low), float(high), len(data))


def _resampled(members: Sequence[np.ndarray], rng: np.random.Generator) -> float:
    chosen = rng.integers(len(members), size=len(members))
    drawn = [members[i][rng.integers(len(members[i]), size=len(members[i]))] for i in chosen]
    return float(np.concatenate(drawn).mean())
