"""Tensor-Train of a matrix (TT-SVD, Oseledets 2011), streamed over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


class RowSource(Protocol):
    """A matrix whose rows are read in slices; a `TensorRef` is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows `[start, stop)`."""


@dataclass(frozen=True)
class Modes:
    """How rows and columns split into mode factors, first mode slowest: core k has mode `m_k n_k`."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Train:
    """One Tensor-Train of one matrix, measured by comparing its rows with the original's.

    `asked_ranks` may be impossible for the shape; `ranks` were used. None where the matrix is all zeros.
    """

    method: str  # "TT" or "SVD core + TT"
    modes: Modes
    padded_rows: int  # rows of zeros added because the rows do not factor
    padded_columns: int
    asked_ranks: tuple[int, ...]
    ranks: tuple[int, ...]
    parameters: int
    ratio: float  # rows * columns / parameters
    relative_error: float | None
    mean_row_cosine: float | None
    core_rank: int | None = None  # of the SVD core

    @property
    def passes_gate(self) -> bool | None:
        """Whether the mean row cosine reaches 0.95."""
        return None if self.mean_row_cosine is None else self.mean_row_cosine >= 0.95


SEED_RANKS = ((1, 8, 8, 1), (1, 16, 16, 1), (1, 32, 32, 1), (1, 64, 64, 1), (1, 128, 128, 1), (1, 256, 256, 1), (1, 512, 4096, 1))


def scaled_ranks(columns: int, ranks: Sequence[Sequence[int]] = SEED_RANKS) -> tuple[tuple[int, ...], ...]:
    """Return `ranks`, meant for 4096 columns, scaled to `columns`, at least 1 each."""
    raise NotImplementedError


def balanced_modes(rows: int, columns: int, cores: int = 3) -> Modes:
    """Return near-equal mode factors."""
    raise NotImplementedError


def sweep(source: RowSource, ranks: Sequence[Sequence[int]] | None = None, modes: Modes | None = None) -> tuple[Train, ...]:
    """Return a measured Tensor-Train of three cores for each rank list, streaming the matrix three times."""
    raise NotImplementedError


def svd_core(source: RowSource, core_rank: int | None = None, ranks: Sequence[int] | None = None) -> Train:
    """Return the seed's SVD core (rank 1024 of 4096 columns) whose two factors are trains [1, 32, 32, 1]."""
    raise NotImplementedError
