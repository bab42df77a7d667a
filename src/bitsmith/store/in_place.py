"""A file of known size, written where its bytes stay, so that a killed run goes on without copying them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from bitsmith.errors import OutputError
from bitsmith.store.atomic import Chunk, Finish, refuse_full, refuse_taken, sync_folder
from bitsmith.store.checkpoint import Bytes
from bitsmith.store.journal import Key
from bitsmith.store.parts import Work

_READ_BYTES = 1 << 24
_SECTOR_BYTES = 512  # the unit of `st_blocks`


class InPlace(Work):
    """The file `.OUT.parts/file`, which becomes OUT, and a journal of its finished pieces.

    Pieces may be written in any order; `write_last` and `digest` take the SHA-256 on the way. What is hashed
    are the bytes as they were handed over, so that a disk that stored others is found out by the digest; only
    what an earlier run wrote, or this one out of order, is read back for it. Raises as `Work` does, and
    OutputError if OUT exists without `overwrite`, is one of `sources`, or needs more than the disk has free.
    """

    def __init__(
        self, out: Path, key: Key, nbytes: int, *, overwrite: bool = False, sources: Iterable[Path] = ()
    ) -> None:
        super().__init__(out, {"layout of the notes": 3, **key}, overwrite=overwrite)
        self._out, self._nbytes = Path(os.path.abspath(out)), nbytes  # noqa: PTH100 (links stay as named)
        self._sources = tuple(sources)
        self.path = self._folder / "file"
        self._sha, self._hashed = hashlib.sha256(), 0

    def __enter__(self) -> Self:
        if not self._folder.exists():
            refuse_full(self._out, self._nbytes)
        return super().__enter__()

    def _open(self) -> None:
        refuse_taken(self._out, self._overwrite, self._sources, folder=False)
        try:
            self._descriptor = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
            )
            try:
                self._take_up()
            except BaseException:
                os.close(self._descriptor)
                raise
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror or error}", path=self.path) from error

    def _take_up(self) -> None:
        found = os.fstat(self._descriptor)
        if self._journal.entries and found.st_size != self._nbytes:
            self._journal.forget()
        super()._open()
        self._keep_only([self.path])
        if not self.finished:
            os.ftruncate(self._descriptor, 0)
        else:
            refuse_full(self._out, self._nbytes - found.st_blocks * _SECTOR_BYTES)
        os.ftruncate(self._descriptor, self._nbytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        super().__exit__(kind, error, trace)

    def forget(self) -> None:
        """Drop all finished pieces: they are of something else."""
        self._journal.forget()
        self.finished, self.resumed = {}, 0

    def write(self, at: int, chunk: Chunk) -> int:
        """Write a chunk at byte `at` and return its length; it may be written again."""
        data = left = _flat(chunk)
        try:
            while left:
                count = os.pwrite(self._descriptor, left, at)
                at, left = at + count, left[count:]
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror or error}", path=self._out) from error
        return len(data)

    def write_last(self, at: int, chunk: Chunk) -> int:
        """Write a chunk as `write` does, where it and everything before it stay as they are from now on."""
        self._hash_to(at)
        count = self.write(at, chunk)
        if self._hashed == at:
            self._sha.update(_flat(chunk))
            self._hashed += count
        return count

    def read(self, first: int, last: int) -> Bytes:
        """Return the bytes `[first, last)` of the file."""
        try:
            data = os.pread(self._descriptor, last - first, first)
        except OSError as error:
            raise OutputError(f"cannot be read: {error.strerror or error}", path=self.path) from error
        if len(data) < last - first:
            raise OutputError(f"ends at byte {first + len(data)}, {last} were written", path=self.path)
        return np.frombuffer(data, np.uint8)

    def keep(self, pieces: Mapping[str, Any]) -> None:
        """Note pieces as finished, with a note of each, once all that was written is on the disk."""
        self._sync()
        self._journal.add_all(pieces)
        self.finished |= pieces

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the whole file, of which nothing is written any more."""
        self._hash_to(self._nbytes)
        return self._sha.hexdigest()

    def publish(self, finish: Finish) -> None:
        """Let the file appear as OUT, after `finish` was told of it, and delete the folder."""
        self._sync()
        finish({"": self.path})
        try:
            self.path.replace(self._out)
            sync_folder(self._out.parent)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror or error}", path=self._out) from error
        self.remove()

    def _sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror or error}", path=self._out) from error

    def _hash_to(self, end: int) -> None:
        while self._hashed < end:
            data = self.read(self._hashed, min(end, self._hashed + _READ_BYTES))
            self._sha.update(data.data)
            self._hashed += data.nbytes


def _flat(chunk: Chunk) -> memoryview:
    """Return a chunk's bytes."""
    if isinstance(chunk, np.ndarray):
        chunk = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
    return memoryview(chunk).cast("B")
