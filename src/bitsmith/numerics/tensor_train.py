"""Tensor-Train of a matrix, in memory for any number of cores, streamed over rows for three.

A matrix (`out in`) of `∏ m_k` rows and `∏ n_k` columns, padded with zeros where they do not factor, is a
tensor with modes `(i_k, j_k)` of size `p_k = m_k n_k`; core k is `r_(k-1) p_k r_k` with `r_0 = r_d = 1`.
TT-SVD (Oseledets 2011, Tensor-Train decomposition, algorithm 1) truncates one unfolding after the other.

With three cores TT-SVD is a projection from both ends: `A' = (U Uᵀ) A (V Vᵀ)`, where `U` are the leading
`r_1` left singular vectors of the first unfolding and `V` the leading `r_2` right singular vectors of the
second unfolding of `Uᵀ A`. `U` of a smaller rank is nested in that of a larger one, so one pass gathers the
Gram matrix of the first unfolding (`p_1 p_1`), a second those of all second unfoldings (`p_3 p_3`, one per
rank), and a third compares rows. Beside a slab of rows, of which a few copies live at a time, that is all the
memory it takes: `8 (p_1² + (configurations + 2) p_3²)` bytes plus about seven slabs. A slab is `SLAB_BYTES`,
or `8 m_1 m_3 in` bytes where that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from bitsmith.errors import BitsmithError
from bitsmith.numerics.modes import Modes, balanced_modes
from bitsmith.numerics.squares import row_products
from bitsmith.numerics.threads import one_blas_thread

Float64 = NDArray[np.float64]
Floats = NDArray[Any]  # float64, or float32 where a function is told so
SLAB_BYTES = 64 << 20
COSINE_GATE = 0.95
SEED_COLUMNS = 4096
SEED_RANKS = (
    (1, 8, 8, 1), (1, 16, 16, 1), (1, 32, 32, 1), (1, 64, 64, 1), (1, 128, 128, 1), (1, 256, 256, 1),
    (1, 512, 4096, 1),
)  # fmt: skip
"""The seed's sweep on its 248,320 × 4,096 embedding."""
SEED_CORE_RANK = 1024
SEED_CORE_TRAIN = (1, 32, 32, 1)


class RowSource(Protocol):
    """A matrix whose rows are read in slices; a `TensorRef` is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows `[start, stop)`."""


