"""Speed of a study with two local workers against one.

    python benchmarks/study.py [--model MODEL] [--tasks 8] [--workers 2] [--repeats 5] [--out FILE]

The study is embarrassingly parallel: `--tasks` compressions that need nothing of each other, each
to another type. Every run starts with an empty store; runs with one and with more workers take turns, each
task with one thread in all of them. The ratio is that of the sums of wall-clock seconds, its 95 % interval by
paired bootstrap over the repeats. The artifacts of all runs are compared: the same keys and the same digests.
Read it beside the cores and what others took of them: where others compute, more workers also take more of
the machine, and the ratio may be too low or too high.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from measuring import Row, Spread, Turns, arguments, report

from bitsmith.lab.models import DEMO_MODEL
from bitsmith.numerics.resampling import ratio_of_sums
from bitsmith.run.actions import ACTIONS
from bitsmith.run.audit import AuditLog
from bitsmith.run.engine import LocalEngine
from bitsmith.run.graph import run_graph
from bitsmith.run.task import Task
from bitsmith.run.task_state import Status
from bitsmith.store.artifacts import ArtifactStore

TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "IQ4_XS", "Q8_0", "Q4_K_S", "Q2_K")
THREADS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")


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
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--tasks", type=int, default=len(TYPES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    os.environ.update(dict.fromkeys(THREADS, "1"))
    seconds: dict[int, list[float]] = {1: [], args.workers: []}
    digests = []
    for repeat in range(args.repeats):
        for workers in list(seconds)[:: 1 if repeat % 2 == 0 else -1]:
            found, made = run(args.model, args.tasks, workers)
            seconds[workers].append(found)
            digests.append(made)
    many, one = f"{args.workers} workers", "1 worker"
    turns = Turns({many: seconds[args.workers], one: seconds[1]})
    ratio = ratio_of_sums(seconds[1], seconds[args.workers])
    rates = {name: Spread.of(args.tasks / each for each in all_) for name, all_ in turns.rounds.items()}
    facts = {
        "same_artifacts": all(made == digests[0] for made in digests),
        "ratio_of_sums": None if ratio is None else asdict(ratio),
    }
    row = Row(
        f"{args.tasks} independent compressions of {args.model.name}",
        "tasks/s",
        "higher",
        rates,
        {one: turns.times_faster(one, many)},
        facts=facts,
    )
    protocol = {
        "statement": "A study of independent compressions from an empty store, each task with one thread; "
        "runs with one and with more workers take turns.",
        "tasks": args.tasks,
        "repeats": args.repeats,
        "same artifacts in all runs": facts["same_artifacts"],
    }
    report("study", protocol, [row], out=args.out)


if __name__ == "__main__":
    main()
