"""The methods that recipe `sahc` tries on a matrix: what each makes of it, its bytes, what was promised.

They are schemes of `run.factored_scheme`, with a scale per row, and computed as `run.pack_factored` computes
them; ranks are for 4096 of the shorter side (trains: 4096 columns) and shrink in proportion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.formats.integer import GridFormat, grid_named
from bitsmith.numerics.tensor_train import ArrayRows
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.factorize import ErrorMetric, FactorCode, factorize, without_columns
from bitsmith.passes.factors import Factors, Metric
from bitsmith.passes.low_rank import claimed_error
from bitsmith.passes.trains import rounded_train, rounded_trains
from bitsmith.run.factored_scheme import form_of, parse_scheme
from bitsmith.run.pack_factored import error_metric
from bitsmith.run.packer import Matrix
from bitsmith.store.factored import LEFT, RIGHT, Blocks, Form, TrainForm, TrainsForm, form_bytes

Float32 = NDArray[np.float32]

SEED_TRAIN_ERROR = 0.017
"""The seed's bound for its Tensor-Train with an SVD core."""
SEED_SIDE = 4096
ROW_GROUP = 0
"""`group` of `write_folder`: a scale per row."""
ROUNDER = "auto"
"""`rounder` of `write_folder`: with statistics per tensor what does best."""


class Weights:
    """One matrix (`out in`), and the blocks of an `axis` that pruning keeps.

    `matrix` has the statistics that guide the rounding, if any do; None is without.
    """

    def __init__(
        self, values: Float32, kept: Blocks | None = None, axis: int = 0, matrix: Matrix | None = None
    ) -> None:
        self.values, self.kept, self.axis, self._matrix = values, kept, axis, matrix

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def kept_shape(self) -> tuple[int, int]:
        """(out, in) without what is pruned."""
        sizes = [*self.shape]
        if self.kept is not None:
            sizes[self.axis] = self.kept.length
        return sizes[0], sizes[1]

    def metric(self, scheme: str) -> ErrorMetric:
        """Return how a scheme's errors are weighed."""
        form = form_of(parse_scheme(scheme), self.shape, ROW_GROUP)
        if self._matrix is None or isinstance(form, TrainForm):
            return ErrorMetric()
        return error_metric(self._matrix, form)[1]

    def part(self, metric: ErrorMetric) -> tuple[Float32, ErrorMetric]:
        """Return what pruning keeps and its metric; kept columns make up for the others as they can."""
        if self.kept is None:
            return self.values, metric
        if self.axis:
            return without_columns(self.values, self.kept.index, metric)
        return np.ascontiguousarray(self.values[self.kept.index]), metric

    def whole(self, part: Float32) -> Float32:
        """Return a matrix of the whole shape: `part` where it is kept, zeros where it is pruned."""
        if self.kept is None:
            return part
        whole = np.zeros(self.shape, np.float32)
        index = self.kept.index
        whole[(index, slice(None)) if self.axis == 0 else (slice(None), index)] = part
        return whole


@dataclass(frozen=True)
class Coded:
    """What a method makes of a matrix: the weights that come back, and those before rounding.

    `truncated` is None where nothing but rounding is done; `promised` is the relative error that the plan
    counts on, None where it says nothing; `best` is Eckart-Young-Mirsky's on the true spectrum, `weighed` the
    relative error in the metric of the inputs, None without statistics.
    """

    decoded: Float32
    truncated: Float32 | None
    stored_bytes: int
    promised: float | None
    best: float | None = None
    weighed: float | None = None


class Method(ABC):
    """One way of storing a matrix."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called in plans, logs and tables."""

    @abstractmethod
    def scheme(self, weights: Weights) -> str:
        """Return `write_folder`'s scheme for the matrix."""

    def nbytes(self, weights: Weights) -> int:
        """Return the bytes of its parts, which the shape and what pruning keeps decide."""
        return stored_bytes(self.scheme(weights), weights.shape)

    @abstractmethod
    def code(self, weights: Weights) -> Coded:
        """Return what it makes of a matrix."""


@dataclass(frozen=True)
class Stored(Method):
    """The matrix as it is stored in the source."""

    @property
    def name(self) -> str:
        """Return `as stored`."""
        return "as stored"

    def scheme(self, weights: Weights) -> str:
        """Return the scheme of what is kept."""
        del weights
        return "BF16"

    def nbytes(self, weights: Weights) -> int:
        """Return the bytes of 16-bit weights."""
        return 2 * weights.values.size

    def code(self, weights: Weights) -> Coded:
        """Return the matrix."""
        return Coded(weights.values, None, self.nbytes(weights), None)


@dataclass(frozen=True)
class Rows(Method):
    """Integers with a scale per row; promised is the error of uniform rounding, `step² / 12` per weight."""

    bits: int

    @property
    def name(self) -> str:
        """Return `row-int4` or `row-int8`."""
        return f"row-int{self.bits}"

    def scheme(self, weights: Weights) -> str:
        """Return the scheme of codes alone."""
        del weights
        return f"INT{self.bits}"

    @one_blas_thread()
    def code(self, weights: Weights) -> Coded:
        """Return the rows as they come back from the grid."""
        values, scheme = weights.values, self.scheme(weights)
        steps = np.abs(values).max(axis=1).astype(np.float64) / (2 ** (self.bits - 1) - 1)
        noise, energy = np.square(steps).sum() * values.shape[1] / 12, squared(values)
        metric = weights.metric(scheme)
        decoded = metric.rounded(values, _grid(self.bits)).decoded
        return Coded(
            decoded,
            None,
            self.nbytes(weights),
            float(np.sqrt(noise / energy)) if energy else None,
            weighed=_weighed(metric, values, decoded),
        )


