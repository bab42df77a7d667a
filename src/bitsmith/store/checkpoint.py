"""A checkpoint is a lazy mapping of names to tensors; a view is one computed on read from another."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]  # float32 for float tensors (float64 for F64), integers as they are
Bytes = NDArray[np.uint8]
SLICE_BYTES = 16 << 20


class TensorRef(ABC):
    """A tensor that knows its shape and dtype without reading, and reads any slice of its rows.

    `shape` is in numpy order (`out in`), `dtype` a safetensors dtype (`BF16`) or a ggml type name (`Q4_K`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def n_rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes as stored."""

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)` of the first axis, decoded; a scalar whole, with shape ()."""

    def raw(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the bytes of rows `[start, stop)`, flat: as stored, or as read where nothing is stored."""
        return np.ascontiguousarray(self.read(start, stop)).reshape(-1).view(np.uint8)

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of the bytes that `raw` returns of all rows."""
        digest = hashlib.sha256()
        for start, stop in self.slices():
            digest.update(self.raw(start, stop).data)
        return digest.hexdigest()

    def hash_reads(self, read: dict[str, TensorRef]) -> bool:
        """Hash what is read from here on, and put the tensor into `read` as it is; tell whether it can."""
        del read
        return False

    def slices(self, limit_bytes: int = SLICE_BYTES) -> Iterator[tuple[int, int]]:
        """Yield `(start, stop)` over all rows: at most `limit_bytes` each as float32, but at least a row."""
        step = max(1, limit_bytes * self.n_rows // max(1, 4 * self.size))
        for start in range(0, self.n_rows, step):
            yield start, min(start + step, self.n_rows)


class Checkpoint(Mapping[str, TensorRef]):
    """A lazy, validated mapping of tensor names to tensors.

    `config` is the Hugging Face config (empty where the file has none), `metadata` the file's own key/values,
    `files` the files that hold the content. Usable as a context manager that closes them.
    """

    path: Path
    config: dict[str, Any]
    metadata: dict[str, Any]
    files: tuple[Path, ...] = ()
    _identity: Mapping[str, Any] = MappingProxyType({})  # what the digest covers besides the tensors

    def __init__(self, path: Path, tensors: Mapping[str, TensorRef]) -> None:
        self.path = path
        self.config = {}
        self.metadata = {}
        self._tensors = dict(tensors)
        self._read: dict[str, TensorRef] = {}

    def __getitem__(self, name: str) -> TensorRef:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release what the checkpoint holds open; its tensors cannot be read after that."""

    @cached_property
    def source_digest(self) -> str:
        """SHA-256 of the content: config or GGUF metadata, then by name dtype, shape, SHA-256 of the bytes.

        Sharding, file names and the order of tensors do not change it. Reads every byte when first asked for,
        but those that were hashed as they were read (`hash_reads`).
        """
        digest = hashlib.sha256(self.identity.encode())
        for name in sorted(self):
            ref = self[name]
            digest.update(json.dumps([name, ref.dtype, ref.shape, ref.sha256()]).encode())
        return digest.hexdigest()

    @property
    def identity(self) -> str:
        """What the digest covers besides the tensors, as JSON."""
        return json.dumps(dict(self._identity), sort_keys=True)

    def hash_reads(self) -> bool:
        """Let what is read from here on count towards the digest; tell whether all tensors can."""
        can = [ref.hash_reads(self._read) for ref in self.values()]
        return all(can)

    def digests_of_read(self) -> dict[str, str]:
        """Return the SHA-256 of the stored tensors that were read since this was asked last, by name.

        Of those that were not read from end to end, the rest is read now. Empty unless `hash_reads`.
        """
        read = dict(self._read)
        self._read.clear()
        return {name: ref.sha256() for name, ref in read.items()}

    def sha256_of(self, name: str) -> str | None:
        """Return the SHA-256 of a stored tensor, None where there is none of that name."""
        return self[name].sha256() if name in self else None


class ComputedTensor(TensorRef):
    """A tensor computed on read: `compute(start, stop)` returns rows `[start, stop)`."""

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: str, compute: Callable[[int, int], Rows]
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self._compute = compute

    @property
    def nbytes(self) -> int:
        """Bytes as float32: a computed tensor is stored nowhere."""
        return 4 * self.size

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Compute rows `[start, stop)`."""
        return self._compute(start, self.n_rows if stop is None else stop)


class View(Checkpoint):
    """A checkpoint whose tensors are computed on read from another; keeps its config and metadata."""

    def __init__(self, base: Checkpoint, tensors: Mapping[str, TensorRef]) -> None:
        super().__init__(base.path, tensors)
        self.base = base
        self.config = base.config
        self.metadata = base.metadata
        self.files = base.files

    @cached_property
    def source_digest(self) -> str:
        """The digest of the checkpoint underneath."""
        return self.base.source_digest

    @property
    def identity(self) -> str:
        """That of the checkpoint underneath."""
        return self.base.identity

    def hash_reads(self) -> bool:
        """Hash what is read of the checkpoint underneath."""
        return self.base.hash_reads()

    def digests_of_read(self) -> dict[str, str]:
        """Those of the checkpoint underneath."""
        return self.base.digests_of_read()

    def sha256_of(self, name: str) -> str | None:
        """Return that of the checkpoint underneath."""
        return self.base.sha256_of(name)
