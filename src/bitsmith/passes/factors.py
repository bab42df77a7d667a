"""The best low rank of a matrix, in whatever metric, and the ways its factors are stored.

`W ≈ A B` with `A` (`out r`) the left singular vectors and `B` (`r in`) the singular values times the right
ones. Every row of `W` has its own row of `A`, so a matrix of any height is coded in slices; what stays in
memory are a few square matrices of the shorter side (and the matrix itself where it is wide).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import linalg

from bitsmith.errors import BitsmithError
from bitsmith.formats import format_named
from bitsmith.numerics.spectrum import Decomposition
from bitsmith.numerics.squares import add_squares
from bitsmith.numerics.tensor_train import RowSource, matrix_shape

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

RESOLVED = 1e-7
"""Share of the largest singular value below which a Gram matrix knows nothing."""
_CHUNK_BYTES = 32 << 20
_LARGEST_SCALE = float(np.finfo(np.float16).max)


def symmetric(rows: Float32, largest: int, group: int | None = None) -> Float32:
    """Return what rows decode to once rounded to `-largest … largest` times a scale `max / largest`.

    A scale for each row, or for each `group` of columns; stored in F16, applied in F32 when rounding (as
    cellm does); halves round away from zero.
    """
    out, columns = rows.shape
    width = min(group or columns, columns)
    groups = -(-columns // width)
    values = np.ascontiguousarray(rows, dtype=np.float32)
    padded = np.pad(values, ((0, 0), (0, groups * width - columns))) if columns % width else values
    apart = padded.reshape(out, groups, width)
    scale = np.maximum(apart.max(axis=2), -apart.min(axis=2)) / np.float32(largest)
    stored = np.minimum(scale, _LARGEST_SCALE).astype(np.float16).astype(np.float32)
    decoded = np.empty_like(values)
    _round_symmetric(values, scale, stored, width, np.float32(largest), decoded)
    return decoded


@njit(nogil=True, cache=True, error_model="numpy")
def _round_symmetric(
    rows: Float32, scale: Float32, stored: Float32, width: int, largest: np.float32, out: Float32
) -> None:
    half, zero = np.float32(0.5), np.float32(0.0)
    for row in range(rows.shape[0]):
        for group in range(scale.shape[1]):
            step, size = scale[row, group], stored[row, group]
            for at in range(group * width, min((group + 1) * width, rows.shape[1])):
                value = rows[row, at] / step if step > zero else zero
                code = min(np.floor(abs(value) + half), largest)
                out[row, at] = (code if value >= zero else -code) * size


def symmetric_bytes(rows: int, columns: int, bits: int, group: int | None = None) -> int:
    """Return the bytes of `symmetric` codes: rows padded to whole bytes, and F16 scales."""
    return rows * (-(-columns * bits // 8) + 2 * -(-columns // (group or columns)))


def row_chunks(source: RowSource, index: NDArray[np.intp]) -> Iterator[tuple[NDArray[np.intp], Float32]]:
    """Yield row numbers out of `index`, ascending, and those rows, a bounded number at a time."""
    step = max(1, _CHUNK_BYTES // (4 * source.shape[1]))
    for start in range(0, index.size, step):
        at = index[start : start + step]
        if at[-1] - at[0] + 1 == at.size:
            yield at, np.asarray(source.read(int(at[0]), int(at[-1]) + 1), dtype=np.float32)
        else:
            rows = [np.asarray(source.read(int(row), int(row) + 1), dtype=np.float32) for row in at]
            yield at, np.concatenate(rows)


def squares(rows: Float32) -> Float64:
    """Return the sum of squares of each row."""
    sums: Float64 = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    return sums


class Metric:
    """How errors of a row are weighed: plainly, by input variances, or by the input covariance."""

    def __init__(self, second_moment: Float64 | None, columns: int) -> None:
        self.diagonal: Float32 | None = None
        self.root: Float64 | None = None  # L with C = L Lᵀ, `in in` or its diagonal `in`
        self.name = "weights"
        if second_moment is None:
            return
        moment = np.asarray(second_moment, dtype=np.float64)
        if moment.shape not in ((columns,), (columns, columns)) or not np.isfinite(moment).all():
            raise BitsmithError(
                f"second moment is {moment.shape}, expected finite {(columns,)} or {(columns, columns)}"
            )
        diagonal = moment if moment.ndim == 1 else np.diagonal(moment)
        if diagonal.min() < 0 or diagonal.max() == 0:
            raise BitsmithError("second moment has negative variances or only zeros")
        self.diagonal = diagonal.astype(np.float32)
        self.name = "input diagonal" if moment.ndim == 1 else "input covariance"
        self.root = np.sqrt(moment) if moment.ndim == 1 else _square_root(moment)

    def weighed(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return `rows @ L`, in the precision of `rows`."""
        if self.root is None:
            return rows
        root = self.root.astype(rows.dtype, copy=False)
        weighed: NDArray[Any] = rows * root if root.ndim == 1 else rows @ root
        return weighed

    def applied(self, vectors: Float64) -> Float64:
        """Return `L @ vectors`."""
        if self.root is None:
            return vectors
        return self.root[:, None] * vectors if self.root.ndim == 1 else self.root @ vectors

    def energies(self, rows: Float32) -> Float64:
        """Return `|row @ L|²` of each row."""
        return squares(self.weighed(rows))

    def errors(self, rows: Float32, decoded: Float32) -> Float64:
        """Return `|(row - decoded row) @ L|²` of each row."""
        if self.root is not None:
            return self.energies(rows - decoded)
        sums = np.zeros((len(rows), 2))
        own, other = (np.ascontiguousarray(values).reshape(-1) for values in (rows, decoded))
        add_squares(own, other, rows.shape[1], sums)
        return sums[:, 0]


