"""Singular values of a matrix read in slices of rows, with error bounds, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, eigvalsh, get_blas_funcs, qr, svdvals

from bitsmith.errors import BitsmithError
from bitsmith.numerics import band
from bitsmith.numerics.marchenko_pastur import MarchenkoPastur

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Found = Literal["gram32", "gram", "svd"]
Method = Literal["auto", "gram32", "gram", "svd"]

ACCURATE = 1e-5  # relative error of a singular value from which `auto` leaves the Gram matrix
ERRORS = (0.5, 0.2, 0.1, 0.05, 0.01)
RANKS = (128, 256, 512, 1024, 2048)
LARGE = 1536  # short side from which the band pays
MIXED32 = 1e-5  # of the largest eigenvalue: below it float32 mixes the vectors of neighbours
UNSURE32 = 1e-3  # below it their lengths are measured
DIRECT_BYTES = 4 << 30  # largest wide matrix, as float64, that is held for a direct SVD
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

    `method` is how they were found: `gram` (square roots of the eigenvalues of the Gram matrix, in float64),
    `gram32` (the same in float32, slices summed in float64) or `svd`.
    """

    shape: tuple[int, int]
    sigma: Vector
    error: Vector
    method: Found

    @property
    def rank(self) -> int:
        """Number of singular values that are larger than their error bound."""
        return int(np.count_nonzero(self.sigma > self.error))

    @property
    def relative_error(self) -> float | None:
        """Largest bound of the relative error over the first `rank` singular values; None at rank 0."""
        rank = self.rank
        return float(np.max(self.error[:rank] / self.sigma[:rank])) if rank else None

    @property
    def first_inaccurate(self) -> int | None:
        """Index (from 1) of the first singular value whose relative error may exceed 1e-5; None if none."""
        inaccurate = self.error > ACCURATE * self.sigma
        return int(np.argmax(inaccurate)) + 1 if inaccurate.any() else None

    @property
    def energy(self) -> float:
        """Squared Frobenius norm Σσ²."""
        return float(np.sum(np.square(self.sigma)))

    def truncation_error(self) -> Vector:
        """Relative Frobenius error √(Σ_{i>r} σ² / Σσ²) of the best rank r, for r = 0 … n (`n+1`).

        Eckart, Young 1936; Mirsky 1960. All zeros for a zero matrix.
        """
        tails = np.append(np.cumsum(np.square(self.sigma[::-1]))[::-1], 0.0)
        return np.sqrt(tails / tails[0]) if tails[0] > 0 else tails

    def rank_for_error(self, error: float) -> int:
        """Return the smallest rank whose relative Frobenius error is at most `error`."""
        return int(np.argmax(self.truncation_error() <= error))


@dataclass(frozen=True)
class BesideRandom:
    """A spectrum beside random matrices of its shape with independent entries of one `variance`.

    Marchenko, Pastur 1967: for `long × short` entries their σ fill √variance (√long ± √short). `spikes` are
    the σ above `threshold`: the upper edge moved by the 99.9 % quantile of the largest σ (Tracy-Widom;
    Johnstone 2001); `spike_energy` is their share of Σσ². `ks_distance` is the Kolmogorov-Smirnov distance
    between the σ² of the others and Marchenko-Pastur's law, None where there are no others.
    """

    variance: float
    lower_edge: float
    upper_edge: float
    threshold: float
    spikes: int
    spike_energy: float
    ks_distance: float | None


@dataclass(frozen=True)
class RandomComparison:
    """A spectrum beside random matrices of its shape, at two variances.

    `same_variance`: the mean square of the matrix, Σσ²/(long·short). `bulk`: the variance whose median σ² is
    the measured one (Gavish, Donoho 2014), which spikes hardly move; None where half of the σ vanish.
    """

    same_variance: BesideRandom
    bulk: BesideRandom | None


