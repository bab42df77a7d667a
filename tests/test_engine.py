"""The local engine: processes that end as told, beyond their limits, when stuck, and with their parent."""

import os
import signal
import subprocess
import sys

import pytest

from bitsmith.errors import BitsmithError
from bitsmith.run.engine import THREADS, LocalEngine, Stops, thread_settings
from bitsmith.run.machine import usage_of_sessions
from bitsmith.run.task import Limits, Task
from bitsmith.store.artifacts import FILES
from graph_actions import ACTIONS
from graph_processes import is_gone, wait_for

MIB = 1 << 20


def _all(engine, tasks, folder):
    """Start all tasks and return their attempts by name when all have ended."""
    for task in tasks:
        assert engine.has_room(task)
        engine.start(task, ACTIONS[task.action], {}, folder / task.name)
    ended = {}
    while len(ended) < len(tasks):
        ended |= {attempt.task.name: attempt for attempt in engine.wait(60)}
    return ended


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """One engine and all the ways for its tasks to end, side by side."""
    folder = tmp_path_factory.mktemp("engine")
    engine = LocalEngine(10, 4096 * MIB)
    tasks = [
        Task("good", "write_bytes", {"value": "x", "seconds": 0}),
        Task("error", "fail_times", {"times": 9}),
        Task("vanished", "vanish"),
        Task("killed", "kill_itself", {"signal": signal.SIGSEGV}),
        Task("memory", "eat_memory", {"bytes": 400 * MIB, "seconds": 300}, limits=Limits(None, 250 * MIB)),
        Task("time", "tick", {"seconds": 300, "sign": "progress"}, limits=Limits(3.0, None)),
        Task("stuck", "hang", {"pids": str(folder / "pids")}, limits=Limits(stuck_seconds=4.0)),
    ]
    result = _all(engine, tasks, folder)
    engine.stop()
    return folder, result


def test_a_task_leaves_its_files_and_its_result(ended):
    _, attempts = ended
    good = attempts["good"]
    assert good.failure is None
    assert good.result == {"inputs": [], "value": "x"}
    assert (good.out / FILES / "data").is_file()
    assert good.latest == ("waiting", 0, 1)
    assert good.seconds > 0


def test_failures_say_why_with_evidence(ended):
    _, attempts = ended
    failures = {name: attempt.failure for name, attempt in attempts.items() if attempt.failure}
    assert {name: failure.kind for name, failure in failures.items()} == {
        "error": "error",
        "vanished": "error",
        "killed": "killed",
        "memory": "memory",
        "time": "time",
        "stuck": "stuck",
    }
    assert failures["error"].message == "ZeroDivisionError: by nothing"
    assert "graph_actions.py" in failures["error"].evidence["trace"]
    assert failures["error"].evidence["log"] == "printed before it failed\n"
    assert failures["vanished"].evidence["exit_code"] == 7
    assert failures["killed"].message == "its process was killed by SIGSEGV"
    assert failures["killed"].evidence["signal"] == signal.SIGSEGV
    assert "Segmentation fault" in failures["killed"].evidence["log"]
    assert failures["memory"].evidence["used_bytes"] > failures["memory"].evidence["limit_bytes"]
    assert failures["time"].evidence["seconds"] > 3.0
    assert failures["stuck"].evidence["still_seconds"] >= 4.0
    assert all(attempt.result is None for name, attempt in attempts.items() if name != "good")


def test_what_a_killed_task_had_started_is_killed_too(ended):
    folder, _ = ended
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert len(pids) == 2
    assert all(is_gone(pid) for pid in pids)


def test_a_killed_parent_takes_its_workers_and_their_children_along(tmp_path):
    program = (
        "import sys; from pathlib import Path; from graph_actions import ACTIONS\n"
        "from bitsmith.run.engine import LocalEngine; from bitsmith.run.task import Task\n"
        "engine, out = LocalEngine(), Path(sys.argv[1])\n"
        "engine.start(Task('x', 'hang', {'pids': str(out / 'pids')}), ACTIONS['hang'], {}, out / 'x')\n"
        "engine.wait(600)\n"
    )
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=paths)
    wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().count(" "))
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert not any(map(is_gone, pids))
    parent.kill()
    parent.wait()
    wait_for(lambda: all(map(is_gone, pids)))


def test_tasks_wait_for_room(tmp_path):
    engine = LocalEngine(2, 1000 * MIB)
    large, small = (Task(str(size), "hang", limits=Limits(None, size * MIB)) for size in (700, 400))
    assert engine.has_room(large)
    whole = Task("more than there is", "hang", limits=Limits(None, 2000 * MIB))
    assert engine.has_room(whole)
    engine.start(large, ACTIONS["hang"], {}, tmp_path / "a")
    assert not engine.has_room(small)
    assert not engine.has_room(whole)
    assert engine.has_room(Task("undeclared", "hang"))
    engine.stop()
    with pytest.raises(BitsmithError, match="at least one worker"):
        LocalEngine(0)


def test_an_action_that_no_process_finds_is_refused(tmp_path):
    with pytest.raises(BitsmithError, match="no function that a process finds"):
        LocalEngine().start(Task("x", "x"), lambda *_: {}, {}, tmp_path / "x")


def test_the_use_of_a_session_is_that_of_all_its_processes():
    usage = usage_of_sessions([os.getsid(0), 1 << 30])
    assert usage[os.getsid(0)].memory_bytes > MIB
    assert usage[os.getsid(0)].cpu_seconds > 0.1
    assert usage[1 << 30] == (0, 0.0)


def test_a_task_computes_with_as_many_threads_whatever_runs_beside_it(monkeypatch):
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    assert thread_settings() == dict.fromkeys(THREADS, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    assert thread_settings() == {**dict.fromkeys(THREADS, "3"), "NUMBA_NUM_THREADS": "2"}


@pytest.mark.slow
def test_threads_are_those_that_the_engine_was_given(tmp_path):
    threads = dict.fromkeys(THREADS, "5")
    for workers in (1, 4):
        folder = tmp_path / str(workers)
        folder.mkdir()
        task = Task("t", "tell_threads", {"names": THREADS})
        assert _all(LocalEngine(workers, threads=threads), [task], folder)["t"].result == threads


@pytest.mark.slow
def test_signs_of_life_keep_a_task_from_being_stuck(tmp_path):
    engine = LocalEngine(3, 4096 * MIB, Stops(stuck_seconds=8.0))
    tasks = [Task(sign, "tick", {"seconds": 12, "sign": sign}) for sign in ("progress", "output", "work")]
    attempts = _all(engine, tasks, tmp_path)
    assert {name: attempt.failure for name, attempt in attempts.items()} == dict.fromkeys(attempts)


@pytest.mark.slow
def test_the_greediest_goes_when_all_together_take_too_much(tmp_path):
    engine = LocalEngine(2, 1500 * MIB)
    tasks = [
        Task("declared", "tick", {"seconds": 1, "sign": "progress"}, limits=Limits(None, 1000 * MIB)),
        Task("greedy", "eat_memory", {"bytes": 1800 * MIB, "seconds": 60}),
    ]
    attempts = _all(engine, tasks, tmp_path)
    assert attempts["declared"].failure is None
    assert attempts["greedy"].failure.kind == "memory"
    assert "the running tasks use" in attempts["greedy"].failure.message
    small = Task("small", "tick", {"seconds": 60, "sign": "progress"})
    assert engine.has_room(small)
    engine.start(small, ACTIONS["tick"], {}, tmp_path / "small")
    assert not engine.has_room(tasks[1])  # alone the next time
    engine.stop()
