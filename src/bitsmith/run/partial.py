"""The first rows of a tensor as a tensor of their own: what a rehearsal works on."""

from __future__ import annotations

import copy

from bitsmith.store.checkpoint import Bytes, Rows, TensorRef
from bitsmith.store.stored import StoredTensor


class FirstRows(TensorRef):
    """The first rows of a tensor that is computed on read."""

    def __init__(self, ref: TensorRef, rows: int) -> None:
        self.name, self.dtype = ref.name, ref.dtype
        self.shape = (rows, *ref.shape[1:])
        self._ref = ref

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self._ref.nbytes * self.shape[0] // self._ref.n_rows

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)`."""
        return self._ref.read(start, self.n_rows if stop is None else stop)

    def raw(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the bytes of rows `[start, stop)`."""
        return self._ref.raw(start, self.n_rows if stop is None else stop)


def first_rows(ref: TensorRef, rows: int) -> TensorRef:
    """Return the first `rows` of a tensor, or all, as a new tensor that is read the way that `ref` is."""
    if not isinstance(ref, StoredTensor):
        return ref if rows >= ref.n_rows else FirstRows(ref, rows)
    part = copy.copy(ref)
    if rows < ref.n_rows:
        part.shape = (rows, *ref.shape[1:])
        part._nbytes = ref.nbytes * rows // ref.n_rows
    return part
