"""The write-up's low rank with 4-bit factors, read so that each factor has a single scale.

It says "SVD rank-512 + 4-bit quant" and nothing of scales. `passes.low_rank` gives every row of a factor its
own; here the largest entry of a factor sets the step of all of it, so that one outlier rounds the rest to
zeros or far past their size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitsmith.numerics.tensor_train import RowSource
from bitsmith.passes.factors import Factors, Metric, row_chunks, squares, symmetric
from bitsmith.passes.low_rank import SEED_RANK, SEED_SIDE

_LARGEST = 7  # of 4 bits, symmetric


@dataclass(frozen=True)
class WholeFactors:
    """One matrix at the write-up's rank, factors in int4 with one scale each: its relative error."""

    name: str
    rank: int
    error: float


def whole_factors(name: str, source: RowSource) -> WholeFactors | None:
    """Measure a matrix, all of its rows; None for one of zeros.

    Memory holds what `Factors` holds and the left factor, `4 out rank` bytes. Raises BitsmithError for
    anything but a matrix and for values that are not finite.
    """
    factors = Factors(source, Metric(None, source.shape[1]))
    if factors.rank == 0:
        return None
    rank = min(factors.rank, max(1, round(factors.side * SEED_RANK / SEED_SIDE)))
    every = np.arange(factors.rows)
    left = np.concatenate([factors.left(at, rows)[:, :rank] for at, rows in row_chunks(source, every)])
    left, right = (
        symmetric(np.ascontiguousarray(one).reshape(1, -1), _LARGEST).reshape(one.shape)
        for one in (left, factors.right[:rank])
    )
    error = total = 0.0
    for at, rows in row_chunks(source, every):
        error += float(squares(rows - left[at] @ right).sum())
        total += float(squares(rows).sum())
    return WholeFactors(name, rank, float(np.sqrt(error / total)))
