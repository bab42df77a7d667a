"""The steps between Hugging Face and GGUF layout: permutations, `+1` norms, `-exp`, squeezed kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs.arch import Step
from bitsmith.store.checkpoint import ComputedTensor, Rows, TensorRef

Permutation = NDArray[np.intp]


class PermuteRows(Step):
    """Row `i` of the result is row `order[i]` of the source."""

    def __init__(self, order: Permutation) -> None:
        self.order = order
        self.inverse = np.argsort(order)

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return the rows in the new order."""
        return _rows_in_order(ref, self.order)

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return the rows in the source's order."""
        return _rows_in_order(ref, self.inverse)


class PermuteColumns(Step):
    """Column `j` of the result is column `order[j]` of the source; importance moves with the columns."""

    changes_columns = True

    def __init__(self, order: Permutation) -> None:
        self.order = self.column_order = order
        self.inverse = np.argsort(order)

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return the columns in the new order."""
        return _mapped(ref, lambda rows: rows[..., self.order])

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return the columns in the source's order."""
        return _mapped(ref, lambda rows: rows[..., self.inverse])

    def inputs(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return the activations in the new column order."""
        return x[..., self.order]

    def importance(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the entries in the new column order."""
        return vector[self.order]

    def importance_back(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the entries in the source's column order."""
        return vector[self.inverse]


class ScaleRows(Step):
    """Row `i` of the result is row `i` of the source times `factors[i]` (`out`, none of them zero)."""

    def __init__(self, factors: NDArray[np.float64]) -> None:
        self.factors = factors

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return the scaled rows."""
        return _rows_scaled(ref, self.factors)

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return the rows before scaling."""
        return _rows_scaled(ref, 1 / self.factors)


class ScaleColumns(Step):
    """Column `j` of the result is column `j` of the source times `factors[j]` (`in`).

    A factor of zero loses its column, whose inputs no longer matter: undoing leaves zeros there.
    """

    changes_columns = True

    def __init__(self, factors: NDArray[np.float64]) -> None:
        self.factors = factors
        self.inverse = np.divide(1.0, factors, out=np.zeros_like(factors), where=factors != 0)
        self.column_factors = self.inverse

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return the scaled columns."""
        return _mapped(ref, lambda rows: _times(rows, self.factors))

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return the columns before scaling."""
        return _mapped(ref, lambda rows: _times(rows, self.inverse))

    def inputs(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return `x / factors`, zero where a factor is."""
        return _times(x, self.inverse)

    def importance(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `E[x²] / factors²`."""
        return _times(vector, self.inverse**2)

    def importance_back(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `E[x²] factors²`."""
        return _times(vector, self.factors**2)


class ScaleNorm(Step):
    """What a norm weight acts as, times `factors`: `w -> w s`, or `w -> (1 + w) s - 1`."""

    def __init__(self, factors: NDArray[np.float64], one_plus: bool) -> None:
        self.factors, self.offset = factors, float(one_plus)

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return the scaled norm weight."""
        return self._scaled(ref, self.factors)

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return the norm weight before scaling."""
        return self._scaled(ref, 1 / self.factors)

    def _scaled(self, ref: TensorRef, factors: NDArray[np.float64]) -> TensorRef:
        def compute(start: int, stop: int) -> Rows:
            rows = ref.read(start, stop)
            acts = rows.astype(np.float64) + self.offset
            return (acts * factors[start:stop] - self.offset).astype(rows.dtype)

        return ComputedTensor(ref.name, ref.shape, ref.dtype, compute)


class ConstantNorm(Step):
    """A norm weight that acts as one, whatever it was; undoing gives `original` back."""

    def __init__(self, original: TensorRef, one_plus: bool) -> None:
        self.original, self.value = original, 0 if one_plus else 1

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return the constant."""
        return _mapped(ref, lambda rows: np.full_like(rows, self.value))

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return the norm weight that was folded away."""
        del ref
        return self.original


class AddOne(Step):
    """`w -> 1 + w` in float32: a norm that acts as `1 + w` becomes one that acts as `w`.

    Undoing it is exact for stored values of at least 1/2; `w` itself keeps an absolute error of 2^-24.
    """

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return `1 + w` in F32."""
        return _mapped(ref, lambda rows: rows.astype(np.float32) + np.float32(1), "F32")

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return `w - 1` in F32."""
        return _mapped(ref, lambda rows: rows.astype(np.float32) - np.float32(1), "F32")


class NegativeExp(Step):
    """`a -> -exp(a)`, computed in float64 and rounded once to float32, so the same on every machine.

    PyTorch's float32 `exp`, which llama.cpp's converter takes, is one unit in the last place away from this
    in about one value of a hundred.
    """

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return `-exp(a)` in F32."""
        return _mapped(ref, lambda rows: -np.exp(rows.astype(np.float64)).astype(np.float32), "F32")

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return `log(-x)` in F32."""
        return _mapped(ref, lambda rows: np.log(-rows.astype(np.float64)).astype(np.float32), "F32")


class SqueezeKernel(Step):
    """A depthwise convolution kernel `channels 1 width` as `channels width`."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Drop the middle axis of one."""
        return (shape[0], shape[2])

    def apply(self, ref: TensorRef) -> TensorRef:
        """Return the kernel as `channels width`."""
        return _mapped(ref, lambda rows: rows[:, 0, :], shape=self.shape(ref.shape))

    def unapply(self, ref: TensorRef) -> TensorRef:
        """Return the kernel as `channels 1 width`."""
        return _mapped(ref, lambda rows: rows[:, None, :], shape=(ref.shape[0], 1, ref.shape[1]))


def _times(rows: NDArray[Any], factors: NDArray[np.float64]) -> NDArray[Any]:
    """Return `rows * factors`, each product rounded once to the dtype of `rows`."""
    return (rows * factors).astype(rows.dtype)


def _rows_scaled(ref: TensorRef, factors: NDArray[np.float64]) -> TensorRef:
    def compute(start: int, stop: int) -> Rows:
        rows = ref.read(start, stop)
        return _times(rows, factors[start:stop].reshape(-1, *(1,) * (rows.ndim - 1)))

    return ComputedTensor(ref.name, ref.shape, ref.dtype, compute)


def _mapped(
    ref: TensorRef,
    change: Callable[[Rows], Rows],
    dtype: str | None = None,
    shape: tuple[int, ...] | None = None,
) -> TensorRef:
    return ComputedTensor(
        ref.name, shape or ref.shape, dtype or ref.dtype, lambda start, stop: change(ref.read(start, stop))
    )


def _rows_in_order(ref: TensorRef, order: Permutation) -> TensorRef:
    return ComputedTensor(
        ref.name, ref.shape, ref.dtype, lambda start, stop: _read_in_order(ref, order[start:stop])
    )


def _read_in_order(ref: TensorRef, rows: Permutation) -> Rows:
    """Read `rows` of `ref` in that order: in one piece where they lie close together, else run by run."""
    if len(rows) == 0:
        return ref.read(0, 0)
    low, high = int(rows.min()), int(rows.max()) + 1
    if high - low <= 2 * len(rows):
        block = ref.read(low, high)
        return block[rows - low]
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    first = ref.read(int(runs[0][0]), int(runs[0][-1]) + 1)
    out = np.empty((len(rows), *first.shape[1:]), first.dtype)
    filled = len(first)
    out[:filled] = first
    for run in runs[1:]:
        out[filled : filled + len(run)] = ref.read(int(run[0]), int(run[-1]) + 1)
        filled += len(run)
    return out
