"""A graph of tiny tasks, also as a program: python graph_run.py FOLDER SECONDS."""

import sys
import time
from pathlib import Path

from bitsmith.errors import BitsmithError
from bitsmith.progress import silent
from bitsmith.run.audit import AuditLog
from bitsmith.run.engine import Attempt, Failure, LocalEngine
from bitsmith.run.graph import run_graph
from bitsmith.run.task import Task
from bitsmith.run.worker import failure_of, perform
from bitsmith.store.artifacts import ArtifactStore, sealed_result
from graph_actions import ACTIONS


class InlineEngine:
    """An engine that runs a task where it is, when it is waited for."""

    def __init__(self, kinds=()):
        self.started, self.stopped, self._kinds, self._attempts = [], False, list(kinds), []

    def has_room(self, task):
        if task.limits.memory_bytes == 0:
            raise BitsmithError("never")
        return not self._attempts

    def start(self, task, action, inputs, out):
        self.started.append((task.name, time.monotonic()))
        self._attempts.append((Attempt(task, out), action, inputs))
        return self._attempts[-1][0]

    def wait(self, timeout_seconds):
        if not self._attempts:
            time.sleep(timeout_seconds)
            return []
        attempt, action, inputs = self._attempts.pop()
        try:
            perform(action, attempt.task.params, inputs, attempt.out, silent)
            attempt.result = sealed_result(attempt.out)
        except Exception as error:
            told = failure_of(error)
            attempt.failure = Failure(self._kinds.pop(0) if self._kinds else told["kind"], told["message"])
        return [attempt]

    def stop(self):
        self.stopped = True


def run(folder, seconds, engine):
    """Run two tasks and one that joins them, and return how each ended."""

    def task(name, *needs):
        return Task(name, "write_bytes", {"value": name, "seconds": seconds}, needs)

    folder.mkdir(exist_ok=True)
    tasks, store = [task("a"), task("b"), task("join", "a", "b")], ArtifactStore(folder / "store")
    with AuditLog(folder / "audit.jsonl") as audit:
        outcomes = run_graph(tasks, store, engine, audit, actions=ACTIONS, folder=folder)
    return list(outcomes.values())


if __name__ == "__main__":
    run(Path(sys.argv[1]), float(sys.argv[2]), LocalEngine(2))
