"""The Ray engine on real clusters of this machine: the same bytes as locally, also where a node dies."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.run import engine_ray
from bitsmith.run.audit import AuditLog
from bitsmith.run.engine import Engine, LocalEngine
from bitsmith.run.engine_ray import RayEngine
from bitsmith.run.graph import Outcome, run_graph
from bitsmith.run.task import Limits, Task
from bitsmith.run.task_state import Status
from bitsmith.store.artifacts import ArtifactStore
from study_actions import ACTIONS

needs_ray = pytest.mark.skipif(not engine_ray.find_spec("ray"), reason="the extra ray is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


def test_without_the_extra_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ray, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"install bitsmith\[ray\]"):
        RayEngine()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes: the head runs no tasks until a second one is added."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        import ray

        with suppress(Exception):
            ray.shutdown()
        made.shutdown()


def graph(text: Path, seconds: float = 0.0, notes: Path | None = None) -> list[Task]:
    params = {"seconds": seconds} | ({} if notes is None else {"notes": str(notes)})
    first = [
        Task(f"first {n}", "blend", {"seed": n, "text": str(text), **params}, sources=("text",))
        for n in range(4)
    ]
    names = tuple(task.name for task in first)
    return [*first, Task("last", "blend", {"seed": 9}, names, Limits(seconds=200.0, memory_bytes=200 << 20))]


def run(folder: Path, tasks: list[Task], engine: Engine) -> tuple[ArtifactStore, dict[str, Outcome]]:
    folder.mkdir(exist_ok=True)
    store = ArtifactStore(folder / "artifacts")
    with AuditLog(folder / "audit.jsonl") as audit:
        return store, run_graph(tasks, store, engine, audit, actions=ACTIONS, folder=folder)


def digests(store: ArtifactStore, outcomes: dict[str, Outcome]) -> dict[str, str]:
    assert {outcome.status for outcome in outcomes.values()} == {Status.COMPLETED}, outcomes
    return {name: store.digest(outcome.key) for name, outcome in outcomes.items()}


@needs_ray
@pytest.mark.slow
def test_nodes_give_the_bytes_of_a_local_run_and_the_same_refusals(cluster: Any, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    text = tmp_path / "text.txt"
    text.write_text("What is read.")
    tasks = graph(text)
    expected = digests(*run(tmp_path / "local", tasks, LocalEngine(2)))
    refused = Task("refused", "refuse", retries=0)
    store, found = run(tmp_path / "ray", [*tasks, refused], RayEngine(cluster.address))
    failed = found.pop("refused")
    assert digests(store, found) == expected
    assert failed.status is Status.FAILED
    assert failed.reason == "error: model: tensor 'w': is not to be"
    assert digests(*run(tmp_path / "pushed", tasks, RayEngine(cluster.address, storage="push"))) == expected
    with pytest.raises(BitsmithError, match="no node has more than"):
        RayEngine(cluster.address).has_room(Task("big", "blend", limits=Limits(memory_bytes=1 << 60)))


@needs_ray
@pytest.mark.slow
def test_a_node_that_dies_loses_its_running_tasks_alone(cluster: Any, tmp_path: Path) -> None:
    text, notes = tmp_path / "text.txt", tmp_path / "notes"
    text.write_text("What is read.")
    expected = digests(*run(tmp_path / "local", graph(text), LocalEngine(2)))
    doomed = cluster.add_node(num_cpus=2)
    tasks = graph(text, 3.0, notes)
    engine = RayEngine(cluster.address)

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (notes.exists() and len(notes.read_text()) >= 6):
            time.sleep(0.1)
        cluster.remove_node(doomed, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    store, found = run(tmp_path / "ray", tasks, engine)
    killer.join()
    assert digests(store, found) == expected
    started = notes.read_text().split()
    assert sorted(set(started)) == ["0", "1", "2", "3"]
    assert 4 < len(started) <= 8, "some began twice, none that was finished"
