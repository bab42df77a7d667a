"""Runs tasks in the order of their needs: nothing twice, failures again after a while, then without them."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from bitsmith.errors import BitsmithError, OutputError, printable
from bitsmith.log import event
from bitsmith.progress import Progress, silent
from bitsmith.run.audit import AuditLog
from bitsmith.run.engine import RESOURCE_KINDS, Attempt, Engine, Failure
from bitsmith.run.task import Action, Task, in_order, task_key
from bitsmith.run.task_state import StateFile, Status, TaskState, load_state
from bitsmith.store.artifacts import ArtifactStore, locked_folder, remove_folder
from bitsmith.store.digests import SourceDigests

LOCK, SOURCES = ".study.lock", "sources.json"
LONGEST_PAUSE_SECONDS = 60.0
WAIT_SECONDS = 1.0
_AGAIN = {
    Status.IN_PROGRESS: "the run that did it ended before it did",
    Status.KILLED: "the run that did it was interrupted",
    Status.FAILED: "it failed in an earlier run; this one tries again",
    Status.BLOCKED: "what it needs failed in an earlier run; this one tries again",
}
ENDS = frozenset({Status.COMPLETED, Status.FAILED, Status.BLOCKED})


@dataclass(frozen=True)
class Outcome:
    """How a task ended: COMPLETED with `result` and `path` (its folder of files), else with neither.

    `attempts` is 0 for what was there already; `seconds` and `peak_bytes` are those of the attempt that made
    the artifact, whenever that was, or of the last one.
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
    """Run all tasks that can be run and return how each ended, in the order given.

    An artifact that the store has is never made again, whoever made it. The n-th failure of a task is
    followed by a pause of `backoff_seconds · 2^(n−1)` (at most a minute) and another attempt, `Task.retries`
    times, once after a resource kill in any case; then the task is FAILED and those that need it BLOCKED.
    `folder` holds `state.json`, written at every change, and the lock. On an interrupt (in the main thread
    also SIGTERM and SIGHUP, which then raise SystemExit) what runs is killed and the interrupt goes on; the
    next call goes on with the rest.

    Raises BitsmithError for a circle, an unknown need, action or source and for a source that holds `folder`
    or the store, OutputError if another run holds the folder or the store, or either cannot be written.
    """
    ordered = in_order(tasks)
    for task in ordered:
        if task.action not in actions:
            known = ", ".join(sorted(actions))
            raise BitsmithError(
                f"task {printable(task.name)!r}: no action {printable(task.action)!r}; there are: {known}"
            )
    _refuse_own_sources(ordered, (folder, store.root))
    folder.mkdir(parents=True, exist_ok=True)
    ending = _Ending()
    with ending.caught(), locked_folder(folder, LOCK), store.writing():
        digests = SourceDigests(store.root / SOURCES)
        keys = _keys_of(ordered, digests, progress)
        run = _Run(ordered, keys, digests, store, engine, audit, progress, actions, folder, backoff_seconds)
        try:
            run.go(ending)
        finally:
            engine.stop()
            with suppress(OutputError):  # where it cannot be noted, that is what ended the run
                run.leave()
        return {task.name: run.outcome(task) for task in tasks}


def _keys_of(ordered: Sequence[Task], digests: SourceDigests, progress: Progress) -> dict[str, str]:
    keys: dict[str, str] = {}
    try:
        for done, task in enumerate(ordered):
            if task.sources:
                progress("sources", done, len(ordered))
            keys[task.name] = _key(task, keys, digests)
    finally:
        digests.save()
    return keys


def _refuse_own_sources(tasks: Sequence[Task], places: Sequence[Path]) -> None:
    """Refuse a source that what the run writes would change."""
    for task in tasks:
        for source in (Path(task.params[name]) for name in task.sources):
            for place in places:
                if place.resolve().is_relative_to(source.resolve()):
                    said = f"lies in {printable(str(source))}, a source of task {printable(task.name)!r}"
                    raise OutputError(f"{said}; choose another output", path=place)


class _Ending:
    """Ends a run at a signal as an exception does: between two of its steps, or at once at a second signal.

    An exception raised anywhere, while a process is being started or an object deleted, may be lost.
    """

    def __init__(self) -> None:
        self._is_stepping = False
        self._number = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch SIGINT, SIGTERM and SIGHUP within the block, where nobody else does."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if current_thread() is main_thread() else ()
        usual = {number: signal.getsignal(number) for number in numbers}
        ours = [number for number in numbers if usual[number] in (signal.SIG_DFL, signal.default_int_handler)]
        try:
            for number in ours:
                signal.signal(number, self._note)
            yield
        finally:
            for number in ours:
                signal.signal(number, usual[number])

    def step(self) -> None:
        """Begin a step: raise KeyboardInterrupt or SystemExit for a signal that came; the next is put off."""
        self._is_stepping = True
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._number:
            raise SystemExit(128 + self._number)

    def _note(self, number: int, _: FrameType | None) -> None:
        again, self._number = bool(self._number), number
        if again or not self._is_stepping:
            self.step()


