"""Finished pieces of a file that takes long to make, beside it, so that a killed run goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from bitsmith.errors import OutputError
from bitsmith.log import event
from bitsmith.progress import Progress, silent
from bitsmith.store.atomic import Chunk, write_chunk
from bitsmith.store.checkpoint import Bytes
from bitsmith.store.journal import Journal, Key, remove_work

_COPIED_BYTES = 1 << 24


def parts_of(out: Path) -> Path:
    """Return the folder of an output's finished pieces."""
    return out.absolute().with_name(f".{out.name}.parts")


class Work:
    """The folder `.OUT.parts`: what is finished of an output, and a journal of it.

    `key` names everything the bytes depend on; what is of another key is dropped with `overwrite` alone.
    `finished` has what the journal says of each piece, `resumed` of them by a killed run. The folder goes at
    the end of the context if nothing was finished, else `remove` deletes it. Raises OutputError if it cannot
    be written, another run holds it, or it has pieces of another key.
    """

    def __init__(self, out: Path, key: Key, *, overwrite: bool = False) -> None:
        self._folder = parts_of(out)
        self._key, self._overwrite = key, overwrite
        self.finished: dict[str, Any] = {}
        self.resumed = 0
        self._removed = False

    def __enter__(self) -> Self:
        made = not self._folder.exists()
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot be made: {error.strerror or error}", path=self._folder) from error
        try:
            self._journal = Journal(self._folder / "journal", self._key, overwrite=self._overwrite)
            try:
                self._open()
            except BaseException:
                self._journal.__exit__(None, None, None)
                raise
        except BaseException:
            if made:
                self.remove()
            raise
        return self

    def _open(self) -> None:
        """Take up what the journal says."""
        self.finished = dict(self._journal.entries)
        self.resumed = len(self.finished)

    def _keep_only(self, kept: Iterable[Path]) -> None:
        """Remove what no finished piece needs."""
        needed = {self._journal.path, *kept}
        for path in self._folder.iterdir():
            if path not in needed:
                path.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.finished and not self._removed:
            self.remove()
        self._journal.__exit__(kind, error, trace)

    def remove(self) -> None:
        """Delete the folder: the output is whole, or nothing was finished."""
        remove_work(self._folder)
        self._removed = True


class Parts(Work):
    """Finished pieces as files of their own in the folder `.OUT.parts`, to be copied from there."""

    def __init__(self, out: Path, key: Key, *, overwrite: bool = False) -> None:
        super().__init__(out, {"layout of the notes": 2, **key}, overwrite=overwrite)

    def _open(self) -> None:
        super()._open()
        self._keep_only(self.path(file) for value in self.finished.values() for file in value["files"])

    def write(self, file: str, blocks: Iterable[Chunk]) -> None:
        """Write a file of a piece, anew if called again."""
        try:
            with self.path(file).open("wb") as stream:
                for part in blocks:
                    write_chunk(stream, part)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror or error}", path=self._folder) from error

    def add(self, name: str, files: Iterable[str], note: Mapping[str, Any]) -> None:
        """Note a piece as finished, with the files it consists of."""
        value = {"files": list(files), "note": dict(note)}
        self._journal.add(name, value)
        self.finished[name] = value

    def note(self, name: str) -> dict[str, Any]:
        """Return what was noted of a finished piece."""
        found: dict[str, Any] = self.finished[name]["note"]
        return found

    def read(self, file: str) -> Iterator[Bytes]:
        """Yield a finished file's bytes."""
        with self.path(file).open("rb") as stream:
            while chunk := stream.read(_COPIED_BYTES):
                yield np.frombuffer(chunk, np.uint8)

    def path(self, file: str) -> Path:
        """Return where a file of a piece lies."""
        return self._folder / f"{file}.blocks"


Make = Callable[["Parts", str], tuple[Sequence[str], dict[str, Any]]]
"""Writes a piece's files and returns their names, and what is to be noted of it."""


@contextmanager
def finished_parts(
    out: Path,
    key: Key,
    names: Sequence[str],
    make: Make,
    progress: Progress = silent,
    *,
    overwrite: bool = False,
) -> Iterator[Parts]:
    """Yield the parts of `out` with every piece of `names`: a killed run's, or made now; gone at the end.

    Where the block fails the parts stay, for the next run. Raises as `Parts` does.
    """
    with Parts(out, key, overwrite=overwrite) as parts:
        for number, name in enumerate(names, 1):
            progress("round", number, len(names))
            if name not in parts.finished:
                event("round", tensor=name)
                parts.add(name, *make(parts, name))
        yield parts
        parts.remove()
