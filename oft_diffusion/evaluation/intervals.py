"""Intervals: a nested bootstrap, which knows that pictures of one run are alike, and Wilson's bounds for shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

RESAMPLES = 2000
_Z = 1.96

Tree: TypeAlias = "list[Tree] | np.ndarray"
Group: TypeAlias = tuple[Hashable, ...]
"""What a picture belongs to, from the outside in: `("bow_cat", 0)` is the first run of the subject bow_cat."""


class Interval(NamedTuple):
    """An estimate with the bounds of its 95 % interval, and the number of pictures (or pairs) behind it."""

    mean: float
    low: float
    high: float
    pictures: int


def mean_interval(values: Sequence[float], groups: Sequence[Group] | None = None, seed: int = 0) -> Interval:
    """Mean and 95 % interval: percentile bootstrap, never narrower than Wilson's for shares.

    The bootstrap knows no chance of what never happened: of 24 misses it makes "0, from 0 to 0". So the bounds of a
    share (values 0 and 1) are the outer ones of both, and equal values of any other kind get 3 / n to either side (the
    rule of three).

    Args:
        values: one per picture.
        groups: what each picture belongs to; resampled level by level, so that the interval is about new subjects and
            new runs, not only new pictures.
        seed: of the resampling.

    Raises:
        ValueError: there are no values.
    """
    data = np.asarray(values, dtype=np.float64)
    found = _bootstrap(data[:, None], groups, lambda sample: sample[:, 0].mean(), seed)
    if set(np.unique(data)) <= {0.0, 1.0}:
        low, high = _wilson(found.mean, len(data))
        return found._replace(low=min(found.low, low), high=max(found.high, high))
    return _not_sure(found)


def difference_interval(
    above: Sequence[float], below: Sequence[float], groups: Sequence[Group] | None = None, seed: int = 0
) -> Interval:
    """The mean difference, pair by pair, and its 95 % interval: percentile bootstrap.

    For shares it is never narrower than what Wilson's bounds leave to pairs that are won and pairs that are lost (their
    distances added in squares, as Newcombe does): that none was lost of six does not mean that none can be.

    Raises:
        ValueError: there are no values.
    """
    data = np.asarray(above, dtype=np.float64) - np.asarray(below, dtype=np.float64)
    found = _bootstrap(data[:, None], groups, lambda sample: sample[:, 0].mean(), seed)
    if not set(np.unique(data)) <= {-1.0, 0.0, 1.0}:
        return _not_sure(found)
    won, lost = ((data == sign).mean() for sign in (1, -1))
    (won_low, won_high), (lost_low, lost_high) = _wilson(won, len(data)), _wilson(lost, len(data))
    low = found.mean - math.hypot(won - won_low, lost_high - lost)
    high = found.mean + math.hypot(won_high - won, lost - lost_low)
    return found._replace(low=min(found.low, low), high=max(found.high, high))


def ratio_interval(
    above: Sequence[float], below: Sequence[float], groups: Sequence[Group] | None = None, seed: int = 0
) -> Interval:
    """The quotient of two means over the same pictures, with its bootstrap interval.

    Raises:
        ValueError: there are no values, or those below are all zero.
    """
    pairs = np.stack([np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)], axis=1)
    if len(pairs) and not pairs[:, 1].any():
        raise ValueError("a ratio needs a denominator that is not zero")

    def ratio(sample: np.ndarray) -> float:
        return float(sample[:, 0].sum() / max(sample[:, 1].sum(), 1.0))

    return _not_sure(_bootstrap(pairs, groups, ratio, seed))


def _not_sure(found: Interval) -> Interval:
    """The interval, or 3 / n to either side of values that were all equal."""
    slack = 3 / found.pictures if found.low == found.high else 0.0
    return found._replace(low=found.low - slack, high=found.high + slack)


def _bootstrap(
    data: np.ndarray, groups: Sequence[Group] | None, statistic: Callable[[np.ndarray], float], seed: int
) -> Interval:
    if not len(data):
        raise ValueError("an interval needs at least one value")
    rng, tree = np.random.default_rng(seed), _nested(data, list(groups) if groups is not None else [()] * len(data))
    drawn = [statistic(_resampled(tree, rng)) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(statistic(data)), float(low), float(high), len(data))


def _nested(data: np.ndarray, groups: list[Group]) -> Tree:
    """Rows by group: a list per level, an array of rows at the bottom."""
    if not groups[0]:
        return data
    heads = [group[0] for group in groups]
    return [
        _nested(data[[i for i, own in enumerate(heads) if own == head]], [g[1:] for g in groups if g[0] == head])
        for head in dict.fromkeys(heads)
    ]


def _resampled(tree: Tree, rng: np.random.Generator) -> np.ndarray:
    chosen = rng.integers(len(tree), size=len(tree))
    if isinstance(tree, np.ndarray):
        return tree[chosen]
    return np.concatenate([_resampled(tree[i], rng) for i in chosen])


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
