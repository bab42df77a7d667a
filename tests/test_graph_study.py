"""A real study by its command, killed at random in three ways, ends with an undisturbed one's bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from bitsmith.lab.models import DEMO_MODEL
from bitsmith.run.audit import read_audit
from bitsmith.run.task_state import load_state
from graph_processes import artifacts, children, finished, is_gone, wait_for

KILLS, KILLS_EACH = 30, 5
WAYS = ("coordinator", "all", "worker")
STUDY = {
    "version": 1,
    "models": {"tiny": str(DEMO_MODEL)},
    "texts": {"held": "held.txt"},
    "recipes": {
        "q4": {"type": "Q4_K_M"},
        "q8": {"type": "Q8_0"},
    },
    "evaluations": [{"text": "held", "ctx": 64, "chunks": 2}],
}


def _start(folder, out):
    """Start the study as a shell would, in a process group of its own."""
    program = "from bitsmith.cli.main import main; main()"
    command = [sys.executable, "-c", program, "study", "study.yaml", "-o", str(out), "--workers", "2"]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen([*command, "--resume"], cwd=folder, stdout=log, stderr=log, process_group=0)


def _begun(out):
    """Return how often each task was begun, as the audit log has it."""
    lines = read_audit(out / "audit.jsonl") if (out / "audit.jsonl").exists() else ()
    return Counter(line.what for line in lines if line.decision == "pending → in_progress")


def _done(out):
    """Return how often each task whose artifact is there was begun."""
    keys = finished(out / "artifacts")
    tasks = load_state(out).tasks if keys else {}
    begun = _begun(out)
    return {f"task {name}": begun[f"task {name}"] for name, state in tasks.items() if state.key in keys}


def _kill(process, way, draw):
    """Kill a study in one of three ways and wait until what was killed is gone."""
    workers = children(process.pid)
    if way == "worker":
        victims = [draw.choice(workers)] if workers else []
    else:
        victims = [process.pid, *(workers if way == "all" else [])]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    if way != "worker":
        process.wait()
        wait_for(lambda: all(map(is_gone, workers)))
    return bool(victims)


def _run_out(folder, out, process):
    """Wait for a study's end, going on with it where it failed."""
    while process.wait(timeout=1800):
        assert "failed" in {state.status.value for state in load_state(out).tasks.values()}
        process = _start(folder, out)


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_a_study_killed_at_thirty_moments_ends_with_the_same_bytes(tmp_path):
    (tmp_path / "study.yaml").write_text(json.dumps(STUDY))
    (tmp_path / "held.txt").write_text("def main():\n    return [x for x in range(10)]\n" * 60)
    began, whole = time.monotonic(), tmp_path / "whole"
    _run_out(tmp_path, whole, _start(tmp_path, whole))
    seconds, expected = time.monotonic() - began, artifacts(whole / "artifacts")
    number_of_tasks = len(load_state(whole).tasks)
    draw, kills, again = random.Random(7), [], 0
    while len(kills) < KILLS:
        out, at_kills = tmp_path / f"out{len(kills)}", []
        process = _start(tmp_path, out)
        for _ in range(KILLS_EACH):
            way = WAYS[len(kills) % len(WAYS)]
            try:
                process.wait(seconds * draw.uniform(0.02, 0.5))
                break
            except subprocess.TimeoutExpired:
                if not _kill(process, way, draw):
                    continue
            at_kills.append(_done(out))
            kills.append((way, len(at_kills[-1])))
            said = f"{way}, {len(at_kills[-1])} of {number_of_tasks} tasks done"
            sys.stdout.write(f"kill {len(kills)}: {said}\n")
            process = _start(tmp_path, out) if way != "worker" else process
        _run_out(tmp_path, out, process)
        assert artifacts(out / "artifacts") == expected
        begun = _begun(out)
        again += sum(begun[name] - count for done in at_kills for name, count in done.items())
        assert not list((out / "artifacts").glob("staging/*"))
    sys.stdout.write(f"begun again though done: {again}; undisturbed: {seconds:.0f} s\n")
    assert again == 0
    assert len({done for _, done in kills}) > 3  # the moments met the study in more than three states
