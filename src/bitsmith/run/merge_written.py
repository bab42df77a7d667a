"""What of a merged view is written: every tensor in the type that the student stores it in.

Measuring this view measures what is written, rounding included.
"""

from __future__ import annotations

from math import prod

import numpy as np

from bitsmith.formats import FORMATS
from bitsmith.passes.merge_fold import MergedTensor, MergedView, RowwiseTensor
from bitsmith.store.checkpoint import Bytes, Rows, TensorRef
from bitsmith.store.packed import PackedTensor
from bitsmith.store.safetensors import ITEM_BYTES
from bitsmith.store.stored import FLOATS

PACKED_AS = "BF16"
"""The type that weights get which the student keeps packed."""


class WrittenTensor(TensorRef):
    """A tensor rounded to the type it is written in, to nearest even; F16 saturates at ±65504."""

    def __init__(self, source: TensorRef, dtype: str) -> None:
        self.name, self.shape, self.dtype = source.name, source.shape, dtype
        self._source = source

    @property
    def nbytes(self) -> int:
        """Bytes as written."""
        return ITEM_BYTES[self.dtype] * prod(self.shape)

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)` as they read when they are written."""
        rows = self._source.read(start, stop)
        return rows if self.dtype in ("F32", "F64") else self._decoded(self._encoded(rows), rows.shape)

    def raw(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the bytes of rows `[start, stop)`, flat."""
        return self._encoded(self._source.read(start, stop))

    def _encoded(self, rows: Rows) -> Bytes:
        if self.dtype == "F64":
            return np.ascontiguousarray(rows, np.float64).reshape(-1).view(np.uint8)
        return FORMATS[self.dtype].encode(np.ascontiguousarray(rows, np.float32).reshape(1, -1)).reshape(-1)

    def _decoded(self, raw: Bytes, shape: tuple[int, ...]) -> Rows:
        return FORMATS[self.dtype].decode(raw.reshape(1, -1)).reshape(shape)


def as_written(view: MergedView) -> MergedView:
    """Return a merged view whose tensors read as they are written.

    What is computed, and what the student keeps packed, is rounded to the tensor's type (`PACKED_AS` where
    that is no float); everything else is the student's, as stored.
    """
    return MergedView(view, {name: _written(ref) for name, ref in view.items()})


def _written(ref: TensorRef) -> TensorRef:
    if isinstance(ref, MergedTensor | RowwiseTensor | PackedTensor) or ref.dtype not in ITEM_BYTES:
        return WrittenTensor(ref, ref.dtype if ref.dtype in FLOATS else PACKED_AS)
    return ref
