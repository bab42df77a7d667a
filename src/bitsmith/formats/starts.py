"""Where the scale searches begin.

Each list was picked greedily, one start after the other, so that the mean over blocks of the best start's
error falls fastest: Gaussian, Student-t and outlier rows, equal and log-normal importance. Any prefix is
good.
"""

from __future__ import annotations

import numpy as np

from bitsmith.formats.format import Float32


def floats(*values: float) -> Float32:
    """Return `values` as float32."""
    return np.array(values, np.float32)


def pairs(*values: float) -> Float32:
    """Return `values` as float32 rows of (share of the span below code 0, steps over the span)."""
    return np.array(values, np.float32).reshape(-1, 2)


AFFINE_2 = pairs(
    0.1, 3.78, 0.2, 3.78, 0.02, 3.78, 0.12, 3.54, 0.0, 4.38, 0.04, 3.54, 0.24, 3.78, 0.2, 4.86, 0.1, 2.46,
    0.12, 4.86, 0.0, 3.0, 0.24, 4.62, -0.02, 4.98, -0.1, 3.0, 0.06, 2.94, 0.08, 4.98, 0.24, 4.14, -0.1, 4.98,
    0.24, 3.3, 0.02, 4.98, 0.16, 4.86, 0.24, 4.98, 0.02, 2.46, -0.02, 3.78,
)  # fmt: skip
"""For codes 0…3."""

AFFINE_4 = pairs(
    0.01, 15.3, 0.0, 15.6, 0.04, 15.6, -0.06, 14.1, 0.0, 15.0, 0.08, 16.5, -0.08, 14.1, 0.0, 16.2, 0.0, 13.2,
    0.02, 15.3, 0.0, 15.3, 0.0, 17.1, 0.12, 17.1, -0.02, 15.0, 0.04, 17.7, 0.02, 15.0, -0.06, 13.2,
    0.06, 16.5, 0.0, 14.1, 0.0, 17.7, 0.18, 18.9, -0.08, 12.0, 0.04, 16.5, 0.02, 14.1, 0.0, 14.7, 0.02, 16.5,
    0.02, 20.1, 0.12, 17.7,
)  # fmt: skip
"""For codes 0…15."""

AFFINE_5 = pairs(
    0.0, 31.0, 0.0, 30.38, -0.02, 30.38, 0.0, 31.62, 0.02, 31.62, 0.0, 29.14, 0.0, 27.9, -0.04, 29.76,
    0.02, 32.24, -0.06, 29.14, -0.1, 27.28, 0.0, 32.24, 0.0, 29.76, -0.04, 26.04, 0.0, 27.28, 0.04, 32.24,
    -0.08, 27.9, 0.0, 32.86, -0.04, 29.14, 0.02, 32.86, 0.06, 32.86, 0.0, 25.42, 0.04, 32.86, -0.04, 28.52,
    0.08, 34.1, -0.06, 28.52, 0.0, 33.48, -0.08, 24.8, -0.02, 29.76, 0.06, 34.1,
)  # fmt: skip
"""For codes 0…31."""
