"""Gradients of what a layer does element by element between its matrix products, in compiled loops."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.numerics.exponential import sigmoid

Float32 = NDArray[np.float32]

_ONE = np.float32(1)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def gate_linear_gradient(gate: Float32, up: Float32, by_product: Float32) -> None:
    """Replace `gate` and `up` (`N in`) by the gradients by them; `by_product` is by silu(gate) · up."""
    for row in range(gate.shape[0]):
        of_gate, of_up, by = gate[row], up[row], by_product[row]
        for column in range(of_gate.size):
            value, linear = of_gate[column], of_up[column]
            slope = sigmoid(value)
            of_gate[column] = by[column] * linear * (slope + value * slope * (_ONE - slope))
            of_up[column] = by[column] * value * slope


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def convolve_gradient(mixed: Float32, taps: Float32, by_result: Float32) -> None:
    """Replace `by_result` (`T channels`), a gradient by what `convolve` makes of `mixed`, by that by `mixed`.

    First by that by what silu is taken of, then, from the first token on, with the taps the other way round.
    """
    n_taps, tokens = taps.shape[0], mixed.shape[0]
    total = np.empty(mixed.shape[1], np.float32)
    for token in range(tokens):
        row, last, by = mixed[token], taps[n_taps - 1], by_result[token]
        for channel in range(row.size):
            total[channel] = row[channel] * last[channel]
        for back in range(1, min(n_taps, token + 1)):
            before, tap = mixed[token - back], taps[n_taps - 1 - back]
            for channel in range(row.size):
                total[channel] += before[channel] * tap[channel]
        for channel in range(row.size):
            value = total[channel]
            slope = sigmoid(value)
            by[channel] *= slope + value * slope * (_ONE - slope)
    for token in range(tokens):
        by, last = by_result[token], taps[n_taps - 1]
        for channel in range(by.size):
            by[channel] *= last[channel]
        for ahead in range(1, min(n_taps, tokens - token)):
            after, tap = by_result[token + ahead], taps[n_taps - 1 - ahead]
            for channel in range(by.size):
                by[channel] += after[channel] * tap[channel]
