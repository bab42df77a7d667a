"""The audit log of a run: a JSON line for everything that was judged or decided, and why."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from bitsmith.errors import BitsmithError, DamagedFileError, OutputError
from bitsmith.run.gate import Judged

Value = float | int | str | None
FIELDS = ("when", "who", "what", "value", "limit", "evidence", "decision")


@dataclass(frozen=True)
class AuditLine:
    """One line: at `when` (UTC, ISO 8601) `who` looked at `what`, found `value` beside `limit`, and decided.

    `value` and `limit` are None where there are none; `evidence` is any JSON. Of a gate it is an object with
    `subject`, `gate`, `outcome`, `direction`, `unit`, `low`, `high` and `found`.
    """

    when: str
    who: str
    what: str
    value: Value
    limit: Value
    evidence: Any
    decision: str


class AuditLog:
    """A file of JSON lines that only grows; each is on the disk before `add` returns.

    Opening drops a last line that a killed run left unfinished. Several processes may append. A context
    manager. Raises OutputError if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            descriptor = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
            )
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror or error}", path=path) from error
        self._stream: BinaryIO = os.fdopen(descriptor, "r+b", buffering=0)
        fcntl.flock(self._stream, fcntl.LOCK_EX)
        try:
            self._drop_torn_line()
        finally:
            fcntl.flock(self._stream, fcntl.LOCK_UN)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def add(
        self,
        who: str,
        what: str,
        *,
        value: Value = None,
        limit: Value = None,
        evidence: Any = "",
        decision: str,
    ) -> AuditLine:
        """Append a line and return it. Raises OutputError if it cannot be written."""
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = AuditLine(when, who, what, _plain(value), _plain(limit), evidence, decision)
        data = json.dumps(asdict(line), allow_nan=False).encode() + b"\n"
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX)
            try:
                while data:
                    data = data[self._stream.write(data) :]
                os.fsync(self._stream.fileno())
            finally:
                fcntl.flock(self._stream, fcntl.LOCK_UN)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror or error}", path=self.path) from error
        return line

    def judged(self, who: str, what: str, found: Judged, decision: str) -> AuditLine:
        """Append a gate's verdict on `what`."""
        return self.add(
            who,
            f"{what}: {found.name}",
            value=found.value,
            limit=found.limit,
            evidence=gate_evidence(what, found),
            decision=decision,
        )

    def _drop_torn_line(self) -> None:
        data = self._stream.read()
        self._stream.truncate(data.rfind(b"\n") + 1)


def gate_evidence(subject: str, found: Judged) -> dict[str, Any]:
    """Return what an audit line says of a gate's verdict beside its value and limit."""
    return {
        "subject": subject,
        "gate": found.name,
        "outcome": found.outcome.value,
        "direction": found.direction,
        "unit": found.unit,
        "low": found.low,
        "high": found.high,
        "found": found.evidence,
    }


def read_audit(path: Path) -> Iterator[AuditLine]:
    """Yield the lines of an audit log; one that is not finished is left out.

    Raises DamagedFileError for a line that is none, BitsmithError for a file that cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BitsmithError(f"cannot be read: {error.strerror or error}", path=path) from error
    for number, raw in enumerate(data.split(b"\n")[:-1], 1):
        yield _line(raw, number, path)


def _line(raw: bytes, number: int, path: Path) -> AuditLine:
    try:
        record: Any = json.loads(raw)
    except ValueError:
        record = None
    if not isinstance(record, dict) or set(record) != set(FIELDS):
        raise DamagedFileError(f"line {number} is no audit line; fields: {', '.join(FIELDS)}", path=path)
    return AuditLine(**record)


def _plain(value: Value) -> Value:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
