"""The local engine: processes that end as told, beyond their limits, when stuck, and with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitsmith.errors import BitsmithError
from bitsmith.run.engine import LocalEngine, Stops
from bitsmith.run.machine import usage_of_sessions
from bitsmith.run.task import Limits, Task
from bitsmith.store.artifacts import FILES
from graph_actions import ACTIONS

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


def _is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """One engine and all the ways for its tasks to end, side by side."""
    folder = tmp_path_factory.mktemp("engine")
    engine = LocalEngine(10, 4096 * MIB, Stops(stuck_seconds=4.0))
    tasks = [
        Task("good", "write_bytes", {"value": "x", "seconds": 0}),
        Task("error", "fail_times", {"times": 9}),
        Task("refusal", "fail_times", {"times": 9, "refuse": True}),
        Task("vanished", "vanish"),
        Task("killed", "kill_itself"),
        Task("memory", "eat_memory", {"bytes": 600 * MIB, "seconds": 300}, limits=Limits(None, 400 * MIB)),
        Task("time", "tick", {"seconds": 300, "sign": "progress"}, limits=Limits(3.0, None)),
        Task("stuck", "hang", {"pids": str(folder / "pids")}),
        Task("no json", "no_json"),
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
        "refusal": "error",
        "vanished": "error",
        "killed": "killed",
        "memory": "memory",
        "time": "time",
        "stuck": "stuck",
        "no json": "error",
    }
    assert failures["error"].message == "ZeroDivisionError: by nothing"
    assert "graph_actions.py" in failures["error"].evidence["trace"]
    assert failures["error"].evidence["log"] == "printed before it failed\n"
    assert failures["refusal"].message == "model: is refused"
    assert "trace" not in failures["refusal"].evidence
    assert failures["vanished"].evidence["exit_code"] == 7
    assert failures["killed"].evidence["signal"] == signal.SIGKILL
    assert failures["memory"].evidence["used_bytes"] > failures["memory"].evidence["limit_bytes"]
    assert failures["time"].evidence["seconds"] > 3.0
    assert failures["stuck"].evidence["still_seconds"] >= 4.0
    assert all(attempt.result is None for name, attempt in attempts.items() if name != "good")


def test_what_a_killed_task_had_started_is_killed_too(ended):
    folder, _ = ended
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert len(pids) == 2
    assert all(_is_gone(pid) for pid in pids)


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
    _wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().count(" "))
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert not any(map(_is_gone, pids))
    parent.kill()
    parent.wait()
    _wait_for(lambda: all(map(_is_gone, pids)))


def test_tasks_wait_for_room(tmp_path):
    engine = LocalEngine(2, 1000 * MIB)
    large, small = (Task(str(size), "hang", limits=Limits(None, size * MIB)) for size in (700, 400))
    assert engine.has_room(large)
    engine.start(large, ACTIONS["hang"], {}, tmp_path / "a")
    assert not engine.has_room(small)
    assert engine.has_room(Task("undeclared", "hang"))
    engine.stop()
    with pytest.raises(BitsmithError, match="may use 2097152000 bytes, all tasks together have 1048576000"):
        engine.has_room(Task("x", "hang", limits=Limits(None, 2000 * MIB)))
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
        Task("greedy", "eat_memory", {"bytes": 2000 * MIB, "seconds": 60}),
    ]
    attempts = _all(engine, tasks, tmp_path)
    assert attempts["declared"].failure is None
    assert attempts["greedy"].failure.kind == "memory"
    assert "the running tasks use" in attempts["greedy"].failure.message