class ArrayRows:
    """An array in memory as a row source."""

    def __init__(self, rows: NDArray[Any]) -> None:
        self.rows, self.shape = rows, rows.shape

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows `[start, stop)`."""
        return self.rows[start:stop]


class ProjectedRows:
    """The rows of a source times a matrix (`in r`), computed on read."""

    def __init__(self, source: RowSource, matrix: Floats) -> None:
        self.source, self.matrix = source, matrix
        self.shape: tuple[int, ...] = (source.shape[0], matrix.shape[1])

    def read(self, start: int = 0, stop: int | None = None) -> Floats:
        """Return rows `[start, stop)` in the precision of the matrix."""
        rows: Floats = np.asarray(self.source.read(start, stop), dtype=self.matrix.dtype) @ self.matrix
        return rows


def as_rows(matrix: RowSource | NDArray[Any]) -> RowSource:
    """Return an array as a row source, and a row source as it is."""
    return ArrayRows(matrix) if isinstance(matrix, np.ndarray) else matrix


@dataclass(frozen=True)
class Train:
    """One Tensor-Train of one matrix, measured by comparing its rows with the original's.

    `asked_ranks` may be impossible for the shape; `ranks` were used. `ratio` compares numbers of parameters.
    The mean row cosine leaves out rows of zeros. Errors are None where the matrix is all zeros.
    """

    method: str  # "TT" or "SVD core + TT"
    modes: Modes
    padded_rows: int  # rows of zeros added because the rows do not factor
    padded_columns: int
    asked_ranks: tuple[int, ...]
    ranks: tuple[int, ...]  # for an SVD core those of the tall factor's train
    parameters: int
    ratio: float
    relative_error: float | None
    mean_row_cosine: float | None
    core_rank: int | None = None

    @property
    def passes_gate(self) -> bool | None:
        """Whether the mean row cosine reaches 0.95; None where it could not be measured."""
        return None if self.mean_row_cosine is None else self.mean_row_cosine >= COSINE_GATE


def scaled(rank: int, columns: int) -> int:
    """Return `rank`, meant for 4096 columns, in proportion to `columns`, at least 1."""
    return max(1, round(rank * columns / SEED_COLUMNS))


def scaled_ranks(columns: int, ranks: Sequence[Sequence[int]] = SEED_RANKS) -> tuple[tuple[int, ...], ...]:
    """Return rank lists meant for 4096 columns in proportion to `columns`; the outer ranks stay 1."""
    return tuple((1, *(scaled(rank, columns) for rank in config[1:-1]), 1) for config in ranks)


def possible_ranks(sizes: Sequence[int], asked: Sequence[int]) -> tuple[int, ...]:
    """Clip TT ranks to what mode sizes allow: `r_k <= min(r_(k-1) p_k, p_(k+1) ... p_d)`.

    Raises BitsmithError for ranks that are not `1, r_1, ..., 1` with one more entry than there are modes.
    """
    if len(asked) != len(sizes) + 1 or asked[0] != 1 or asked[-1] != 1 or min(asked) < 1:
        raise BitsmithError(
            f"TT ranks {list(asked)} do not fit {len(sizes)} cores: expected 1, {len(sizes) - 1} ranks, 1"
        )
    ranks = [1]
    for core in range(1, len(sizes)):
        rest = int(np.prod(sizes[core:]))
        ranks.append(min(int(asked[core]), ranks[-1] * sizes[core - 1], rest))
    return (*ranks, 1)


def parameter_count(sizes: Sequence[int], ranks: Sequence[int]) -> int:
    """Return the number of entries in all cores."""
    return sum(ranks[k] * size * ranks[k + 1] for k, size in enumerate(sizes))


def to_tensor(matrix: NDArray[Any], modes: Modes) -> Float64:
    """Return the matrix (`out in`, zero-padded) as a tensor of shape `modes.sizes`."""
    padded = np.zeros(modes.shape)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    cores = len(modes.rows)
    paired = [axis for k in range(cores) for axis in (k, cores + k)]
    return padded.reshape(*modes.rows, *modes.columns).transpose(paired).reshape(modes.sizes)


def to_matrix(tensor: Float64, modes: Modes, shape: tuple[int, ...]) -> Float64:
    """Return the matrix of `shape` (`out in`) that `to_tensor` made into `tensor`."""
    pairs = [size for pair in zip(modes.rows, modes.columns, strict=True) for size in pair]
    cores = len(modes.rows)
    apart = [*range(0, 2 * cores, 2), *range(1, 2 * cores, 2)]
    return tensor.reshape(pairs).transpose(apart).reshape(modes.shape)[: shape[0], : shape[1]]


def tt_svd(tensor: Float64, asked_ranks: Sequence[int]) -> list[Float64]:
    """Return TT cores (`r_(k-1) p_k r_k`) of a tensor by TT-SVD; ranks are clipped to what is possible."""
    ranks = possible_ranks(tensor.shape, asked_ranks)
    cores, rest = [], tensor
    for k, size in enumerate(tensor.shape[:-1]):
        left, values, right = linalg.svd(rest.reshape(ranks[k] * size, -1), full_matrices=False)
        keep = ranks[k + 1]
        cores.append(left[:, :keep].reshape(ranks[k], size, keep))
        rest = values[:keep, None] * right[:keep]
    return [*cores, rest.reshape(ranks[-2], tensor.shape[-1], 1)]


def tt_tensor(cores: Sequence[Float64]) -> Float64:
    """Return the tensor that TT cores stand for."""
    rest = cores[0]
    for core in cores[1:]:
        rest = np.tensordot(rest, core, axes=1)
    return rest[0, ..., 0]


def sweep(
    matrix: RowSource | NDArray[Any],
    ranks: Sequence[Sequence[int]] | None = None,
    modes: Modes | None = None,
    coded: Callable[[Float64], Float64] | None = None,
    dtype: type[Any] = np.float64,
) -> tuple[Train, ...]:
    """Return a measured Tensor-Train of three cores for each rank list, reading the matrix three times.

    Without `ranks` the seed's seven configurations in proportion to the columns, without `modes` balanced
    ones. `coded` is what rows of the middle core (`r_1 p_2` rows of `r_2`) decode to; it gets them with
    columns of one size in each slab. Products are in `dtype`, sums over slabs in float64: float32 resolves
    errors to about 1e-5.
    Raises BitsmithError for a source that is no matrix, holds values that are not finite, or is larger than
    the modes, and for ranks that are none.
    """
    source = as_rows(matrix)
    rows, columns = matrix_shape(source)
    asked = scaled_ranks(columns) if ranks is None else tuple(tuple(config) for config in ranks)
    modes = balanced_modes(rows, columns) if modes is None else modes
    slabs = _Slabs(source, modes, dtype)
    fitted = [replace(train, coded=coded) for train in _fit(slabs, asked)]
    widest, scores = max(fitted, key=lambda train: train.ranks[1]), [_Score() for _ in fitted]
    for slab in slabs:
        target = slab.rows_of(slab.tensor)
        # one projection serves all: the smaller ranks are its leading rows
        inside = np.tensordot(widest.left.T, slab.tensor.reshape(slab.first, -1), axes=1)
        for train, score in zip(fitted, scores, strict=True):
            score.add(target, slab.rows_of(train.approximate(inside, slab.middle)))
    return tuple(
        _measured("TT", source, modes, config, train.ranks, parameter_count(modes.sizes, train.ranks), score)
        for config, train, score in zip(asked, fitted, scores, strict=True)
    )


@one_blas_thread()
def fitted_cores(
    matrix: RowSource | NDArray[Any], ranks: Sequence[int], modes: Modes | None = None
) -> list[Float64]:
    """Return the three cores (`r_(k-1) p_k r_k`) that `sweep` measures, reading the matrix three times.

    Raises as `sweep` does.
    """
    source = as_rows(matrix)
    slabs = _Slabs(source, balanced_modes(*matrix_shape(source)) if modes is None else modes)
    [train] = _fit(slabs, [ranks])
    size, last = slabs.modes.sizes[0], slabs.modes.sizes[2]
    parts = []
    for slab in slabs:
        inside = (train.left.T @ slab.tensor.reshape(size, -1)).reshape(train.ranks[1], -1, last)
        parts.append(inside @ train.right)
    return [train.left[None], np.concatenate(parts, axis=1), train.right.T[..., None]]


def svd_core(
    matrix: RowSource | NDArray[Any],
    core_rank: int | None = None,
    ranks: Sequence[int] | None = None,
    known: Floats | None = None,
    dtype: type[Any] = np.float64,
) -> Train:
    """Return the seed's "SVD core + TT": rank `core_rank`, then a train of each factor at `ranks`.

    `W ≈ (W V) Vᵀ` with `V` (`in R`) the leading right singular vectors, the first of those that are `known`;
    the tall factor is streamed. Without other arguments rank 1024 and [1, 32, 32, 1], in proportion to 4096
    columns. The modes and TT ranks reported are the tall factor's. Reads the matrix three times, once more
    for V, and holds `24 in²` bytes beside the slabs. `dtype` as in `sweep`. Raises as `sweep` does.
    """
    source = as_rows(matrix)
    rows, columns = matrix_shape(source)
    asked = scaled_ranks(columns, [SEED_CORE_TRAIN])[0] if ranks is None else tuple(ranks)
    rank = min(scaled(SEED_CORE_RANK, columns) if core_rank is None else core_rank, rows, columns)
    right = _signed(_right_vectors(source, rank) if known is None else known[:, :rank]).astype(dtype)
    wide_modes = balanced_modes(rank, columns)
    wide = tt_svd(to_tensor(right.T, wide_modes), asked)
    wide_rows = to_matrix(tt_tensor(wide), wide_modes, (rank, columns)).astype(dtype)
    tall = ProjectedRows(source, right)
    modes = balanced_modes(rows, rank)
    slabs = _Slabs(tall, modes, dtype)
    (train,) = _fit(slabs, [asked])
    score = _Score()
    for slab in slabs:
        inside = np.tensordot(train.left.T, slab.tensor.reshape(slab.first, -1), axes=1)
        approximate = slab.rows_of(train.approximate(inside, slab.middle))
        score.add(slab.read(source), approximate @ wide_rows)
    parameters = parameter_count(modes.sizes, train.ranks) + sum(core.size for core in wide)
    return _measured("SVD core + TT", source, modes, asked, train.ranks, parameters, score, rank)


def _right_vectors(source: RowSource, count: int) -> Float64:
    rows, columns = source.shape
    gram = np.zeros((columns, columns))
    step = max(1, SLAB_BYTES // (8 * columns))
    for start in range(0, rows, step):
        part = np.asarray(source.read(start, min(start + step, rows)), dtype=np.float64)
        gram += part.T @ part
    return _leading(gram, count)


def _signed(vectors: Floats) -> Floats:
    """Return vectors whose largest entry is positive: trains of what is reshaped depend on the signs."""
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[np.newaxis], axis=0)
    signed: Floats = np.where(largest < 0, -vectors, vectors)
    return signed


def matrix_shape(source: RowSource) -> tuple[int, int]:
    """Return (out, in); raises BitsmithError for anything but a matrix with entries."""
    shape = tuple(source.shape)
    if len(shape) != 2 or min(shape) < 1:
        raise BitsmithError(f"shape is {shape}, expected a matrix")
    return shape[0], shape[1]


@dataclass(frozen=True)
class _Slab:
    """All rows `(i_1, i_2, i_3)` with `i_2` in `[start, stop)`, as a tensor `i_1 j_1, i_2 j_2, i_3 j_3`."""

    modes: Modes
    shape: tuple[int, int]
    start: int
    stop: int
    tensor: Floats

    @property
    def first(self) -> int:
        return self.modes.sizes[0]

    @property
    def middle(self) -> int:
        return (self.stop - self.start) * self.modes.columns[1]

    def rows_of(self, tensor: Floats) -> Floats:
        """Return the slab's rows (`rows in`) without padding."""
        (m1, _, m3), (n1, n2, n3) = self.modes.rows, self.modes.columns
        split = tensor.reshape(m1, n1, self.stop - self.start, n2, m3, n3)
        rows = split.transpose(0, 2, 4, 1, 3, 5).reshape(-1, n1 * n2 * n3)
        return rows[self._stored(), : self.shape[1]]

    def read(self, source: RowSource) -> Floats:
        """Return another source's rows in the order of `rows_of`."""
        width = self.modes.rows[1] * self.modes.rows[2]
        parts = []
        for i1 in range(self.modes.rows[0]):
            first = i1 * width + self.start * self.modes.rows[2]
            last = min(i1 * width + self.stop * self.modes.rows[2], self.shape[0])
            if first < last:
                parts.append(np.asarray(source.read(first, last), dtype=self.tensor.dtype))
        return np.concatenate(parts)

    def _stored(self) -> NDArray[np.bool_] | slice:
        m1, m2, m3 = self.modes.rows
        if m1 * m2 * m3 == self.shape[0]:
            return slice(None)
        index = np.arange(m1 * m2 * m3).reshape(m1, m2, m3)[:, self.start : self.stop]
        return index.reshape(-1) < self.shape[0]


