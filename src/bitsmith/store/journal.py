"""Finished pieces of a long run, kept so that a killed run goes on where it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from bitsmith.errors import OutputError
from bitsmith.store.atomic import atomic_file
from bitsmith.store.checkpoint import Checkpoint


class Journal:
    """A file of JSON lines, one finished piece each, valid for one `key` (a digest of source and options).

    Pieces of another key are dropped, and so is a last line that a killed run left unfinished. Holds a lock
    while open. Raises OutputError if another run holds it.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        self._stream = _locked(path)
        kept = self._load(key)
        self._stream.seek(kept)
        self._stream.truncate()
        if kept == 0:
            self._append({"key": key})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, name: str, value: Any) -> None:
        """Keep one finished piece on the disk."""
        self._append({"name": name, "value": value})
        self.entries[name] = value

    def remove(self) -> None:
        """Delete the file: the run it served is whole."""
        self.path.unlink(missing_ok=True)

    def _append(self, record: dict[str, Any]) -> None:
        self._stream.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _load(self, key: str) -> int:
        """Read the entries of `key` and return how many bytes of the file are sound."""
        sound = 0
        for line in self._stream:
            record = _record(line)
            if record is None or (sound == 0 and record.get("key") != key):
                break
            if sound:
                if not isinstance(record.get("name"), str) or "value" not in record:
                    break
                self.entries[record["name"]] = record["value"]
            sound += len(line)
        return sound


def content_key(checkpoint: Checkpoint, options: Any) -> str:
    """Return a digest of what results depend on: the files' sizes and times, every tensor, the options."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    tensors = [(name, ref.dtype, ref.shape) for name, ref in checkpoint.items()]
    facts = [files, tensors, checkpoint.config, options]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def result_folder(out: Path, result: str, overwrite: bool) -> None:
    """Make the folder that a journal and then the file `result` go into.

    Raises OutputError if `out` is a file, cannot be made, or holds a result already (unless `overwrite`).
    """
    if out.exists() and not out.is_dir():
        raise OutputError("is a file, the output is a folder", path=out)
    if (out / result).exists() and not overwrite:
        raise OutputError("exists; pass --overwrite", path=out / result)
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror or error}", path=out) from error


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, over an earlier one."""
    with atomic_file(path, overwrite=True) as stream:
        stream.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _locked(path: Path) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=path) from error
    stream = os.fdopen(descriptor, "r+b")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        raise OutputError("is being written by another run", path=path) from error
    return stream
