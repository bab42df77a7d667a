"""llama.cpp's importance matrix, in GGUF and in the legacy .dat layout, read and written.

Layouts checked against llama.cpp's tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError, DamagedFileError, printable
from bitsmith.store.atomic import Finish, atomic_file
from bitsmith.store.checkpoint import SLICE_BYTES
from bitsmith.store.gguf import open_gguf
from bitsmith.store.gguf_layout import MAGIC, MAX_NAME_BYTES, TensorInfo, Typed
from bitsmith.store.gguf_writer import write_gguf
from bitsmith.store.stored import SourceFile

Float32 = NDArray[np.float32]

LEGACY_CHUNK_TOKENS = 512
"""Tokens of a chunk in a legacy file, which does not say: llama.cpp's default. Means do not depend on it."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_MAX_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Imatrix:
    """Σ x² (`in`) and the tokens counted, by GGUF tensor name, columns in GGUF order.

    `datasets` name the texts, `chunks` of `chunk_tokens` were run (0: unknown). `left_out` are the entries of
    a file that cannot weigh anything, by name with the reason, and are not among `entries`: no token counted,
    sums all zero, negative or not finite, several matrices (experts) in one.
    """

    entries: Mapping[str, tuple[Float32, float]]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_tokens: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)
    sha256: str = field(default="", compare=False)


def read_imatrix(path: Path) -> Imatrix:
    """Read an imatrix, GGUF or legacy: which one, the first bytes say.

    Raises BitsmithError naming file and tensor for a file that is none; DamagedFileError for a truncated one
    and for an entry without its counts.
    """
    source = SourceFile(path)
    try:
        is_gguf = source.size_bytes >= 4 and source.read(0, 4).tobytes() == MAGIC
        return _read_gguf(path, _sha256(source)) if is_gguf else _read_legacy(source)
    finally:
        source.close()


def is_imatrix_name(path: Path) -> bool:
    """Tell whether a path is to be written as an imatrix: it ends in `.gguf` or `.dat`."""
    return path.suffix in (".gguf", ".dat")


def write_imatrix(
    target: Path,
    imatrix: Imatrix,
    *,
    overwrite: bool = False,
    sources: Iterable[Path] = (),
    finish: Finish | None = None,
) -> None:
    """Write an imatrix, atomically: legacy where the name ends in `.dat`, else GGUF.

    `finish` is told of the whole file before it appears. Raises OutputError as `atomic_file` does.
    """
    if target.suffix == ".dat":
        content = _legacy_bytes(imatrix)
        with atomic_file(
            target, overwrite=overwrite, expect_bytes=len(content), sources=sources, finish=finish
        ) as stream:
            stream.write(content)
        return
    arrays: dict[str, Float32] = {}
    for name in sorted(imatrix.entries):
        sums, count = imatrix.entries[name]
        arrays[name + _SUMS] = sums.reshape(1, -1)
        arrays[name + _COUNTS] = np.array([[count]], np.float32)
    write_gguf(
        target,
        {
            "general.type": "imatrix",
            _DATASETS: Typed("STRING", list(imatrix.datasets)),
            _CHUNKS: Typed("UINT32", imatrix.chunks),
            _CHUNK_SIZE: Typed("UINT32", imatrix.chunk_tokens),
        },
        [TensorInfo(name, array.shape, "F32") for name, array in arrays.items()],
        lambda info: [arrays[info.name]],
        overwrite=overwrite,
        sources=sources,
        finish=finish,
    )


def _sha256(source: SourceFile) -> str:
    digest = hashlib.sha256()
    for start in range(0, source.size_bytes, SLICE_BYTES):
        digest.update(source.read(start, min(SLICE_BYTES, source.size_bytes - start)).data)
    return digest.hexdigest()


def _read_gguf(path: Path, sha256: str) -> Imatrix:
    entries: dict[str, tuple[Float32, float]] = {}
    left_out: dict[str, str] = {}
    with open_gguf(path) as file:
        names = [name.removesuffix(_SUMS) for name in file if name.endswith(_SUMS)]
        if not names:
            raise BitsmithError("is no imatrix: no tensor ends in .in_sum2", path=path)
        for name in names:
            sums, counts = file[name + _SUMS], file.get(name + _COUNTS)
            if counts is None:
                raise DamagedFileError("has sums but no counts", path=path, tensor=name)
            if sums.dtype != "F32" or counts.dtype != "F32":
                raise DamagedFileError(
                    f"holds {sums.dtype} and {counts.dtype}, expected F32", path=path, tensor=name
                )
            if counts.size != 1 or prod(sums.shape[:-1]) != 1:
                left_out[name] = f"holds {sums.size} sums and {counts.size} counts, expected one matrix's"
                continue
            count = float(counts.read().reshape(-1)[0])
            _add(entries, left_out, name, sums.read().reshape(-1), count)
        chunks, size = (_whole(path, file.metadata, key) for key in (_CHUNKS, _CHUNK_SIZE))
        datasets = file.metadata.get(_DATASETS, [])
    if not isinstance(datasets, list) or not all(isinstance(text, str) for text in datasets):
        raise DamagedFileError(f"metadata {_DATASETS!r} are no names of texts", path=path)
    texts = (text.encode(errors="surrogateescape").decode(errors="replace") for text in datasets)
    return Imatrix(entries, tuple(texts), chunks, size, left_out, sha256)