def _key(task: Task, keys: Mapping[str, str], digests: SourceDigests) -> str:
    return task_key(task, keys, {name: digests.of(Path(task.params[name])) for name in task.sources})


class _Run:
    """One run of a graph: what is pending, what runs, and when what failed may be tried again."""

    def __init__(
        self,
        tasks: Sequence[Task],
        keys: Mapping[str, str],
        digests: SourceDigests,
        store: ArtifactStore,
        engine: Engine,
        audit: AuditLog,
        progress: Progress,
        actions: Mapping[str, Action],
        folder: Path,
        backoff_seconds: float,
    ) -> None:
        self._tasks = {task.name: task for task in tasks}
        self._keys, self._digests = keys, digests
        self._store, self._engine, self._audit = store, engine, audit
        self._progress, self._actions, self._backoff_seconds = progress, actions, backoff_seconds
        self._running: dict[str, Attempt] = {}
        self._not_before: dict[str, float] = {}
        self._states = _earlier(folder, self._tasks, keys)
        self._begin_again()

    def go(self, ending: _Ending) -> None:
        """Run until every task has ended."""
        self._report()
        while True:
            ending.step()
            for task in self._tasks.values():
                if self._is_ready(task):
                    self._take_or_start(task)
            if all(state.status in ENDS for state in self._states.tasks.values()):
                return
            for attempt in self._engine.wait(self._patience_seconds()):
                del self._running[attempt.task.name]
                self._settle(attempt)
            for name, attempt in self._running.items():
                if attempt.latest is not None:
                    stage, done, total = attempt.latest
                    self._progress(f"{printable(name)}: {stage}", done, total)

    def leave(self) -> None:
        """Note what an interrupt killed."""
        for name in self._running:
            self._change(name, Status.KILLED, "the study was interrupted", {})

    def outcome(self, task: Task) -> Outcome:
        """Return how a task ended."""
        state, key = self._states.tasks[task.name], self._keys[task.name]
        done = state.status is Status.COMPLETED
        return Outcome(
            task.name,
            state.status,
            key,
            self._store.result(key) if done else None,
            self._store.path(key) if done else None,
            state.attempts,
            state.seconds,
            state.peak_bytes,
            state.reason,
            state.evidence,
        )

    def _begin_again(self) -> None:
        """Make every task pending, and say so of those that an earlier run left in another state."""
        for name, state in self._states.tasks.items():
            reason = _AGAIN.get(state.status)
            if state.status is Status.COMPLETED and not self._store.has(self._keys[name]):
                reason = "its artifact is gone, or is of other sources, parameters or another version"
            if reason is not None:
                self._change(name, Status.PENDING, reason, {"key": self._keys[name]})
            state.status, state.attempts = Status.PENDING, 0
            state.seconds, state.peak_bytes = 0.0, 0
        self._states.write()

    def _is_ready(self, task: Task) -> bool:
        """Whether a task may start, what it needs being there; one whose needs failed is blocked here."""
        if self._states.tasks[task.name].status is not Status.PENDING:
            return False
        needs = {need: self._states.tasks[need].status for need in task.needs}
        lost = [need for need, status in needs.items() if status in (Status.FAILED, Status.BLOCKED)]
        if lost:
            said = ", ".join(f"{printable(need)} ({needs[need].value})" for need in lost)
            self._change(task.name, Status.BLOCKED, f"it needs {said}", {"needs": lost})
            return False
        waits = self._not_before.get(task.name, 0.0) > time.monotonic()
        twin_runs = any(self._keys[name] == self._keys[task.name] for name in self._running)
        return not waits and not twin_runs and all(status is Status.COMPLETED for status in needs.values())

    def _take_or_start(self, task: Task) -> None:
        if self._is_in_store(task.name):
            self._complete(task.name, "its artifact was there", 0)
            return
        try:
            has_room = self._engine.has_room(task)
        except BitsmithError as error:  # there never will be
            self._change(task.name, Status.FAILED, str(error), {"kind": "error"})
            return
        if has_room:
            self._start(task)

    def _start(self, task: Task) -> None:
        state, key = self._states.tasks[task.name], self._keys[task.name]
        state.attempts += 1
        try:
            inputs = {need: self._store.path(self._keys[need]) for need in task.needs}
            staged = self._store.stage(key, state.attempts)
            attempt = self._engine.start(task, self._actions[task.action], inputs, staged)
        except BitsmithError as error:
            self._failed(task, state, Failure("error", str(error)))
            return
        self._running[task.name] = attempt
        self._change(task.name, Status.IN_PROGRESS, f"attempt {state.attempts}", {"key": key})

    def _is_in_store(self, name: str) -> bool:
        """Whether a task's artifact is there and whole; a damaged one is thrown away, and said to be."""
        key = self._keys[name]
        if not self._store.has(key):
            return False
        try:
            self._store.verify(key)
        except BitsmithError as error:
            self._audit.add("graph", f"task {name}", evidence=str(error), decision="made again: damaged")
            self._store.discard(key)
            return False
        return True

    def _settle(self, attempt: Attempt) -> None:
        task, state = attempt.task, self._states.tasks[attempt.task.name]
        state.seconds, state.peak_bytes = attempt.seconds, attempt.peak_bytes
        failure = attempt.failure or self._kept(attempt)
        if failure is None:
            self._complete(task.name, f"attempt {state.attempts} succeeded", state.attempts)
            return
        with suppress(OutputError):  # what it left goes at the end of the run at the latest
            remove_folder(attempt.out)
        self._failed(task, state, failure)

    def _kept(self, attempt: Attempt) -> Failure | None:
        """Put what an attempt made into the store; return why that cannot be, None if it is there."""
        task, key = attempt.task, self._keys[attempt.task.name]
        try:
            if _key(task, self._keys, self._digests) != key:
                return Failure("error", "what it reads changed since the study began; run the study again")
            cost = {"seconds": attempt.seconds, "peak_bytes": attempt.peak_bytes}
            self._store.put(key, attempt.out, cost)
        except BitsmithError as error:
            return Failure("error", str(error))
        return None

    def _complete(self, name: str, reason: str, attempts: int) -> None:
        state, key = self._states.tasks[name], self._keys[name]
        cost = self._store.cost(key)
        state.attempts = attempts
        state.seconds = float(cost.get("seconds", 0.0))
        state.peak_bytes = int(cost.get("peak_bytes", 0))
        evidence = {"key": key, "manifest_sha256": self._store.digest(key)}
        self._change(name, Status.COMPLETED, reason, evidence)
        self._report()

    def _failed(self, task: Task, state: TaskState, failure: Failure) -> None:
        """Decide what follows a failed attempt: a pause and another one, or the end."""
        resource = failure.kind in RESOURCE_KINDS
        allowed = max(state.attempts, 1 + task.retries, 2 if resource else 1)
        reason = f"{failure.kind}: {failure.message}"
        evidence = {
            "kind": failure.kind,
            "attempt": state.attempts,
            "allowed": allowed,
            "seconds": state.seconds,
            **failure.evidence,
        }
        if state.attempts >= allowed:
            self._change(task.name, Status.FAILED, reason, evidence)
            self._report()
            return
        if resource:
            self._change(task.name, Status.KILLED, reason, evidence)
        pause = pause_seconds(state.attempts, self._backoff_seconds)
        self._not_before[task.name] = time.monotonic() + pause
        again = {**evidence, "pause_seconds": pause}
        self._change(task.name, Status.PENDING, f"again in {pause:g} s, after {reason}", again)

    def _patience_seconds(self) -> float:
        """Return how long to wait for an attempt's end before looking at the pending tasks again."""
        now = time.monotonic()
        pauses = [
            when - now
            for name, when in self._not_before.items()
            if self._states.tasks[name].status is Status.PENDING and when > now
        ]
        return min([WAIT_SECONDS, *pauses])

    def _change(self, name: str, status: Status, reason: str, evidence: Mapping[str, Any]) -> None:
        event("task", task=name, status=status.value, reason=reason)
        decision = self._states.change(name, status, reason, evidence)
        self._audit.add(
            "graph",
            f"task {name}",
            value=evidence.get("attempt"),
            limit=evidence.get("allowed"),
            evidence={"reason": reason, **evidence},
            decision=f"{decision.before.value} → {status.value}",
        )

    def _report(self) -> None:
        ended = sum(state.status in ENDS for state in self._states.tasks.values())
        self._progress("tasks", ended, len(self._tasks))


def _earlier(folder: Path, tasks: Mapping[str, Task], keys: Mapping[str, str]) -> StateFile:
    """Return the tasks in the states that an earlier run left them in, PENDING where there is none."""
    before = StateFile(folder, {}, [])
    with suppress(BitsmithError):  # none, or one that cannot be read: the store knows what is finished
        before = load_state(folder)
    states = {}
    for name, task in tasks.items():
        states[name] = TaskState(keys[name], task.action, list(task.needs))
        if name in before.tasks:
            states[name].status = before.tasks[name].status
    return StateFile(folder, states, before.decisions)


def pause_seconds(failures: int, first_seconds: float) -> float:
    """Return the pause after that many failures, `first_seconds · 2^(failures−1)`, at most a minute."""
    return float(min(LONGEST_PAUSE_SECONDS, first_seconds * 2.0 ** (failures - 1)))
