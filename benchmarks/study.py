"""Speed of a study with two local workers against one, as JSON.

    python benchmarks/study.py [--model MODEL] [--tasks 8] [--workers 2] [--repeats 3] [--out FILE]

The study is embarrassingly parallel: `--tasks` compressions that need nothing of each other, each
to another type. Every run starts with an empty store; runs with one and with more workers take turns, each
task with one thread in all of them, and the ratio is that of the medians. The artifacts of all runs are
compared: the same keys and the same digests. Read it beside `cores` and `load`: a busy machine gives less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bitsmith.lab.models import DEMO_MODEL
from bitsmith.run.actions import ACTIONS
from bitsmith.run.audit import AuditLog
from bitsmith.run.engine import LocalEngine
from bitsmith.run.graph import run_graph
from bitsmith.run.task import Task
from bitsmith.run.task_state import Status
from bitsmith.store.artifacts import ArtifactStore

TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "IQ4_XS", "Q8_0", "Q4_K_S", "Q2_K")
THREADS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Json = dict[str, Any]


def tasks(model: Path, number: int) -> list[Task]:
    """Return compressions that need nothing of each other."""
    return [
        Task(kind, "compress", {"model": str(model), "type_name": kind}, sources=("model",))
        for kind in TYPES[:number]
    ]


def run(model: Path, number: int, workers: int) -> tuple[float, dict[str, str]]:
    """Return the seconds of one study from an empty store, and its artifacts' digests by key."""
    with tempfile.TemporaryDirectory() as name, AuditLog(Path(name) / "audit.jsonl") as audit:
        folder = Path(name)
        store = ArtifactStore(folder / "store")
        began = time.perf_counter()
        engine = LocalEngine(workers)
        ended = run_graph(tasks(model, number), store, engine, audit, actions=ACTIONS, folder=folder)
        seconds = time.perf_counter() - began
        for outcome in ended.values():
            if outcome.status is not Status.COMPLETED:
                sys.exit(f"task {outcome.name} is {outcome.status.value}: {outcome.reason}")
        return seconds, {outcome.key: store.digest(outcome.key) for outcome in ended.values()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--tasks", type=int, default=len(TYPES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.update(dict.fromkeys(THREADS, "1"))
    load = os.getloadavg()[0]
    seconds: dict[int, list[float]] = {1: [], args.workers: []}
    digests = []
    for _ in range(args.repeats):
        for workers, taken in seconds.items():
            found, made = run(args.model, args.tasks, workers)
            taken.append(round(found, 3))
            digests.append(made)
    medians = {workers: statistics.median(taken) for workers, taken in seconds.items()}
    result: Json = {
        "model": args.model.name,
        "tasks": args.tasks,
        "cores": os.cpu_count(),
        "load": load,
        "seconds": seconds,
        "median_seconds": medians,
        "ratio": round(medians[1] / medians[args.workers], 3),
        "same_artifacts": all(made == digests[0] for made in digests),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
