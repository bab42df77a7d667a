"""Tensor-Trains as compression: cores that are rounded, in a metric of rows and columns.

TT-SVD knows no metric but the plain one. Where rows and columns have weights `d` and `c`, it is given
`W_ij √(d_i c_j)`, and what comes of it is divided by them again: `sum d_i c_j E_ij²` is what it makes small.
The divisors are stored beside the cores, in F16.

A product of two trains has `W ≈ A B`: B are the leading right singular vectors of `W` in the metric H of the
inputs, as rows of one length; A is solved for the B that is stored, `W H Bᵀ (B H Bᵀ)⁻¹`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.formats.format import Float32
from bitsmith.numerics.modes import Modes
from bitsmith.numerics.tensor_train import ArrayRows, ProjectedRows, RowSource, fitted_cores
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.factorize import ErrorMetric, FactorCode, Rounded, solved
from bitsmith.passes.factors import Factors, Metric
from bitsmith.store.factored import (
    COLUMN_SCALE,
    CORES,
    FLOAT_CODES,
    LEFT,
    RIGHT,
    ROW_SCALE,
    TrainForm,
    TrainsForm,
    code_grid,
    train_rows,
)

Float64 = NDArray[np.float64]

_LEAST_WEIGHT = 1e-2  # of the mean weight of rows or columns


def factor_code(code: str) -> FactorCode:
    """Return the code of a form (`store.factored`) as factors are rounded by."""
    return FactorCode(code_grid(code), FLOAT_CODES.get(code, "F32"))


@dataclass(frozen=True)
class RoundedTrain:
    """The cores of a train as they are stored, and the divisors of rows and columns where it has them."""

    form: TrainForm
    cores: tuple[Rounded, ...]
    scales: tuple[Float32, Float32] | None = None

    @property
    def parts(self) -> dict[str, Rounded]:
        """What is stored, by suffix."""
        scales = zip((ROW_SCALE, COLUMN_SCALE), map(Rounded, self.scales or ()), strict=False)
        return dict(zip(CORES, self.cores, strict=True)) | dict(scales)

    def rows(self, start: int = 0, stop: int | None = None) -> Float32:
        """Return rows `[start, stop)` of the matrix that is stored."""
        cores = [core.decoded for core in self.cores]
        return train_rows(self.form, cores, start, self.form.shape[0] if stop is None else stop, self.scales)


@one_blas_thread()
def rounded_train(
    source: RowSource, form: TrainForm, scales: tuple[Float32, Float32] | None = None
) -> RoundedTrain:
    """Return a matrix's train as `form` stores it, with `divisors` of rows and columns as its scales.

    Raises as `fitted_cores` does.
    """
    code, plain = factor_code(form.cores), ErrorMetric()
    divided = source if scales is None else _DividedRows(source, *scales)
    cores = fitted_cores(divided, form.ranks, Modes(*form.modes))
    shaped = zip(cores, form.core_shapes, strict=True)
    return RoundedTrain(
        form, tuple(plain.as_stored(core.reshape(shape), code) for core, shape in shaped), scales
    )


@one_blas_thread()
def rounded_trains(source: RowSource, form: TrainsForm, metric: ErrorMetric) -> dict[str, RoundedTrain]:
    """Return the trains of A and B as `form` stores them, under LEFT and RIGHT; raises as `fitted_cores`."""
    rank, columns = form.right.shape
    factors = Factors(source, Metric(metric.matrix, columns))
    found = min(rank, factors.rank)
    vectors = np.zeros((rank, columns))
    vectors[:found] = factors.right[:found] * (factors.sigma[:1] / factors.sigma[:found])[:, None]
    right = rounded_train(ArrayRows(vectors), form.right)
    stored = right.rows()
    weighed = metric.weighed(stored)
    into_left = solved(weighed @ stored.T.astype(np.float64), weighed).T
    return {LEFT: rounded_train(ProjectedRows(source, into_left), form.left), RIGHT: right}


def divisors(weights: NDArray[Any] | None, length: int) -> Float32:
    """Return `1 / √weights` (`length`) as F16 holds it, the weights over their mean; None: all alike.

    Weights below a hundredth of the mean count as that.
    """
    mean = 0.0 if weights is None else float(np.mean(weights, dtype=np.float64))
    if weights is None or not mean > 0:
        return np.ones(length, np.float32)
    found = 1 / np.sqrt(np.maximum(np.asarray(weights, np.float64) / mean, _LEAST_WEIGHT))
    return found.astype(np.float16).astype(np.float32)


class _DividedRows:
    """The rows of a source, each over its divisor, and each column over its own, computed on read."""

    def __init__(self, source: RowSource, rows: Float32, columns: Float32) -> None:
        self._source, self._rows, self._columns = source, rows, columns

    @property
    def shape(self) -> tuple[int, ...]:
        return self._source.shape

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        divisor = self._rows[start:stop, None] * self._columns
        return np.asarray(self._source.read(start, stop), np.float64) / divisor
