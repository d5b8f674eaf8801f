"""The geometry of SO(b): what is between two rotations, the mean of several, and the way back to exact Cayley.

Rotations are deltas `D = R - I`, `(n, b, b)` float64, for n blocks at once. The distance of two is the largest angle of
a plane of `R_1^T R_2`, in radians. At 180 degrees nothing here is unique, so every function tells the angle too: beyond
`CUT` its other results mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from oft_diffusion.rotation import cayley_delta, compose_deltas, pack

CUT = math.radians(179.5)
_SETTLED = 1e-8  # largest entry of what pulls at a mean; float32, in which files are, has 6e-8
_STEPS = 100


class Mean(NamedTuple):
    """A Karcher mean.

    Shapes: `delta (n, b, b)`; `farthest (n,)`, how far from the mean the farthest is, in radians; `found (n,)` bool,
    whether the search came to an end.
    """

    delta: Tensor
    farthest: Tensor
    found: Tensor


def between(first: Tensor, second: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """`R_1 (R_1^T R_2)^t`, the point t of the shortest way from the first to the second, and their distance `(n,)`."""
    relative = compose_deltas(first.mT, second)
    angle, vectors = _planes(relative)
    safe = angle.clamp_max(CUT)
    # Functions of the angle that are smooth at 0: sin(t a) / sin a, and cos(t a) - 1 without cancellation.
    odd = t * torch.sinc(t * safe / math.pi) / torch.sinc(safe / math.pi)
    even = -2.0 * torch.sin(t * safe / 2) ** 2
    return compose_deltas(first, _function(relative, vectors, odd, even)), angle[:, -1]


def mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Mean:
    """The Karcher mean: of all rotations that with the least sum of squared distances, `‖log(R^T R_i)‖_F`, by weight.

    While all are within 90 degrees of the mean it is the only one that near: squared distances, and the sets of points
    within that distance, are convex up to there.

    Args:
        deltas: one or more.
        weights: one each, positive, their sum 1.
    """
    # The search begins with two at a time, which is near the mean, or, where they are opposites, with one of them.
    result, total = deltas[0], weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total += weight
        nearer, angle = between(result, delta, weight / total)
        result = torch.where((angle < CUT)[:, None, None], nearer, result)
    result, farthest, rows = result.clone(), result.new_zeros(len(result)), torch.arange(len(result))
    before: tuple[Tensor, Tensor] | None = None  # the last step, and the pull that it followed
    for _ in range(_STEPS):
        here, pull = result[rows], torch.zeros_like(result[rows])
        farthest[rows] = 0.0
        for delta, weight in zip(deltas, weights, strict=True):
            log, angle = _logarithm(compose_deltas(here.mT, delta[rows]))
            pull.add_(log, alpha=weight)
            farthest[rows] = torch.maximum(farthest[rows], angle)
        step = pull if before is None else pull * _step_size(*before, pull)
        result[rows] = compose_deltas(here, cayley_delta(step / 2))  # exp(step) up to third order
        going = pull.abs().amax((1, 2)) > _SETTLED
        rows, before = rows[going], (step[going], pull[going])
        if not len(rows):
            break
    found = torch.ones_like(farthest, dtype=torch.bool)
    found[rows] = False
    return Mean(result, farthest, found)


def _step_size(step: Tensor, before: Tensor, pull: Tensor) -> Tensor:
    """`(n, 1, 1)`: one over the curvature that the last step met, at most 1 (Barzilai and Borwein's step)."""
    met = (step * (before - pull)).sum((1, 2), keepdim=True)
    return ((step * step).sum((1, 2), keepdim=True) / met).clamp(0.5, 4.0)


def cayley_generators(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Packed generators `(n, b(b-1)/2)` of `Q = (R - I)(R + I)^-1`, and each block's largest angle `(n,)`."""
    versine = torch.linalg.eigvalsh(_versine(delta))
    # R + I = D + 2 I is singular at 180 degrees, for which solve_ex raises nothing.
    q = torch.linalg.solve_ex(delta + 2.0 * torch.eye(delta.shape[-1], dtype=delta.dtype), delta)[0]
    return pack((q - q.mT) / 2), _angle(versine[:, -1])


def _planes(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Angles of the planes, `(n, b)` radians, ascending, and their vectors `(n, b, b)`: a plane has two of each."""
    versine, vectors = torch.linalg.eigh(_versine(delta))
    return _angle(versine), vectors


def _versine(delta: Tensor) -> Tensor:
    """`1 - (R + R^T)/2`, whose eigenvalues are 1 - cos of the angles."""
    return -(delta + delta.mT) / 2


def _angle(versine: Tensor) -> Tensor:
    return 2.0 * torch.asin((versine / 2).clamp(0.0, 1.0).sqrt())


def _logarithm(delta: Tensor) -> tuple[Tensor, Tensor]:
    """The skew-symmetric logarithm `(n, b, b)`, and the largest angle `(n,)`."""
    angle, vectors = _planes(delta)
    odd = 1.0 / torch.sinc(angle.clamp_max(CUT) / math.pi)  # a / sin a
    return _function(delta, vectors, odd, torch.zeros_like(odd)), angle[:, -1]


def _function(delta: Tensor, vectors: Tensor, odd: Tensor, even: Tensor) -> Tensor:
    """`(R - R^T)/2` times one function of every plane, `odd (n, b)`, plus the matrix of another, `even (n, b)`."""
    sine = (delta - delta.mT) / 2
    return (vectors * even.unsqueeze(1) + sine @ (vectors * odd.unsqueeze(1))) @ vectors.mT
