"""A program that runs a graph of tiny tasks: python graph_run.py FOLDER WORKERS SECONDS."""

import sys
from pathlib import Path

from bitsmith.run.audit import AuditLog
from bitsmith.run.engine import LocalEngine
from bitsmith.run.graph import run_graph
from bitsmith.run.task import Task
from bitsmith.store.artifacts import ArtifactStore
from graph_actions import ACTIONS


def tasks(seconds):
    """Return two tasks and one that joins them."""

    def task(name, *needs):
        return Task(name, "write_bytes", {"value": name, "seconds": seconds}, needs)

    return [task("a"), task("b"), task("join", "a", "b")]


def main(folder, workers, seconds):
    """Run the graph and print how each task ended."""
    folder.mkdir(exist_ok=True)
    with AuditLog(folder / "audit.jsonl") as audit:
        outcomes = run_graph(
            tasks(seconds),
            ArtifactStore(folder / "store"),
            LocalEngine(workers),
            audit,
            actions=ACTIONS,
            folder=folder,
        )
    for outcome in outcomes.values():
        sys.stdout.write(f"{outcome.name} {outcome.status.value} {outcome.attempts}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