def _square_root(moment: Float64) -> Float64:
    values, vectors = linalg.eigh((moment + moment.T) / 2)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)), dtype=np.float64)


class Factors:
    """Singular values in the metric, the right factor, and the left factor's rows computed when asked for.

    `W_r = left[:, :r] @ right[:r]` is the best rank r in the metric. The Gram matrix of the shorter side is
    accumulated in float64, unless singular values and the vectors of that side are `known`. Both factors
    carry `sqrt(σ_1)`, so that F16 can hold them.
    """

    def __init__(self, source: RowSource, metric: Metric, known: Decomposition | None = None) -> None:
        self.rows, self.columns = self.shape = matrix_shape(source)
        self.side = min(self.shape)
        tall = self.rows >= self.columns
        if known is not None and metric.root is None:
            sigma, vectors, lengths = known.spectrum.sigma, known.vectors, known.lengths
            inner = None if tall else np.asarray(source.read(), vectors.dtype)
        else:
            sigma, vectors, inner = _tall(source, metric) if tall else _wide(source, metric)
            lengths = sigma
        self.sigma = sigma
        self.rank = int(np.count_nonzero(sigma > RESOLVED * sigma[0]))
        vectors, used = vectors[:, : self.rank], lengths[: self.rank].astype(vectors.dtype)
        balance = float(np.sqrt(sigma[0])) if self.rank else 1.0
        self._into_left: Float32 | None = None
        if tall:
            weighed = metric.applied(vectors)
            right = used[:, None] * vectors.T
            if metric.root is not None and inner is not None:
                right = (weighed.T @ inner) / used[:, None]
            self._into_left = (weighed / used * balance).astype(np.float32)
        else:
            right = vectors.T @ inner
            self._left = (vectors * balance).astype(np.float32)
        self.right = (right / balance).astype(np.float32)

    def left(self, at: NDArray[np.intp], rows: Float32) -> Float32:
        """Return rows `at` of the left factor; `rows` are the same rows of the matrix."""
        return self._left[at] if self._into_left is None else rows @ self._into_left

    def theory(self, rank: int) -> float | None:
        """Return Eckart-Young-Mirsky's relative error of the best `rank`; None for zeros."""
        energy = np.square(self.sigma)
        return float(np.sqrt(energy[rank:].sum() / energy.sum())) if energy[0] > 0 else None


