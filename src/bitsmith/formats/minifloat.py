"""Floats of a byte or less as OCP defines them, as tables of their values by code."""

from __future__ import annotations

import numpy as np

from bitsmith.formats.format import Float32


def _values(exponent_bits: int, mantissa_bits: int) -> Float32:
    """Return every code's value: sign, exponent (bias `2^(bits-1) - 1`, 0: subnormal), mantissa."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    size = np.ldexp(np.where(exponent > 0, 1.0, 0.0) + mantissa, np.maximum(exponent, 1) - bias)
    values: Float32 = np.where(codes >> (exponent_bits + mantissa_bits), -size, size).astype(np.float32)
    return values


def _e4m3() -> Float32:
    values = _values(4, 3)
    values[[0x7F, 0xFF]] = np.nan
    return values


E2M1 = _values(2, 1)
"""The 16 values of a 4-bit float: 0 to 6, and negative."""
E4M3 = _e4m3()
"""The 256 values of F8_E4M3, of at most 448; two codes are NaN."""
E8M0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
"""The 256 scales 2^(code - 127) of microscaling blocks; the last code is NaN."""
