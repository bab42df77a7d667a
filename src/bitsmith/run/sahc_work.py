"""Where recipe `sahc` works: a folder beside its output, and how the output appears when it has passed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bitsmith.errors import OutputError
from bitsmith.run.audit import AuditLog
from bitsmith.run.execute import write_manifest
from bitsmith.run.sahc_artifact import digest
from bitsmith.store.atomic import refuse_taken
from bitsmith.store.journal import Journal, result_folder
from bitsmith.store.safetensors import INDEX_NAME, SINGLE_NAME
from bitsmith.store.safetensors_writer import move_checkpoint

RESULT_NAME = "sahc.json"
AUDIT_NAME = "audit.jsonl"
JOURNAL_NAME = "journal"
CANDIDATE_NAME = "candidate"
BASELINE_NAME = "int4"
_PLACING = "placing"


def work_folder(out: Path) -> Path:
    """Return the folder `OUT.sahc` beside an output."""
    whole = Path(os.path.abspath(out))  # noqa: PTH100 (links stay as named)
    return whole.with_name(f"{whole.name}.sahc")


def refuse_output(out: Path, work: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """Raise OutputError for an output or a work folder that cannot be, before anything is computed.

    What a killed run may own is judged when its journal is open.
    """
    if not out.absolute().parent.is_dir():
        raise OutputError("is not in a folder that exists", path=out)
    if out.absolute() in (work.absolute() / CANDIDATE_NAME, work.absolute() / BASELINE_NAME):
        raise OutputError("is what the recipe calls a folder of its own; choose another name", path=out)
    if work.exists() and not work.is_dir():
        raise OutputError("is a file, the recipe works in a folder", path=work)
    if not (work / JOURNAL_NAME).exists():
        _refuse_results(out, work, overwrite, sources)


def is_whole(folder: Path, sha256: str) -> bool:
    """Tell whether a folder is there with the digest."""
    return folder.is_dir() and digest(folder) == sha256


class Workplace:
    """The folder `work` with the journal and the audit log of a run whose model is to be `out`.

    A context manager; a folder that it made goes again when an error leaves nothing finished in it. Raises
    OutputError if it cannot be written, if another run holds it, if `out` or a result is there without
    `overwrite` and no killed run's, and if `out` would be on another file system.
    """

    def __init__(
        self, out: Path, work: Path, key: str, overwrite: bool, sources: Sequence[Path], audit: Path | None
    ) -> None:
        self.out, self.folder = out, work
        self._overwrite, self._sources = overwrite, sources
        self._made = not work.exists()
        result_folder(work, RESULT_NAME, overwrite=True)
        if work.stat().st_dev != out.absolute().parent.stat().st_dev:
            raise OutputError(f"is on another file system than {out}", path=work)
        self.journal = Journal(work / JOURNAL_NAME, key)
        try:
            placed = self.journal.entries.get(_PLACING)
            if placed is not None and out.is_dir() and not _reads_as_model(out):
                self._overwrite = True  # a killed run had moved some of its files
            elif placed is None or not is_whole(out, placed):
                finished = [work / RESULT_NAME] if self.journal.entries else []
                _refuse_results(out, work, overwrite, sources, allowed=finished)
            self.log = AuditLog(work / AUDIT_NAME if audit is None else audit)
        except BaseException as error:
            self._closed(error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.log.close()
        self._closed(error)

    def has(self, name: str, sha256: str) -> bool:
        """Tell whether an artifact is whole, in its place or, if it has passed, as the output."""
        if name == CANDIDATE_NAME and self.journal.entries.get(_PLACING) == sha256:
            return is_whole(self.out, sha256) or is_whole(self.folder / name, sha256)
        return is_whole(self.folder / name, sha256)

    def place(self, sha256: str) -> None:
        """Make the candidate the output, with its manifest. Raises OutputError as `move_checkpoint` does."""
        self.journal.add(_PLACING, sha256)
        if not is_whole(self.out, sha256):
            made = self.folder / CANDIDATE_NAME
            move_checkpoint(made, self.out, overwrite=self._overwrite, sources=self._sources)
        write_manifest(self.out)

    def drop(self, name: str) -> None:
        """Remove an artifact that is not to be kept."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _closed(self, error: BaseException | None) -> None:
        self.journal.__exit__(None, None, None)
        if error is not None and not self.journal.entries:
            self.journal.remove()
            if self._made:
                shutil.rmtree(self.folder, ignore_errors=True)


def _reads_as_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in (INDEX_NAME, SINGLE_NAME))


def _refuse_results(
    out: Path, work: Path, overwrite: bool, sources: Sequence[Path], allowed: Sequence[Path] = ()
) -> None:
    refuse_taken(out, overwrite, sources, folder=True)
    result = work / RESULT_NAME
    if result.exists() and result not in allowed and not overwrite:
        raise OutputError("exists; pass --overwrite", path=result)
