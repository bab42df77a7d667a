"""Power laws in spectra: the slope of log σ, and the tail exponent α of σ² with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class LogSlope:
    """Least squares of ln σ_i = intercept + slope · ln i over the positive σ; `low`…`high` is a 95 % interval.

    The interval assumes independent residuals, which those of sorted values are not: it is a lower bound of
    the uncertainty.
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

    `alpha` = 1 + n/Σ ln(λ_i/x_min), x_min minimising the Kolmogorov-Smirnov distance `ks_distance`;
    `low`…`high` a 95 % bootstrap interval with x_min chosen anew in every resample; `p_value` the share of
    semi-parametric resamples that fit worse (below 0.1: a power law is refused), None with no resamples.
    """

    alpha: float
    low: float | None
    high: float | None
    x_min: float
    n_tail: int
    n_values: int
    ks_distance: float
    p_value: float | None


def log_slope(sigma: NDArray[Any]) -> LogSlope | None:
    """Fit ln σ_i against ln i (σ descending); None under 10 positive values or where all are equal."""


def fit_tail(values: NDArray[Any], resamples: int = 100, seed: int = 0) -> TailFit | None:
    """Fit a power law to the tail of `values` (eigenvalues λ = σ²).

    Values that are not positive are left out. None under 10 positive values or where all are equal.
    """
