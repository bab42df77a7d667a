"""Sums of squares inside compiled loops."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.numerics.vectors import converted, load, spread, total

_SUMS = 16  # side by side


@njit(nogil=True, cache=True, error_model="numpy")
def add_squares(
    weights: NDArray[np.float32], values: NDArray[np.float32], unit: int, sums: NDArray[np.float64]
) -> None:
    """Add `sum (w - v)^2` and `sum w^2` of every `unit` weights to `sums` (`n 2`).

    Differences are taken in float32, squares in float64.
    """
    for k in range(sums.shape[0]):
        first, last = k * unit, min((k + 1) * unit, weights.size)
        whole = first + (last - first) // _SUMS * _SUMS
        error, energy = spread(np.float64(0.0), 16), spread(np.float64(0.0), 16)
        for at in range(first, whole, _SUMS):
            w = load(weights, at, 16)
            left, wide = converted(w - load(values, at, 16), "float64"), converted(w, "float64")
            error, energy = error + left * left, energy + wide * wide
        sums[k, 0] += total(error)
        sums[k, 1] += total(energy)
        for at in range(whole, last):
            rest = np.float64(weights[at] - values[at])
            sums[k, 0] += rest * rest
            sums[k, 1] += np.float64(weights[at]) * np.float64(weights[at])
