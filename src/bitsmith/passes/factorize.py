"""Low rank as compression: factors that are rounded, and what they leave rounded beside them.

Errors `E = W - (A B + Q)` (`out in`) are weighed by what the inputs make of them, `tr(E H Eᵀ)` with H the
damped second moment of the inputs, `|E|²` without statistics. With `H = L Lᵀ` the best rank r is that of
`W L`, taken back: `[W L]_r L⁻¹` (Eckart, Young, Mirsky).

Rounding goes in turns, each kept only where the error falls: B is rounded in H; A is solved for the B that is
stored, `W H Bᵀ (B H Bᵀ)⁻¹`, and rounded by error feedback in `B H Bᵀ`; B is solved for the A that is stored.
With a remainder, Q is rounded to what the factors leave and the factors are taken of what Q leaves, in turns
(LoftQ, Li et al. 2023; with calibration CALDERA, Saha et al. 2024).
A matrix is held in memory, with a few squares of its shorter side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from bitsmith.errors import BitsmithError
from bitsmith.formats.format import Float32
from bitsmith.formats.integer import Coded, GridFormat
from bitsmith.numerics.input_metric import DAMPING, InputMetric
from bitsmith.numerics.tensor_train import ArrayRows
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.factors import Factors, Metric
from bitsmith.passes.grid_feedback import feedback

Float64 = NDArray[np.float64]

ROUNDS, REMAINDER_ROUNDS = 4, 8
"""Turns at most; most matrices stop earlier."""

_TOGETHER = 32  # columns that error feedback takes at a time
_RIDGE = 1e-7  # of the mean diagonal, where factors are solved for
_INNER_DAMPING = 1e-4  # of the metric that rows of A are rounded in: it is exact, not sampled
_HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Rounded:
    """A matrix of numbers as stored and what it decodes to; `coded` is None for floats."""

    decoded: Float32
    coded: Coded | None = None


@dataclass(frozen=True)
class Factored:
    """`A B + Q` as stored (None: not there), and `tr(E H Eᵀ)` of what it leaves."""

    left: Rounded | None
    right: Rounded | None
    rest: Rounded | None
    error: float

    @property
    def decoded(self) -> Float32:
        """The matrix that is stored (`out in`)."""
        product = None if self.left is None or self.right is None else self.left.decoded @ self.right.decoded
        if product is None or self.rest is None:
            found = product if self.rest is None else self.rest.decoded
            if found is None:
                raise BitsmithError("nothing is stored of a matrix")
            return found
        return product + self.rest.decoded


@dataclass(frozen=True)
class FactorCode:
    """How factors are stored: on a grid, or as floats."""

    grid: GridFormat | None
    dtype: str = "F32"


class ErrorMetric:
    """How the errors of a matrix's rows are weighed and rounded away.

    `moment` is E[x xᵀ] (`in in`), or None: all columns alike. It is divided by its mean diagonal, what lies
    off it by `1 + shrink`, and `damping` is added to the diagonal. Rounding feeds errors back, or with
    `feed` off weighs columns by the diagonal alone. `importance` (`in`) weighs them where only that is known.
    Raises BitsmithError for a moment of another shape, one that is not finite or has negative variances.
    """

    def __init__(
        self,
        moment: NDArray[Any] | None = None,
        damping: float = DAMPING,
        *,
        shrink: float = 0.0,
        feed: bool = True,
        importance: Float32 | None = None,
    ) -> None:
        if moment is None and importance is not None:
            moment, feed = np.diag(importance), False
        self.matrix = None if moment is None else _damped(moment, damping, shrink)
        self.importance = None if self.matrix is None else np.diagonal(self.matrix).astype(np.float32)
        self.feeds = feed and self.matrix is not None
        self._feedback: dict[int, InputMetric] = {}

    def error(self, errors: Float32) -> float:
        """Return `tr(E H Eᵀ)`."""
        weighed = errors if self.matrix is None else errors @ self.matrix.astype(np.float32)
        return float(np.einsum("ij,ij->", weighed, errors, dtype=np.float64))

    def weighed(self, rows: NDArray[Any]) -> Float64:
        """Return `rows H`."""
        return rows.astype(np.float64) if self.matrix is None else rows @ self.matrix

    def as_stored(self, rows: NDArray[Any], code: FactorCode) -> Rounded:
        """Return rows as `code` stores them."""
        if code.grid is not None:
            return self.rounded(rows, code.grid)
        if code.dtype == "F32":
            return Rounded(rows.astype(np.float32))
        return Rounded(np.clip(rows, -_HALF_MAX, _HALF_MAX).astype(np.float16).astype(np.float32))

    def rounded(self, rows: NDArray[Any], grid: GridFormat) -> Rounded:
        """Return rows (`out in`) on a grid: by error feedback or by the search, whichever errs less."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        coded = grid.quantize(rows, self.importance)
        found = Rounded(grid.dequantize(coded), coded)
        if not self.feeds:
            return found
        fed = self._fed_back(rows, grid)
        return min(fed, found, key=lambda one: self.error(rows - one.decoded))

    def _fed_back(self, rows: Float32, grid: GridFormat) -> Rounded:
        """Return rows rounded by error feedback, which takes whole groups of columns.

        Columns of zeros that no error reaches fill up the last group.
        """
        columns = rows.shape[1]
        more = -columns % (grid.group or _TOGETHER)
        if more not in self._feedback and self.matrix is not None:
            wide = linalg.block_diag(self.matrix, np.eye(more)) if more else self.matrix
            self._feedback[more] = InputMetric(wide, 0.0)
        fed = feedback(grid, np.pad(rows, ((0, 0), (0, more))), self._feedback[more])
        coded = Coded(np.ascontiguousarray(fed.codes[:, :columns]), fed.scales)
        return Rounded(grid.dequantize(coded), coded)


