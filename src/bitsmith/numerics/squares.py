"""Sums of squares inside compiled loops."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_SUMS = 16  # side by side, so that they vectorise in a fixed order


@njit(nogil=True, cache=True, error_model="numpy")
def add_squares(weights: NDArray[np.float32], values: NDArray[np.float32], sums: NDArray[np.float64]) -> None:
    """Add `sum (w - v)^2` and `sum w^2` to `sums` (`2`): differences in float32, squares in float64."""
    error, energy = np.zeros(_SUMS, np.float64), np.zeros(_SUMS, np.float64)
    whole = weights.size // _SUMS * _SUMS
    for at in range(0, whole, _SUMS):
        w, v = weights[at : at + _SUMS], values[at : at + _SUMS]
        for k in range(_SUMS):
            left = np.float64(w[k] - v[k])
            error[k] += left * left
            energy[k] += np.float64(w[k]) * np.float64(w[k])
    for k in range(weights.size - whole):
        left = np.float64(weights[whole + k] - values[whole + k])
        error[k] += left * left
        energy[k] += np.float64(weights[whole + k]) * np.float64(weights[whole + k])
    sums[0] += error.sum()
    sums[1] += energy.sum()
