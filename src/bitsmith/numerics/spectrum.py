"""Singular values of a matrix read in slices of rows, with error bounds, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas, eigvalsh, qr, svdvals

from bitsmith.errors import BitsmithError

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Method = Literal["auto", "gram", "svd"]

ACCURATE = 1e-5  # relative error of a singular value from which `auto` leaves the Gram matrix
ERRORS = (0.5, 0.2, 0.1, 0.05, 0.01)
RANKS = (128, 256, 512, 1024, 2048)
INDICES = (1, 2, 3, 4, 512, 1024, 2048, 4096)


class Rows(Protocol):
    """What is read: a `TensorRef`, or anything with a shape and slices of rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (`out in`); axes after the first are flattened into columns."""

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows `[start, stop)`."""


@dataclass(frozen=True)
class Spectrum:
    """All singular values of a matrix, descending, each with the bound of its absolute error.

    `method` is how they were found: `gram` (square roots of the eigenvalues of the Gram matrix) or `svd`.
    """

    shape: tuple[int, int]
    sigma: Vector
    error: Vector
    method: Literal["gram", "svd"]

    @property
    def rank(self) -> int:
        """Number of singular values that are larger than their error bound."""

    @property
    def relative_error(self) -> float | None:
        """Largest bound of the relative error over the first `rank` singular values; None at rank 0."""

    @property
    def first_inaccurate(self) -> int | None:
        """Index (from 1) of the first singular value whose relative error may exceed 1e-5; None if none."""

    @property
    def energy(self) -> float:
        """Squared Frobenius norm Σσ²."""

    def truncation_error(self) -> Vector:
        """Relative Frobenius error √(Σ_{i>r} σ² / Σσ²) of the best rank r, for r = 0 … n (`n+1`).

        Eckart, Young 1936; Mirsky 1960. All zeros for a zero matrix.
        """

    def rank_for_error(self, error: float) -> int:
        """Return the smallest rank whose relative Frobenius error is at most `error`."""


@dataclass(frozen=True)
class RandomComparison:
    """The spectrum beside that of a random matrix of the same shape with independent entries.

    Marchenko, Pastur 1967: for `long × short` entries of variance v the singular values fill
    √v (√long ± √short). `spikes` are the σ above `threshold`: the upper edge plus the 99.9 % quantile of
    Tracy-Widom fluctuations (Johnstone 2001). The plain fields take v = Σσ²/(long·short); those of `bulk_` take
    the v that matches the median σ (Gavish, Donoho 2014), which spikes do not inflate: None where more than
    half of the σ are zero. `ks_distance` is the Kolmogorov-Smirnov distance between the σ² at or below the
    threshold and Marchenko-Pastur at the same variance.
    """

    variance: float
    lower_edge: float
    upper_edge: float
    threshold: float
    spikes: int
    spike_energy: float  # share of Σσ²
    ks_distance: float | None
    bulk_variance: float | None
    bulk_upper_edge: float | None
    bulk_spikes: int | None
    bulk_spike_energy: float | None
    bulk_ks_distance: float | None


@dataclass(frozen=True)
class SpectrumStatistics:
    """What the singular values of one matrix say, as plain values; None is not measurable.

    `condition_number` σ₁/σ_n (None if rank-deficient); `stable_rank` Σσ²/σ₁² (Rudelson, Vershynin 2007);
    `effective_rank` exp(−Σ p ln p), p = σ/Σσ (Roy, Vetterli 2007); `nuclear_rank` (Σσ)²/Σσ²;
    `rank_for_error` the smallest rank for each relative Frobenius error; `energy_at` share of Σσ² in the first
    r; `sigma_at` σ at indices from 1, clipped to those there are; `r90` min k: Σ_{i≤k} σ ≥ 0.9 Σσ.
    """

    shape: tuple[int, int]
    method: Literal["gram", "svd"]
    relative_error: float | None
    first_inaccurate: int | None
    rank: int
    frobenius: float
    condition_number: float | None
    stable_rank: float | None
    effective_rank: float | None
    nuclear_rank: float | None
    r90: int
    rank_for_error: dict[float, int]
    energy_at: dict[int, float]
    sigma_at: dict[int, float]
    random: RandomComparison | None


@dataclass(frozen=True)
class PartialSpectrum:
    """Bounds that follow from a few singular values, since they descend; ranks r = 0 … n (`n+1`).

    `lowest_error[r]` and `highest_error[r]` bound the relative Frobenius error of the best rank r.
    """

    shape: tuple[int, int]
    sigma_at: dict[int, float]
    lowest_error: Vector
    highest_error: Vector

    def rank_bounds(self, error: float) -> tuple[int, int]:
        """Return the smallest and the largest that `rank_for_error(error)` can be."""


def singular_values(
    source: NDArray[Any] | Rows, method: Method = "auto", slice_bytes: int = 64 << 20
) -> Spectrum:
    """Return all singular values of a matrix, or of a tensor flattened to `out × rest`.

    `auto` takes the Gram matrix, and the direct way (QR by slices, then SVD) where the Gram matrix leaves a
    relative error bound above 1e-5. Raises BitsmithError naming the first NaN or infinity, or an empty shape.
    """


def describe(
    spectrum: Spectrum,
    errors: Sequence[float] = ERRORS,
    ranks: Sequence[int] = RANKS,
    indices: Sequence[int] = INDICES,
) -> SpectrumStatistics:
    """Return the statistics of a spectrum."""


def compare_with_random(spectrum: Spectrum) -> RandomComparison | None:
    """Compare with a random matrix of the same shape and variance; None for a zero matrix."""


def bounds_from_partial(sigma_at: Mapping[int, float], shape: tuple[int, int]) -> PartialSpectrum:
    """Bound the truncation errors of a matrix known by the singular values at a few indices (from 1).

    Raises BitsmithError for an index outside the shape, or values that are negative or do not descend.
    """
