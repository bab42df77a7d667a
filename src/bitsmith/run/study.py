"""Studies: models × recipes × evaluations as a graph of gated tasks, on one machine or a Ray cluster.

A study's folder holds `state.json` (every task), `audit.jsonl` (every decision), `artifacts` (by content) and
`report.json`. What is finished is never computed again, in this run or in a later one.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from bitsmith.errors import BitsmithError, DamagedFileError, OutputError, printable
from bitsmith.log import keeps
from bitsmith.progress import Progress, silent
from bitsmith.run.actions import ACTIONS
from bitsmith.run.audit import AuditLog
from bitsmith.run.engine import Engine, LocalEngine
from bitsmith.run.gate import Judged
from bitsmith.run.graph import LOCK, Outcome, run_graph
from bitsmith.run.study_commands import study_command
from bitsmith.run.study_file import Row, Study, load_study
from bitsmith.run.study_graph import graph_of, named, window_name
from bitsmith.run.study_result import JUDGE, StudyResult, environment
from bitsmith.run.study_sources import check_study, fetch_models, source_digests
from bitsmith.run.task_state import STATE, Decision, Status, TaskState, load_state
from bitsmith.store.artifacts import ArtifactStore
from bitsmith.store.journal import write_result

__all__ = ["StudyResult", "StudyStatus", "graph_of", "load_study", "run_study", "study_status"]

ARTIFACTS, AUDIT, REPORT = "artifacts", "audit.jsonl", "report.json"
PINS = "commits.json"
"""Of models of a hub the commits: a resumed study takes the same."""

EngineName = Literal["local", "ray"]


def run_study(
    path: Path,
    out: Path,
    *,
    engine: EngineName = "local",
    workers: int | None = None,
    memory_bytes: int | None = None,
    address: str | None = None,
    cache: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> StudyResult:
    """Run the study that the YAML at `path` describes in the folder `out`, and write `report.json` there.

    `engine` `local` runs `workers` processes (default: as many as cores) that together use at most
    `memory_bytes` (default: nine tenths of what is free); `ray` runs on the cluster at `address`. Artifacts
    lie in `out`, or in `cache`, which several studies may share one after the other. With `resume` a run that
    was killed, failed or was asked for less goes on: what is finished is kept, what failed is tried again.

    Raises BitsmithError as `load_study` and `run_graph` do, for a source that does not exist and for a recipe
    or a claim that cannot be, OutputError if `out` holds a study and `resume` is not given, UnsupportedError
    for `ray` without its extra.
    """
    started = time.monotonic()
    study = load_study(path)
    if out.exists() and not out.is_dir():
        raise OutputError("is a file, a study makes a folder", path=out)
    if (out / STATE).exists() and not resume:
        raise OutputError("holds a study already; pass --resume to go on with it", path=out)
    study, pins = fetch_models(study, _pins(out) if resume else {}, progress)
    peers = check_study(study)
    tasks = graph_of(study)
    chosen = _engine(engine, workers, memory_bytes, address)
    try:
        _make_folder(out)
        if pins:
            write_result(out / PINS, pins)
        keeps(out / STATE, "the same command with --resume goes on with it")
        store = ArtifactStore(cache or out / ARTIFACTS)
        with AuditLog(out / AUDIT) as audit:
            outcomes = run_graph(tasks, store, chosen, audit, progress, actions=ACTIONS, folder=out)
            judged = _judge(study, outcomes, audit)
    finally:
        chosen.stop()
    result = StudyResult(
        study,
        tuple(tasks),
        outcomes,
        judged,
        out / AUDIT,
        environment() | {"engine": engine},
        study_command(path, out),
        time.monotonic() - started,
        source_digests(study, store),
        peers,
    )
    write_result(out / REPORT, result.to_json())
    return result


def _pins(out: Path) -> dict[str, str]:
    path = out / PINS
    if not path.exists():
        return {}
    try:
        return TypeAdapter(dict[str, str]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise DamagedFileError("does not name commits", path=path) from error


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands: its tasks by name, the latest decisions, and whether a run works on it now."""

    tasks: Mapping[str, TaskState]
    decisions: tuple[Decision, ...]
    is_running: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """How many tasks are in each status."""
        found = [task.status for task in self.tasks.values()]
        return {status.value: found.count(status) for status in Status if status in found}

    def reasons(self) -> list[tuple[str, str, str]]:
        """Return name, status and reason of every task that runs, failed, is blocked or will be repeated."""
        quiet = (Status.COMPLETED, Status.PENDING)
        shown = [
            (name, task) for name, task in self.tasks.items() if task.status not in quiet or task.attempts
        ]
        return [
            (printable(name), task.status.value, printable(self._reason(task), 500))
            for name, task in shown
            if task.status is not Status.COMPLETED
        ]

    def _reason(self, task: TaskState) -> str:
        if task.status is Status.IN_PROGRESS and not self.is_running:
            return f"{task.reason}, but the run that did it has ended; go on with --resume"
        return task.reason

    def to_json(self) -> dict[str, Any]:
        """Return the status as plain values."""
        rows = [{"task": name, "status": status, "reason": why} for name, status, why in self.reasons()]
        return {
            "kind": "study status",
            "is_running": self.is_running,
            "counts": self.counts,
            "tasks": rows,
        }


def study_status(out: Path) -> StudyStatus:
    """Read where the study in `out` stands, also while it runs.

    Raises BitsmithError if `out` holds none, DamagedFileError if its state cannot be read.
    """
    running = _is_held(out / LOCK)
    found = load_state(out)
    return StudyStatus(found.tasks, tuple(found.decisions), running)


def _is_held(lock: Path) -> bool:
    """Whether a process holds a lock file; a reader's own lock is gone at once."""
    try:
        with lock.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"cannot be made: {printable(said)}", path=out) from error


def _engine(name: EngineName, workers: int | None, memory_bytes: int | None, address: str | None) -> Engine:
    if name == "ray":
        from bitsmith.run.engine_ray import RayEngine  # noqa: PLC0415 (an extra)

        if memory_bytes is not None:
            raise BitsmithError("a memory budget is for the local engine; on Ray, limit the tasks' memory")
        return RayEngine(address, workers)
    if address is not None:
        raise BitsmithError("an address is for the Ray engine: --engine ray")
    return LocalEngine(workers, memory_bytes)


def _judge(study: Study, outcomes: Mapping[str, Outcome], audit: AuditLog) -> dict[Row, tuple[Judged, ...]]:
    """Hold every row's measures against the study's gates, and keep what was found in the audit log."""
    if not study.gates:
        return {}
    found: dict[Row, tuple[Judged, ...]] = {}
    for row in study.rows:
        found[row] = tuple(_row_judged(study, outcomes, *row))
        for one in found[row]:
            decision = "reported" if one.passed else "reported as not passed"
            audit.judged(JUDGE, "/".join(part for part in row if part), one, decision)
    return found


def _row_judged(study: Study, outcomes: Mapping[str, Outcome], model: str, recipe: str) -> list[Judged]:
    judged = []
    for evaluation in study.evaluations:
        window = window_name(study, evaluation)
        outcome = outcomes[named("evaluate", model, recipe, window)]
        measures = {} if outcome.result is None else outcome.result["measures"]
        for name, bound in study.gates.items():
            figure = measures.get(name, {})
            evidence = window if figure else f"{window}: {outcome.reason}"
            judged.append(
                bound.gate(name).judge(
                    figure.get("value"), low=figure.get("low"), high=figure.get("high"), evidence=evidence
                )
            )
    return judged
