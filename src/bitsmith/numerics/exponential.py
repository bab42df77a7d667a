"""The exponential function in loops that compile to vector instructions, where the C library's would not."""

from __future__ import annotations

import numpy as np
from numba import njit

_LOG2_E = 1.4426950408889634
_LN_2_HIGH = 0.6931471803691238  # its low 32 bits are zero, so that k times it is exact
_LN_2_LOW = 1.9082149292705877e-10
_INTEGER = 6755399441055744.0  # 1.5 · 2^52: added to a whole number it puts it into the lowest bits
_BIAS = 1023.0
_LEAST = -708.0  # e^-708 is the smallest that is no subnormal


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"}, inline="always")
def decay(x: float) -> float:
    """Return e^x for x ≤ 0 in float64, within 2 units in the last place; below e^-708 that; NaN of NaN.

    e^x = 2^k e^r with k = round(x log2 e) and |r| ≤ ln 2 / 2, e^r by its series to r¹² (the rest: 2e-16).
    """
    x = max(x, _LEAST)
    k = np.floor(x * _LOG2_E + 0.5)
    r = (x - k * _LN_2_HIGH) - k * _LN_2_LOW
    power = 1 / 479001600
    power = power * r + 1 / 39916800
    power = power * r + 1 / 3628800
    power = power * r + 1 / 362880
    power = power * r + 1 / 40320
    power = power * r + 1 / 5040
    power = power * r + 1 / 720
    power = power * r + 1 / 120
    power = power * r + 1 / 24
    power = power * r + 1 / 6
    power = power * r + 0.5
    power = power * r + 1.0
    power = power * r + 1.0
    exponent = np.float64(k + (_INTEGER + _BIAS)).view(np.int64) << np.int64(52)
    return float(power * np.int64(exponent).view(np.float64))


_LOG2_E_32 = np.float32(_LOG2_E)
_LN_2_HIGH_32 = np.float32(0.693359375)
_LN_2_LOW_32 = np.float32(-2.12194440e-4)
_INTEGER_32 = np.float32(12582912.0 + 127.0)  # 1.5 · 2^23 and the bias
_LARGEST_32 = np.float32(87.0)  # beyond, e^x would overflow: silu(-87) is within 1e-36 of 0
_HALF = np.float32(0.5)
_ONE = np.float32(1)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"}, inline="always")
def _exp_minus(x: np.float32) -> np.float32:
    """Return e^-x in float32, x first brought to -87 … 87."""
    y = min(max(-x, -_LARGEST_32), _LARGEST_32)
    k = np.floor(y * _LOG2_E_32 + _HALF)
    r = (y - k * _LN_2_HIGH_32) - k * _LN_2_LOW_32
    power = np.float32(1 / 5040)
    power = power * r + np.float32(1 / 720)
    power = power * r + np.float32(1 / 120)
    power = power * r + np.float32(1 / 24)
    power = power * r + np.float32(1 / 6)
    power = power * r + _HALF
    power = power * r + _ONE
    power = power * r + _ONE
    exponent = np.int32(np.float32(k + _INTEGER_32).view(np.int32) << np.int32(23))
    return np.float32(power * exponent.view(np.float32))


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"}, inline="always")
def silu(x: np.float32) -> np.float32:
    """Return x / (1 + e^-x) in float32, within about 4 units in the last place; NaN of NaN."""
    return np.float32(x / (_ONE + _exp_minus(x)))


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"}, inline="always")
def sigmoid(x: np.float32) -> np.float32:
    """Return 1 / (1 + e^-x) in float32, within about 4 units in the last place."""
    return np.float32(_ONE / (_ONE + _exp_minus(x)))
