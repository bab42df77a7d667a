"""Finished pieces of a long run, kept so that a killed run goes on where it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitsmith import __version__
from bitsmith.errors import OutputError, printable
from bitsmith.log import keeps
from bitsmith.store.atomic import atomic_file, is_open_as
from bitsmith.store.checkpoint import Checkpoint

Key = Mapping[str, Any]
"""What finished pieces depend on, plain values by what a reader calls them: `source`, `rounder`, …"""
_SHOWN_CHARACTERS = 40  # of a value that changed; a digest is longer


class Journal:
    """A file of JSON lines, one finished piece each, valid for one `key`.

    A last line that a killed run left unfinished is dropped; pieces of another key are so with `overwrite`
    alone. Holds a lock while open. Raises OutputError if another run holds it, or for pieces of another key,
    and names what differs.
    """

    def __init__(self, path: Path, key: Key, *, overwrite: bool = False) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        self._stream = _locked(path)
        try:
            self._take_up(key, overwrite)
        except BaseException:
            self._stream.close()
            raise

    def _take_up(self, key: Key, overwrite: bool) -> None:
        self._key = facts = key_facts(key)
        found, kept = self._load()
        if found != facts:
            if found is not None and self.entries and not overwrite:
                raise OutputError(
                    f"has finished pieces of a run with other {_differences(found, facts)}; "
                    "run that again to go on, or pass --overwrite to begin anew",
                    path=self.path,
                )
            self.entries.clear()
            kept = 0
        self._sound = kept
        with _named(self.path):
            self._cut()
        if kept == 0:
            self._append({"key": facts})
        elif self.entries:
            keeps(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, name: str, value: Any) -> None:
        """Keep one finished piece on the disk."""
        self.add_all({name: value})

    def add_all(self, pieces: Mapping[str, Any]) -> None:
        """Keep finished pieces on the disk, all at once."""
        self._append(*({"name": name, "value": value} for name, value in pieces.items()))
        keeps(self.path)
        self.entries |= pieces

    def forget(self) -> None:
        """Drop all pieces: what they stood for is gone."""
        self.entries.clear()
        self._sound = 0
        with _named(self.path):
            self._cut()
        self._append({"key": self._key})

    def remove(self) -> None:
        """Delete the file: the run it served is whole."""
        self.path.unlink(missing_ok=True)

    def _append(self, *records: dict[str, Any]) -> None:
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        line = memoryview(lines.encode())
        with _named(self.path):
            try:
                written = 0
                while written < len(line):
                    written += self._stream.write(line[written:])
                os.fsync(self._stream.fileno())
            except BaseException:
                with suppress(OSError):  # half a line would hide those that follow
                    self._cut()
                raise
        self._sound += len(line)

    def _cut(self) -> None:
        """Drop what is not sound."""
        self._stream.truncate(self._sound)
        self._stream.seek(self._sound)

    def _load(self) -> tuple[dict[str, Any] | None, int]:
        """Read the entries; return the key they are of, and how many bytes of the file are sound."""
        lines = self._stream.readall().splitlines(keepends=True)
        first = _record(lines[0]) if lines else None
        if first is None or "key" not in first:
            return None, 0
        key, sound = first["key"], len(lines[0])
        for line in lines[1:]:
            record = _record(line)
            if record is None or not isinstance(record.get("name"), str) or "value" not in record:
                break
            self.entries[record["name"]] = record["value"]
            sound += len(line)
        return key if isinstance(key, dict) else {"version of the journal": 1}, sound


def remove_work(folder: Path, journal: str = "journal") -> None:
    """Remove a folder in which a run kept pieces; its journal is emptied first.

    What a kill meanwhile leaves is then not gone on with.
    """
    with suppress(OSError):
        os.truncate(folder / journal, 0)
    shutil.rmtree(folder, ignore_errors=True)


def key_facts(key: Key) -> dict[str, str]:
    """Return a key as it is kept: each value as JSON, or the SHA-256 of that where it is long."""
    facts = {}
    for name, value in key.items():
        text = json.dumps(value, default=str, sort_keys=True)
        facts[name] = text if len(text) <= _SHOWN_CHARACTERS else hashlib.sha256(text.encode()).hexdigest()
    return facts


def key_digest(key: Key) -> str:
    """Return one SHA-256 of a key."""
    return hashlib.sha256(json.dumps(key_facts(key)).encode()).hexdigest()


def content_key(source: Checkpoint | str, options: Key) -> dict[str, Any]:
    """Return what results depend on: the version, the source's content (every byte is read), the options.

    `source` may also be as much of the content's digest as the key is to tell.
    """
    digest = source if isinstance(source, str) else source.source_digest
    return {"bitsmith version": __version__, "source": digest, **options}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Name what differs between two keys' facts, with both values where they are short."""
    found = []
    for name in sorted({*old, *new}):
        was, now = (str(facts.get(name, "absent")) for facts in (old, new))
        if was != now:
            short = max(len(was), len(now)) <= _SHOWN_CHARACTERS
            found.append(printable(f"{name} ({was}, now {now})" if short else name))
    return ", ".join(found)


def result_folder(out: Path, result: str, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Make the folder that a journal and then the file `result` go into.

    Raises OutputError if `out` is a file, one of `sources`, cannot be made, or holds a result already (unless
    `overwrite`).
    """
    if out.exists() and not out.is_dir():
        raise OutputError("is a file, the output is a folder", path=out)
    if out.exists() and any(source.exists() and out.samefile(source) for source in sources):
        raise OutputError("is the input; choose another output", path=out)
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


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=path) from error


def _locked(path: Path) -> FileIO:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=path) from error
    stream = FileIO(descriptor, "r+b")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_open_as(path, descriptor):
            return stream
    except OSError as error:
        stream.close()
        raise OutputError("is being written by another run", path=path) from error
    stream.close()
    return _locked(path)  # its owner finished between our opening and our locking it
