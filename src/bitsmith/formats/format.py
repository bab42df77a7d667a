"""What a storage format is: blocks of weights of a fixed number of bytes, coded row by row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

FORMATS: dict[str, Format] = {}
"""Every format by its ggml type name, filled by subclassing `Format`."""


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
        return self._encode(weights, importance)

    def decode(self, blocks: Bytes) -> Float32:
        """Decode bytes (`out row_bytes`) to float32 rows (`out in`), bit-exact with ggml."""
        if blocks.shape[-1] % self.block_bytes:
            raise BitsmithError(
                f"{self.name} rows are multiples of {self.block_bytes} bytes, found {blocks.shape[-1]}"
            )
        return self._decode(np.ascontiguousarray(blocks))

    @abstractmethod
    def _encode(self, rows: Float32, importance: Float32 | None) -> Bytes: ...

    @abstractmethod
    def _decode(self, blocks: Bytes) -> Float32: ...


def format_named(name: str) -> Format:
    """Return the format called `name` (a ggml type name, any case).

    Raises BitsmithError that lists the known names.
    """
    found = FORMATS.get(name.upper())
    if found is None:
        raise BitsmithError(f"unknown type {name!r}; known: {' '.join(FORMATS)}")
    return found
