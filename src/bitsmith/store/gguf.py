"""Reads GGUF files: every count, length and offset is checked against what remains before it is believed."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError, printable
from bitsmith.store.checkpoint import Bytes, Rows, TensorRef
from bitsmith.store.gguf_layout import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    NUMBERS,
    VALUE_TYPES,
    VERSION,
    Typed,
    check_alignment,
    check_name,
    ggml_format,
    padded,
    tensor_bytes,
    type_names,
)
from bitsmith.store.gguf_split import SPLIT_KEYS, check_part, check_total, part_count, part_paths
from bitsmith.store.stored import PLAIN, Decoder, SourceFile, StoredCheckpoint, StoredTensor, plain_decoder

MAX_ARRAY = 1 << 24
"""Elements of a metadata array; vocabularies have 2^18."""
WINDOW_BYTES = 1 << 20
_KINDS = {number: name for name, number in VALUE_TYPES.items()}
_SMALLEST_VALUE_BYTES = 8 + 1 + 4 + 1  # key length, key, type, value
_SMALLEST_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # name length, name, dimensions, type, offset


class GgufCheckpoint(StoredCheckpoint):
    """A GGUF file; `value_types` says the GGUF type of each metadata value, or of its elements."""

    value_types: dict[str, str]

    def typed_metadata(self) -> dict[str, Typed]:
        """Return the metadata so that writing it gives the same bytes."""
        return {key: Typed(self.value_types[key], value) for key, value in self.metadata.items()}


def open_gguf(path: Path) -> GgufCheckpoint:
    """Open a GGUF file (version 2 or 3, little endian) after checking all of its header.

    Tensors have `shape` in numpy order and ggml type names as `dtype`. A part of a split file, any of them,
    is the whole of it: the others lie beside it, and `path` is the first's. Raises DamagedFileError, or
    UnsupportedError for another version or byte order, and a tensor type whose blocks are not known.
    """
    opened = _open_file(path)
    try:
        with _naming(path):
            count = part_count(opened.metadata)
            paths = [path] if count == 1 else part_paths(path, count)
    except BitsmithError:
        opened.close()
        raise
    if count == 1:
        return opened
    opened.close()
    return _open_parts(paths)


def _open_file(path: Path) -> GgufCheckpoint:
    source = SourceFile(path)
    try:
        with _naming(path):
            return _Parser(source).checkpoint()
    except BitsmithError:
        source.close()
        raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors that do not."""
    try:
        yield
    except BitsmithError as error:
        if error.path is not None:
            raise
        kind = UnsupportedError if isinstance(error, UnsupportedError) else DamagedFileError
        raise kind(error.message, path=path, tensor=error.tensor) from error


def _open_parts(paths: Sequence[Path]) -> GgufCheckpoint:
    """Open all parts of a split file; the first has the metadata."""
    tensors: dict[str, TensorRef] = {}
    with ExitStack() as opened:
        parts = [opened.enter_context(_open_file(path)) for path in paths]
        for number, (path, part) in enumerate(zip(paths, parts, strict=True)):
            with _naming(path):
                check_part(part.metadata, number, len(paths))
                if twice := tensors.keys() & part.keys():
                    raise DamagedFileError("is in an earlier part too", tensor=min(twice))
            tensors |= part
        first = parts[0]
        with _naming(paths[0]):
            check_total(first.metadata, len(tensors))
        opened.pop_all()
    whole = GgufCheckpoint(paths[0], tensors, [source for part in parts for source in part.sources])
    whole.metadata = {key: value for key, value in first.metadata.items() if key not in SPLIT_KEYS}
    whole.value_types = {key: kind for key, kind in first.value_types.items() if key in whole.metadata}
    whole._identity = whole.metadata
    return whole


def _refuse_overlaps_and_holes(spans: Sequence[tuple[int, int, str]], start: int, alignment: int) -> None:
    """Refuse regions (first byte, last, tensor) that leave more than padding between them, or none.

    A type or a shape that was changed shows as either, and ggml loads neither (`gguf_init_from_file`).
    """
    expected, before = start, ""
    for first, end, name in spans:
        if first < expected:
            raise DamagedFileError(
                f"needs bytes up to {expected} with its padding, but {printable(name)!r} starts at {first}: "
                "they overlap",
                tensor=before,
            )
        if first > expected:
            raise DamagedFileError(
                f"starts at byte {first}, expected {expected}: {first - expected} bytes belong to no tensor",
                tensor=name,
            )
        expected, before = start + padded(end - start, alignment), name