@dataclass(frozen=True)
class SpectrumStatistics:
    """What the singular values of one matrix say, as plain values; None is not measurable.

    `condition_number` σ₁/σ_n (None if rank-deficient); `stable_rank` Σσ²/σ₁² (Rudelson, Vershynin 2007);
    `effective_rank` exp(−Σ p ln p), p = σ/Σσ (Roy, Vetterli 2007); `nuclear_rank` (Σσ)²/Σσ²;
    `rank_for_error` the smallest rank for each relative Frobenius error; `energy_at` the share of Σσ² in the
    first r; `sigma_at` σ at indices from 1, clipped to those there are; `r90` min k: Σ_{i≤k} σ ≥ 0.9 Σσ.
    """

    shape: tuple[int, int]
    method: Found
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


def singular_values(
    source: NDArray[Any] | Rows, method: Method = "auto", slice_bytes: int = 64 << 20
) -> Spectrum:
    """Return all singular values of a matrix, or of a tensor flattened to `out × rest`.

    `auto` goes from the fast to the exact until the bound of every relative error is at most 1e-5: the Gram
    matrix in float32 (large matrices at least twice as long as wide only, and none whose largest singular
    values are far above the others, since those never pass) and in float64, then QR by slices and SVD. A wide
    matrix too large to hold stays with the Gram matrix and its bound. Raises BitsmithError naming the first
    NaN or infinity, or for an empty shape.
    """
    rows = _Flat(source)
    if method == "gram32" or (method == "auto" and rows.suits_float32 and _float32_may_do(rows, slice_bytes)):
        spectrum = _by_gram(rows, slice_bytes, np.float32)
        if method == "gram32" or spectrum.first_inaccurate is None:
            return spectrum
    if method != "svd":
        spectrum = _by_gram(rows, slice_bytes, np.float64)
        if method == "gram" or spectrum.first_inaccurate is None or not rows.fits_direct:
            return spectrum
    return _by_svd(rows, slice_bytes)


@dataclass(frozen=True)
class Decomposition:
    """A spectrum with the singular vectors of the shorter side as columns (`n n`), from the Gram matrix.

    `lengths` are |W v| of the vectors: their singular values, but where the vectors are of lower precision.
    """

    spectrum: Spectrum
    vectors: NDArray[Any]
    lengths: Vector

    @property
    def right_vectors(self) -> NDArray[Any] | None:
        """The vectors where they are those of the columns (`in in`), None for a wide matrix."""
        return self.vectors if self.spectrum.shape[0] >= self.spectrum.shape[1] else None


