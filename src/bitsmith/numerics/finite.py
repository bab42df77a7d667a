"""Find values that no format can store."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


def first_non_finite(rows: NDArray[np.float32]) -> tuple[int, int] | None:
    """Return (row, column) of the first NaN or infinity in `rows` (`out in`), or None."""
    flat = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1)
    found = int(_first_non_finite(flat.view(np.int32)))
    return None if found < 0 else divmod(found, rows.shape[-1])


@njit(nogil=True, cache=True)
def _first_non_finite(bits: NDArray[np.int32]) -> int:
    piece = 4096
    exponent = np.int32(0x7F800000)
    for start in range(0, bits.size, piece):
        stop = min(start + piece, bits.size)
        largest = np.int32(0)
        for i in range(start, stop):
            largest = max(largest, np.int32(bits[i] & exponent))
        if largest == exponent:
            for i in range(start, stop):
                if np.int32(bits[i] & exponent) == exponent:
                    return i
    return -1
