"""What a storage format is: blocks of weights of a fixed number of bytes, coded row by row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.formats.accelerator import accelerator
from bitsmith.numerics.squares import add_squares
from bitsmith.numerics.threads import for_ranges

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

FORMATS: dict[str, Format] = {}
"""Every format by its ggml type name, filled by subclassing `Format`."""

_LEAST_DECODED, _MOST_DECODED = 1 << 18, 1 << 20  # weights that a thread decodes at a time
_UNIT = 1 << 11  # weights whose errors make one sum
_MOST_UNITS = 64  # decoded at a time, what a cache holds


class SquaredError(NamedTuple):
    """`error` is `sum (w - decoded)^2`, `energy` `sum w^2`."""

    error: float
    energy: float


class Format(ABC):
    """One storage format: `block_size` weights in `block_bytes` bytes.

    A subclass with a `name` is registered by being defined.
    """

    name: ClassVar[str]
    ggml_type: ClassVar[int]
    block_size: ClassVar[int]
    block_bytes: ClassVar[int]

    def __init_subclass__(cls) -> None:
        """Register the format under its name."""
        if "name" in cls.__dict__:
            FORMATS[cls.name] = cls()

    @property
    def bpw(self) -> float:
        """Bits per weight, block overhead included."""
        return 8 * self.block_bytes / self.block_size

    def fits(self, row_weights: int) -> bool:
        """Tell whether a row of `row_weights` weights is a whole number of blocks."""
        return row_weights % self.block_size == 0

    def row_bytes(self, row_weights: int) -> int:
        """Return the bytes of one row of `row_weights` weights.

        Raises BitsmithError if the row is not a whole number of blocks.
        """
        if not self.fits(row_weights):
            raise BitsmithError(f"{self.name} needs rows divisible by {self.block_size}, found {row_weights}")
        return row_weights // self.block_size * self.block_bytes

    def encode(self, rows: Float32, importance: Float32 | None = None) -> Bytes:
        """Encode `rows` (`out in`) to bytes (`out row_bytes`).

        With `importance` (`in`, non-negative) block scales minimise `sum_j importance_j (w_j - q_j)^2`,
        without it the plain squared error. Deterministic for any number of threads. Finite rows give finite
        blocks; look for others first with `numerics.finite.first_non_finite`.
        Raises BitsmithError for rows that do not fit and for an importance that is not such a vector.
        """
        self.row_bytes(rows.shape[-1])
        weights = np.ascontiguousarray(rows, dtype=np.float32)
        if importance is not None:
            if importance.shape != weights.shape[-1:]:
                raise BitsmithError(f"importance has shape {importance.shape}, expected {weights.shape[-1:]}")
            importance = np.ascontiguousarray(importance, dtype=np.float32)
            if not (np.isfinite(importance) & (importance >= 0)).all():
                raise BitsmithError("importance holds values that are negative or not finite")
        fast = accelerator()
        found = None if fast is None else fast.encode(self, weights, importance)
        return self._encode(weights, importance) if found is None else found

    def decode(self, blocks: Bytes, out: Float32 | None = None) -> Float32:
        """Decode bytes (`out row_bytes`) to float32 rows (`out in`), bit-exact with ggml.

        With `out`, contiguous and of that shape, the rows are written there: fresh memory costs more than
        decoding. Raises BitsmithError for bytes that are no whole blocks.
        """
        rows = np.empty(self._decoded_shape(blocks), np.float32) if out is None else out
        flat = np.ascontiguousarray(blocks).reshape(-1, self.block_bytes)
        values = rows.reshape(len(flat), self.block_size)

        def decode(first: int, last: int) -> None:
            self._decode(flat[first:last], values[first:last])

        for_ranges(len(flat), _LEAST_DECODED // self.block_size, _MOST_DECODED // self.block_size, decode)
        return rows

    def squared_error(self, rows: Float32, blocks: Bytes) -> SquaredError:
        """Return how far `rows` (`out in`) are from what `blocks` (`out row_bytes`) decode to.

        Decodes a piece at a time that a cache holds. Sums are float64 in an order that does not depend on
        the number of threads. Raises BitsmithError for bytes that are no whole blocks of such rows.
        """
        if self._decoded_shape(blocks) != rows.shape:
            raise BitsmithError(f"{self.name} blocks hold {self._decoded_shape(blocks)}, found {rows.shape}")
        flat = np.ascontiguousarray(blocks).reshape(-1, self.block_bytes)
        weights = np.ascontiguousarray(rows, np.float32).reshape(len(flat), self.block_size)
        each = _UNIT // self.block_size
        sums = np.zeros((-(-len(flat) // each), 2))

        def add(first: int, last: int) -> None:
            coded = flat[first * each : last * each]
            values = np.empty((len(coded), self.block_size), np.float32)
            self._decode(coded, values)
            known = weights[first * each : last * each].reshape(-1)
            add_squares(known, values.reshape(-1), _UNIT, sums[first:last])

        for_ranges(len(sums), _LEAST_DECODED // _UNIT, _MOST_UNITS, add)
        error, energy = sums.sum(axis=0).tolist()
        return SquaredError(error, energy)

    def _decoded_shape(self, blocks: Bytes) -> tuple[int, ...]:
        if blocks.shape[-1] % self.block_bytes:
            raise BitsmithError(
                f"{self.name} rows are multiples of {self.block_bytes} bytes, found {blocks.shape[-1]}"
            )
        return (*blocks.shape[:-1], blocks.shape[-1] // self.block_bytes * self.block_size)

    @abstractmethod
    def _encode(self, rows: Float32, importance: Float32 | None) -> Bytes: ...

    @abstractmethod
    def _decode(self, blocks: Bytes, out: Float32) -> None:
        """Decode `blocks` (`n block_bytes`) into `out` (`n block_size`)."""


def format_named(name: str) -> Format:
    """Return the format called `name` (a ggml type name, any case).

    Raises BitsmithError that lists the known names.
    """
    found = FORMATS.get(name.upper())
    if found is None:
        raise BitsmithError(f"unknown type {name!r}; known: {' '.join(FORMATS)}")
    return found
