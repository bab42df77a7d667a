"""Search for the scales of a gauge by the rounding error of the matrices whose columns they change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitsmith.passes.column_trial import ColumnTrial, gain_of

Float64 = NDArray[np.float64]

LIMIT = 64.0
"""Factors stay between 1 / LIMIT and LIMIT."""

OF_SCALE, OF_MOMENT = (-1.0, -0.5, 0.5), (-0.125, 0.0625, 0.125, 0.25, 0.5)
"""Exponents a of the columns' RMS and b of E[x²] that are tried in the columns' factor `RMS^a E[x²]^b`."""


def normalised(factors: Float64) -> Float64:
    """Return factors of geometric mean 1 within the limits, 1 where they are zero or not finite."""
    live = np.isfinite(factors) & (factors > 0)
    if not live.any():
        return np.ones_like(factors)
    logs = np.log(factors, out=np.zeros_like(factors), where=live)
    logs[live] -= logs[live].mean()
    found: Float64 = np.exp(np.clip(logs, -np.log(LIMIT), np.log(LIMIT)))
    return found


def best_scales(matrices: Sequence[ColumnTrial], power: int, balance: Float64) -> Float64 | None:
    """Return the scales, columns taking `scales ** power`, of the least summed error of all matrices.

    Errors are those of `ColumnTrial`. Candidates are `balance` and column factors `RMS^a E[x²]^b`: a of
    `OF_SCALE` first, then b of `OF_MOMENT` (where that is known) with the best a. None where none is better
    than no scales by more than its standard errors (`gain_of`).
    """
    search = _Search(matrices, power)
    search.offer(balance)
    for of_scale in OF_SCALE:
        search.offer(search.family(of_scale, 0.0), of_scale)
    if all(one.importance is not None for one in matrices):
        of_scale = search.of_scale
        for of_moment in OF_MOMENT:
            search.offer(search.family(of_scale, of_moment), of_scale)
    return search.best


class _Search:
    """The best scales so far, by the gain over none."""

    def __init__(self, matrices: Sequence[ColumnTrial], power: int) -> None:
        self.matrices, self.power = matrices, power
        self.best: Float64 | None = None
        self.gain = self.of_scale = 0.0
        self._before = [one.errors() for one in matrices]
        self._squares = np.mean([one.mean_squares for one in matrices], axis=0)
        self._moments = np.mean([one.moments for one in matrices], axis=0)

    def family(self, of_scale: float, of_moment: float) -> Float64:
        """Return scales that give columns the factor `RMS^of_scale E[x²]^of_moment`, 1 where either is 0."""
        dead = (self._squares == 0) | (self._moments == 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = self._squares ** (of_scale / 2) * self._moments**of_moment
            return normalised(np.where(dead, 0.0, factors**self.power))

    def offer(self, scales: Float64, of_scale: float = 0.0) -> None:
        """Take the scales if they gain more than the best so far, and surely something."""
        factors = scales**self.power
        gain = gain_of(self._before, [one.scaled(factors[one.channels]) for one in self.matrices])
        if gain > self.gain:
            self.best, self.gain, self.of_scale = scales, gain, of_scale
