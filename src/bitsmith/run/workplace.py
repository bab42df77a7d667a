"""A folder beside an output in which a long run works, and how the output appears when it has passed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitsmith.errors import OutputError
from bitsmith.run.record import rebased
from bitsmith.store.atomic import Content, files_in, refuse_taken
from bitsmith.store.journal import Journal, Key, result_folder
from bitsmith.store.manifest import read_record, record_of, remove_output, write_manifest
from bitsmith.store.safetensors import INDEX_NAME, SINGLE_NAME
from bitsmith.store.safetensors_writer import move_checkpoint

JOURNAL_NAME = "journal"
_PLACING = "placing"
_BUFFER_BYTES = 1 << 20


def beside(out: Path, suffix: str) -> Path:
    """Return the folder of an output's name and `suffix`, beside it."""
    whole = Path(os.path.abspath(out))  # noqa: PTH100 (links stay as named)
    return whole.with_name(f"{whole.name}{suffix}")


def digest(folder: Path) -> str:
    """Return the SHA-256 of the shards and the config of a folder, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name == "config.json":
            total.update(path.name.encode())
            with path.open("rb") as stream:
                while part := stream.read(_BUFFER_BYTES):
                    total.update(part)
    return total.hexdigest()


def is_whole(folder: Path, sha256: str) -> bool:
    """Tell whether a folder is there with the digest."""
    return folder.is_dir() and digest(folder) == sha256


class Workplace:
    """The folder `work` with the journal of a run whose model, made there as `made`, is to be `out`.

    A context manager; a folder that it made goes again when an error leaves nothing finished in it. `result`
    is the file that a whole run leaves in the folder. Raises OutputError if it cannot be written, if another
    run holds it, if `out` or a result is there without `overwrite` and no killed run's, and if `out` would be
    on another file system.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        key: Key,
        overwrite: bool,
        sources: Sequence[Path],
        *,
        result: str,
        made: str,
    ) -> None:
        self.out, self.folder, self.result = out, work, work / result
        self._overwrite, self._sources, self._candidate = overwrite, sources, made
        self._made = not work.exists()
        result_folder(work, result, overwrite=True)
        if work.stat().st_dev != out.absolute().parent.stat().st_dev:
            raise OutputError(f"is on another file system than {out}", path=work)
        self.journal = Journal(work / JOURNAL_NAME, key, overwrite=overwrite)
        try:
            placed = self.journal.entries.get(_PLACING)
            if placed is not None and out.is_dir() and not _reads_as_model(out):
                self._overwrite = True  # a killed run had moved some of its files
            elif placed is None or not is_whole(out, placed):
                finished = [self.result] if self.journal.entries else []
                refuse_results(out, self.result, overwrite, sources, allowed=finished)
        except BaseException as error:
            self._closed(error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed(error)

    def has(self, name: str, sha256: str) -> bool:
        """Tell whether an artifact is whole, in its place or, if it has passed, as the output."""
        if name == self._candidate and self.journal.entries.get(_PLACING) == sha256:
            return is_whole(self.out, sha256) or is_whole(self.folder / name, sha256)
        return is_whole(self.folder / name, sha256)

    def place(self, sha256: str, **facts: Any) -> None:
        """Make the candidate the output, with its manifest and its record, `facts` replaced in it.

        Raises OutputError as `move_checkpoint` does.
        """
        self.journal.add(_PLACING, sha256)
        made = self.folder / self._candidate

        def finish(content: Content) -> None:
            write_manifest(self.out, {**rebased(read_record(made), made, self.out), **facts}, content=content)

        if not is_whole(self.out, sha256):
            move_checkpoint(made, self.out, overwrite=self._overwrite, sources=self._sources, finish=finish)
        elif record_of(made).exists():  # a killed run was about to let go of it
            finish(files_in(self.out))
        self.drop(self._candidate)

    def drop(self, name: str) -> None:
        """Remove an artifact that is not to be kept, with what lies beside it."""
        remove_output(self.folder / name)

    def abandon(self) -> None:
        """Let go of what the run kept: with an error, the folder goes too if this run made it."""
        self.journal.entries.clear()

    def _closed(self, error: BaseException | None) -> None:
        self.journal.__exit__(None, None, None)
        if error is not None and not self.journal.entries:
            self.journal.remove()
            if self._made:
                shutil.rmtree(self.folder, ignore_errors=True)


def refuse_output(
    out: Path,
    model: Path,
    result: Path,
    overwrite: bool,
    sources: Sequence[Path],
    own: Sequence[str] = (),
) -> None:
    """Raise OutputError for an output or a work folder that cannot be, before anything is computed.

    `model` is the folder that the run makes: `out`, or what `out` is made of; `own` are folders that it makes
    beside `result`. What a killed run may own is judged when its journal is open.
    """
    work = result.parent
    if not out.absolute().parent.is_dir():
        raise OutputError("is not in a folder that exists", path=out)
    if out.absolute() in [work.absolute() / name for name in own]:
        raise OutputError("is what the recipe calls a folder of its own; choose another name", path=out)
    if work.exists() and not work.is_dir():
        raise OutputError("is a file, the recipe works in a folder", path=work)
    if not (work / JOURNAL_NAME).exists():
        refuse_results(model, result, overwrite, sources)


def refuse_results(
    out: Path, result: Path, overwrite: bool, sources: Sequence[Path], allowed: Sequence[Path] = ()
) -> None:
    """Raise OutputError for an output or a result that is there without `overwrite`; `allowed` may be."""
    refuse_taken(out, overwrite, sources, folder=True)
    if result.exists() and result not in allowed and not overwrite:
        raise OutputError("exists; pass --overwrite", path=result)


def _reads_as_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in (INDEX_NAME, SINGLE_NAME))
