"""Bounds of the truncation errors of a matrix of which only a few singular values are known."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class PartialSpectrum:
    """Bounds that follow from a few singular values, since they descend; ranks r = 0 … n (`n+1`).

    `lowest_error[r]` and `highest_error[r]` bound the relative Frobenius error of the best rank r.
    """

    shape: tuple[int, int]
    sigma_at: dict[int, float]
    lowest_error: Vector
    highest_error: Vector

    def rank_bounds(self, error: float) -> tuple[int, int]:
        """Return the smallest and the largest that `rank_for_error(error)` can be."""
        return int(np.argmax(self.lowest_error <= error)), int(np.argmax(self.highest_error <= error))


def bounds_from_partial(sigma_at: Mapping[int, float], shape: tuple[int, int]) -> PartialSpectrum:
    """Bound the truncation errors of a matrix known by the singular values at a few indices (from 1).

    Raises BitsmithError for an index outside the shape, or values that are negative or do not descend.
    """
    known, n = _checked(sigma_at, min(shape)), min(shape)
    indices, values = np.array(list(known)), np.array(list(known.values()))
    before = np.searchsorted(indices, np.arange(1, n + 1), side="right")  # known ones at or before each
    after = np.searchsorted(indices, np.arange(1, n + 1), side="left")  # known ones strictly before each
    upper = np.square(np.concatenate([[np.inf], values]))[before]
    lower = np.square(np.concatenate([values, [0.0]]))[after]
    return PartialSpectrum(shape, known, _lowest_errors(lower, upper), _highest_errors(indices, lower, upper))


def _checked(sigma_at: Mapping[int, float], n: int) -> dict[int, float]:
    known = {int(index): float(sigma_at[index]) for index in sorted(sigma_at)}
    if not known:
        raise BitsmithError("no singular value is known: expected at least one")
    for index, sigma in known.items():
        if not 1 <= index <= n or not 0.0 <= sigma < np.inf:
            raise BitsmithError(f"σ{index} = {sigma}: expected an index in 1 … {n} and a finite value from 0")
    for (index, sigma), (later, smaller) in itertools.pairwise(known.items()):
        if smaller > sigma:
            raise BitsmithError(
                f"σ{later} = {smaller} is above σ{index} = {sigma}: expected a descending order"
            )
    return known


def _lowest_errors(lower: Vector, upper: Vector) -> Vector:
    """Take the head as large and the tail as small as each may be."""
    return _relative(_sums_from(lower), _sums_before(upper))


def _highest_errors(indices: NDArray[np.int64], lower: Vector, upper: Vector) -> Vector:
    """Take the head small and the tail large.

    Between the known indices around a rank all σ take one value, as the head is nowhere below the tail; the
    error is monotone in that value, so it is largest at either end.
    """
    n = len(lower)
    ranks = np.arange(n + 1)
    ends = np.concatenate([[0], indices, [n + 1]])
    place = np.searchsorted(ends, ranks, side="right")
    before, after = ends[place - 1], ends[place]
    heads, tails = _sums_before(lower)[before], _sums_from(upper)[after - 1]
    n_head, n_tail = ranks - before, after - 1 - ranks
    least, most = np.append(lower, 0.0)[after - 1], np.append(np.inf, upper)[before]
    at_least = _relative(tails + n_tail * least, heads + n_head * least)
    finite = np.where(np.isfinite(most), most, 0.0)
    at_most = _relative(tails + n_tail * finite, heads + n_head * finite)
    unbounded = _relative(n_tail.astype(np.float64), n_head.astype(np.float64))
    return np.maximum(at_least, np.where(np.isfinite(most), at_most, unbounded))


def _sums_before(squares: Vector) -> Vector:
    return np.append(0.0, np.cumsum(squares))


def _sums_from(squares: Vector) -> Vector:
    return np.append(np.cumsum(squares[::-1])[::-1], 0.0)


def _relative(tails: Vector, heads: Vector) -> Vector:
    """Return √(tail / (tail + head)), 0 where there is no tail."""
    share = np.zeros(len(tails))
    np.divide(tails, tails + heads, out=share, where=tails > 0)
    return np.sqrt(share)
