"""How the rows and columns of a matrix split into the modes of a Tensor-Train."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LEAST_SHARE, _MOST_SHARE = 0.5, 2.0  # a balanced mode factor against the geometric mean
_LARGEST_SPREAD = 4.0  # of the largest factor over the smallest, where any split keeps it


@dataclass(frozen=True)
class Modes:
    """How rows and columns split into mode factors, the slowest first: core k has mode `m_k n_k`."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Mode sizes `p_k = m_k n_k`."""
        return tuple(m * n for m, n in zip(self.rows, self.columns, strict=True))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, padding included."""
        return int(np.prod(self.rows)), int(np.prod(self.columns))


def balanced_modes(rows: int, columns: int, cores: int = 3) -> Modes:
    """Return near-equal mode factors with the least padding, the largest in the middle.

    The largest is at most four times the smallest where that can be. A large middle mode makes for small
    outer unfoldings, which is what streaming has to hold.
    """
    return Modes(_middle_largest(_factors(rows, cores)), _middle_largest(_factors(columns, cores)))


def _factors(count: int, parts: int) -> tuple[int, ...]:
    """Return factors whose product is at least `count`: not too uneven, least padding, most even."""
    if parts == 1:
        return (count,)
    mean = count ** (1 / parts)
    low, high = max(1, int(mean * _LEAST_SHARE)), int(np.ceil(mean * _MOST_SHARE))
    splits = []
    for first in range(low, high + 1):
        split = (first, *_factors(-(-count // first), parts - 1))
        spread = max(split) / min(split)
        splits.append((spread > _LARGEST_SPREAD, int(np.prod(split)), spread, split))
    return min(splits)[-1]


def _middle_largest(factors: tuple[int, ...]) -> tuple[int, ...]:
    *ends, largest = sorted(factors)
    middle = len(ends) // 2
    return (*ends[:middle], largest, *ends[middle:])
