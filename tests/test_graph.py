"""The task graph: order, what is kept, what fails, and what the disk says of it."""

import json
import resource
from itertools import pairwise

import pytest

from bitsmith.errors import BitsmithError, OutputError
from bitsmith.run.audit import AuditLog, read_audit
from bitsmith.run.graph import pause_seconds, run_graph
from bitsmith.run.task import Limits, Task
from bitsmith.run.task_state import DECISIONS, Decision, StateFile, Status, load_state
from bitsmith.run.worker import failure_of
from bitsmith.store.artifacts import ArtifactStore, locked_folder
from graph_actions import ACTIONS
from graph_run import InlineEngine


def _run(folder, tasks, engine=None, **options):
    engine = engine or InlineEngine()
    folder.mkdir(exist_ok=True)
    with AuditLog(folder / "audit.jsonl") as audit:
        options = {"actions": ACTIONS, "folder": folder, "backoff_seconds": 0.01, **options}
        return run_graph(tasks, ArtifactStore(folder / "store"), engine, audit, **options), engine


def _write(name, *needs, **params):
    return Task(name, "write_bytes", {"value": name, **params}, needs)


@pytest.fixture
def count(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPH_COUNT", str(tmp_path / "count"))
    return tmp_path / "count"


def test_tasks_run_after_what_they_need_and_get_its_files(tmp_path):
    tasks = [_write("c", "a", "b"), _write("b", "a"), _write("a")]
    told = []
    outcomes, engine = _run(tmp_path / "out", tasks, progress=lambda *facts: told.append(facts))
    assert [name for name, _ in engine.started] == ["a", "b", "c"]
    assert list(outcomes) == ["c", "b", "a"]
    assert all(outcome.status is Status.COMPLETED for outcome in outcomes.values())
    assert outcomes["c"].result == {"value": "c", "inputs": ["a", "b"]}
    seen = {"a": json.dumps(["a", {}]) * 100}
    assert (outcomes["b"].path / "data").read_text() == json.dumps(["b", seen]) * 100
    assert told[0] == ("tasks", 0, 3)
    assert told[-1] == ("tasks", 3, 3)
    assert engine.stopped


def test_nothing_is_computed_twice(tmp_path, count):
    tasks = [_write("a"), Task("twin", "write_bytes", {"value": "a"}), _write("b", "a")]
    first, _ = _run(tmp_path / "out", tasks)
    assert first["a"].path == first["twin"].path
    assert count.read_text().count("began") == 2
    again, engine = _run(tmp_path / "out", [*tasks, _write("c", "b")])
    assert [name for name, _ in engine.started] == ["c"]
    assert again["b"].attempts == 0
    assert again["b"].path == first["b"].path


def test_a_failure_is_tried_again_after_a_pause_that_doubles(tmp_path, count):
    task = Task("f", "fail_times", {"times": 2}, retries=2)
    outcomes, engine = _run(tmp_path / "out", [task], backoff_seconds=0.1)
    assert outcomes["f"].status is Status.COMPLETED
    assert outcomes["f"].attempts == 3
    assert [path.name for path in outcomes["f"].path.iterdir()] == ["data"]
    pauses = [later - earlier for (_, earlier), (_, later) in pairwise(engine.started)]
    assert pauses[0] >= 0.1
    assert pauses[1] >= 0.2
    assert [pause_seconds(n, 2.0) for n in (1, 2, 3, 9)] == [2.0, 4.0, 8.0, 60.0]


def test_a_second_failure_blocks_what_needs_it_and_nothing_else(tmp_path, count):
    fails = Task("f", "fail_times", {"times": 9, "refuse": True})
    tasks = [fails, _write("x", "f"), _write("y", "x"), _write("z")]
    outcomes, engine = _run(tmp_path / "out", tasks)
    assert {name: outcome.status.value for name, outcome in outcomes.items()} == {
        "f": "failed",
        "x": "blocked",
        "y": "blocked",
        "z": "completed",
    }
    assert [name for name, _ in engine.started].count("f") == 2
    assert outcomes["f"].reason == "error: model: is refused"
    assert outcomes["f"].result is outcomes["f"].path is None
    assert outcomes["x"].reason == "it needs f (failed)"
    assert outcomes["y"].reason == "it needs x (blocked)"
    decisions = [line.decision for line in read_audit(tmp_path / "out/audit.jsonl") if line.what == "task f"]
    assert decisions == [
        "pending → in_progress",
        "in_progress → pending",
        "pending → in_progress",
        "in_progress → failed",
    ]
    count.write_text("began None\n" * 9)
    again, _ = _run(tmp_path / "out", tasks)
    assert {outcome.status for outcome in again.values()} == {Status.COMPLETED}


def test_a_resource_kill_returns_to_pending_once_even_without_retries(tmp_path, count):
    task = Task("f", "fail_times", {"times": 9}, retries=0)
    outcomes, engine = _run(tmp_path / "killed", [task], InlineEngine(["memory", "error"]))
    assert outcomes["f"].status is Status.FAILED
    assert len(engine.started) == 2
    changes = [decision.after.value for decision in load_state(tmp_path / "killed").decisions]
    assert changes == ["in_progress", "killed", "pending", "in_progress", "failed"]
    outcomes, engine = _run(tmp_path / "error", [task], InlineEngine(["error"]))
    assert len(engine.started) == 1


def test_a_task_that_can_never_start_fails_and_says_so(tmp_path):
    outcomes, _ = _run(tmp_path / "out", [Task("a", "write_bytes", {"value": 1}, limits=Limits(None, 0))])
    assert outcomes["a"].status is Status.FAILED
    assert outcomes["a"].reason == "never"


def test_every_change_is_in_the_state_with_reason_and_evidence(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    earlier = Decision("then", "old", Status.PENDING, Status.BLOCKED, "why", {})
    StateFile(out, {}, [earlier] * 99).write()
    outcomes, _ = _run(out, [_write("t1"), _write("t2")])
    state = load_state(out)
    assert len(state.decisions) == DECISIONS == 100
    last = state.decisions[-1]
    assert (last.task, last.before, last.after) == ("t2", Status.IN_PROGRESS, Status.COMPLETED)
    assert last.reason == "attempt 1 succeeded"
    assert last.evidence["key"] == outcomes["t2"].key == state.tasks["t2"].key
    assert sum(decision == earlier for decision in state.decisions) == 96
    assert len(list(read_audit(out / "audit.jsonl"))) == 4
    (out / "state.json").write_text("{")
    assert load_state(out).tasks["t2"].status is Status.IN_PROGRESS
    (out / "state.json.bak").unlink()
    with pytest.raises(BitsmithError, match="is no state of a study"):
        load_state(out)
    again, engine = _run(out, [_write("t1")])
    assert again["t1"].status is Status.COMPLETED
    assert not engine.started


def test_a_damaged_artifact_is_made_again_and_that_is_said(tmp_path):
    first, _ = _run(tmp_path / "out", [_write("a")])
    whole = (first["a"].path / "data").read_bytes()
    (first["a"].path / "data").write_bytes(whole[:-1] + b"x")
    again, engine = _run(tmp_path / "out", [_write("a")])
    assert len(engine.started) == 1
    assert (again["a"].path / "data").read_bytes() == whole
    assert any("damaged" in line.decision for line in read_audit(tmp_path / "out/audit.jsonl"))


def test_a_changed_source_makes_its_tasks_anew_and_says_so(tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(b"one")
    tasks = [Task("a", "read_source", {"source": str(source)}, sources=("source",)), _write("b", "a")]
    first, _ = _run(tmp_path / "out", tasks)
    source.write_bytes(b"two")
    again, _ = _run(tmp_path / "out", tasks)
    assert (again["a"].path / "data").read_bytes() == b"two"
    assert (first["a"].path / "data").read_bytes() == b"one"
    assert first["b"].key != again["b"].key
    reasons = [decision.reason for decision in load_state(tmp_path / "out").decisions]
    assert "its artifact is gone, or is of other sources, parameters or another version" in reasons


def test_what_was_made_of_a_source_that_changed_meanwhile_is_not_kept(tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(b"one")

    class Meddling(InlineEngine):
        def wait(self, timeout_seconds):
            source.write_bytes(b"other")
            return super().wait(timeout_seconds)

    task = Task("a", "read_source", {"source": str(source)}, sources=("source",))
    outcomes, _ = _run(tmp_path / "out", [task], Meddling())
    assert outcomes["a"].status is Status.FAILED
    assert "what it reads changed since the study began" in outcomes["a"].reason
    assert not ArtifactStore(tmp_path / "out/store").keys()
    again, _ = _run(tmp_path / "out", [task])
    assert (again["a"].path / "data").read_bytes() == b"other"


def test_two_runs_on_one_folder_are_refused(tmp_path):
    out = tmp_path / "out"
    _run(out, [_write("a")])
    before = (out / "state.json").read_bytes()
    with (
        locked_folder(out, ".study.lock"),
        pytest.raises(OutputError, match="is being written by another run"),
    ):
        _run(out, [_write("b")])
    assert (out / "state.json").read_bytes() == before


def test_an_interrupt_is_noted_and_goes_on(tmp_path):
    class Interrupted(InlineEngine):
        def wait(self, timeout_seconds):
            if len(self.started) == 2:
                raise KeyboardInterrupt
            return super().wait(timeout_seconds)

    engine = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "out", [_write("a"), _write("b")], engine)
    assert engine.stopped
    tasks = load_state(tmp_path / "out").tasks
    assert (tasks["a"].status, tasks["b"].status) == (Status.COMPLETED, Status.KILLED)
    again, engine = _run(tmp_path / "out", [_write("a"), _write("b")])
    assert [name for name, _ in engine.started] == ["b"]
    assert again["b"].status is Status.COMPLETED


@pytest.fixture
def small_files():
    """A disk that has no room for files of more than 100 kB, as far as this process goes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_without_room_a_task_fails_in_one_line_and_leaves_nothing(tmp_path, small_files):
    tasks = [_write("large", times=50_000), _write("x", "large"), _write("small")]
    outcomes, _ = _run(tmp_path / "out", tasks)
    statuses = {name: outcome.status.value for name, outcome in outcomes.items()}
    assert statuses == {"large": "failed", "x": "blocked", "small": "completed"}
    assert "no room for what it writes: [Errno 27] File too large" in outcomes["large"].reason
    assert set(failure_of(OSError(28, "No space left on device"))) == {"kind", "message"}
    assert ArtifactStore(tmp_path / "out/store").keys() == [outcomes["small"].key]
    assert not list(tmp_path.glob("out/store/staging/*"))


def test_a_source_that_the_study_would_change_is_refused(tmp_path):
    tasks = [Task("a", "read_source", {"source": str(tmp_path)}, sources=("source",))]
    with pytest.raises(OutputError, match="a source of task 'a'; choose another output"):
        _run(tmp_path / "out", tasks)


def test_an_unknown_action_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(BitsmithError, match="task 'a': no action 'fly'; there are: eat_memory"):
        _run(tmp_path / "out", [Task("a", "fly")])
    assert not (tmp_path / "out/state.json").exists()
