"""Intervals of ratios of sums by paired bootstrap: what is drawn together keeps together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitsmith.numerics.divergence import MIN_CHUNKS, Estimate

Float64 = NDArray[np.float64]

_TAILS = (0.025, 0.975)
_DRAWS_AT_ONCE = 50


def ratio_of_sums(top: ArrayLike, bottom: ArrayLike, resamples: int = 2000, seed: int = 0) -> Estimate | None:
    """Return `sum(top) / sum(bottom)` of paired entries with its 95 % interval.

    Pairs are drawn with replacement `resamples` times; the interval is the 2.5 % to 97.5 % percentile range
    of the drawn ratios, None where there are fewer than two pairs or a draw has nothing below the line. None
    where `bottom` sums to 0.
    """
    return difference_of_ratios((top, bottom), None, resamples, seed)


def difference_of_ratios(
    one: tuple[ArrayLike, ArrayLike],
    other: tuple[ArrayLike, ArrayLike] | None,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """Return the ratio of sums of `one` less that of `other` as `ratio_of_sums` does, both drawn alike."""
    count = len(np.atleast_1d(np.asarray(one[0])))
    whole = _difference(np.ones((1, count)), one, other)[0]
    if np.isnan(whole):
        return None
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    found = _difference(draws.astype(np.float64), one, other)
    if count < MIN_CHUNKS or np.isnan(found).any():
        return Estimate(float(whole), None, None)
    low, high = np.quantile(found, _TAILS)
    return Estimate(float(whole), float(low), float(high))


def resampled(
    statistic: Callable[[Float64], Float64], count: int, resamples: int = 2000, seed: int = 0
) -> Float64 | None:
    """Return a statistic (`resamples`) of `count` things drawn with replacement; None for fewer than two.

    `statistic` is given how often each draw holds each (`R count`), some draws at a time, and returns `R`.
    """
    if count < MIN_CHUNKS:
        return None
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    parts = [draws[at : at + _DRAWS_AT_ONCE] for at in range(0, resamples, _DRAWS_AT_ONCE)]
    return np.concatenate([statistic(part.astype(np.float64)) for part in parts])


def interval_about(value: float, drawn: Float64 | None) -> Estimate:
    """Return a value with the 2.5 % to 97.5 % percentile range of what was drawn; no interval without any."""
    if drawn is None or not len(drawn):
        return Estimate(value, None, None)
    low, high = np.quantile(drawn, _TAILS)
    return Estimate(value, float(low), float(high))


def _difference(
    draws: Float64, one: tuple[ArrayLike, ArrayLike], other: tuple[ArrayLike, ArrayLike] | None
) -> Float64:
    first = _ratios(draws, *one)
    return first if other is None else first - _ratios(draws, *other)


def _ratios(draws: Float64, top: ArrayLike, bottom: ArrayLike) -> Float64:
    """Return each draw's ratio, NaN where nothing is below the line."""
    above, below = (draws @ np.asarray(part, np.float64) for part in (top, bottom))
    found: Float64 = np.divide(above, below, out=np.full(len(draws), np.nan), where=below > 0)
    return found
