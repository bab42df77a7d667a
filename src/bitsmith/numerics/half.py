"""float32 and float16 inside compiled loops: rounding to nearest even, saturating instead of overflowing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from bitsmith.numerics.vectors import larger, magnitude, reread, smaller, spread, where

HALF_MAX = np.float32(65504.0)
"""The largest finite float16."""

HALF_TINY = np.float32(2.0**-24)
"""The smallest positive float16."""

_MIN_NORMAL_BITS = np.int32(0x38800000)  # 2^-14, the smallest normal float16
_SUBNORMAL_MAGIC = np.float32(0.5)  # adding it leaves exactly the float16 subnormal's bits in the mantissa
_SUBNORMAL_MAGIC_BITS = np.int32(0x3F000000)
_REBIAS = np.int32(112 << 23)
_FAR = np.float32(2.0**112)  # between the exponents of the same bits read as float32 and as float16


@njit(nogil=True, cache=True, error_model="numpy")
def half_bits(value: np.float32) -> np.uint16:
    """Return the float16 bits nearest to `value`; beyond ±65504 the largest finite one."""
    clipped = min(max(np.float32(value), -HALF_MAX), HALF_MAX)
    bits = np.float32(clipped).view(np.int32)
    magnitude = bits & np.int32(0x7FFFFFFF)
    sign = (bits >> np.int32(16)) & np.int32(0x8000)
    odd = (magnitude >> np.int32(13)) & np.int32(1)
    normal = (magnitude + np.int32(0xFFF) + odd - _REBIAS) >> np.int32(13)
    shifted = np.float32(abs(clipped) + _SUBNORMAL_MAGIC)
    subnormal = shifted.view(np.int32) - _SUBNORMAL_MAGIC_BITS
    rounded = subnormal if magnitude < _MIN_NORMAL_BITS else normal
    return np.uint16(sign | rounded)


@njit(nogil=True, cache=True, error_model="numpy")
def half_round(value: np.float32) -> np.float32:
    """Return `value` rounded to the nearest float16 and widened back, within ±65504."""
    clipped = min(max(np.float32(value), -HALF_MAX), HALF_MAX)
    bits = np.float32(clipped).view(np.int32)
    magnitude = bits & np.int32(0x7FFFFFFF)
    sign = bits & np.int32(-(2**31))
    odd = (magnitude >> np.int32(13)) & np.int32(1)
    normal = (magnitude + np.int32(0xFFF) + odd) & np.int32(~0x1FFF)
    subnormal = np.float32((abs(clipped) + _SUBNORMAL_MAGIC) - _SUBNORMAL_MAGIC)
    rounded = subnormal.view(np.int32) if magnitude < _MIN_NORMAL_BITS else normal
    return np.int32(rounded | sign).view(np.float32)


@njit(nogil=True, cache=True, error_model="numpy")
def half_value(bits: np.uint16) -> np.float32:
    """Return the value of float16 bits as float32, exactly.

    Exponent and mantissa are read as a float32 of a far smaller exponent, so that one product also puts
    subnormal ones right.
    """
    word = np.int32(bits)
    magnitude = word & np.int32(0x7FFF)
    value = np.int32(magnitude << np.int32(13)).view(np.float32) * _FAR
    finite = np.float32(value).view(np.int32)
    found = finite if magnitude < np.int32(0x7C00) else finite | np.int32(0x7F800000)
    return np.int32(found | ((word & np.int32(0x8000)) << np.int32(16))).view(np.float32)


@njit(nogil=True, cache=True, error_model="numpy")
def half_vector(values: Any) -> tuple[Any, Any]:
    """Return 16 floats as `half_round` rounds them, and their `half_bits` (int32)."""
    clipped = smaller(larger(values, spread(-HALF_MAX, 16)), spread(HALF_MAX, 16))
    bits = reread(clipped, "int32")
    size, sign = bits & np.int32(0x7FFFFFFF), bits & np.int32(-(2**31))
    raised = size + ((size >> np.int32(13)) & np.int32(1)) + np.int32(0xFFF)
    shifted = magnitude(clipped) + _SUBNORMAL_MAGIC
    tiny = spread(_MIN_NORMAL_BITS, 16) > size
    rounded = where(tiny, reread(shifted - _SUBNORMAL_MAGIC, "int32"), raised & np.int32(~0x1FFF))
    short = where(tiny, reread(shifted, "int32") - _SUBNORMAL_MAGIC_BITS, (raised - _REBIAS) >> np.int32(13))
    return reread(rounded | sign, "float32"), short | ((sign >> np.int32(16)) & np.int32(0x8000))
