"""Where a Tensor-Train in 4 bits passes the cosine gate: both ranks in proportion, ever finer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from bitsmith.numerics.modes import balanced_modes
from bitsmith.numerics.tensor_train import COSINE_GATE, RowSource, Train, matrix_shape, sweep
from bitsmith.passes.factors import symmetric, symmetric_bytes

Float64 = NDArray[np.float64]

SHARES = 256
"""Of the largest ranks."""
STEPS = (64, 16, 4, 1)
"""The last is taken only where it matters on which side of int4 the gate lies."""


@dataclass(frozen=True)
class TrainPoint:
    """A Tensor-Train of one matrix as decoded: 16-bit bytes over its own, and the mean row cosine.

    The middle core is in int4 with a scale per row, the outer ones are in 16 bits.
    """

    name: str
    parameters: int
    ranks: tuple[int, ...]
    ratio: float
    cosine: float


def search_trains(name: str, source: RowSource, int4_ratio: float) -> tuple[TrainPoint, ...]:
    """Return the trains tried, the smallest first; `int4_ratio` is what int4 of the matrix itself reaches.

    Reads the matrix nine to twelve times. Raises BitsmithError as `sweep` does.
    """
    found: dict[int, TrainPoint] = {}
    low, high = 0, SHARES + 1
    for step in STEPS:
        if step == STEPS[-1] and not _open(found, int4_ratio):
            break
        found |= _trains(name, source, range(low + step, high, step))
        high = min((share for share, one in found.items() if one.cosine >= COSINE_GATE), default=0)
        low = max((share for share in found if share < high), default=0)
        if high == 0:  # not even the largest ranks pass
            break
    return tuple(found[share] for share in sorted(found))


def _open(found: Mapping[int, TrainPoint], int4_ratio: float) -> bool:
    passing = [one.ratio for one in found.values() if one.cosine >= COSINE_GATE]
    failing = [one.ratio for one in found.values() if one.cosine < COSINE_GATE]
    return max(passing) <= int4_ratio < min((one for one in failing if one > max(passing)), default=0.0)


def _trains(name: str, source: RowSource, shares: Sequence[int]) -> dict[int, TrainPoint]:
    sizes = balanced_modes(*matrix_shape(source)).sizes
    ranks = [(1, *(max(1, sizes[core] * share // SHARES) for core in (0, 2)), 1) for share in shares]
    trains = sweep(source, ranks, coded=_int4) if ranks else ()
    return {
        share: TrainPoint(name, prod(source.shape), one.ranks, _ratio(one), one.mean_row_cosine)
        for share, one in zip(shares, trains, strict=True)
        if one.mean_row_cosine is not None
    }


def _ratio(train: Train) -> float:
    """Return 16-bit bytes of the matrix over those of a train with its middle core in int4."""
    rows = train.ranks[1] * train.modes.sizes[1]
    outer = train.parameters - rows * train.ranks[2]
    nbytes = symmetric_bytes(rows, train.ranks[2], 4) + 2 * outer
    return 2 * train.ratio * train.parameters / nbytes


def _int4(rows: Float64) -> Float64:
    return symmetric(rows.astype(np.float32), 7).astype(np.float64)
