"""Digests of the files and folders that a run reads, remembered so that nothing is read twice for them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError
from bitsmith.store.journal import write_result


class SourceDigests:
    """SHA-256 of sources by path.

    Those of files are kept in `cache`, by place, size, inode and the times of change of bytes and of inode:
    the latter shows bytes that were changed under an old date.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known: dict[str, Any] = _load(cache)

    def of(self, path: Path) -> str:
        """Return the SHA-256 (hex) of a file's bytes, or of a folder's file names, sizes and digests.

        Hidden files count for nothing. Raises BitsmithError if the source is not there or cannot be read.
        """
        try:
            if path.is_dir():
                return self._of_folder(path)
            return self._of_file(path)
        except OSError as error:
            raise BitsmithError(f"cannot be read: {error.strerror or error}", path=path) from error

    def save(self) -> None:
        """Write the cache."""
        write_result(self._cache, self._known)

    def _of_folder(self, folder: Path) -> str:
        names = sorted(path.relative_to(folder) for path in _visible(folder))
        facts = [(name.as_posix(), self._of_file(folder / name)) for name in names]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _of_file(self, path: Path) -> str:
        found = path.stat()
        stamp = [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
        place = str(path.resolve())
        known = self._known.get(place)
        if not (isinstance(known, list) and known[:-1] == stamp):
            with path.open("rb", buffering=0) as stream:
                known = [*stamp, hashlib.file_digest(stream, "sha256").hexdigest()]
            self._known[place] = known
        return str(known[-1])


def _visible(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those in it, also of linked ones unless that leads in a circle."""
    seen: set[Path] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        seen.add(Path(parent).resolve())
        inside = [name for name in sorted(folders) if not name.startswith(".")]
        folders[:] = [name for name in inside if (Path(parent) / name).resolve() not in seen]
        yield from (Path(parent) / name for name in files if not name.startswith("."))


def _load(cache: Path) -> dict[str, Any]:
    try:
        known = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