@one_blas_thread()
def low_rank(matrix: Float32, rank: int, metric: ErrorMetric) -> tuple[Float64, Float64]:
    """Return A (`out r`) and B (`r in`) of the best `rank` of a matrix in the metric, not rounded.

    The columns of A have one length. A matrix of a lower rank fills them up with zeros.
    """
    factors = Factors(ArrayRows(matrix), Metric(metric.matrix, matrix.shape[1]))
    found = min(rank, factors.rank)
    left, right = np.zeros((matrix.shape[0], rank)), np.zeros((rank, matrix.shape[1]))
    left[:, :found] = factors.left(np.arange(matrix.shape[0]), matrix)[:, :found]
    right[:found] = factors.right[:found]
    return left, right


@one_blas_thread()
def factorize(
    matrix: Float32, rank: int, code: FactorCode, metric: ErrorMetric, rounds: int = ROUNDS
) -> Factored:
    """Return rank `rank` of a matrix (`out in`) with both factors rounded, in at most `rounds` turns."""
    return _measured(matrix, *_factors(matrix, rank, code, metric, rounds), None, metric)


def _factors(
    matrix: Float32, rank: int, code: FactorCode, metric: ErrorMetric, rounds: int = ROUNDS
) -> tuple[Rounded, Rounded]:
    left, right = low_rank(matrix, rank, metric)
    if code.grid is None:
        return metric.as_stored(left, code), metric.as_stored(right, code)
    best = _turn(matrix, right, code, metric)
    for _ in range(rounds - 1):
        exact = best[0].decoded.astype(np.float64)
        found = _turn(matrix, solved(exact.T @ exact, exact.T @ matrix), code, metric)
        if not found[2] < best[2]:
            break
        best = found
    return best[:2]


def _turn(
    matrix: Float32, right: Float64, code: FactorCode, metric: ErrorMetric
) -> tuple[Rounded, Rounded, float]:
    """Return A and B as stored, B first and A solved for that, and the error."""
    b = metric.as_stored(right, code)
    weighed = metric.weighed(b.decoded)
    inner = weighed @ b.decoded.T.astype(np.float64)
    left = solved(inner, weighed @ matrix.T.astype(np.float64)).T
    a = ErrorMetric(inner, _INNER_DAMPING).as_stored(left, code)
    return a, b, metric.error(matrix - a.decoded @ b.decoded)


@one_blas_thread()
def with_remainder(
    matrix: Float32,
    rank: int,
    code: FactorCode,
    grid: GridFormat,
    metric: ErrorMetric,
    rounds: int = REMAINDER_ROUNDS,
) -> Factored:
    """Return rank `rank` and the remainder on `grid`: never worse in the metric than the grid alone.

    Two starts are tried: factors of the matrix and then the remainder, and factors of what rounding leaves.
    """
    alone = metric.rounded(matrix, grid)
    left, right = (np.zeros(shape) for shape in ((matrix.shape[0], rank), (rank, matrix.shape[1])))
    nothing = [ErrorMetric().as_stored(factor, code) for factor in (left, right)]
    found = [_measured(matrix, nothing[0], nothing[1], alone, metric)]
    for start in (np.zeros_like(matrix), alone.decoded):
        found.append(_in_turns(matrix, rank, code, grid, metric, start, rounds))
    return min(found, key=lambda one: one.error)


