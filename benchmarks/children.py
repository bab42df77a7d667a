"""Commands run as processes of their own, watched from start to end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MEASURES = (
    ("seconds", "s", "wall time"),
    ("cpu_seconds", "s", "processor time"),
    ("peak_bytes", "bytes", "peak memory"),
    ("read_bytes", "bytes", "bytes read"),
    ("written_bytes", "bytes", "bytes written"),
)
"""What a row is made of each: field of `Ran`, unit, words."""
LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Ran:
    """What a command and all it started took.

    `read_bytes` and `written_bytes` are those of its calls, cached or not (Linux' rchar and wchar; pages of
    mapped files are not among them); `disk_…` those that storage moved for it; None where the system does
    not say. `peak_bytes` is the largest resident memory: of one process the kernel's, of several the largest
    sum of their proportional shares (PSS), looked at every 50 ms.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_bytes: int | None
    written_bytes: int | None
    disk_read_bytes: int | None
    disk_written_bytes: int | None
    processes: int = 1
    output: str = field(default="", repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return its fields, without the output."""
        return {name: value for name, value in asdict(self).items() if name != "output"}


class ChildFailedError(Exception):
    """A command ended with another status than 0; the message has the end of what it said."""


def child(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    threads: int | None = None,
) -> Ran:
    """Run a command to its end, its output kept; `threads` limits it to so many of this process's cores.

    Raises `ChildFailedError`.
    """
    cores = (
        sorted(os.sched_getaffinity(0))[:threads] if threads and hasattr(os, "sched_setaffinity") else None
    )
    own_peak = _status_bytes(os.getpid(), "VmHWM")
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        started = subprocess.Popen(
            [str(part) for part in command], stdout=said, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, env=None if env is None else {**os.environ, **env}, cwd=cwd,
        )  # fmt: skip
        if cores:
            os.sched_setaffinity(started.pid, cores)
        watch = _Watch(started.pid)
        try:
            if hasattr(os, "waitid"):
                os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.perf_counter() - began
            moved = _io(started.pid)  # of a process that has ended but is still listed, with its children's
            _, status, usage = os.wait4(started.pid, 0)
        except BaseException:
            started.kill()
            started.wait()
            raise
        finally:
            watch.stop()
        started.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        output = said.read().decode(errors="replace")
    if started.returncode:
        raise ChildFailedError(
            f"{' '.join(map(str, command))}: status {started.returncode}\n{output[-4000:]}"
        )
    kernel = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if kernel <= own_peak:  # Linux starts a child's figure at its parent's peak
        kernel = 0
    peak = max(watch.peak, kernel) or usage.ru_maxrss * 1024
    return Ran(seconds, usage.ru_utime + usage.ru_stime, peak, *moved, watch.processes, output)


class _Watch:
    """Looks at a process and all below it every 50 ms or as often as is cheap, in a thread."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak, self.processes = pid, 0, 1
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if Path("/proc/self/status").exists():
            self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        pause = LOOK_SECONDS
        while not self._end.wait(pause):
            began = time.thread_time()
            pids = list(_tree(self.pid))
            self.processes = max(self.processes, len(pids))
            if len(pids) == 1:
                self.peak = max(self.peak, _status_bytes(self.pid, "VmHWM"))
            else:
                self.peak = max(self.peak, _shared_out_bytes(pids))
            pause = max(LOOK_SECONDS, 100 * (time.thread_time() - began))  # at most 1 % of a core


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for below in (task / "children").read_text().split():
                yield from _tree(int(below))


def _status_bytes(pid: int, name: str) -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
    return 0


def _rollup(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/smaps_rollup").read_text()
    return ""


def _shared_out_bytes(pids: Sequence[int]) -> int:
    """Return the sum of proportional shares; a child that has not begun its program is its parent."""
    lines = [
        line for text in set(map(_rollup, pids)) for line in text.splitlines() if line.startswith("Pss:")
    ]
    return 1024 * sum(int(line.split()[1]) for line in lines)


def _io(pid: int) -> tuple[int | None, int | None, int | None, int | None]:
    try:
        lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    except OSError:
        return None, None, None, None
    return int(lines["rchar"]), int(lines["wchar"]), int(lines["read_bytes"]), int(lines["write_bytes"])


def drop_cache(*paths: Path) -> None:
    """Ask the system to forget the cached pages of files, and of all files in folders."""
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else (path,):
            if file.is_file() and hasattr(os, "posix_fadvise"):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