def _tall(source: RowSource, metric: Metric) -> tuple[Float64, Float64, Float64]:
    """Return singular values, right singular vectors in the metric, and `Wᵀ W`."""
    rows, columns = source.shape
    inner = np.zeros((columns, columns))
    for at, piece in row_chunks(source, np.arange(rows)):
        del at
        exact = piece.astype(np.float64)
        inner += exact.T @ exact
    return *_eigen(metric.weighed(metric.weighed(inner).T)), inner


def _wide(source: RowSource, metric: Metric) -> tuple[Float64, Float64, Float64]:
    """Return singular values, left singular vectors in the metric, and `W`."""
    matrix = np.asarray(source.read(), dtype=np.float64)
    weighed = metric.weighed(matrix)
    return *_eigen(weighed @ weighed.T), matrix


def _eigen(gram: Float64) -> tuple[Float64, Float64]:
    if not np.isfinite(gram).all():
        raise BitsmithError("values are not finite, or too large to square; low rank needs finite ones")
    values, vectors = linalg.eigh(gram, driver="evd")
    return np.sqrt(np.maximum(values[::-1], 0.0)), vectors[:, ::-1]


@dataclass(frozen=True)
class FactorCode:
    """How the rows of a factor are stored; the rank is a multiple of `multiple`.

    `whole_rows`: what an entry decodes to depends on its whole row, so that a shorter row is no part of it.
    """

    name: str
    row_bytes: Callable[[int], int]
    decoded: Callable[[Float32], Float32]
    multiple: int = 1
    whole_rows: bool = False

    def size(self, shape: tuple[int, int], rank: int) -> int:
        """Return the bytes of both factors, `out r` and `r in`."""
        return shape[0] * self.row_bytes(rank) + rank * self.row_bytes(shape[1]) if rank else 0

    def products(self, left: Float32, right: Float32, ranks: Sequence[int]) -> Iterator[Float32]:
        """Yield `left[:, :r]`, coded, times `right[:r]` for ascending ranks r, each made of the one before.

        The array that is yielded is changed for the next.
        """
        made = np.zeros((len(left), right.shape[1]), np.float32)
        coded, done = left[:, :0], 0
        for rank in ranks:
            if rank > done:
                first = 0 if self.whole_rows else done
                more = self.decoded(np.ascontiguousarray(left[:, first:rank]))
                made += more[:, done - first :] @ right[done:rank]
                if self.whole_rows:
                    changed = np.flatnonzero((more[:, :done] != coded).any(axis=1))
                    made[changed] = more[changed] @ right[:rank]
                    coded = more
                done = rank
            yield made

    def largest_rank(self, shape: tuple[int, int], most: int, budget_bytes: int) -> int:
        """Return the largest rank up to `most` whose factors fit into the budget."""
        low, high = 0, most // self.multiple
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.size(shape, middle * self.multiple) <= budget_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * self.multiple


def half(rows: Float32) -> Float32:
    """Return what rows decode to from F16."""
    return rows.astype(np.float16).astype(np.float32)


def _integers(bits: int) -> FactorCode:
    return FactorCode(
        f"int{bits}",
        lambda width: symmetric_bytes(1, width, bits),
        lambda rows: symmetric(rows, 2 ** (bits - 1) - 1),
        whole_rows=True,
    )


F16_CODE = FactorCode("F16", lambda width: 2 * width, half)
INT4_CODE = _integers(4)


def factor_codes(columns: int) -> list[FactorCode]:
    """Return the codes for factors of a matrix with `columns` columns: F16, int8, int4, Q4_K if it fits."""
    codes, coder = [F16_CODE, _integers(8), INT4_CODE], format_named("Q4_K")
    if coder.fits(columns):
        codes.append(
            FactorCode(
                coder.name, coder.row_bytes, lambda rows: coder.decode(coder.encode(rows)), coder.block_size
            )
        )
    return codes
