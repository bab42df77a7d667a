"""Sums of squares inside compiled loops."""

from __future__ import annotations

from typing import Any

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


def row_products(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float64]:
    """Return `|l|²`, `|r|²`, `<l, r>` and `|l - r|²` of each row of two matrices of one type (`n 4`).

    Differences are taken in their precision, float32 or float64, sums in float64.
    """
    sums = np.zeros((len(left), 4))
    _add_row_products(np.ascontiguousarray(left), np.ascontiguousarray(right), sums)
    return sums


@njit(nogil=True, cache=True, error_model="numpy")
def _add_row_products(left: NDArray[Any], right: NDArray[Any], sums: NDArray[np.float64]) -> None:
    columns = left.shape[1]
    for row in range(left.shape[0]):
        first = row * columns
        whole = first + columns // 8 * 8
        zero = spread(np.float64(0.0), 8)
        energy, other, inner, error = zero, zero, zero, zero
        for at in range(first, whole, 8):
            a, b = load(left, at, 8), load(right, at, 8)
            gap = converted(a - b, "float64")
            a64, b64 = converted(a, "float64"), converted(b, "float64")
            energy, other = energy + a64 * a64, other + b64 * b64
            inner, error = inner + a64 * b64, error + gap * gap
        sums[row, 0], sums[row, 1] = total(energy), total(other)
        sums[row, 2], sums[row, 3] = total(inner), total(error)
        for at in range(columns // 8 * 8, columns):
            one, two, rest = left[row, at], right[row, at], np.float64(left[row, at] - right[row, at])
            sums[row, 0] += np.float64(one) * np.float64(one)
            sums[row, 1] += np.float64(two) * np.float64(two)
            sums[row, 2] += np.float64(one) * np.float64(two)
            sums[row, 3] += rest * rest
