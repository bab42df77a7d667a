"""Eigenvalues of a symmetric matrix by way of a band: most of the work is products of matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigvals_banded, get_blas_funcs, get_lapack_funcs, solve_triangular

WIDTH = 48  # of the band; wider makes the products faster and the band slower


def eigenvalues(matrix: NDArray[Any], width: int = WIDTH) -> NDArray[np.float64]:
    """Return all eigenvalues, ascending, of a symmetric matrix given by its lower triangle.

    The matrix is reduced to a band by block reflections I − V T Vᵀ in its own precision, float32 or float64
    (Bischof, Lang, Sun 2000), and the band is solved in float64. `eigvalsh` reduces it to three diagonals at
    once, where half of the work waits for memory.
    """
    band = _band(np.asfortranarray(matrix), max(1, min(width, len(matrix) - 1)))
    ascending: NDArray[np.float64] = eigvals_banded(band, lower=True, check_finite=False)
    return ascending


def _band(block: NDArray[Any], width: int) -> NDArray[np.float64]:
    """Reduce to a band; return its diagonals as rows, from the main one downwards (`width+1 n`)."""
    n = len(block)
    gemm, symm, syr2k = get_blas_funcs(("gemm", "symm", "syr2k"), (block,))
    band = np.zeros((width + 1, n))
    for start in range(0, n, width):
        wide = min(width, n - start)
        if len(block) > width + 1:
            corner, V, T = _reflections(block[width:, :width])
            rest = np.asfortranarray(block[width:, width:])
            VT = gemm(1.0, V, T)
            Y = symm(1.0, rest, VT, lower=True)
            Y = gemm(-0.5, V, gemm(1.0, VT, Y, trans_a=True), beta=1.0, c=Y, overwrite_c=True)
            columns = np.concatenate([block[:width, :width], corner])
            block = syr2k(-1.0, V, Y, beta=1.0, c=rest, lower=True, overwrite_c=True)
        else:
            columns = block[:, :wide]
            block = block[wide:, wide:]
        for column in range(wide):
            values = columns[column : column + width + 1, column]
            band[: len(values), start + column] = values
    return band


def _reflections(panel: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return R, V, T of the panel's QR factorisation, Q = I − V T Vᵀ."""
    (geqrf,), (gemm,) = get_lapack_funcs(("geqrf",), (panel,)), get_blas_funcs(("gemm",), (panel,))
    factors, tau, _, _ = geqrf(panel, lwork=64 * panel.shape[1])
    k = len(tau)
    R = np.triu(factors[:k])
    V = np.tril(factors, -1)[:, :k]
    V[np.arange(k), np.arange(k)] = 1.0
    V[:, tau == 0] = 0.0
    inverse = np.triu(gemm(1.0, V, V, trans_a=True), 1)
    inverse[np.arange(k), np.arange(k)] = 1 / np.where(tau == 0, 1, tau)
    T = solve_triangular(inverse, np.eye(k, dtype=panel.dtype), check_finite=False)
    return R, np.asfortranarray(V), T
