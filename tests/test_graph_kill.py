"""A study killed at any moment goes on where it was, and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitsmith.run.task_state import load_state

PROGRAM = Path(__file__).with_name("graph_run.py")
DONE = ["a", "b", "join"]
TASK_SECONDS = "0.3"


def _start(folder, seconds=TASK_SECONDS):
    environment = {**os.environ, "GRAPH_COUNT": str(folder.with_suffix(".count"))}
    command = [sys.executable, str(PROGRAM), str(folder), "2", seconds]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(folder):
    process = _start(folder)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def _artifacts(folder):
    """Return the bytes of every file of every artifact but those of what making it took."""
    root = folder / "store/objects"
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "cost.json"
    }


def _finished(folder):
    return {path.parent.name for path in (folder / "store/objects").glob("*/*/manifest.json")}


def _children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole run, how long it took in seconds, and its artifacts."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    began = time.monotonic()
    out = _finish(folder)
    assert out.split() == [word for name in DONE for word in (name, "completed", "1")]
    return time.monotonic() - began, _artifacts(folder)


def _begun(folder):
    path = folder.with_suffix(".count")
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: lines.count(f"began {name}") for name in DONE}


def _kill_at(folder, seconds):
    """Kill a run so long after its start; return how often each task that is finished was begun by then."""
    process = _start(folder)
    time.sleep(seconds)
    workers = _children(process.pid) if process.poll() is None else []
    process.kill()
    process.communicate()
    _wait_for(lambda: all(map(_is_gone, workers)))
    finished = _finished(folder)
    tasks = load_state(folder).tasks if finished else {}
    return {name: _begun(folder)[name] for name, state in tasks.items() if state.key in finished}


def _check_kills(folder, moments, artifacts):
    begun = [_kill_at(folder, moment) for moment in moments]
    _finish(folder)
    assert _artifacts(folder) == artifacts
    for finished in begun:
        assert {name: _begun(folder)[name] for name in finished} == finished
    assert not list((folder / "store").glob("staging/*"))
    return [len(finished) for finished in begun]


def test_killed_it_goes_on_and_ends_with_the_same_bytes(tmp_path, undisturbed):
    seconds, artifacts = undisturbed
    assert len(artifacts) == 3 * len(DONE)
    _check_kills(tmp_path / "out", [seconds * 0.75], artifacts)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, undisturbed):
    seconds, artifacts = undisturbed
    draw = random.Random(7)
    _check_kills(tmp_path / "out", [seconds * draw.uniform(0.4, 1.0) for _ in range(4)], artifacts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_thirty_moments_it_ends_with_the_same_bytes(tmp_path, undisturbed):
    seconds, artifacts = undisturbed
    draw = random.Random(11)
    counts = []
    for number in range(30):
        moment = seconds * draw.uniform(0.1, 1.0)
        counts += _check_kills(tmp_path / f"out{number}", [moment], artifacts)
    assert len(set(counts)) > 2  # the moments met the study in more than two states


def test_ctrl_c_ends_it_with_all_its_workers_and_a_second_run_is_refused(tmp_path):
    folder = tmp_path / "out"
    process = _start(folder, "300")
    _wait_for(lambda: _begun(folder)["a"] == _begun(folder)["b"] == 1)
    second = _start(folder, "300")
    assert "is being written by another run" in second.communicate(timeout=120)[1]
    assert second.returncode != 0
    workers = _children(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert all(map(_is_gone, workers))
    statuses = {name: state.status.value for name, state in load_state(folder).tasks.items()}
    assert statuses == {"a": "killed", "b": "killed", "join": "pending"}
    assert not _finished(folder)
    assert not list((folder / "store").glob("staging/*"))
