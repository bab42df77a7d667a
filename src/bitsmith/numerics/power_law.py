"""Power laws in spectra: the slope of log σ, and the tail exponent α of σ² with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

FEWEST = 10  # values in a tail, and altogether
CANDIDATES = 200  # tails that are tried
RESAMPLES = 200
_NORMAL_975 = 1.959964
_SAME = 1e-9  # logarithms closer than this are equal values


@dataclass(frozen=True)
class LogSlope:
    """Least squares of ln σ_i = intercept + slope · ln i over the positive σ.

    `low`…`high` is the 95 % interval of the slope. Its standard error is the larger of the regression's and
    |slope|·√(2/n), that of sorted draws from a power law, whose residuals are not independent (Gabaix,
    Ibragimov 2011).
    """

    slope: float
    low: float
    high: float
    intercept: float
    r_squared: float
    n_values: int


@dataclass(frozen=True)
class TailFit:
    """Density p(λ) ∝ λ^−α of the λ ≥ x_min (Clauset, Shalizi, Newman 2009).

    `alpha` = 1 + n/Σ ln(λ_i/x_min) over the `n_tail` largest of `n_values`; x_min minimises the
    Kolmogorov-Smirnov distance `ks_distance` over 200 tails of at least 10 values (all tails if fewer),
    spaced evenly in ln n. `low`…`high` is the 95 % interval from semi-parametric resamples, in each of which
    x_min is chosen anew: α − 1 times and divided by the larger of the two ratios that their quantiles give.
    `p_value` is the share of the resamples that fit no better (below 0.1: not a power law). All three are
    None without resamples.
    """

    alpha: float
    low: float | None
    high: float | None
    x_min: float
    n_tail: int
    n_values: int
    ks_distance: float
    p_value: float | None


class _Tails(NamedTuple):
    """The best tail of each sample: its length, its α − 1, and its Kolmogorov-Smirnov distance."""

    lengths: NDArray[np.int64]
    exponents: Vector
    distances: Vector


def log_slope(sigma: NDArray[Any]) -> LogSlope | None:
    """Fit ln σ_i against ln i (σ descending); None under 10 positive values or where all are equal."""
    logs = _descending_logs(sigma)
    if logs is None:
        return None
    n = len(logs)
    x = np.log(np.arange(1, n + 1))
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ logs) / spread
    intercept = float(logs.mean() - slope * x.mean())
    residual = logs - intercept - slope * x
    unexplained, total = float(residual @ residual), float(np.sum(np.square(logs - logs.mean())))
    regression = float(stdtrit(n - 2, 0.975)) * np.sqrt(unexplained / (n - 2) / spread)
    margin = float(max(regression, _NORMAL_975 * abs(slope) * np.sqrt(2 / n)))
    return LogSlope(slope, slope - margin, slope + margin, intercept, 1.0 - unexplained / total, n)


def fit_tail(values: NDArray[Any], resamples: int = RESAMPLES, seed: int = 0) -> TailFit | None:
    """Fit a power law to the tail of `values` (eigenvalues λ = σ²), in any order.

    Values that are not positive are left out. None under 10 positive values or where all are equal.
    """
    logs = _descending_logs(values)
    if logs is None:
        return None
    lengths = _candidates(len(logs))
    best = _best_tails(logs[np.newaxis], lengths)
    if not np.isfinite(best.distances[0]):
        return None
    k, exponent, distance = int(best.lengths[0]), float(best.exponents[0]), float(best.distances[0])
    low = high = p_value = None
    if resamples > 0:
        drawn = _resampled(logs, k, exponent, resamples, np.random.default_rng(seed))
        others = _best_tails(drawn, lengths)
        ratio = _widest_ratio(others.exponents / exponent)
        low, high = 1.0 + exponent / ratio, 1.0 + exponent * ratio
        p_value = float(np.mean(others.distances >= distance))
    return TailFit(1.0 + exponent, low, high, float(np.exp(logs[k - 1])), k, len(logs), distance, p_value)


def _descending_logs(values: NDArray[Any]) -> Vector | None:
    positive = np.asarray(values, dtype=np.float64)
    positive = positive[positive > 0]
    if len(positive) < FEWEST:
        return None
    logs = np.sort(np.log(positive))[::-1]
    return None if logs[0] - logs[-1] < _SAME else logs


def _candidates(n: int) -> NDArray[np.int64]:
    """Return the lengths of the tails to try, ascending."""
    return np.unique(np.round(np.geomspace(FEWEST, n, CANDIDATES)).astype(np.int64))


def _best_tails(logs: Matrix, lengths: NDArray[np.int64]) -> _Tails:
    """Choose each sample's tail (`samples values`, descending); distance ∞ where every tail is one value."""
    n_samples = len(logs)
    best = _Tails(np.zeros(n_samples, np.int64), np.ones(n_samples), np.full(n_samples, np.inf))
    sums = np.cumsum(logs, axis=1)
    for k in lengths:
        least = logs[:, k - 1]
        spread = sums[:, k - 1] - k * least
        exponents = k / np.maximum(spread, _SAME)
        above = np.exp((least[:, np.newaxis] - logs[:, :k]) * exponents[:, np.newaxis])
        share = np.arange(1, k + 1) / k
        distances = np.maximum((share - above).max(axis=1), (above - share).max(axis=1) + 1 / k)
        better = (distances < best.distances) & (spread > _SAME)
        for field, value in zip(best, (k, exponents, distances), strict=True):
            np.copyto(field, value, where=better)
    return best


def _resampled(logs: Vector, k: int, exponent: float, count: int, rng: np.random.Generator) -> Matrix:
    """Draw samples of as many values: from the fitted law as often as in the tail, else from the body."""
    shape, body = (count, len(logs)), logs[k:]
    drawn = logs[k - 1] + rng.exponential(1 / exponent, shape)
    if len(body):
        in_body = rng.random(shape) >= k / len(logs)
        drawn[in_body] = body[rng.integers(0, len(body), int(in_body.sum()))]
    return -np.sort(-drawn, axis=1)


def _widest_ratio(ratios: Vector) -> float:
    """Return the larger of the two factors that hold 95 % of the ratios: those below 1 and those above."""
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(max(high, 1 / low))