def decompose(
    source: NDArray[Any] | Rows, dtype: type[Any] = np.float64, slice_bytes: int = 64 << 20
) -> Decomposition:
    """Return all singular values and the vectors of the shorter side, from the Gram matrix in `dtype`.

    In float64 singular values that it does not resolve are found as `singular_values` does; in float32 their
    bounds say what it resolves. Vectors of a large matrix are found in float32 unless more than an eighth of
    its eigenvalues is so small that it would mix them. Raises as `singular_values`.
    """
    rows = _Flat(source)
    gram = _gram(rows, slice_bytes, dtype)
    if gram is None:
        return decompose(source, np.float64, slice_bytes)
    if dtype is np.float64 and len(gram) >= LARGE:
        ascending = band.eigenvalues(gram)
        if ascending[len(gram) // 8] > MIXED32 * ascending[-1]:
            single = gram.astype(np.float32, order="F")
            vectors = eigh(single, lower=True, overwrite_a=True, check_finite=False, driver="evd")[1]
            return _decomposition(rows, slice_bytes, ascending, vectors, _lengths(gram, ascending, vectors))
    ascending, vectors = eigh(gram, lower=True, overwrite_a=True, check_finite=False, driver="evd")
    return _decomposition(rows, slice_bytes, ascending, vectors, np.sqrt(np.maximum(ascending, 0.0)))


def _decomposition(
    rows: _Flat, slice_bytes: int, ascending: NDArray[Any], vectors: NDArray[Any], lengths: NDArray[Any]
) -> Decomposition:
    spectrum = _from_eigenvalues(rows, ascending.astype(np.float64), ascending.dtype.type)
    if spectrum.method == "gram" and spectrum.first_inaccurate is not None and rows.fits_direct:
        spectrum = _by_svd(rows, slice_bytes)
        lengths = spectrum.sigma[::-1] if vectors.dtype == np.float64 else lengths
    return Decomposition(spectrum, vectors[:, ::-1], lengths[::-1].astype(np.float64))


def _lengths(gram: Matrix, ascending: Vector, vectors: NDArray[Any]) -> Vector:
    """Return |W v| by the Gram matrix where float32 is not sure of v, the singular value elsewhere."""
    squares = np.maximum(ascending, 0.0)
    unsure = int(np.searchsorted(ascending, UNSURE32 * ascending[-1]))
    if unsure:
        low = np.asfortranarray(vectors[:, :unsure], dtype=np.float64)
        symm = get_blas_funcs("symm", (gram,))
        products = np.einsum("ij,ij->j", low, symm(1.0, gram, low, lower=True))
        squares[:unsure] = np.maximum(squares[:unsure], products)
    return np.sqrt(squares)


def describe(
    spectrum: Spectrum,
    errors: Sequence[float] = ERRORS,
    ranks: Sequence[int] = RANKS,
    indices: Sequence[int] = INDICES,
) -> SpectrumStatistics:
    """Return the statistics of a spectrum."""
    sigma, n = spectrum.sigma, len(spectrum.sigma)
    energy, total = spectrum.energy, float(np.sum(sigma))
    truncation = spectrum.truncation_error()
    shares = 1.0 - np.square(truncation)
    return SpectrumStatistics(
        shape=spectrum.shape,
        method=spectrum.method,
        relative_error=spectrum.relative_error,
        first_inaccurate=spectrum.first_inaccurate,
        rank=spectrum.rank,
        frobenius=float(np.sqrt(energy)),
        condition_number=float(sigma[0] / sigma[-1]) if spectrum.rank == n else None,
        stable_rank=energy / float(sigma[0]) ** 2 if energy else None,
        effective_rank=_effective_rank(sigma / total) if energy else None,
        nuclear_rank=total**2 / energy if energy else None,
        r90=_first_at_least(np.cumsum(sigma), 0.9 * total) if energy else 0,
        rank_for_error={error: int(np.argmax(truncation <= error)) for error in errors},
        energy_at={rank: float(shares[rank]) for rank in _clipped(ranks, n)},
        sigma_at={index: float(sigma[index - 1]) for index in _clipped(indices, n)},
        random=compare_with_random(spectrum),
    )


def compare_with_random(spectrum: Spectrum) -> RandomComparison | None:
    """Compare with a random matrix of the same shape and variance; None for a zero matrix."""
    short, long = sorted(spectrum.shape)
    if spectrum.energy == 0.0 or short < 2:
        return None
    squares = np.square(spectrum.sigma)
    law = MarchenkoPastur(short, long)
    plain = _beside(law, squares, spectrum.energy / (short * long))
    middle = float(np.median(squares))
    bulk = _beside(law, squares, middle / (long * law.median)) if spectrum.rank > short // 2 else None
    return RandomComparison(same_variance=plain, bulk=bulk)


class _Flat:
    """A source as a matrix: slices of float64 rows, finite, along the first axis."""

    def __init__(self, source: NDArray[Any] | Rows) -> None:
        self.name: str | None = getattr(source, "name", None)
        self._source = source
        if not source.shape or 0 in source.shape:
            raise BitsmithError(
                f"shape {source.shape}: expected a matrix that is not empty", tensor=self.name
            )
        self.shape = (source.shape[0], math.prod(source.shape[1:]))

    @property
    def wide(self) -> bool:
        """Whether the rows are the short side."""
        return self.shape[0] < self.shape[1]

    @property
    def fits_direct(self) -> bool:
        """Whether the direct way can be taken: a tall matrix is read by slices, a wide one is held."""
        return not self.wide or 8 * self.shape[0] * self.shape[1] <= DIRECT_BYTES

    @property
    def suits_float32(self) -> bool:
        """Whether the Gram matrix in float32 saves time and has a chance to be accurate enough."""
        short, long = sorted(self.shape)
        return short >= LARGE and long >= 2 * short and self._rows(0, 1).dtype.itemsize <= 4

    def slices(
        self, limit_bytes: int, stop: int | None = None, dtype: type[Any] = np.float64
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (first row, rows) up to row `stop`, at most `limit_bytes` each but at least a row."""
        step = max(1, limit_bytes // (np.dtype(dtype).itemsize * self.shape[1]))
        stop = self.shape[0] if stop is None else stop
        for start in range(0, stop, step):
            yield start, self._read(start, min(start + step, stop), dtype)

    def _rows(self, start: int, stop: int) -> NDArray[Any]:
        source = self._source
        return source[start:stop] if isinstance(source, np.ndarray) else source.read(start, stop)

    def _read(self, start: int, stop: int, dtype: type[Any]) -> NDArray[Any]:
        rows = self._rows(start, stop)
        matrix = np.ascontiguousarray(rows, dtype=dtype).reshape(stop - start, self.shape[1])
        finite = np.isfinite(matrix)
        if not finite.all():
            row, column = np.unravel_index(int(np.argmin(finite)), matrix.shape)
            value = matrix[row, column]
            raise BitsmithError(
                f"{value} at row {start + row}, column {column}: expected finite values", tensor=self.name
            )
        return matrix


def _float32_may_do(rows: _Flat, slice_bytes: int) -> bool:
    """Tell whether the bounds of the Gram matrix in float32 may come to 1e-5: only time depends on it.

    They do up to a ratio of the largest eigenvalue to the smallest. Two steps of the power method see how
    large the largest is at least; for the smallest Marchenko and Pastur's lower edge is taken.
    """
    vector, energy, largest = np.ones(rows.shape[1], np.float32), 0.0, 0.0
    with np.errstate(all="ignore"):  # what leaves the range of float32 is found out later
        for _ in range(2):
            found = np.zeros(rows.shape[1])
            for _, piece in rows.slices(slice_bytes, dtype=np.float32):
                found += (piece @ vector) @ piece
                energy += float(np.vdot(piece, piece)) / 2
            largest = float(np.linalg.norm(found))
            vector = (found / largest).astype(np.float32)
        short, long = sorted(rows.shape)
        least = energy / short * (1 - np.sqrt(short / long)) ** 2
        most = (2 * ACCURATE / float(np.finfo(np.float32).eps) - 24.0) / 4.0  # by `_roundoff`
        return not largest > most * least


def _by_gram(rows: _Flat, slice_bytes: int, dtype: type[Any]) -> Spectrum:
    gram = _gram(rows, slice_bytes, dtype)
    if gram is None:
        return _by_gram(rows, slice_bytes, np.float64)
    return _from_eigenvalues(rows, _eigenvalues(gram), dtype)


def _gram(rows: _Flat, slice_bytes: int, dtype: type[Any]) -> NDArray[Any] | None:
    """Return the lower triangle of the Gram matrix of the shorter side; None if float32 cannot hold it."""
    gram = (_gram_of_rows if rows.wide else _gram_of_columns)(rows, slice_bytes, dtype)
    largest = float(np.max(np.diagonal(gram)))
    if dtype is np.float32 and not 1e-20 < largest < 1e30:
        return None
    if not largest < np.finfo(np.float64).max / len(gram):
        raise BitsmithError(
            f"values as large as 1e{np.log10(largest) / 2:.0f}: squares overflow", tensor=rows.name
        )
    return gram.astype(dtype, order="F", copy=False)


def _from_eigenvalues(rows: _Flat, ascending: Vector, dtype: type[Any]) -> Spectrum:
    squares = np.maximum(ascending[::-1], 0.0)
    error = _roundoff(squares, rows.shape, dtype)
    sigma, lowest = np.sqrt(squares), np.sqrt(np.maximum(squares - error, 0.0))
    ratio = np.divide(error, sigma + lowest, out=np.sqrt(error), where=sigma > 0)
    found: Found = "gram" if dtype is np.float64 else "gram32"
    return Spectrum(rows.shape, sigma, np.minimum(ratio, np.sqrt(error)), found)


def _eigenvalues(gram: NDArray[Any]) -> Vector:
    if len(gram) >= LARGE or gram.dtype == np.float32:
        return band.eigenvalues(gram)
    found: Vector = eigvalsh(gram, lower=True, overwrite_a=True, check_finite=False, driver="evd")
    return found


def _roundoff(values: Vector, shape: tuple[int, int], dtype: type[Any]) -> Vector:
    """Return the absolute error of descending eigenvalues or singular values that counts.

    A part goes with the value (reflections that are not quite orthogonal), a part with the largest. Rounding
    errors add like a random walk (Higham, Mary 2019), hence the root of the number of additions in float64;
    float32, summed in short pieces, is bounded by about twice and four times what is measured. The worst
    case, with the number of additions itself, is never met.
    """
    largest: Vector = values[:1]
    if dtype is np.float32:
        return (24.0 * values + 4.0 * largest) * float(np.finfo(np.float32).eps)
    return (4.0 * values + largest) * float(np.sqrt(sum(shape)) * np.finfo(np.float64).eps)


def _gram_of_columns(rows: _Flat, slice_bytes: int, dtype: type[Any]) -> Matrix:
    """Return the lower triangle of WᵀW (`in in`)."""
    n = rows.shape[1]
    gram = np.zeros((n, n), order="F")
    syrk = get_blas_funcs("syrk", dtype=dtype)
    for _, piece in rows.slices(slice_bytes, dtype=dtype):
        if dtype is np.float64:
            gram = syrk(1.0, piece.T, beta=1.0, c=gram, lower=True, overwrite_c=True)
        else:
            gram += syrk(1.0, piece.T, lower=True)
    return gram


def _gram_of_rows(rows: _Flat, slice_bytes: int, dtype: type[Any]) -> Matrix:
    """Return the lower triangle of WWᵀ (`out out`), every slice against those before it."""
    n = rows.shape[0]
    gram = np.zeros((n, n), order="F")
    gemm, syrk = (get_blas_funcs(name, dtype=dtype) for name in ("gemm", "syrk"))
    for start, piece in rows.slices(slice_bytes, dtype=dtype):
        stop = start + len(piece)
        gram[start:stop, start:stop] = syrk(1.0, piece.T, trans=True, lower=True)
        for first, other in rows.slices(slice_bytes, start, dtype):
            gram[start:stop, first : first + len(other)] = gemm(1.0, piece.T, other.T, trans_a=True)
    return gram


def _by_svd(rows: _Flat, slice_bytes: int) -> Spectrum:
    """Reduce a tall matrix to its triangular factor slice by slice, then take singular values directly."""
    n = rows.shape[1]
    triangle = np.empty((0, n))
    whole = 8 * rows.shape[0] * n if rows.wide else max(slice_bytes, 8 * n * n)
    for _, piece in rows.slices(whole):
        if not len(triangle):
            triangle = piece
            continue
        stacked = np.concatenate([triangle, piece])
        triangle = qr(stacked, overwrite_a=True, mode="r", check_finite=False)[0][:n]
    sigma = svdvals(triangle, overwrite_a=True, check_finite=False)
    return Spectrum(rows.shape, sigma, _roundoff(sigma, rows.shape, np.float64), "svd")


def _clipped(indices: Sequence[int], n: int) -> list[int]:
    return sorted({min(index, n) for index in indices})


def _first_at_least(ascending: Vector, target: float) -> int:
    """Return the first index (from 1) that reaches `target`."""
    return min(int(np.searchsorted(ascending, target)) + 1, len(ascending))


def _effective_rank(p: Vector) -> float:
    positive = p[p > 0]
    return float(np.exp(-np.sum(positive * np.log(positive))))


def _beside(law: MarchenkoPastur, squares: Vector, variance: float) -> BesideRandom:
    scale = law.long * variance
    above = squares > law.threshold * scale
    return BesideRandom(
        variance=variance,
        lower_edge=float(np.sqrt(law.lower * scale)),
        upper_edge=float(np.sqrt(law.upper * scale)),
        threshold=float(np.sqrt(law.threshold * scale)),
        spikes=int(np.count_nonzero(above)),
        spike_energy=float(np.sum(squares[above]) / np.sum(squares)),
        ks_distance=None if above.all() else law.distance(squares[~above] / scale),
    )
