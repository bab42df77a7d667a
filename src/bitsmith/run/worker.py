"""A process that does one task: runs its action, seals the artifact, and tells how it went."""

from __future__ import annotations

import errno
import faulthandler
import fcntl
import importlib
import json
import logging
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from bitsmith.errors import BitsmithError, is_out_of_memory, printable
from bitsmith.log import LOGGER, fields_of, latest_place
from bitsmith.progress import Progress
from bitsmith.run.task import Action
from bitsmith.store.artifacts import FILES, seal

F_SETSIG = 10
O_ASYNC = 0o20000
REPORT_SECONDS = 0.2
TRACE_CHARACTERS = 4000
OUT_OF_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def perform(
    action: Action, params: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, progress: Progress
) -> None:
    """Run an action in the new folder `out/files` and seal `out` with its result.

    The folder is not an artifact until `ArtifactStore.put` takes it. Raises what the action raises.
    """
    (out / FILES).mkdir(parents=True)
    result = action(params, inputs, out / FILES, progress)
    seal(out, result)


def reference_of(action: Action) -> str:
    """Return `module:name`, by which another process finds the action.

    Raises BitsmithError for one that has no such place: a lambda, a nested function, one of a script.
    """
    module, name = getattr(action, "__module__", None), getattr(action, "__qualname__", "")
    if module in (None, "__main__") or not name or "<" in name:
        raise BitsmithError(f"action {printable(repr(action))} is no function that a process finds by a name")
    return f"{module}:{name}"


def action_at(reference: str) -> Action:
    """Return the action that `reference_of` named."""
    module, name = reference.split(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def failure_of(error: BaseException) -> dict[str, Any]:
    """Return what a worker tells of an error: kind, one line, and the trace of one that is no refusal."""
    if isinstance(error, BitsmithError):
        return {"kind": "error", "message": str(error)}
    if isinstance(error, OSError) and error.errno in OUT_OF_ROOM:
        return {"kind": "error", "message": printable(f"no room for what it writes: {error}")}
    kind = "memory" if is_out_of_memory(error) else "error"
    trace = "".join(traceback.format_exception(error))[-TRACE_CHARACTERS:]
    place = f" at {latest_place()}" if kind == "memory" else ""
    return {"kind": kind, "message": printable(f"{type(error).__name__}: {error}{place}"), "trace": trace}


def main(report: int) -> int:
    """Do the task that stdin's first line describes and report on descriptor `report`."""
    request = _request()
    _end_with_parent()
    _end_before_parent()
    faulthandler.enable()  # a crash of compiled code leaves its trace in the log
    LOGGER.addHandler(_Telling(report))
    LOGGER.setLevel(logging.INFO)
    try:
        progress = _reporter(report)
        inputs = {name: Path(path) for name, path in request["inputs"].items()}
        perform(action_at(request["action"]), request["params"], inputs, Path(request["out"]), progress)
        _tell(report, {"end": "sealed"})
    except Exception as error:
        _tell(report, {"failure": failure_of(error)})
        return 1
    return 0


class _Telling(logging.Handler):
    """Tells every event to the parent, which has its own log and learns where a killed worker was."""

    def __init__(self, report: int) -> None:
        super().__init__(logging.INFO)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            _tell(self._report, {"event": [record.getMessage(), fields_of(record), latest_place()]})


def _request() -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        chunk = os.read(0, 1 << 16)
        if not chunk:
            sys.exit(1)
        line += chunk
    request: dict[str, Any] = json.loads(line)
    return request


def _end_with_parent() -> None:
    """Have the kernel kill this process and its children when the other end of stdin closes.

    The parent holds that end and writes nothing more, so it closes with the parent, however that dies. The
    signal goes to the process group, which a thread that waits could not promise while compiled code runs.
    """
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if sys.platform != "linux":  # no choice of the signal elsewhere
        Thread(target=_wait_for_end, args=[lifeline], daemon=True).start()
        return
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # closed before the signal was armed
        os.killpg(0, signal.SIGKILL)


def _end_before_parent() -> None:
    """Have the kernel, when memory is short, take this process rather than the one that looks after all."""
    with suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("500", "utf-8")


def _wait_for_end(lifeline: int) -> None:
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def _reporter(report: int) -> Progress:
    last: tuple[str, float] = ("", 0.0)

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if stage != last[0] or done >= total or now - last[1] >= REPORT_SECONDS:
            last = (stage, now)
            _tell(report, {"progress": [stage, int(done), int(total)]})

    return progress


def _tell(report: int, message: Mapping[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(report, data) :]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