class _Slabs:
    """A row source in slabs that a three-core train can be fitted from; iterating reads it all."""

    def __init__(self, source: RowSource, modes: Modes, dtype: type[Any] = np.float64) -> None:
        rows, columns = matrix_shape(source)
        if len(modes.rows) != 3 or len(modes.columns) != 3:
            raise BitsmithError(f"streaming takes three cores, found modes {modes.rows} x {modes.columns}")
        if modes.shape[0] < rows or modes.shape[1] < columns:
            raise BitsmithError(f"modes of {modes.shape} cannot hold a matrix of {(rows, columns)}")
        self.source, self.modes, self.shape, self.dtype = source, modes, (rows, columns), np.dtype(dtype)

    def __iter__(self) -> Iterator[_Slab]:
        (m1, m2, m3), width = self.modes.rows, self.modes.shape[1]
        step = max(1, SLAB_BYTES // (self.dtype.itemsize * m1 * m3 * width))
        for start in range(0, m2, step):
            yield self._slab(start, min(start + step, m2))

    def _slab(self, start: int, stop: int) -> _Slab:
        (m1, m2, m3), (n1, n2, n3) = self.modes.rows, self.modes.columns
        rows = np.zeros((m1, (stop - start) * m3, self.modes.shape[1]), self.dtype)
        for i1 in range(m1):
            first = (i1 * m2 + start) * m3
            last = min((i1 * m2 + stop) * m3, self.shape[0])
            if first < last:
                rows[i1, : last - first, : self.shape[1]] = self.source.read(first, last)
        split = rows.reshape(m1, stop - start, m3, n1, n2, n3).transpose(0, 3, 1, 4, 2, 5)
        tensor = split.reshape(m1 * n1, (stop - start) * n2, m3 * n3)
        return _Slab(self.modes, self.shape, start, stop, tensor)


@dataclass(frozen=True)
class _Fitted:
    """The two projections of a three-core train: `left` (`p_1 r_1`) and `right` (`p_3 r_2`)."""

    ranks: tuple[int, ...]
    left: Floats
    right: Floats
    coded: Callable[[Float64], Float64] | None = None

    def approximate(self, inside: Floats, middle: int) -> Floats:
        """Return the approximated slab from `Uᵀ` of it, with `U` as wide as this one's or wider."""
        r1, (p3, r2) = self.ranks[1], self.right.shape
        reduced = inside[:r1].reshape(r1 * middle, p3)
        if self.coded is not None:
            reduced = _level(self.coded, reduced @ self.right) @ self.right.T
        elif r2 < p3:
            reduced = (reduced @ self.right) @ self.right.T
        return self.left @ reduced.reshape(r1, -1)


def _level(coded: Callable[[Float64], Float64], rows: Float64) -> Float64:
    """Return what rows decode to that were coded with columns of one size."""
    size = np.sqrt(np.mean(np.square(rows), axis=0))
    scale = np.where(size > 0, size, 1.0)
    return coded(rows / scale) * scale


def _fit(slabs: _Slabs, asked: Sequence[Sequence[int]]) -> list[_Fitted]:
    sizes = slabs.modes.sizes
    ranks = [possible_ranks(sizes, config) for config in asked]
    widest = max(config[1] for config in ranks)
    left = _leading(_first_gram(slabs), widest).astype(slabs.dtype)
    cuts = sorted({config[1] for config in ranks})
    bands = {cut: np.zeros((sizes[2], sizes[2])) for cut in cuts}
    for slab in slabs:
        inside = left.T @ slab.tensor.reshape(sizes[0], -1)
        for low, high in zip([0, *cuts], cuts, strict=False):
            band = inside[low:high].reshape(-1, sizes[2])
            bands[high] += band.T @ band
    rights, gram = {}, np.zeros((sizes[2], sizes[2]))
    for cut in cuts:  # the second unfolding at a larger rank has the rows of the smaller one and more
        gram += bands.pop(cut)
        rights[cut] = _leading(gram, max(config[2] for config in ranks if config[1] == cut))
        rights[cut] = rights[cut].astype(slabs.dtype)
    return [_Fitted(config, left[:, : config[1]], rights[config[1]][:, : config[2]]) for config in ranks]


def _first_gram(slabs: _Slabs) -> Float64:
    size = slabs.modes.sizes[0]
    gram = np.zeros((size, size))
    for slab in slabs:
        unfolded = slab.tensor.reshape(size, -1)
        gram += unfolded @ unfolded.T
    return gram


def _leading(gram: Float64, count: int) -> Float64:
    """Return the eigenvectors of the `count` largest eigenvalues, the largest first."""
    if not np.isfinite(gram).all():
        raise BitsmithError("values are not finite, or too large to square; a Tensor-Train needs finite ones")
    _, vectors = linalg.eigh(gram, subset_by_index=(gram.shape[0] - count, gram.shape[0] - 1))
    return np.ascontiguousarray(vectors[:, ::-1], dtype=np.float64)


class _Score:
    """Sums of squares and row cosines over slabs."""

    def __init__(self) -> None:
        self.error = self.total = self.cosines = 0.0
        self.rows = 0

    def add(self, target: Floats, approximate: Floats) -> None:
        energy, other, inner, error = row_products(target, approximate).T
        length = np.sqrt(energy * other)
        # a row of zeros has no direction; one approximated by zeros has lost its own, cosine 0
        self.cosines += float(np.divide(inner, length, out=np.zeros_like(inner), where=length > 0).sum())
        self.rows += int(np.count_nonzero(energy))
        self.total += float(energy.sum())
        self.error += float(error.sum())


def _measured(
    method: str,
    source: RowSource,
    modes: Modes,
    asked: tuple[int, ...],
    ranks: tuple[int, ...],
    parameters: int,
    score: _Score,
    core_rank: int | None = None,
) -> Train:
    rows, columns = source.shape
    return Train(
        method=method,
        modes=modes,
        padded_rows=modes.shape[0] - rows,
        padded_columns=modes.shape[1] - (columns if core_rank is None else core_rank),
        asked_ranks=asked,
        ranks=ranks,
        parameters=parameters,
        ratio=rows * columns / parameters,
        relative_error=float(np.sqrt(score.error / score.total)) if score.total > 0 else None,
        mean_row_cosine=score.cosines / score.rows if score.rows else None,
        core_rank=core_rank,
    )