def _in_turns(
    matrix: Float32,
    rank: int,
    code: FactorCode,
    grid: GridFormat,
    metric: ErrorMetric,
    start: Float32,
    rounds: int,
) -> Factored:
    """Return factors and remainder in turns from the remainder `start`, factors last."""
    best: Factored | None = None
    rest = start
    for _ in range(max(1, rounds)):
        left, right = _factors(matrix - rest, rank, code, metric, 1)  # more would not lower the end's error
        remainder = metric.rounded(matrix - left.decoded @ right.decoded, grid)
        found = _measured(matrix, left, right, remainder, metric)
        if best is not None and not found.error < best.error:
            break
        best, rest = found, remainder.decoded
    if best is None or best.rest is None:
        raise BitsmithError("no turn was asked for")
    left, right = _factors(matrix - rest, rank, code, metric)
    return min(best, _measured(matrix, left, right, best.rest, metric), key=lambda one: one.error)


def _measured(
    matrix: Float32, left: Rounded, right: Rounded, rest: Rounded | None, metric: ErrorMetric
) -> Factored:
    found = Factored(left, right, rest, 0.0)
    return Factored(left, right, rest, metric.error(matrix - found.decoded))


@one_blas_thread()
def head_energies(output: Float32, heads: int, moment: NDArray[Any] | None = None) -> Float64:
    """Return what each head adds to the output, `tr(O_h H_hh O_hᵀ)`, of an output projection.

    `output` is `out (heads width)`, `moment` E[x xᵀ] of what it reads (None: all alike, `|O_h|²`).
    Raises BitsmithError where the columns are no whole heads.
    """
    columns = output.shape[1]
    if heads < 1 or columns % heads:
        raise BitsmithError(f"{columns} columns are not {heads} heads")
    width = columns // heads
    found = np.empty(heads)
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        own = output[:, at].astype(np.float64)
        weighed = own if moment is None else own @ moment[at, at].astype(np.float64)
        found[head] = np.einsum("ij,ij->", weighed, own)
    return found


@one_blas_thread()
def without_columns(
    matrix: Float32, kept: NDArray[np.intp], metric: ErrorMetric
) -> tuple[Float32, ErrorMetric]:
    """Return the kept columns of a matrix, making up for the others, and the metric of the kept ones' inputs.

    `W H[:, k] H[k, k]⁻¹`: what inputs that are kept tell of those that are not is not lost.
    """
    if metric.matrix is None:
        return np.ascontiguousarray(matrix[:, kept]), ErrorMetric()
    inside = metric.matrix[np.ix_(kept, kept)]
    target = solved(inside, metric.matrix[kept] @ matrix.T.astype(np.float64)).T
    return target.astype(np.float32), ErrorMetric(inside, 0.0, feed=metric.feeds)


def _damped(moment: NDArray[Any], damping: float, shrink: float) -> Float64:
    exact = np.asarray(moment, dtype=np.float64)
    diagonal = np.diagonal(exact).copy() if exact.ndim == 2 else np.zeros(0)
    if exact.ndim != 2 or exact.shape[0] != exact.shape[1] or not np.isfinite(exact).all():
        raise BitsmithError(f"second moment is {exact.shape}, expected finite `in in`")
    if diagonal.min(initial=0.0) < 0:
        raise BitsmithError("second moment has negative variances")
    unit = float(diagonal.mean())
    if not unit > 0:
        return np.eye(len(exact))
    found: Float64 = (exact + exact.T) / (2 * unit * (1 + shrink))
    np.fill_diagonal(found, diagonal / unit + damping)
    return found


def solved(gram: Float64, right: Float64) -> Float64:
    """Return `gram⁻¹ right`, a little damped: a Gram matrix of zeros gives zeros."""
    ridge = _RIDGE * float(np.diagonal(gram).mean()) or 1.0
    found = np.linalg.solve(gram + ridge * np.eye(len(gram)), right)
    return found.astype(np.float64)
