"""The metric of a matrix's inputs: a damped second moment H and the factors to feed errors back by.

An error `E` (`out in`) of a weight matrix costs `tr(E H Eᵀ)` at its output. With `H = V Vᵀ`, V upper
triangular, a row's cost is `|e V|² = sum_j V_jj² (e_j + sum_{k<j} e_k V_kj / V_jj)²`: column by column, the
errors of the columns before move the target of the next one, and a column's own error weighs `V_jj²`, its
Schur complement. V is the reversed Cholesky factor of H; nothing is inverted (LDLQ of Chee et al. 2023, which
equals GPTQ of Frantar et al. 2022).
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from bitsmith.errors import BitsmithError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

PANEL = 16
"""Columns of a packed matrix that lie together."""

DAMPING = 0.01
_GROWTH = 10.0
_ATTEMPTS = 12
_LEAST_DAMPING = 1e-6
_CORNER = 32


class SubFactors(NamedTuple):
    """Of every `size` columns by themselves: the feedback, its weights and the inverse of H.

    `feedback` (`subs size size`) is `V_kj / V_jj` above the diagonal, `weights` (`subs size`) is `V_jj²`.
    """

    feedback: NDArray[Any]
    weights: NDArray[Any]
    inverse: NDArray[Any]


def upper_factor(matrix: Float64) -> Float64 | None:
    """Return upper triangular V with `matrix = V Vᵀ` (`in in`), or None if it is not positive definite."""
    turned = np.asfortranarray(matrix[::-1, ::-1])
    try:
        lower: Float64 = linalg.cholesky(turned, lower=True, overwrite_a=True, check_finite=False)
    except linalg.LinAlgError:
        return None
    return lower[::-1, ::-1] if np.isfinite(lower).all() else None


def packed(matrix: NDArray[Any], kind: Any) -> NDArray[Any]:
    """Return a matrix (`n n`) with `PANEL` columns side by side (`n/PANEL n PANEL`)."""
    n = len(matrix)
    return np.ascontiguousarray(matrix.reshape(n, n // PANEL, PANEL).transpose(1, 0, 2), dtype=kind)


class Group:
    """Columns that see each other: H over them (`width width`), normalised and damped, and its factors.

    `hessian` is H and `feedback` is `V_kj / V_jj` above the diagonal, both packed
    (`width/PANEL width PANEL`); `diagonal` is H's, `weights` is what a column's own error costs when the
    later ones make up for it, `V_jj²`.
    """

    def __init__(self, moment: Float64, factor: Float64, kind: Any) -> None:
        self.width = len(moment)
        self.diagonal: Float64 = np.diagonal(moment).copy()
        self.hessian = packed(moment, kind)
        corners = range(0, self.width, _CORNER)
        self._corners = [moment[at : at + _CORNER, at : at + _CORNER].copy() for at in corners]
        self._kind = kind
        self._subs: dict[int, SubFactors] = {}
        self._lock = threading.Lock()
        own = np.diagonal(factor).copy()
        self.weights: Float64 = own**2
        factor /= own
        np.fill_diagonal(factor, 0.0)
        self.feedback = packed(factor, kind)

    def sub_factors(self, size: int) -> SubFactors:
        """Return the factors of every `size` columns (16 or 32) by themselves."""
        with self._lock:
            if size not in self._subs:
                self._subs[size] = self._sub_factors(size)
            return self._subs[size]

    def _sub_factors(self, size: int) -> SubFactors:
        cuts = [
            corner[at : at + size, at : at + size]
            for corner in self._corners
            for at in range(0, len(corner), size)
        ]
        subs = np.stack(cuts)
        factor = np.linalg.cholesky(subs[:, ::-1, ::-1])[:, ::-1, ::-1]
        own = np.diagonal(factor, axis1=1, axis2=2)
        parts = np.triu(factor / own[:, None, :], 1), own**2, np.linalg.inv(subs)
        return SubFactors(*(np.ascontiguousarray(part, dtype=self._kind) for part in parts))


class InputMetric:
    """H of one activation site, damped; its factors are computed when first asked for and then shared.

    `moment` is E[x xᵀ] (`in in`), or block-diagonal (`n b b`). It is divided by its mean diagonal, and
    `damping` is added to the diagonal (in units of the mean), so that columns which calibration never saw
    keep their weights; `shrink` moves it towards its own diagonal: what lies off it is divided by
    `1 + shrink`.
    A moment of zeros weighs every column the same. Where H is still not positive definite (an inconsistent
    input), the damping grows tenfold until it is: `damping` then says what was used.

    Raises BitsmithError for a moment that is not square, not finite or has negative variances.
    """

    def __init__(
        self, moment: NDArray[Any], damping: float = DAMPING, *, shrink: float = 0.0, kind: Any = np.float32
    ) -> None:
        blocks = moment[None] if moment.ndim == 2 else moment
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
            raise BitsmithError(f"second moment has shape {moment.shape}, expected `in in` or `n b b`")
        self.damping = damping
        self.shrink = shrink
        self.kind = kind
        self.width = blocks.shape[0] * blocks.shape[1]
        self._blocks = blocks
        self._groups: dict[int, list[Group]] = {}
        self._lock = threading.Lock()
        diagonals = np.diagonal(blocks, axis1=1, axis2=2).astype(np.float64)
        if not np.isfinite(blocks).all():
            raise BitsmithError("second moment holds values that are not finite")
        if (diagonals < 0).any():
            raise BitsmithError("second moment has negative variances")
        self._unit = float(diagonals.max()) if diagonals.size else 0.0
        if self._unit > 0:
            self._unit *= float((diagonals / self._unit).mean())

    def groups(self, block_size: int) -> list[Group]:
        """Return the groups of columns that see each other, each a whole number of blocks."""
        with self._lock:
            if block_size not in self._groups:
                size = self._blocks.shape[1]
                together = np.lcm(size, block_size) // size if size % block_size else 1
                same = [groups for key, groups in self._groups.items() if groups[0].width == size * together]
                found = same[0] if same else self._build(int(together))
                self._groups[block_size] = found
            return self._groups[block_size]

    def _build(self, together: int) -> list[Group]:
        count = len(self._blocks)
        starts = range(0, count, together)
        return [self._group(self._blocks[a : min(a + together, count)]) for a in starts]

    def _group(self, blocks: NDArray[Any]) -> Group:
        count, size = blocks.shape[:2]
        joined = np.zeros((count * size, count * size))
        for index, block in enumerate(blocks):
            at = slice(index * size, (index + 1) * size)
            exact = block.astype(np.float64)
            joined[at, at] = (exact + exact.T) / 2
        if self._unit > 0:
            joined /= self._unit
            diagonal = np.diagonal(joined).copy()
            joined /= 1 + self.shrink
        else:
            joined[:], diagonal = 0.0, np.ones(len(joined))
        return self._damped(joined, diagonal)

    def _damped(self, joined: Float64, diagonal: Float64) -> Group:
        damping = max(self.damping, _LEAST_DAMPING)
        for _ in range(_ATTEMPTS):
            np.fill_diagonal(joined, diagonal + damping)
            factor = upper_factor(joined)
            if factor is not None:
                self.damping = max(self.damping, damping)
                return Group(joined, factor, self.kind)
            damping *= _GROWTH
        raise BitsmithError("second moment is not positive definite even with damping")


def corrected_target(
    rows: Float32, cross: NDArray[Any], moment: NDArray[Any], damping: float = DAMPING
) -> Float32:
    """Return rows W' that give on changed inputs x̂ what `rows` W (`out in`) give on the original inputs x.

    `W' = argmin E|W x - W' x̂|² + λ |W' - W|² = W (C + λI) (M + λI)⁻¹`, where `cross` C is E[x x̂ᵀ], `moment`
    M is E[x̂ x̂ᵀ] (both `in in`) and λ is `damping` times M's mean diagonal. Rounding W' in the metric M then
    minimises the output error against the original model.

    Raises BitsmithError for moments of another shape or that are not finite.
    """
    width = rows.shape[-1]
    for matrix in (cross, moment):
        if matrix.shape != (width, width):
            raise BitsmithError(f"moments have shape {matrix.shape}, expected {(width, width)}")
    target: Float32 = (rows + rows @ target_change(cross, moment, damping)).astype(np.float32)
    return target


def target_change(cross: NDArray[Any], moment: NDArray[Any], damping: float = DAMPING) -> Float64:
    """Return D (`in in`) with `W' = W + W D` the target of `corrected_target`: `(C - M) (M + λI)⁻¹`.

    Exactly zero where nothing changed, and for a moment of zeros. Raises BitsmithError for moments that are
    not finite.
    """
    if not (np.isfinite(cross).all() and np.isfinite(moment).all()):
        raise BitsmithError("moments hold values that are not finite")
    exact = moment.astype(np.float64)
    exact = (exact + exact.T) / 2
    unit = float(np.diagonal(exact).mean())
    if not unit > 0:
        return np.zeros_like(exact)
    ridge = max(damping, _LEAST_DAMPING) * unit
    values, vectors = linalg.eigh(exact)
    inverse = (vectors / (np.maximum(values, 0.0) + ridge)) @ vectors.T
    change: Float64 = (cross.astype(np.float64) - exact) @ inverse
    return change
