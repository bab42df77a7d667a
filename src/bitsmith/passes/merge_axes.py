"""How the channels of a student's inner axis (heads, FFN neurons) are made of a teacher's."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from bitsmith.errors import BitsmithError

Float64 = NDArray[np.float64]
Index = NDArray[np.intp]
Mixing = Any
"""`n_s` indices (a selection), or a matrix `n_t n_s`, dense or scipy's sparse array."""

_SPARSE: Any = sparse  # scipy's functions carry no types
_OPTIMIZE: Any = optimize

LARGEST_ASSIGNMENT = 1 << 26
"""Entries of a score matrix up to which an optimal assignment is searched."""


@dataclass(frozen=True)
class AxisMap:
    """A student's `n_s` channels out of a teacher's `n_t`.

    `producing` makes the rows of what writes the axis, `W'[j] = Σ_i producing[i, j] W[i]`; `reading` the
    columns of what reads it, `W'[:, j] = Σ_i W[:, i] reading[i, j]`. With `keeps_producers` what writes the
    axis stays the student's.
    """

    producing: Mixing
    reading: Mixing
    method: str
    keeps_producers: bool = False

    @classmethod
    def selecting(cls, order: Sequence[int] | Index, method: str = "select") -> AxisMap:
        """Return the map that takes channel `order[j]` for the student's j."""
        index = np.asarray(order, np.intp)
        return cls(index, index, method)


def mixed_columns(weights: Float64, mixing: Mixing | None) -> Float64:
    """Return the columns of `weights` (`out n_t`) mixed to `out n_s`; as they are without a mixing."""
    if mixing is None:
        return weights
    if is_selection(mixing):
        return weights[:, mixing]
    return np.asarray(weights @ mixing)


def is_selection(mixing: Mixing) -> bool:
    """Tell whether a mixing only picks channels."""
    return isinstance(mixing, np.ndarray) and mixing.ndim == 1


def by_channel(mixing: Mixing, size: int) -> Mixing:
    """Return a mixing of blocks of `size` channels from one of the blocks: channel c goes with channel c."""
    if is_selection(mixing):
        return (mixing[:, None] * size + np.arange(size, dtype=np.intp)).reshape(-1)
    return _SPARSE.kron(_SPARSE.csr_array(mixing), _SPARSE.eye_array(size), format="csr")


def best_matches(score: Float64) -> Index:
    """Return for each column of `score` (`n_t n_s`) its own row, so that the sum of scores is largest.

    Beyond `LARGEST_ASSIGNMENT` entries pairs are taken greedily, best first. Raises BitsmithError for
    fewer rows than columns or scores that are not finite.
    """
    rows, columns = score.shape
    if rows < columns:
        raise BitsmithError(f"{rows} channels of the teacher cannot fill the student's {columns}")
    if not np.isfinite(score).all():
        raise BitsmithError("scores are not finite")
    if score.size > LARGEST_ASSIGNMENT:
        return greedy_matches(score)
    found, student = _OPTIMIZE.linear_sum_assignment(score, maximize=True)
    order: Index = np.empty(columns, np.intp)
    order[student] = found
    return order


def greedy_matches(score: Float64) -> Index:
    """Return for each column of `score` (`n_t n_s`) its own row, the best pair of all left each time."""
    order: Index = np.full(score.shape[1], -1, np.intp)
    taken = np.zeros(len(score), bool)
    wanted = score.argmax(0)
    heap = [(-float(score[row, column]), column) for column, row in enumerate(wanted)]
    heapq.heapify(heap)
    while heap:
        _, column = heap[0]
        row = int(wanted[column])
        if taken[row]:
            wanted[column] = row = int(np.where(taken, -np.inf, score[:, column]).argmax())
            heapq.heapreplace(heap, (-float(score[row, column]), column))
            continue
        heapq.heappop(heap)
        order[column], taken[row] = row, True
    return order


def turned_blocks(mixing: Mixing, size: int, turns: Float64) -> Mixing:
    """Return `by_channel` of a mixing (`n_t n_s`) with each student block turned (`n_s size size`)."""
    return (by_channel(mixing, size) @ _SPARSE.block_diag(list(turns), format="csr")).tocsr()


def sparse_mixing(values: Float64, teacher: Index, student: Index, shape: tuple[int, int]) -> Mixing:
    """Return the mixing (`n_t n_s`) with `values` at (teacher, student) and zeros elsewhere."""
    return _SPARSE.csr_array((values, (teacher, student)), shape=shape)


def diagonal_of(moment: Float64) -> Float64:
    """Return the diagonal (`D`) of a second moment kept whole (`D D`), in blocks (`n b b`) or as it is."""
    if moment.ndim == 1:
        return moment
    blocks = moment[None] if moment.ndim == 2 else moment
    return np.diagonal(blocks, axis1=1, axis2=2).reshape(-1).copy()


def head_blocks(moment: Float64, dim: int) -> Float64:
    """Return the blocks by head (`H dim dim`) of a second moment kept whole, in blocks or as a diagonal.

    Raises BitsmithError where it does not divide into heads.
    """
    size = moment.shape[-1]
    if size % dim:
        raise BitsmithError(f"a moment of shape {moment.shape} does not divide into heads of {dim}")
    if moment.ndim == 1:
        return moment.reshape(-1, dim)[:, :, None] * np.eye(dim)
    each = size // dim
    split = moment.reshape(-1, each, dim, each, dim)
    blocks: Float64 = np.einsum("gaiaj->gaij", split).reshape(-1, dim, dim)
    return blocks


def regression(cross: Float64, student: Float64, ridge: float) -> Float64:
    """Return M (`n_t n_s`) with `t ≈ M s`, by least squares: `E[t sᵀ] (E[s sᵀ] + λ)⁻¹`.

    `student` is E[s sᵀ] whole (`n_s n_s`) or in blocks, between which nothing is taken to correlate; `ridge`
    is λ as a share of the mean power.
    """
    blocks = student[None] if student.ndim == 2 else student.reshape(len(student), *student.shape[1:])
    power = diagonal_of(student)
    unit = float(power.mean())
    found, size = np.empty_like(cross), blocks.shape[-1]
    for n, block in enumerate(blocks):
        at = slice(n * size, (n + 1) * size)
        damped = block + ridge * (unit if unit > 0 else 1.0) * np.eye(size)
        found[:, at] = np.linalg.solve(damped, cross[:, at].T).T
    return found


def correlations(cross: Float64, teacher: Float64, student: Float64) -> Float64:
    """Return `cross` (`n_t n_s`) over the root of both powers (`n_t`, `n_s`); 0 where one has no power."""
    left, right = (
        np.divide(1.0, np.sqrt(np.maximum(power, 0.0)), out=np.zeros(len(power)), where=power > 0)
        for power in (teacher, student)
    )
    scaled: Float64 = cross * left[:, None]
    scaled *= right
    return scaled
