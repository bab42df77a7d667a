"""Tiny actions for the tests of graphs and engines, in a module that worker processes can import."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bitsmith.errors import BitsmithError


def write_bytes(params, inputs, out, progress):
    """Write bytes that depend on the parameters and on all inputs, after a while."""
    _count(params)
    progress("waiting", 0, 1)
    time.sleep(params.get("seconds", 0))
    seen = {name: (path / "data").read_text() for name, path in inputs.items()}
    (out / "data").write_text(json.dumps([params["value"], seen], sort_keys=True) * params.get("times", 100))
    return {"value": params["value"], "inputs": sorted(inputs)}


def read_source(params, inputs, out, progress):
    """Copy a source."""
    (out / "data").write_bytes(Path(params["source"]).read_bytes())
    return {}


def fail_times(params, inputs, out, progress):
    """Fail as often as told, then write; by a refusal, or by any other error."""
    began = _count(params)
    (out / "data").write_text("half")
    if began <= params["times"]:
        sys.stdout.write("printed before it failed\n")
        if params.get("refuse"):
            raise BitsmithError("is refused", path="model")
        raise ZeroDivisionError("by nothing")
    return {"began": began}


def eat_memory(params, inputs, out, progress):
    """Hold that many bytes for that long."""
    began = _count(params)
    held = bytearray(params["bytes"] if began <= params.get("times", 99) else 0)
    held[::4096] = b"x" * len(held[::4096])
    time.sleep(params["seconds"] if held else 0)
    return {"held": len(held)}


def hang(params, inputs, out, progress):
    """Do nothing for ever, with a child that does the same and a half-written file."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "half").write_text("half")
    Path(params["pids"]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
    return {}


def tick(params, inputs, out, progress):
    """Sleep, telling of progress, or writing, or computing all the while."""
    end = time.monotonic() + params["seconds"]
    while time.monotonic() < end:
        if params["sign"] == "progress":
            progress("ticking", 1, 2)
            time.sleep(0.05)
        if params["sign"] == "output":
            with (out / "data").open("ab") as stream:
                stream.write(b"x")
            time.sleep(0.05)
    return {}


def vanish(params, inputs, out, progress):
    """End the process without a word."""
    os._exit(7)


def kill_itself(params, inputs, out, progress):
    """End as the kernel ends what does wrong or takes too much memory."""
    os.kill(os.getpid(), params["signal"])


def tell_threads(params, inputs, out, progress):
    """Return what the environment says of threads."""
    return {name: os.environ.get(name) for name in params["names"]}


def _count(params):
    """Note in the file that GRAPH_COUNT names that an attempt began; return how many did."""
    path = os.environ.get("GRAPH_COUNT")
    if path is None:
        return 1
    line = f"began {params.get('value')}\n"
    with Path(path).open("ab") as stream:
        stream.write(line.encode())
    return Path(path).read_text().count(line)


ACTIONS = {
    action.__name__: action
    for action in (
        write_bytes,
        read_source,
        fail_times,
        eat_memory,
        hang,
        tick,
        vanish,
        kill_itself,
        tell_threads,
    )
}
