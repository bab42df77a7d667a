"""A checkpoint is a lazy mapping of names to tensors; a view is one computed on read from another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]  # float32 for float tensors (float64 for F64), integers as they are


class TensorRef(ABC):
    """A tensor that knows its shape and dtype without reading, and reads any slice of its rows.

    `shape` is in numpy order (`out in`), `dtype` is a safetensors dtype (`BF16`) or a ggml type name (`Q4_K`).
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
        """Return rows `[start, stop)` of the first axis, decoded; a scalar is returned whole, with shape ()."""


class Checkpoint(Mapping[str, TensorRef]):
    """A lazy, validated mapping of tensor names to tensors.

    `config` is the Hugging Face config (empty where the file has none), `metadata` the file's own key/values,
    `source_digest` a SHA-256 over names, dtypes, shapes and bytes-identifying facts of the content.
    """

    path: Path
    config: dict[str, Any]
    metadata: dict[str, Any]

    def __init__(self, path: Path, tensors: Mapping[str, TensorRef]) -> None:
        self.path = path
        self.config = {}
        self.metadata = {}
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> TensorRef:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


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
