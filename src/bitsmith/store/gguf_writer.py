"""Writes GGUF as a stream: the header is known before the first tensor is encoded, and so is the size."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitsmith.errors import BitsmithError
from bitsmith.store.atomic import Chunk, Finish, atomic_file, write_chunk
from bitsmith.store.gguf_layout import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    NUMBERS,
    VALUE_TYPES,
    VERSION,
    TensorInfo,
    Typed,
    check_alignment,
    check_name,
    ggml_format,
    padded,
)

Encode = Callable[[TensorInfo], Iterable[Chunk]]
Progress = Callable[[TensorInfo, int], None]


def write_gguf(
    target: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorInfo],
    encode: Encode,
    *,
    overwrite: bool = False,
    sources: Iterable[Path] = (),
    progress: Progress | None = None,
    finish: Finish | None = None,
) -> int:
    """Write a GGUF file, atomically, and return its size in bytes; it equals `gguf_size_bytes`.

    `encode(info)` yields the tensor's bytes in order, in chunks of any size, each written and dropped at
    once; `progress(info, nbytes)` is called after each. A metadata value is a `Typed`, or a plain one as
    llama.cpp's converter writes it: bool BOOL, int UINT32, float FLOAT32, str STRING, a list of them an array
    (of int: INT32). `finish` is told of the whole file before it appears. Raises OutputError as `atomic_file`
    does, BitsmithError for a value, name or shape that
    GGUF cannot hold and for an encoding of the wrong length.
    """
    layout = gguf_layout(metadata, tensors)
    with atomic_file(
        target, overwrite=overwrite, expect_bytes=layout.nbytes, sources=sources, finish=finish
    ) as stream:
        stream.write(layout.header)
        for info in tensors:
            done = 0
            for chunk in encode(info):
                written = write_chunk(stream, chunk)
                done += written
                if done > info.nbytes:
                    break
                if progress is not None:
                    progress(info, written)
            if done != info.nbytes:
                found = "more" if done > info.nbytes else f"{done}"
                raise BitsmithError(
                    f"was encoded to {found} bytes, expected {info.nbytes}", path=target, tensor=info.name
                )
            stream.write(bytes(padded(done, layout.alignment) - done))
    return layout.nbytes


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a file of `nbytes`: the header, padded, and each tensor's first byte by name.

    Tensors and their padding follow one another in the order of `offsets`.
    """

    header: bytes
    offsets: Mapping[str, int]
    nbytes: int
    alignment: int


def gguf_layout(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> Layout:
    """Return the layout of the file that `write_gguf` would write. Raises as it does."""
    alignment = _alignment(metadata)
    header = _header(metadata, tensors)
    at, offsets = padded(len(header), alignment), {}
    header = header.ljust(at, b"\0")
    for info in tensors:
        offsets[info.name] = at
        at += padded(info.nbytes, alignment)
    return Layout(header, offsets, at, alignment)


def gguf_size_bytes(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> int:
    """Return the exact size of the file that `write_gguf` would write."""
    return gguf_layout(metadata, tensors).nbytes


def _alignment(metadata: Mapping[str, Any]) -> int:
    if ALIGNMENT_KEY not in metadata:
        return DEFAULT_ALIGNMENT
    return check_alignment(*_typed(ALIGNMENT_KEY, metadata[ALIGNMENT_KEY]))


def _header(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> bytes:
    for name, count in Counter(info.name for info in tensors).items():
        if count > 1:
            raise BitsmithError("appears twice", tensor=name)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(check_name(key, MAX_KEY_BYTES, "metadata key")), _packed(key, _typed(key, value))]
    alignment, offset = _alignment(metadata), 0
    for info in tensors:
        nbytes = info.nbytes  # refuses a shape that does not suit the type
        parts.append(_tensor_entry(info, offset))
        offset += padded(nbytes, alignment)
    return b"".join(parts)


def _tensor_entry(info: TensorInfo, offset: int) -> bytes:
    name = check_name(info.name, MAX_NAME_BYTES, "tensor name")
    dims, kind = info.shape[::-1], ggml_format(info.type).ggml_type
    return _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def _string(encoded: bytes) -> bytes:
    return struct.pack("<Q", len(encoded)) + encoded


def _typed(key: str, value: Any) -> Typed:
    """Say the GGUF type of a metadata value that does not say it itself."""
    if isinstance(value, Typed):
        return value
    first, is_array = value, isinstance(value, list | tuple)
    if is_array:
        if not value:
            raise BitsmithError(f"metadata {key!r} is an empty array: say its type with Typed")
        first = value[0]
    integer = "INT32" if is_array else "UINT32"
    for kind, name in ((bool, "BOOL"), (int, integer), (float, "FLOAT32"), (str, "STRING")):
        if isinstance(first, kind):
            return Typed(name, value)
    raise BitsmithError(f"metadata {key!r} is of the type {type(first).__name__}, which GGUF cannot hold")


def _packed(key: str, typed: Typed) -> bytes:
    kind, value = typed
    if kind not in VALUE_TYPES or kind == "ARRAY":
        raise BitsmithError(
            f"metadata {key!r} has the unknown type {kind!r}; known: {' '.join(NUMBERS)} STRING"
        )
    number = struct.pack("<I", VALUE_TYPES[kind])
    if not isinstance(value, list | tuple):
        return number + _elements(key, kind, [value])
    array = struct.pack("<I", VALUE_TYPES["ARRAY"]) + number + struct.pack("<Q", len(value))
    return array + _elements(key, kind, value)


def _elements(key: str, kind: str, values: Sequence[Any]) -> bytes:
    """Pack values of one type one after the other; each must be of that type and in its range."""
    kinds = {"STRING": (str,), "BOOL": (bool,), "FLOAT32": (int, float), "FLOAT64": (int, float)}
    expected = kinds.get(kind, (int,))
    if not all(
        isinstance(value, expected) and (kind == "BOOL" or type(value) is not bool) for value in values
    ):
        raise BitsmithError(f"metadata {key!r} is not all {kind}")
    if kind == "STRING":
        try:
            return b"".join(_string(value.encode("utf-8", "surrogateescape")) for value in values)
        except UnicodeEncodeError as error:
            raise BitsmithError(f"metadata {key!r} is not Unicode") from error
    try:
        with np.errstate(over="raise"):
            return np.array(values, NUMBERS[kind]).tobytes()
    except (OverflowError, FloatingPointError) as error:
        raise BitsmithError(f"metadata {key!r} does not fit {kind}") from error
