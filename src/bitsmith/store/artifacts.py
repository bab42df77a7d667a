"""Finished artifacts by the key of the task that makes them, with a digest of every file."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError, DamagedFileError, OutputError, printable
from bitsmith.store.atomic import sync_folder, sync_path
from bitsmith.store.journal import write_result

FILES, RESULT, MANIFEST, COST = "files", "result.json", "manifest.json", "cost.json"
REMOVALS, REMOVAL_SECONDS = 20, 0.05


class ArtifactStore:
    """A folder of artifacts by key: `objects/KE/KEY` holds `files` and three JSON files about them.

    `result.json` is what the action returned. `manifest.json`, the last but for the rename that makes the
    artifact appear, has bytes and SHA-256 of result and files. `cost.json` tells what making it took.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sound: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the artifact is there."""
        return (self._object(key) / MANIFEST).is_file()

    def path(self, key: str) -> Path:
        """Return the folder with the artifact's files, read and compared once. Raises as `verify` does."""
        self.verify(key)
        return self._object(key) / FILES

    def result(self, key: str) -> dict[str, Any]:
        """Return what the action returned. Raises as `verify` does."""
        self.verify(key)
        return _read_json(self._object(key) / RESULT)

    def cost(self, key: str) -> dict[str, Any]:
        """Return what making it took, as given to `put`; empty where nobody said."""
        path = self._object(key) / COST
        return _read_json(path) if path.is_file() else {}

    def digest(self, key: str) -> str:
        """Return the SHA-256 of the manifest: equal digests, equal results and files."""
        return _sha256(self._object(key) / MANIFEST)

    def verify(self, key: str) -> None:
        """Compare every file with the manifest, once for each store.

        Raises BitsmithError if there is no such artifact, DamagedFileError for a file that changed.
        """
        if key in self._sound:
            return
        if not self.has(key):
            raise BitsmithError("there is no such artifact", path=self._object(key))
        verify_sealed(self._object(key))
        self._sound.add(key)

    def stage(self, key: str, attempt: int) -> Path:
        """Return the path, not there yet, of a folder to make the artifact in. Call within `writing`."""
        path = self.root / "staging" / f"{key}-{attempt}-{uuid.uuid4().hex[:8]}"  # no one else's, ever
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot be made: {error.strerror or error}", path=path.parent) from error
        return path

    def put(self, key: str, staged: Path, cost: Mapping[str, Any] | None = None) -> None:
        """Make a sealed folder the artifact of `key`; one that is there already stays, and is the same.

        Raises DamagedFileError if the folder is not sealed, OutputError if it cannot be moved.
        """
        for name, entry in _manifest(staged).items():
            _refuse_size(staged / name, entry)
        if self.has(key):
            remove_folder(staged)
            return
        self.discard(key)  # what is left of a damaged one
        target = self._object(key)
        try:
            (staged / COST).write_text(json.dumps(cost or {}) + "\n", "utf-8")
            sync_path(staged / COST)
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True)
                sync_folder(target.parent.parent)
            staged.rename(target)
            sync_folder(target.parent)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror or error}", path=target) from error
        self._sound.add(key)  # who sealed it has just read it

    def discard(self, key: str) -> None:
        """Remove an artifact: it vanishes whole, then its bytes go."""
        self._sound.discard(key)
        if self._object(key).exists():
            grave = self.stage(key, -1)
            self._object(key).rename(grave)
            remove_folder(grave)

    def keys(self) -> list[str]:
        """Return the keys of all artifacts, sorted."""
        return sorted(path.parent.name for path in self.root.glob(f"objects/*/*/{MANIFEST}"))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the store for one run and clear what an earlier one left unfinished.

        Raises OutputError if another run holds it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot be made: {error.strerror or error}", path=self.root) from error
        with locked_folder(self.root):
            remove_folder(self.root / "staging")
            try:
                yield
            finally:
                remove_folder(self.root / "staging")

    def _object(self, key: str) -> Path:
        return self.root / "objects" / key[:2] / key


def seal(staged: Path, result: Mapping[str, Any]) -> None:
    """Write an action's result beside its `files` and the manifest of both, all forced to the disk.

    Raises BitsmithError if the result is not JSON or the files are not all plain files, OutputError if there
    is no room for it.
    """
    try:
        text = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BitsmithError(f"the action's result is not JSON: {error}") from error
    try:
        (staged / RESULT).write_text(text + "\n", "utf-8")
        paths = [staged / RESULT, *_plain_files(staged / FILES)]
        entries = {
            path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in paths
        }
        for path in [*paths, *{path.parent for path in paths}]:
            sync_path(path)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=staged) from error
    write_result(staged / MANIFEST, {"format": 1, "files": dict(sorted(entries.items()))})


def sealed_result(staged: Path) -> dict[str, Any]:
    """Return the result that a sealed folder holds."""
    _manifest(staged)
    return _read_json(staged / RESULT)


def verify_sealed(folder: Path) -> None:
    """Compare every file of a sealed folder with its manifest.

    Raises DamagedFileError for the first that differs.
    """
    entries = _manifest(folder)
    for name, entry in entries.items():
        _refuse_size(folder / name, entry)
        if _sha256(folder / name) != entry["sha256"]:
            raise DamagedFileError("its bytes are not those of the manifest", path=folder / name)
    for path in _plain_files(folder / FILES):
        if path.relative_to(folder).as_posix() not in entries:
            raise DamagedFileError("is not in the manifest", path=path)


@contextmanager
def locked_folder(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold `folder` until the block ends, or the process does. Raises OutputError if another run holds it."""
    try:
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=folder) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError("is being written by another run", path=folder) from error
        yield
    finally:
        os.close(descriptor)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files under `folder`, those that vanish meanwhile left out."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(parent) / name).lstat().st_size
    return total


def remove_folder(folder: Path) -> None:
    """Remove a folder and all in it, if it is there. Raises OutputError if that fails."""
    for left in reversed(range(REMOVALS)):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            if not folder.exists():
                return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not left:
                raise OutputError(f"cannot be removed: {error.strerror or error}", path=folder) from error
        else:
            return
        time.sleep(REMOVAL_SECONDS)  # a killed worker that was in the midst of writing ends only then


def _plain_files(folder: Path) -> list[Path]:
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BitsmithError("is a link or no plain file, which an artifact cannot hold", path=path)
    return [path for path in paths if path.is_file()]


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    entries: Any = _read_json(folder / MANIFEST).get("files")
    named = isinstance(entries, dict) and RESULT in entries
    if not named or not all(_is_entry(name, entry) for name, entry in entries.items()):
        raise DamagedFileError("is no manifest of an artifact", path=folder / MANIFEST)
    return dict(entries)


def _is_entry(name: str, entry: Any) -> bool:
    inside = not name.startswith("/") and ".." not in name.split("/")
    return inside and isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry)


def _refuse_size(path: Path, entry: Mapping[str, Any]) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != entry["bytes"]:
        what = "is missing" if found is None else f"has {found} bytes"
        raise DamagedFileError(f"{what}, the manifest says {entry['bytes']}", path=path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"cannot be read: {printable(str(error))}", path=path) from error
    if not isinstance(record, dict):
        raise DamagedFileError("is not a JSON object", path=path)
    return record


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
