"""What became of each task of a study, on the disk at every change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError, DamagedFileError, printable
from bitsmith.store.journal import write_result

STATE, BACKUP = "state.json", "state.json.bak"
DECISIONS = 100


class Status(StrEnum):
    """Where a task stands; COMPLETED, FAILED and BLOCKED are ends."""

    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    BLOCKED = "blocked"
    COMPLETED = "completed"
    FAILED = "failed"
    KILLED = "killed"


@dataclass
class TaskState:
    """A task's status, why it is so, what shows it, and what its attempts of this run took."""

    key: str
    action: str
    needs: list[str]
    status: Status = Status.PENDING
    since: str = ""
    attempts: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    reason: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """One change of a status."""

    when: str
    task: str
    before: Status
    after: Status
    reason: str
    evidence: dict[str, Any]


class StateFile:
    """`state.json` in `folder`: every task's state and the last 100 decisions.

    `state.json.bak` is the one before.
    """

    def __init__(self, folder: Path, tasks: Mapping[str, TaskState], decisions: list[Decision]) -> None:
        self.folder = folder
        self.tasks = dict(tasks)
        self.decisions = decisions[-DECISIONS:]

    def change(self, name: str, status: Status, reason: str, evidence: Mapping[str, Any]) -> Decision:
        """Give a task another status, for a reason and with evidence, and write it all."""
        state = self.tasks[name]
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        decision = Decision(when, name, state.status, status, reason, dict(evidence))
        state.status, state.since, state.reason, state.evidence = status, when, reason, dict(evidence)
        self.decisions = [*self.decisions, decision][-DECISIONS:]
        self.write()
        return decision

    def write(self) -> None:
        """Write the file; the one before stays as the backup."""
        path = self.folder / STATE
        if path.exists():
            spare = self.folder / f".{BACKUP}.part"
            shutil.copyfile(path, spare)
            spare.replace(self.folder / BACKUP)
        record = {
            "format": 1,
            "tasks": {name: asdict(state) for name, state in self.tasks.items()},
            "decision_log": [asdict(decision) for decision in self.decisions],
        }
        write_result(path, record)


def load_state(folder: Path) -> StateFile:
    """Read `state.json`, or its backup where that is damaged or missing.

    Raises BitsmithError if there is neither, DamagedFileError if neither can be read.
    """
    paths = [path for path in (folder / STATE, folder / BACKUP) if path.exists()]
    if not paths:
        raise BitsmithError("holds no study that was begun", path=folder)
    for path in paths[:-1]:
        try:
            return _read(path)
        except DamagedFileError:
            continue
    return _read(paths[-1])


def _read(path: Path) -> StateFile:
    try:
        record = json.loads(path.read_bytes())
        tasks = {name: _state(entry) for name, entry in record["tasks"].items()}
        decisions = [_decision(entry) for entry in record["decision_log"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"is no state of a study: {printable(str(error))}", path=path) from error
    return StateFile(path.parent, tasks, decisions)


def _state(entry: dict[str, Any]) -> TaskState:
    state = TaskState(**{**entry, "status": Status(entry["status"])})
    _refuse_other(state.needs, list)
    _refuse_other(state.attempts, int)
    for text in (state.key, state.action, state.since, state.reason):
        _refuse_other(text, str)
    return state


def _decision(entry: dict[str, Any]) -> Decision:
    decision = Decision(**{**entry, "before": Status(entry["before"]), "after": Status(entry["after"])})
    for text in (decision.when, decision.task, decision.reason):
        _refuse_other(text, str)
    return decision


def _refuse_other(value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
