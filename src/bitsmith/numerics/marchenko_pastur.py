"""The law of random matrices' singular values (Marchenko, Pastur 1967), and where the largest may lie."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_TRACY_WIDOM_999 = 3.2724  # 99.9 % quantile of the Tracy-Widom law for real matrices


class MarchenkoPastur:
    """The law of σ²/long for independent entries of variance 1, as a table of its distribution."""

    def __init__(self, short: int, long: int) -> None:
        ratio = short / long
        centre, half = 1.0 + ratio, 2.0 * np.sqrt(ratio)
        self.lower, self.upper = (1.0 - np.sqrt(ratio)) ** 2, (1.0 + np.sqrt(ratio)) ** 2
        edges = np.linspace(np.pi, 0.0, 4097)  # λ = centre + half·cos θ makes the density smooth
        middles = (edges[1:] + edges[:-1]) / 2
        mass = np.square(half * np.sin(middles)) / (centre + half * np.cos(middles))
        self._points = centre + half * np.cos(edges)
        self._share = np.append(0.0, np.cumsum(mass)) / np.sum(mass)
        self.median = float(np.interp(0.5, self._share, self._points))
        roots = np.sqrt(long - 1) + np.sqrt(short)
        self.long = long
        width = roots * (1 / np.sqrt(long - 1) + 1 / np.sqrt(short)) ** (1 / 3)
        self.threshold = float(max(self.upper, (roots**2 + _TRACY_WIDOM_999 * width) / long))

    def quantile(self, share: Vector) -> Vector:
        """Return the values below which these shares of the law lie."""
        return np.asarray(np.interp(share, self._share, self._points), np.float64)

    def distance(self, values: Vector) -> float:
        """Return the Kolmogorov-Smirnov distance of a sample."""
        share = np.interp(np.sort(values), self._points, self._share)
        steps = np.arange(len(values) + 1) / len(values)
        return float(max(np.max(share - steps[:-1]), np.max(steps[1:] - share)))
