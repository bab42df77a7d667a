"""Tensors that lie in a file: checked regions of it, read by position into numpy, never mapped."""

from __future__ import annotations

import os
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from bitsmith.errors import BitsmithError, DamagedFileError
from bitsmith.log import reading
from bitsmith.store.checkpoint import Bytes, Checkpoint, Rows, TensorRef
from bitsmith.store.content import HashedTensor

PLAIN = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "<u1",
    "BOOL": "<u1",
}
"""numpy's name of the bits that hold one element of each dtype without blocks."""
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = frozenset(PLAIN.keys() - FLOATS)

Decoder = Callable[[Bytes], Rows]  # stored bytes, flat -> elements, flat


_SETTLED_NS = 2_000_000_000


class SourceFile:
    """A regular file, open for reading by position from when it was checked, so it is not swapped later.

    Raises DamagedFileError if it cannot be opened. The descriptor is closed by `close` or with the last user.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise DamagedFileError(f"cannot be opened: {error.strerror}", path=path) from error
        self.close = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise DamagedFileError("is not a regular file", path=path)
        self.size_bytes = status.st_size

    def stamp(self) -> tuple[int, ...] | None:
        """Return what changes with the bytes: inode, size, times of change; None where that was just now.

        Bytes that are changed within the clock's grain of another change have the same times.
        """
        if not self.close.alive:
            return None
        found = os.fstat(self._descriptor)
        if time.time_ns() - found.st_ctime_ns < _SETTLED_NS:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def read(self, offset: int, length: int) -> Bytes:
        """Return `length` bytes at `offset`.

        Raises DamagedFileError if the file ends before that.
        """
        if not self.close.alive:
            raise BitsmithError("is closed", path=self.path)
        if offset + length > self.size_bytes:  # before the buffer is allocated
            raise DamagedFileError(
                f"ends at byte {self.size_bytes}, {offset + length} are expected", path=self.path
            )
        buffer = np.empty(length, np.uint8)
        done = 0
        while done < length:
            try:
                count = os.preadv(self._descriptor, [buffer[done:].data], offset + done)
            except OSError as error:
                raise DamagedFileError(
                    f"cannot be read at byte {offset + done}: {error.strerror}", path=self.path
                ) from error
            if count == 0:
                raise DamagedFileError(
                    f"ends at byte {offset + done}, {offset + length} are expected", path=self.path
                )
            done += count
        return buffer


class StoredTensor(HashedTensor):
    """A tensor in `file` at `offset`; `decode` turns stored bytes into elements, `block_size` go together."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        file: SourceFile,
        offset: int,
        nbytes: int,
        decode: Decoder,
        block_size: int = 1,
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.file = file
        self.offset = offset
        self._nbytes = nbytes
        self._decode = decode
        self._rows_together = block_size if len(shape) == 1 else 1

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self._nbytes

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)` of the first axis, decoded; a scalar is returned whole, with shape ().

        Raises UnsupportedError for a dtype whose values cannot be had, DamagedFileError if the file fails.
        """
        stop = self._checked(start, stop)
        if not self.shape:
            return self._decode(self.raw()).reshape(())
        together = self._rows_together
        first = start // together * together
        last = min(self.n_rows, -(-stop // together) * together)
        rows = self._decode(self.raw(first, last)).reshape((last - first, *self.shape[1:]))
        return rows[start - first : stop - first]

    def raw(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the stored bytes of rows `[start, stop)`, flat.

        Raises BitsmithError if a block of a one-dimensional tensor would be cut.
        """
        stop = self._checked(start, stop)
        if start % self._rows_together or (stop % self._rows_together and stop != self.n_rows):
            raise BitsmithError(
                f"{start}..{stop} cuts a block of {self._rows_together}",
                path=self.file.path,
                tensor=self.name,
            )
        first, last = (self._nbytes * row // max(1, self.n_rows) for row in (start, stop))
        return self._hashed(first, self.stored(first, last))

    def stamp(self) -> tuple[int, ...] | None:
        """Return the file's stamp and the place in it."""
        stamp = self.file.stamp()
        return None if stamp is None else (*stamp, self.offset, self._nbytes)

    def _load(self, first: int, last: int) -> Bytes:
        reading(self.name, self.file.path, self._nbytes)
        return self.file.read(self.offset + first, last - first)

    def _checked(self, start: int, stop: int | None) -> int:
        stop = self.n_rows if stop is None else stop
        if not 0 <= start <= stop <= self.n_rows:
            raise BitsmithError(
                f"rows {start}..{stop} are not within 0..{self.n_rows}", path=self.file.path, tensor=self.name
            )
        return stop


class StoredCheckpoint(Checkpoint):
    """A checkpoint whose tensors lie in files; closing it, or dropping it, closes them."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorRef], sources: Iterable[SourceFile]) -> None:
        super().__init__(path, tensors)
        self.sources = tuple(sources)
        self.files = tuple(source.path for source in self.sources)

    def close(self) -> None:
        """Close the files; tensors cannot be read after that."""
        for source in self.sources:
            source.close()


def plain_decoder(dtype: str) -> Decoder:
    """Return the exact decoder of a dtype without blocks: F16, BF16 to float32, BOOL to bool, else as is."""
    bits = PLAIN[dtype]
    if dtype == "BF16":
        return _decode_bf16
    if dtype == "F16":
        return lambda raw: raw.view(bits).astype(np.float32)
    if dtype == "BOOL":
        return lambda raw: raw != 0
    return lambda raw: raw.view(bits)


def _decode_bf16(raw: Bytes) -> Rows:
    wide = raw.view("<u2").astype("<u4")
    wide <<= 16
    return wide.view("<f4")
