"""Where recipe `sahc` works: a folder beside its output, with a journal and an audit log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from bitsmith.run import workplace
from bitsmith.run.audit import AuditLog
from bitsmith.run.workplace import beside
from bitsmith.store.journal import Key

RESULT_NAME = "sahc.json"
AUDIT_NAME = "audit.jsonl"
CANDIDATE_NAME = "candidate"
BASELINE_NAME = "int4"


def work_folder(out: Path) -> Path:
    """Return the folder `OUT.sahc` beside an output."""
    return beside(out, ".sahc")


def refuse_output(out: Path, work: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """Raise OutputError as `workplace.refuse_output` does."""
    own = CANDIDATE_NAME, BASELINE_NAME
    workplace.refuse_output(out, out, work / RESULT_NAME, overwrite, sources, own)


class Workplace(workplace.Workplace):
    """A `workplace.Workplace` with the audit log of a run of the recipe; raises as it does."""

    def __init__(
        self, out: Path, work: Path, key: Key, overwrite: bool, sources: Sequence[Path], audit: Path | None
    ) -> None:
        super().__init__(out, work, key, overwrite, sources, result=RESULT_NAME, made=CANDIDATE_NAME)
        try:
            self.log = AuditLog(work / AUDIT_NAME if audit is None else audit)
        except BaseException as error:
            self._closed(error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.log.close()
        super().__exit__(kind, error, trace)
