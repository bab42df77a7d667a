"""The metric of a matrix's inputs: a damped second moment H and the factors to feed errors back by.

An error `E` (`out in`) of a weight matrix costs `tr(E H Eᵀ)` at its output. With `H = V Vᵀ`, V upper
triangular, a row's cost is `|e V|² = sum_j V_jj² (e_j + sum_{k<j} e_k V_kj / V_jj)²`: column by column, the
errors of the columns before move the target of the next one, and a column's own error weighs `V_jj²`, its
Schur complement. V is the reversed Cholesky factor of H; nothing is inverted (LDLQ of Chee et al. 2023, which
equals GPTQ of Frantar et al. 2022).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.linalg import get_lapack_funcs

from bitsmith.errors import BitsmithError
from bitsmith.numerics.short_products import ShortMatrix, short_matrix

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

DAMPING = 0.01
_potrf: Any = get_lapack_funcs("potrf", dtype=np.float64)
_GROWTH = 10.0
_ATTEMPTS = 12
_LEAST_DAMPING = 1e-6
_TILE = 512


class SubFactors(NamedTuple):
    """Of every `size` columns by themselves: the feedback, its weights and the inverse of H.

    `feedback` (`subs size size`) is `V_kj / V_jj` at `j k` (below the diagonal), `weights` (`subs size`) is
    `V_jj²`.
    """

    feedback: NDArray[Any]
    weights: NDArray[Any]
    inverse: NDArray[Any]


class Panel(NamedTuple):
    """Columns that are rounded together, what follows them taken as making up for their errors.

    The metric of their own errors is then `metric` S = V Vᵀ of V's diagonal block `factor` (`size size`),
    `turned` its transpose; `feedback` is `V_kj / V_jj` at `j k` (below the diagonal), `solved` the inverse of
    `I + feedback`, and `subs` are the factors of every few columns of S by themselves.
    """

    metric: NDArray[Any]
    factor: NDArray[Any]
    turned: NDArray[Any]
    feedback: NDArray[Any]
    solved: NDArray[Any]
    subs: SubFactors


class Group:
    """Columns that see each other: H over them (`width width`), normalised and damped, and its factors.

    `feedback` is `V_kj / V_jj` at `j k`, below the diagonal (`width width`); `diagonal` is H's, `weights` is
    what a column's own error costs when the later ones make up for it, `V_jj²`.
    """

    def __init__(self, moment: Callable[[], Float64], lower: Float64, diagonal: Float64, kind: Any) -> None:
        self.width = len(lower)
        self.diagonal = diagonal
        self._moment = moment
        self._kind = kind
        self._subs: dict[int, SubFactors] = {}
        self._panels: dict[tuple[int, int], list[Panel]] = {}
        self._short: dict[int, list[ShortMatrix]] = {}
        self._lock = threading.RLock()
        own = np.diagonal(lower)[::-1].copy()
        self.weights: Float64 = own**2
        self.feedback = np.empty(lower.shape, kind)
        np.divide(lower.T[::-1, ::-1], own[:, None], out=self.feedback, casting="unsafe")
        _keep_below(self.feedback)

    @cached_property
    def hessian(self) -> NDArray[Any]:
        """H (`width width`)."""
        return self._moment().astype(self._kind)

    def sub_factors(self, size: int) -> SubFactors:
        """Return the factors of every `size` columns (16 or 32) of H by themselves."""
        with self._lock:
            if size not in self._subs:
                cuts = [self.hessian[at : at + size, at : at + size] for at in range(0, self.width, size)]
                self._subs[size] = _sub_factors(np.stack(cuts).astype(np.float64), self._kind)
            return self._subs[size]

    def panels(self, size: int, sub_size: int) -> list[Panel]:
        """Return the panels of `size` columns (the last may be narrower), their sub-blocks of `sub_size`."""
        key = size, sub_size
        with self._lock:
            if key not in self._panels:
                ends = [(at, min(at + size, self.width)) for at in range(0, self.width, size)]
                self._panels[key] = [self._panel(*ends_at, sub_size) for ends_at in ends]
            return self._panels[key]

    def short_rows(self, size: int) -> list[ShortMatrix]:
        """Return `feedback` in short for each panel of `size` columns: its rows, the columns before it."""
        with self._lock:
            if size not in self._short:
                starts = range(0, self.width, size)
                self._short[size] = [short_matrix(self.feedback[at : at + size, :at], size) for at in starts]
            return self._short[size]

    def _panel(self, at: int, end: int, sub_size: int) -> Panel:
        feedback = self.feedback[at:end, at:end].astype(np.float64)
        unit = feedback + np.eye(end - at)
        turned = unit * np.sqrt(self.weights[at:end, None])
        metric = turned.T @ turned
        cuts = range(0, end - at, sub_size)
        subs = np.stack([metric[cut : cut + sub_size, cut : cut + sub_size] for cut in cuts])
        solved = linalg.solve_triangular(unit, np.eye(end - at), lower=True, unit_diagonal=True)
        parts = metric, turned.T, turned, feedback, solved
        a, b, c, d, e = (np.ascontiguousarray(part, dtype=self._kind) for part in parts)
        return Panel(a, b, c, d, e, _sub_factors(subs, self._kind))


def _sub_factors(subs: Float64, kind: Any) -> SubFactors:
    factor = np.linalg.cholesky(subs[:, ::-1, ::-1])[:, ::-1, ::-1]
    own = np.diagonal(factor, axis1=1, axis2=2)
    turned = np.swapaxes(np.triu(factor / own[:, None, :], 1), 1, 2)
    return SubFactors(
        *(np.ascontiguousarray(part, dtype=kind) for part in (turned, own**2, np.linalg.inv(subs)))
    )


def _keep_below(matrix: NDArray[Any]) -> None:
    """Set a square matrix to zero on and above its diagonal."""
    for at in range(0, len(matrix), _TILE):
        end = at + _TILE
        matrix[at:end, end:] = 0.0
        matrix[at:end, at:end] = np.tril(matrix[at:end, at:end], -1)


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
        diagonal = np.concatenate([np.diagonal(block) for block in blocks]).astype(np.float64)
        diagonal = diagonal / self._unit if self._unit > 0 else np.ones(len(diagonal))
        damping = max(self.damping, _LEAST_DAMPING)
        for _ in range(_ATTEMPTS):
            damped = diagonal + damping
            lower = self._lower(blocks, damped)
            if lower is not None:
                self.damping = max(self.damping, damping)
                return Group(partial(self._joined, blocks, damped), lower, damped, self.kind)
            damping *= _GROWTH
        raise BitsmithError("second moment is not positive definite even with damping")

    def _lower(self, blocks: NDArray[Any], diagonal: Float64) -> Float64 | None:
        """Return the Cholesky factor of H with its columns turned round, or None if it has none.

        What lies above the diagonal means nothing.
        """
        turned = np.zeros((len(diagonal), len(diagonal)))
        self._join(blocks, diagonal, turned[::-1, ::-1])
        lower, info = _potrf(turned.T, lower=1, clean=0, overwrite_a=1)
        return lower if info == 0 and np.isfinite(np.diagonal(lower)).all() else None

    def _joined(self, blocks: NDArray[Any], diagonal: Float64) -> Float64:
        """Return H (`width width`)."""
        joined = np.zeros((len(diagonal), len(diagonal)))
        self._join(blocks, diagonal, joined)
        return joined

    def _join(self, blocks: NDArray[Any], diagonal: Float64, out: Float64) -> None:
        size = blocks.shape[1]
        for index, block in enumerate(blocks if self._unit > 0 else []):
            at = index * size
            factor = 0.5 / self._unit / (1 + self.shrink)
            _add_symmetric(block, factor, out[at : at + size, at : at + size])
        np.fill_diagonal(out, diagonal)


def _add_symmetric(block: NDArray[Any], factor: float, out: Float64) -> None:
    """Set `out` to `factor (block + blockᵀ)`, tile by tile so that both lie in the cache."""
    cuts = [slice(at, at + _TILE) for at in range(0, len(block), _TILE)]
    for row in cuts:
        for column in cuts:
            np.add(block[row, column], block[column, row].T, out=out[row, column], dtype=np.float64)
            out[row, column] *= factor


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
