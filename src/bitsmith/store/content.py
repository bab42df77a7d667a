"""Digests of tensors, taken from the bytes that a run reads anyway."""

from __future__ import annotations

import hashlib
import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from bitsmith.store.checkpoint import SLICE_BYTES, Bytes, TensorRef

Stamp = tuple[int, ...]


_known: dict[Stamp, str] = {}  # of this process's tensors: many candidates are made of one source


class HashedTensor(TensorRef):
    """A tensor of stored bytes whose SHA-256 can be taken while its rows are read.

    What is read in the order of the bytes counts, from any thread, once; `sha256` reads the rest. The same
    bytes, opened again by this process, are known.
    """

    _content: _Content | None = None
    _held: Bytes | None = None

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of the stored bytes; those that were hashed already are not read again."""
        stamp = self.stamp()
        if stamp is not None and stamp in _known:
            return _known[stamp]
        if self._content is None:
            self._content = _Content(stamp)
        return self._content.finish(self)

    def hash_reads(self, read: dict[str, TensorRef]) -> bool:
        """Hash what is read from here on, and put the tensor into `read` whenever it is."""
        if self._content is None:
            self._content = _Content(self.stamp())
        self._content.read = read
        return True

    def stamp(self) -> Stamp | None:
        """Return what tells the bytes from any others without reading them, None where nothing does."""
        return None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep all bytes in memory meanwhile, read in their order: rows are then taken from there, in any."""
        whole = np.empty(self.nbytes, np.uint8)
        for first in range(0, len(whole), SLICE_BYTES):
            piece = whole[first : first + SLICE_BYTES]
            piece[:] = self._hashed(first, self.stored(first, first + len(piece)))
        self._held = whole
        try:
            yield
        finally:
            self._held = None

    def _hashed(self, first: int, data: Bytes) -> Bytes:
        """Return `data`, which was read at byte `first` of the tensor, once it is hashed if it has to be."""
        if self._content is not None:
            self._content.take(self, first, data)
        return data

    def stored(self, first: int, last: int) -> Bytes:
        """Return the stored bytes `[first, last)`."""
        return self._load(first, last) if self._held is None else self._held[first:last]

    @abstractmethod
    def _load(self, first: int, last: int) -> Bytes:
        """Read the bytes `[first, last)`."""


class _Content:
    """A tensor's SHA-256 as far as it is taken: of the first `at` bytes."""

    def __init__(self, stamp: Stamp | None) -> None:
        self.read: dict[str, TensorRef] | None = None
        self._stamp = stamp
        self._sha, self._at, self._lock = hashlib.sha256(), 0, threading.Lock()

    def take(self, tensor: HashedTensor, first: int, data: Bytes) -> None:
        if self.read is None:
            return
        self.read[tensor.name] = tensor
        if self._stamp in _known:
            return
        with self._lock:
            if first <= self._at < first + data.nbytes:
                self._add(tensor, data[self._at - first :])

    def finish(self, tensor: HashedTensor) -> str:
        with self._lock:
            while self._at < tensor.nbytes:
                self._add(tensor, tensor.stored(self._at, min(tensor.nbytes, self._at + SLICE_BYTES)))
            return self._sha.hexdigest()

    def _add(self, tensor: HashedTensor, data: Bytes) -> None:
        self._sha.update(data.data)
        self._at += data.nbytes
        if self._at == tensor.nbytes and self._stamp is not None and tensor.stamp() == self._stamp:
            _known[self._stamp] = self._sha.hexdigest()
