"""Low rank against int4 at equal bytes, on the actual weights (signatures; bodies follow)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.floating]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Coding:
    """One way of storing one matrix, with the error measured after decoding it.

    `relative_error` is `|W - W'|_F / |W|_F` in the contest's metric; zeros would score 1. `budget` names the
    int4 coding whose bytes a low-rank coding may use. `theory_error` is Eckart-Young-Mirsky's at `rank` on the
    true spectrum, `claimed_error` the seed's on its claimed exponential decay.
    """

    method: str
    stored_bytes: int
    bpw: float
    ratio_to_16_bit: float
    relative_error: float | None
    rank: int | None = None
    budget: str | None = None
    theory_error: float | None = None
    claimed_error: float | None = None
    measured_over_theory: float | None = None
    measured_over_claimed: float | None = None

    @property
    def worse_than_zeros(self) -> bool:
        """Whether storing nothing at all would have been closer."""
        return self.relative_error is not None and self.relative_error >= 1


@dataclass(frozen=True)
class Contest:
    """One matrix: int4 codings, low rank in the bytes of each, the seed's own configuration."""

    rows: int
    columns: int
    metric: str  # "weights", "input diagonal" or "input covariance"
    int4: tuple[Coding, ...]
    low_rank: tuple[Coding, ...]
    with_residual: tuple[Coding, ...]  # low rank in 16 bits plus int4 of what it leaves, same bytes
    seed: Coding  # rank 512/4096 of the shorter side, 4-bit factors

    @property
    def low_rank_wins(self) -> bool | None:
        """Whether some low-rank coding is closer than the int4 coding whose bytes it had; None for zeros."""
        raise NotImplementedError


def contest(
    weights: Weights,
    second_moment: Float64 | None = None,
    singular_values: Float64 | None = None,
) -> Contest:
    """Measure low rank against int4 on `weights` (`out in`); `second_moment` is E[x xᵀ] (`in in`) or its diagonal (`in`)."""
    raise NotImplementedError


@dataclass(frozen=True)
class FormatGap:
    """How far one format is from the Gaussian bounds at its rate; positive dB are worse than the bound."""

    format: str
    bpw: float
    relative_error: float
    gap_white_db: float
    gap_spectral_db: float


def format_gaps(
    weights: Weights, singular_values: Float64, formats: Sequence[str] = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
) -> tuple[FormatGap, ...]:
    """Encode and decode `weights` in each format that fits its rows and compare with the bounds."""
    raise NotImplementedError
