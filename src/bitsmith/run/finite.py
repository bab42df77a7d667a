"""Weights on their way into a computation or a file: a NaN or an infinity stops with its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bitsmith.errors import DamagedFileError
from bitsmith.formats.format import Float32
from bitsmith.numerics.finite import first_non_finite
from bitsmith.store.checkpoint import Bytes, Rows, TensorRef
from bitsmith.store.stored import FLOATS, StoredTensor, plain_decoder


def finite_weights(ref: TensorRef, path: Path, start: int = 0, stop: int | None = None) -> Float32:
    """Return rows `[start, stop)` of a tensor in its own shape, contiguous, as float32.

    Raises DamagedFileError with the value and the index of the first weight that is not finite in float32.
    """
    return _finite(ref.read(start, stop), ref, path, start, stop)


def finite_bytes(ref: TensorRef, path: Path, start: int, stop: int) -> Bytes:
    """Return the stored bytes of rows `[start, stop)`, read once; raises as `finite_weights` for floats."""
    data = ref.raw(start, stop)
    if ref.dtype in FLOATS:
        _finite(plain_decoder(ref.dtype)(data), ref, path, start, stop)
    return data


def _finite(rows: Rows, ref: TensorRef, path: Path, start: int, stop: int | None) -> Float32:
    with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is refused
        values = np.ascontiguousarray(rows, dtype=np.float32).reshape(_shape(ref, start, stop))
    flat = values.reshape(1, -1)
    place = first_non_finite(flat) if flat.size else None
    if place is not None:
        first, *rest = (int(at) for at in np.unravel_index(place[1], values.shape or (1,)))
        raise DamagedFileError(
            f"is {flat[place]} at {[start + first, *rest]}, expected finite weights",
            path=file_of(ref, path),
            tensor=ref.name,
        )
    return values


def file_of(ref: TensorRef, path: Path) -> Path:
    """Return the file that holds a tensor of the model at `path`: its shard, where it is stored as it is."""
    return ref.file.path if isinstance(ref, StoredTensor) else path


def _shape(ref: TensorRef, start: int, stop: int | None) -> tuple[int, ...]:
    if not ref.shape:
        return ()
    return ((ref.n_rows if stop is None else stop) - start, *ref.shape[1:])
