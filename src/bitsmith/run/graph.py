"""Runs tasks in the order of their needs: nothing twice, failures again after a while, then without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsmith.progress import Progress, silent
from bitsmith.run.audit import AuditLog
from bitsmith.run.engine import Engine
from bitsmith.run.task import Action, Task
from bitsmith.run.task_state import Status
from bitsmith.store.artifacts import ArtifactStore


@dataclass(frozen=True)
class Outcome:
    """How a task ended: COMPLETED with `result` and `path` (its folder of files), FAILED or BLOCKED with neither.

    `attempts` is 0 for what an earlier run had finished; `seconds` and `peak_bytes` are those of the attempt
    that made the artifact, whenever that was.
    """

    name: str
    status: Status
    key: str
    result: Mapping[str, Any] | None
    path: Path | None
    attempts: int
    seconds: float
    peak_bytes: int
    reason: str
    evidence: Mapping[str, Any]


def run_graph(
    tasks: Sequence[Task],
    store: ArtifactStore,
    engine: Engine,
    audit: AuditLog,
    progress: Progress = silent,
    *,
    actions: Mapping[str, Action],
    folder: Path,
    backoff_seconds: float = 1.0,
) -> dict[str, Outcome]:
    """Run all tasks that can be run and return how each ended; `folder` holds `state.json` and the lock."""
    raise NotImplementedError