def _whole(path: Path, metadata: Mapping[str, Any], key: str) -> int:
    """Return a number of the metadata, 0 where it is not there."""
    value = metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise DamagedFileError(
            f"metadata {key!r} is {printable(str(value), 40)}, expected a number of at least 0", path=path
        )
    return value


def _add(
    entries: dict[str, tuple[Float32, float]],
    left_out: dict[str, str],
    name: str,
    sums: Float32,
    count: float,
) -> None:
    bad = np.flatnonzero(~(np.isfinite(sums) & (sums >= 0)))
    if not np.isfinite(count) or count < 0:
        left_out[name] = f"counts {count} tokens"
    elif count == 0:
        left_out[name] = "no token was counted"
    elif len(bad):
        left_out[name] = (
            f"sum of squares {sums[bad[0]]} at column {bad[0]}, expected a finite one of at least 0"
        )
    elif not sums.any():
        left_out[name] = f"the sums of all its {sums.size} columns are zero"
    else:
        entries[name] = sums.astype(np.float32), count


class _Legacy:
    """The bytes of a legacy file, taken front to back and never past the end."""

    def __init__(self, source: SourceFile) -> None:
        self.path, self.content, self.at = source.path, source.read(0, source.size_bytes), 0

    def take(self, length: int, what: str) -> NDArray[np.uint8]:
        if not 0 <= length <= len(self.content) - self.at:
            raise DamagedFileError(
                f"ends at byte {len(self.content)}, {what} at byte {self.at} needs {length} bytes; "
                "it is truncated, or no imatrix",
                path=self.path,
            )
        self.at += length
        return self.content[self.at - length : self.at]

    def number(self, what: str, least: int, most: int) -> int:
        at = self.at
        value = int(self.take(4, what).view("<i4")[0])
        if not least <= value <= most:
            raise DamagedFileError(
                f"{what} at byte {at} is {value}, expected {least} to {most}; is it an imatrix?",
                path=self.path,
            )
        return value

    def text(self, length: int, what: str) -> str:
        try:
            return self.take(length, what).tobytes().decode()
        except UnicodeDecodeError as error:
            raise DamagedFileError(f"{what} is not UTF-8", path=self.path) from error


def _read_legacy(source: SourceFile) -> Imatrix:
    """Read `n`, then per entry a name, a count of chunks and mean squares times that count."""
    file = _Legacy(source)
    entries: dict[str, tuple[Float32, float]] = {}
    left_out: dict[str, str] = {}
    for _ in range(file.number("the number of entries", 1, _MAX_ENTRIES)):
        name = file.text(file.number("a name's length", 1, MAX_NAME_BYTES), "a name")
        if name in entries or name in left_out or not name.isprintable():
            raise DamagedFileError(f"has the name {printable(name)!r} twice or unprintable", path=file.path)
        calls = file.number("a count of chunks", 0, (1 << 31) - 1)
        size = file.number("a count of values", 1, (1 << 31) - 1)
        values = file.take(4 * size, "values").copy().view("<f4")
        with np.errstate(over="ignore"):
            sums = values * np.float32(LEGACY_CHUNK_TOKENS)
        _add(entries, left_out, name, sums, float(calls * LEGACY_CHUNK_TOKENS))
    chunks, datasets = 0, tuple[str, ...]()
    if file.at < len(file.content):  # older files end here
        chunks = file.number("the number of chunks", 0, (1 << 31) - 1)
        length = file.number("the text's name", 0, len(file.content))
        datasets = (file.text(length, "the text's name"),) if length else ()
    sha256 = hashlib.sha256(file.content.data).hexdigest()
    return Imatrix(entries, datasets, chunks, LEGACY_CHUNK_TOKENS, left_out, sha256)


def _legacy_bytes(imatrix: Imatrix) -> bytes:
    parts = [struct.pack("<i", len(imatrix.entries))]
    size = imatrix.chunk_tokens or LEGACY_CHUNK_TOKENS
    for name in sorted(imatrix.entries):
        sums, count = imatrix.entries[name]
        calls = -(-int(count) // size)  # rounded up, as llama-imatrix does, so that it is never zero
        values = (sums.astype(np.float64) / count * calls).astype("<f4")
        encoded = name.encode()
        parts += [struct.pack("<i", len(encoded)), encoded, struct.pack("<ii", calls, len(values))]
        parts.append(values.tobytes())
    dataset = imatrix.datasets[-1].encode() if imatrix.datasets else b""
    return b"".join([*parts, struct.pack("<ii", imatrix.chunks, len(dataset)), dataset])
