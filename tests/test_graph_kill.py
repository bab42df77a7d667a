"""A study killed at any moment goes on where it was, and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitsmith.errors import OutputError
from bitsmith.run.task_state import load_state
from graph_processes import artifacts, children, finished, is_gone, wait_for
from graph_run import InlineEngine, run

PROGRAM = Path(__file__).with_name("graph_run.py")
DONE = ["a", "b", "join"]
TASK_SECONDS = 0.3


@pytest.fixture(autouse=True)
def count(tmp_path, monkeypatch):
    """Where every attempt that begins is noted."""
    monkeypatch.setenv("GRAPH_COUNT", str(tmp_path / "count"))


def _start(folder, seconds=TASK_SECONDS):
    command = [sys.executable, str(PROGRAM), str(folder), str(seconds)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole run's artifacts."""
    folder = tmp_path_factory.mktemp("whole")
    outcomes = run(folder, TASK_SECONDS, InlineEngine())
    assert [(outcome.status, outcome.attempts) for outcome in outcomes] == [("completed", 1)] * len(DONE)
    found = artifacts(folder / "store")
    assert len(found) == 3 * len(DONE)
    return found


def _begun():
    path = Path(os.environ["GRAPH_COUNT"])
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: lines.count(f"began {name}") for name in DONE}


def _kill(process, folder):
    """Kill a run; return how often each task that is finished was begun by then."""
    workers = children(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: all(map(is_gone, workers)))
    keys = finished(folder / "store")
    tasks = load_state(folder).tasks if keys else {}
    return {name: _begun()[name] for name, state in tasks.items() if state.key in keys}


def _goes_on(folder, begun, expected):
    """Finish a killed run: the same bytes as `expected`, and nothing that was finished begun again."""
    run(folder, TASK_SECONDS, InlineEngine())
    assert artifacts(folder / "store") == expected
    for done in begun:
        assert {name: _begun()[name] for name in done} == done
    assert not list((folder / "store").glob("staging/*"))


def test_killed_it_goes_on_and_ends_with_the_same_bytes(tmp_path, undisturbed):
    folder, begun = tmp_path / "out", []
    for moment in (lambda: _begun()["a"], lambda: _begun()["join"]):
        process = _start(folder)
        wait_for(moment)
        begun.append(_kill(process, folder))
    assert sorted(begun[1]) == ["a", "b"]
    _goes_on(folder, begun, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_thirty_moments_it_ends_with_the_same_bytes(tmp_path, undisturbed):
    draw, counts = random.Random(11), []
    began = time.monotonic()
    _start(tmp_path / "whole").communicate()
    seconds = time.monotonic() - began
    for number in range(30):
        folder = tmp_path / f"out{number}"
        Path(os.environ["GRAPH_COUNT"]).unlink(missing_ok=True)
        process = _start(folder)
        time.sleep(seconds * draw.uniform(0.1, 1.0))
        begun = _kill(process, folder)
        counts.append(len(begun))
        _goes_on(folder, [begun], undisturbed)
    assert len(set(counts)) > 2  # the moments met the study in more than two states


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_with_all_its_workers_and_a_second_run_is_refused(tmp_path, number):
    folder = tmp_path / "out"
    process = _start(folder, 300)
    workers = wait_for(lambda: _begun()["a"] and _begun()["b"] and children(process.pid))
    assert len(workers) == 2
    with pytest.raises(OutputError, match="is being written by another run"):
        run(folder, 300, InlineEngine())
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == (-number if number == signal.SIGINT else 128 + number), said
    assert all(map(is_gone, workers))
    statuses = {name: state.status.value for name, state in load_state(folder).tasks.items()}
    assert statuses == {"a": "killed", "b": "killed", "join": "pending"}
    assert not finished(folder / "store")
    assert not list((folder / "store").glob("staging/*"))