@dataclass(frozen=True)
class LowRank(Method):
    """Truncated SVD with integer factors, of what pruning leaves; a `rank` of None keeps all.

    The plan's error is the seed's: exponential decay to 0.039 at rank 512; none where the rank is full.
    """

    rank: int | None
    bits: int = 4
    pruning: str = ""

    @property
    def name(self) -> str:
        """Return the rank as in the seed's plan, its bits and its pruning."""
        pruned = f"{self.pruning} pruning + " if self.pruning else ""
        return f"{pruned}SVD {'full rank' if self.rank is None else f'r{self.rank}/4096'} + int{self.bits}"

    def scheme(self, weights: Weights) -> str:
        """Return the scheme of a product, with the blocks that are kept."""
        text = f"SVD:r={self._rank(weights)}:int{self.bits}"
        if self.pruning and weights.kept is not None:
            blocks = f"{weights.kept.size}x{'.'.join(map(str, weights.kept.kept))}"
            text += f":{'cols' if weights.axis else 'rows'}={blocks}"
        return text

    @one_blas_thread()
    def code(self, weights: Weights) -> Coded:
        """Return the product of rounded factors."""
        scheme, rank, pruned = self.scheme(weights), self._rank(weights), bool(self.pruning and weights.kept)
        metric = weights.metric(scheme)
        part, inner = weights.part(metric) if pruned else (weights.values, metric)
        found = factorize(part, rank, FactorCode(_grid(self.bits)), inner).decoded
        factors = Factors(ArrayRows(part), Metric(inner.matrix, part.shape[1]))
        left = factors.left(np.arange(part.shape[0]), part)[:, :rank]
        truncated: Float32 = left @ factors.right[:rank]
        decoded = weights.whole(found) if pruned else found
        return Coded(
            decoded,
            weights.whole(truncated) if pruned else truncated,
            self.nbytes(weights),
            claimed_error(rank, min(part.shape)) if rank < min(part.shape) else None,
            None if pruned else factors.theory(rank),
            _weighed(metric, weights.values, decoded),
        )

    def _rank(self, weights: Weights) -> int:
        side = min(weights.kept_shape if self.pruning else weights.shape)
        return side if self.rank is None else min(side, _scaled(self.rank, side))


@dataclass(frozen=True)
class Train(Method):
    """A Tensor-Train of three cores with integer entries, or with a `core` one of each factor of an SVD.

    The promise is the seed's bound; none where the rank is full.
    """

    rank: int
    core: int | None = None
    bits: int = 4

    @property
    def name(self) -> str:
        """Return the ranks as in the seed's plan."""
        core = "" if self.core is None else f" + SVD core r{self.core}/4096"
        return f"TT [1, {self.rank}, {self.rank}, 1]/4096{core} + int{self.bits}"

    def scheme(self, weights: Weights) -> str:
        """Return the scheme of a train, or of two."""
        columns = weights.shape[1]
        ranks = f"r={_scaled(self.rank, columns)}:int{self.bits}"
        return f"TT:{ranks}" if self.core is None else f"TT+SVD:core={_scaled(self.core, columns)}:{ranks}"

    @one_blas_thread()
    def code(self, weights: Weights) -> Coded:
        """Return the matrix that the rounded cores make."""
        scheme = self.scheme(weights)
        form, metric = form_of(parse_scheme(scheme), weights.shape, ROW_GROUP), weights.metric(scheme)
        exact = form_of(parse_scheme(scheme.replace(f"int{self.bits}", "f32")), weights.shape, ROW_GROUP)
        decoded, truncated = (_of_trains(weights.values, one, metric) for one in (form, exact))
        return Coded(
            decoded,
            truncated,
            self.nbytes(weights),
            None if self.rank == SEED_SIDE else SEED_TRAIN_ERROR,
            weighed=_weighed(metric, weights.values, decoded),
        )


def _of_trains(values: Float32, form: Form, metric: ErrorMetric) -> Float32:
    """Return the matrix that the trains of a form make."""
    source = ArrayRows(values)
    if isinstance(form, TrainForm):
        return rounded_train(source, form).rows()
    if not isinstance(form, TrainsForm):
        raise BitsmithError(f"{form.name} is no Tensor-Train")
    trains = rounded_trains(source, form, metric)
    product: Float32 = trains[LEFT].rows() @ trains[RIGHT].rows()
    return product


def _scaled(rank: int, side: int) -> int:
    return max(1, round(rank * side / SEED_SIDE))


def stored_bytes(scheme: str, shape: tuple[int, int]) -> int:
    """Return the bytes of a matrix under a scheme of factors or codes."""
    return form_bytes(form_of(parse_scheme(scheme), shape, ROW_GROUP))


def relative_error(values: Float32, found: Float32) -> float | None:
    """Return |W - W'| / |W|, None for a matrix of zeros."""
    energy = squared(values)
    return float(np.sqrt(squared(values - found) / energy)) if energy else None


def squared(values: Float32) -> float:
    """Return the sum of squares."""
    flat = values.reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


def _weighed(metric: ErrorMetric, values: Float32, found: Float32) -> float | None:
    """Return the relative error in a metric; None where all columns count alike, and for zeros."""
    energy = 0.0 if metric.matrix is None else metric.error(values)
    return float(np.sqrt(metric.error(values - found) / energy)) if energy > 0 else None


def _grid(bits: int) -> GridFormat:
    return grid_named(f"int{bits}")