def _decoder(type_name: str, row_bytes: int | None) -> Decoder:
    """Return the decoder of a ggml type for rows of `row_bytes`; None: any whole number of blocks."""
    if type_name in PLAIN:
        return plain_decoder(type_name)
    known = ggml_format(type_name)

    def decode(raw: Bytes) -> Rows:
        if not raw.size:
            return np.empty(0, np.float32)
        return known.decode(raw.reshape(-1, row_bytes or raw.size)).reshape(-1)

    return decode


class _Parser:
    """Reads the header front to back through a window, never past the end of the file."""

    def __init__(self, source: SourceFile) -> None:
        self.source = source
        self.position = 0
        self._window = b""
        self._window_start = 0

    def checkpoint(self) -> GgufCheckpoint:
        """Parse everything and return the checkpoint."""
        n_tensors, n_values = self._preamble()
        metadata = self._metadata(n_values)
        if ALIGNMENT_KEY in metadata:
            alignment = check_alignment(*metadata[ALIGNMENT_KEY])
        else:
            alignment = DEFAULT_ALIGNMENT
        tensors = self._tensors(n_tensors, alignment)
        opened = GgufCheckpoint(self.source.path, tensors, [self.source])
        opened.metadata = {key: value for key, (_, value) in metadata.items()}
        opened.value_types = {key: kind for key, (kind, _) in metadata.items()}
        opened._identity = opened.metadata
        return opened

    def take(self, length: int, what: str) -> bytes:
        """Return the next `length` bytes, which `what` names if they are not there."""
        if length > self.source.size_bytes - self.position:
            raise DamagedFileError(
                f"ends at byte {self.source.size_bytes}, {what} at byte {self.position} needs {length} bytes"
            )
        start = self.position - self._window_start
        if start + length > len(self._window):
            ahead = min(max(length, WINDOW_BYTES), self.source.size_bytes - self.position)
            self._window = self.source.read(self.position, ahead).tobytes()
            self._window_start, start = self.position, 0
        self.position += length
        return self._window[start : start + length]

    def number(self, layout: str, what: str) -> int:
        """Return the next integer of a struct layout such as `<Q`."""
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]
        return value

    def string(self, what: str) -> bytes:
        """Return the next length-prefixed string."""
        return self.take(int.from_bytes(self.take(8, what), "little"), what)

    def name(self, limit: int, what: str) -> str:
        """Return the next string as a name of 1 to `limit` UTF-8 bytes."""
        at = self.position
        length = self.number("<Q", what)
        if not 0 < length <= limit:
            raise DamagedFileError(f"{what} at byte {at} has {length} bytes, expected 1 to {limit}")
        try:
            name = self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise DamagedFileError(f"{what} at byte {at} is not UTF-8") from error
        check_name(name, limit, what)
        return name

    def _preamble(self) -> tuple[int, int]:
        if (magic := self.take(4, "the magic")) != MAGIC:
            raise DamagedFileError(f"starts with {magic!r}, expected {MAGIC!r}")
        version = self.number("<I", "the version")
        if version & 0xFFFF == 0 and version:
            raise UnsupportedError("is a big-endian GGUF, expected little endian")
        if not 2 <= version <= VERSION:
            raise UnsupportedError(f"is GGUF version {version}, expected 2 or {VERSION}")
        counts = self.number("<Q", "the tensor count"), self.number("<Q", "the metadata count")
        remaining = self.source.size_bytes - self.position
        sizes = (_SMALLEST_TENSOR_BYTES, "tensors"), (_SMALLEST_VALUE_BYTES, "metadata values")
        for count, (smallest, what) in zip(counts, sizes, strict=True):
            if count > remaining // smallest:
                raise DamagedFileError(
                    f"says {count} {what}, which its {remaining} remaining bytes cannot hold"
                )
        return counts

    def _metadata(self, count: int) -> dict[str, Typed]:
        metadata: dict[str, Typed] = {}
        for _ in range(count):
            key = self.name(MAX_KEY_BYTES, "a metadata key")
            if key in metadata:
                raise DamagedFileError(f"metadata key {printable(key, 80)!r} appears twice")
            metadata[key] = self._value(f"metadata {printable(key, 80)!r}")
        return metadata

    def _value(self, what: str) -> Typed:
        kind, count = self._kind(what), None
        if kind == "ARRAY":
            kind, count = self._kind(what), self.number("<Q", what)
            if kind == "ARRAY":
                raise UnsupportedError(f"{what} is an array of arrays")
        if kind == "STRING":
            return Typed(kind, self._strings(what, 1)[0] if count is None else self._strings(what, count))
        values = self._numbers(what, kind, 1 if count is None else count)
        return Typed(kind, values[0] if count is None else values)

    def _kind(self, what: str) -> str:
        number = self.number("<I", what)
        if number not in _KINDS:
            raise DamagedFileError(f"{what} has the unknown value type {number}")
        return _KINDS[number]

    def _bounded(self, what: str, count: int, element_bytes: int) -> None:
        remaining = self.source.size_bytes - self.position
        if count > min(MAX_ARRAY, remaining // element_bytes):
            raise DamagedFileError(
                f"{what} says {count} elements of {element_bytes} bytes or more, "
                f"{remaining} bytes remain and {MAX_ARRAY} elements are the limit"
            )

    def _numbers(self, what: str, kind: str, count: int) -> list[Any]:
        layout = np.dtype(NUMBERS[kind])
        self._bounded(what, count, layout.itemsize)
        values = np.frombuffer(self.take(count * layout.itemsize, what), layout)
        listed: list[Any] = (values != 0 if kind == "BOOL" else values).tolist()
        return listed

    def _strings(self, what: str, count: int) -> list[str]:
        self._bounded(what, count, 8)
        return [self.string(what).decode("utf-8", "surrogateescape") for _ in range(count)]

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorRef]:
        names = type_names()
        entries: dict[str, tuple[tuple[int, ...], str, int]] = {}
        for _ in range(count):
            name = self.name(MAX_NAME_BYTES, "a tensor name")
            if name in entries:
                raise DamagedFileError("appears twice", tensor=name)
            entries[name] = self._entry(name, names)
        data_start = padded(self.position, alignment)
        regions: dict[str, TensorRef] = {}
        spans = []
        for name, (shape, kind, offset) in entries.items():
            tensor = self._tensor(name, shape, kind, data_start + offset)
            if offset % alignment:
                raise DamagedFileError(
                    f"has offset {offset}, expected a multiple of {alignment}", tensor=name
                )
            regions[name] = tensor
            spans.append((tensor.offset, tensor.offset + tensor.nbytes, name))
        _refuse_overlaps_and_holes(sorted(spans), data_start, alignment)
        return regions

    def _entry(self, name: str, names: dict[int, str]) -> tuple[tuple[int, ...], str, int]:
        n_dims = self.number("<I", "a tensor's dimensions")
        if n_dims > MAX_DIMS:
            raise DamagedFileError(f"has {n_dims} dimensions, expected at most {MAX_DIMS}", tensor=name)
        dims = struct.unpack(f"<{n_dims}Q", self.take(8 * n_dims, "a tensor's dimensions"))
        kind = self.number("<I", "a tensor's type")
        if kind not in names:
            raise UnsupportedError(f"has the unknown ggml type {kind}", tensor=name)
        return dims[::-1], names[kind], self.number("<Q", "a tensor's offset")

    def _tensor(self, name: str, shape: tuple[int, ...], kind: str, start: int) -> StoredTensor:
        nbytes = tensor_bytes(name, shape, kind)
        if start + nbytes > self.source.size_bytes:
            raise DamagedFileError(
                f"needs bytes {start} to {start + nbytes}, the file ends at {self.source.size_bytes}; "
                "it is truncated: download it again",
                tensor=name,
            )
        decode = _decoder(kind, nbytes // prod(shape[:-1]) if len(shape) > 1 else None)
        return StoredTensor(
            name, shape, kind, self.source, start, nbytes, decode, ggml_format(kind).block_size
        )
