"""A stored matrix folded to a student's rows and columns in float64, in pieces that threads share.

Pieces are cut by the matrix alone and each is multiplied by one thread, so that bytes do not depend on how
many there are. Beside the result there is in memory a piece for each thread, and where rows are mixed, the
matrix with its columns mixed (float32 where they are only picked).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.numerics.threads import in_order
from bitsmith.passes.merge_axes import Mixing, is_selection, mixed_columns
from bitsmith.store.checkpoint import Rows, TensorRef

Float64 = NDArray[np.float64]

_STRIPE = 512


def folded(ref: TensorRef, rows: Mixing | None, columns: Mixing | None) -> Float64:
    """Return `rowsᵀ W columns` (`n_s in'`) of a stored tensor, read in slices; None keeps an axis.

    `rows` may be a residual map (`out n_s`), `columns` one too (`in in'`).
    """
    if rows is None or is_selection(rows):
        return _picked(ref, rows, columns)
    return _mixed(ref, rows, columns)


def as_matrix(rows: Rows) -> Float64:
    """Return a tensor's rows as a matrix in float64: a vector as a column, a convolution by channel."""
    return rows.astype(np.float64).reshape(len(rows), -1)


def _picked(ref: TensorRef, rows: Mixing | None, columns: Mixing | None) -> Float64:
    """Return `W[rows] columns`; every row is read once, and only those that are wanted are multiplied."""
    wanted = np.arange(ref.n_rows, dtype=np.intp) if rows is None else np.asarray(rows, np.intp)
    made: Float64 = np.empty((len(wanted), _width(ref, columns)))

    def piece(at: tuple[int, int]) -> None:
        places = np.flatnonzero((wanted >= at[0]) & (wanted < at[1]))
        if places.size:
            made[places] = mixed_columns(as_matrix(ref.read(*at)[wanted[places] - at[0]]), columns)

    for _ in in_order(piece, ref.slices()):
        pass
    return made


def _mixed(ref: TensorRef, rows: Mixing, columns: Mixing | None) -> Float64:
    turned = rows.T if isinstance(rows, np.ndarray) else rows.T.tocsr()
    inner = _with_columns(ref, columns)
    made: Float64 = np.empty((turned.shape[0], inner.shape[1]))

    def piece(start: int) -> None:
        made[:, start : start + _STRIPE] = turned @ inner[:, start : start + _STRIPE].astype(np.float64)

    for _ in in_order(piece, range(0, inner.shape[1], _STRIPE)):
        pass
    return made


def _with_columns(ref: TensorRef, columns: Mixing | None) -> NDArray[Any]:
    """Return `W columns` of all rows: as they are stored where columns are only picked."""
    plain = columns is None or is_selection(columns)
    kept: Any = np.float32 if plain and ref.dtype != "F64" else np.float64
    made = np.empty((ref.n_rows, _width(ref, columns)), kept)

    def piece(at: tuple[int, int]) -> None:
        part = ref.read(*at).reshape(at[1] - at[0], -1)
        made[slice(*at)] = (
            part[:, columns]
            if plain and columns is not None
            else (part if plain else mixed_columns(part.astype(np.float64), columns))
        )

    for _ in in_order(piece, ref.slices()):
        pass
    return made


def _width(ref: TensorRef, columns: Mixing | None) -> int:
    """Return how many columns come out."""
    if columns is None:
        return ref.size // max(1, ref.n_rows)
    return len(columns) if is_selection(columns) else int(columns.shape[1])
