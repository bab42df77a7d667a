"""The Ray engine on real clusters of this machine: the same bytes as locally, also where a node dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
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
from bitsmith.run.study import run_study, study_status
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


def graph(text: Path, seconds: float = 0.0, notes: Path | None = None, count: int = 4) -> list[Task]:
    params = {"seconds": seconds} | ({} if notes is None else {"notes": str(notes)})
    first = [
        Task(f"first {n}", "blend", {"seed": n, "text": str(text), **params}, sources=("text",))
        for n in range(count)
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
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("nonsense", "expected host:port"),
        ("127.0.0.1:99999", "expected host:port"),
        ("ray://127.0.0.1:10001", "expected host:port, as `ray start --head` says it"),
        ("auto", "Could not find any running Ray instance"),
    ],
)
def test_an_address_without_a_cluster_is_one_line_at_once(address: str, said: str) -> None:
    with pytest.raises(BitsmithError, match=said) as refused:
        RayEngine(address)
    assert str(refused.value).startswith(f"no Ray cluster at {address}: ")


@needs_ray
@pytest.mark.timeout(600)
def test_a_node_that_dies_loses_its_running_tasks_alone(cluster: Any, tmp_path: Path) -> None:
    text, notes = tmp_path / "text.txt", tmp_path / "notes"
    text.write_text("What is read.")
    expected = digests(*run(tmp_path / "local", graph(text, count=3), LocalEngine(2)))
    doomed = cluster.add_node(num_cpus=1)
    engine = RayEngine(cluster.address)

    def kill() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (notes.exists() and len(notes.read_text()) >= 4):
            time.sleep(0.05)
        cluster.remove_node(doomed, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    store, found = run(tmp_path / "ray", graph(text, 1.0, notes, count=3), engine)
    killer.join()
    assert digests(store, found) == expected
    started = notes.read_text().split()
    assert sorted(set(started)) == ["0", "1", "2"]
    assert 3 < len(started) <= 5, "what ran on it began again, and nothing that was finished"


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("storage", ["auto", "shared", "push"])
def test_nodes_give_the_bytes_of_a_local_run_and_the_same_failures(
    cluster: Any, tmp_path: Path, storage: Any
) -> None:
    cluster.add_node(num_cpus=1)
    text = tmp_path / "text.txt"
    text.write_text("What is read.")
    tasks = [*graph(text), Task("threads", "threads")]
    ends = [
        Task("refused", "refuse", retries=0),
        Task("slow", "blend", {"seed": 1, "seconds": 60}, limits=Limits(seconds=1.0), retries=0),
        Task("greedy", "hog", limits=Limits(memory_bytes=200 << 20), retries=0),
        Task("crashed", "blend", retries=0),
    ]
    local, of_local = run(tmp_path / "local", [*tasks, *ends], LocalEngine(2))
    store, found = run(tmp_path / "ray", [*tasks, *ends], RayEngine(cluster.address, storage=storage))
    for task in ends:
        ended, expected = found.pop(task.name), of_local.pop(task.name)
        assert ended.status is expected.status is Status.FAILED
        assert ended.evidence["kind"] == expected.evidence["kind"]
        if task.name != "greedy":  # what it used when it was looked at
            assert ended.reason == expected.reason
    assert digests(store, found) == digests(local, of_local)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_without_the_files_is_told_apart(cluster: Any, tmp_path: Path) -> None:
    """A marker that is gone stands for a node that has another disk."""
    text = tmp_path / "text.txt"
    text.write_text("What is read.")
    task = graph(text)[0]
    expected = digests(*run(tmp_path / "local", [task], LocalEngine(1)))

    class Elsewhere(RayEngine):
        def _mark(self, folder: Path) -> tuple[str, str]:
            return str(folder / "not here"), "said"

    _, found = run(tmp_path / "shared", [task], Elsewhere(cluster.address, storage="shared"))
    assert "does not see" in found[task.name].reason
    assert digests(*run(tmp_path / "auto", [task], Elsewhere(cluster.address))) == expected
    with pytest.raises(BitsmithError, match="no node has more than"):
        RayEngine(cluster.address).has_room(Task("big", "blend", limits=Limits(memory_bytes=1 << 60)))


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_study_on_a_cluster_that_loses_a_node_gives_the_bytes_of_a_local_run(
    cluster: Any, tiny_qwen3: Path, tmp_path: Path
) -> None:
    (tmp_path / "held.txt").write_text("def name(self, value):\n    return self.value + value\n" * 40)
    path = tmp_path / "study.yaml"
    path.write_text(
        f"version: 1\nmodels: {{tiny: {tiny_qwen3}}}\ntexts: {{held: held.txt}}\n"
        "recipes: {q4: {type: Q4_K_M}, i4: {type: i4}, int4: {type: INT4}}\n"
        "evaluations: [{text: held, ctx: 32, chunks: 2}]\ngenerate: {prompts: [import os], tokens: 3}\n"
    )
    local = run_study(path, tmp_path / "local", workers=2)
    doomed = cluster.add_node(num_cpus=1)

    def kill() -> None:
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline:
            with suppress(BitsmithError):
                counts = study_status(tmp_path / "ray").counts
                if counts.get("completed", 0) >= 3 and counts.get("in_progress", 0) == 2:
                    break
            time.sleep(0.1)
        cluster.remove_node(doomed, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    found = run_study(path, tmp_path / "ray", engine="ray", address=cluster.address)
    killer.join()
    assert found.is_whole
    stores = [ArtifactStore(tmp_path / name / "artifacts") for name in ("local", "ray")]
    assert digests(stores[1], dict(found.outcomes)) == digests(stores[0], dict(local.outcomes))


CHILD = """
import sys
from pathlib import Path
from bitsmith.run.engine_ray import RayEngine
from test_engine_ray import graph, run
run(Path(sys.argv[1]), graph(Path(sys.argv[2]), 60.0, Path(sys.argv[3])), RayEngine())
"""


def marked(mark: str) -> list[str]:
    """Return the processes that inherited a mark from the one that was started with it."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    text, notes, mark = tmp_path / "text.txt", tmp_path / "notes", f"BITSMITH_TEST_MARK={uuid.uuid4().hex}"
    text.write_text("What is read.")
    paths = os.pathsep.join([str(Path(__file__).parent), *(path for path in sys.path if path)])
    environment = {**os.environ, "PYTHONPATH": paths, **dict([mark.split("=")])}
    command = [sys.executable, "-c", CHILD, tmp_path / "ray", text, notes]
    child = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not notes.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(marked(mark)) > 3
    os.killpg(child.pid, number) if number is signal.SIGINT else child.kill()
    child.communicate(timeout=60)
    deadline = time.monotonic() + 200  # Ray's agents look for their parent now and then
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert marked(mark) == []
