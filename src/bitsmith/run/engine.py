"""Where tasks run: the contract of an engine, and the one that runs processes on this machine."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from bitsmith.errors import BitsmithError
from bitsmith.log import tell
from bitsmith.run.machine import Usage, available_bytes, usable_cores, usage_of_sessions
from bitsmith.run.task import Action, Task
from bitsmith.run.worker import reference_of
from bitsmith.store.artifacts import FILES, folder_bytes, sealed_result

LOG_BYTES = 4000
THREADS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
FailureKind = Literal["error", "killed", "memory", "time", "stuck"]
RESOURCE_KINDS: frozenset[str] = frozenset({"killed", "memory", "time", "stuck"})


class Failure(NamedTuple):
    """Why an attempt ended without a result, and the figures that show it."""

    kind: FailureKind
    message: str
    evidence: Mapping[str, Any] = {}


@dataclass(eq=False)
class Attempt:
    """One run of a task: the handle that `Engine.start` returns and `Engine.wait` fills in."""

    task: Task
    out: Path
    result: Mapping[str, Any] | None = None
    failure: Failure | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    latest: tuple[str, int, int] | None = field(default=None)  # what it last reported as progress


class Engine(Protocol):
    """Starts tasks and tells which have ended; knows nothing of their order."""

    def has_room(self, task: Task) -> bool:
        """Whether `task` can be started now. Raises BitsmithError if it never can, which fails the task."""

    def start(self, task: Task, action: Action, inputs: Mapping[str, Path], out: Path) -> Attempt:
        """Begin one attempt, which leaves a sealed artifact at `out` (see `bitsmith.run.worker.perform`)."""

    def wait(self, timeout_seconds: float) -> Sequence[Attempt]:
        """Return the attempts that ended, each once: at the first end, or empty when the time is over."""

    def stop(self) -> None:
        """Kill what runs, with all its children, and return when it is gone."""


class Stops(NamedTuple):
    """When a local attempt is taken for stuck: that long without output, progress or use of the processor."""

    stuck_seconds: float = 900.0
    poll_seconds: float = 0.2


STOPS = Stops()


def thread_settings() -> dict[str, str]:
    """Return the variables that say how many threads a task computes with: as set here, else one.

    They are the same for any number of workers and on every node: the last bits of sums depend on them.
    """
    common = os.environ.get(THREADS[0]) or "1"
    return {name: os.environ.get(name) or common for name in THREADS}


class LocalEngine:
    """Runs each task in a process of its own on this machine, at most `workers` (None: as cores) at once.

    A task starts beside others when what all of them need fits into `memory_bytes` (None: nine tenths of what
    is free now). It needs what its limit allows, or, if that is more, what it was seen to use, or its action
    on the same sources was. One that needs more than there is runs alone. Beyond a limit, its own or the
    common one, an attempt is killed with all its children; if it was the common one, it runs alone the next
    time. So it is when it is stuck. Used memory leaves out the pages of mapped files. `threads` are variables
    of the processes' environment. `start` and `wait` belong to one thread.
    """

    def __init__(
        self,
        workers: int | None = None,
        memory_bytes: int | None = None,
        stops: Stops = STOPS,
        threads: Mapping[str, str] | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise BitsmithError(f"an engine needs at least one worker, {workers} are asked for")
        self.workers = workers or usable_cores()
        self.memory_bytes = available_bytes() * 9 // 10 if memory_bytes is None else memory_bytes
        self._stops = stops
        self._threads = thread_settings() if threads is None else dict(threads)
        self._running: list[_Process] = []
        self._peaks: dict[str, int] = {}

    def has_room(self, task: Task) -> bool:
        """Whether `task` can be started now: beside others only if there is memory for all."""
        if not self._running:
            return True
        held = sum(process.need_bytes for process in self._running)
        return len(self._running) < self.workers and held + self._need_bytes(task) <= self.memory_bytes

    def start(self, task: Task, action: Action, inputs: Mapping[str, Path], out: Path) -> Attempt:
        """Begin one attempt in a new process, whose prints go to `out` with the suffix `.log`."""
        paths = os.pathsep.join(path or os.curdir for path in sys.path)
        environment = {**os.environ, **self._threads, "PYTHONPATH": paths}
        process = _Process(Attempt(task, out), action, inputs, environment, self._need_bytes(task))
        self._running.append(process)
        return process.attempt

    def wait(self, timeout_seconds: float) -> Sequence[Attempt]:
        """Return the attempts that ended; looks after limits meanwhile, so it is to be called often."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            self._look_after()
            ended = [process for process in self._running if process.attempt.seconds]
            if ended:
                self._running = [process for process in self._running if process not in ended]
                for process in ended:
                    self._learn(process.attempt)
                return [process.attempt for process in ended]
            left = deadline - time.monotonic()
            if left <= 0:
                return []
            reports = [process.report for process in self._running]
            select.select(reports, [], [], min(left, self._stops.poll_seconds))

    def stop(self) -> None:
        """Kill what runs, with all its children, and return when it is gone."""
        for process in self._running:
            process.kill()
        for process in self._running:
            process.close()
        self._running = []

    def _need_bytes(self, task: Task) -> int:
        """Return the memory to count on for a task that is to start."""
        seen = self._peaks.get(_of_task(task), self._peaks.get(_of_action(task), 0))
        return max(task.limits.memory_bytes or 0, seen)

    def _learn(self, attempt: Attempt) -> None:
        """Remember what an attempt used: if it comes again, and for the same action on the same sources."""
        for name in (_of_task(attempt.task), _of_action(attempt.task)):
            self._peaks[name] = max(self._peaks.get(name, 0), attempt.peak_bytes)

    def _look_after(self) -> None:
        used = usage_of_sessions([process.pid for process in self._running])
        for process in self._running:
            process.look(used[process.pid], self._stops.stuck_seconds)
        alive = [process for process in self._running if not process.attempt.seconds]
        held = sum(process.used.memory_bytes for process in alive)
        if held > self.memory_bytes:
            greediest = max(alive, key=lambda process: process.beyond_declared_bytes)
            self._peaks[_of_task(greediest.attempt.task)] = self.memory_bytes + 1  # next time alone
            greediest.end(
                Failure(
                    "memory",
                    f"the running tasks use {held} bytes, they have {self.memory_bytes} together",
                    {"used_bytes": greediest.used.memory_bytes, "limit_bytes": self.memory_bytes},
                )
            )


def _of_task(task: Task) -> str:
    return f"task {task.name}"


def _of_action(task: Task) -> str:
    return json.dumps([task.action, *(task.params[name] for name in task.sources)])


class _Process:
    """One attempt's process, which leads a session of its own, so that its children are found and killed."""

    def __init__(
        self,
        attempt: Attempt,
        action: Action,
        inputs: Mapping[str, Path],
        environment: dict[str, str],
        expected_bytes: int,
    ) -> None:
        self.attempt = attempt
        self.used = Usage()
        self._expected_bytes = expected_bytes
        self._log = attempt.out.with_name(attempt.out.name + ".log")
        self._told: dict[str, Any] = {}
        self._rest = b""
        self._place: str | None = None
        request = {
            "action": reference_of(action),
            "params": dict(attempt.task.params),
            "inputs": {name: str(path) for name, path in inputs.items()},
            "out": str(attempt.out),
        }
        self._popen, self.report = _spawn(request, self._log, environment)
        self.pid = self._popen.pid
        self._began = time.monotonic()
        self._alive = _Alive(self._began)

    @property
    def need_bytes(self) -> int:
        """The memory to count on for it."""
        return max(self._expected_bytes, self.used.memory_bytes)

    @property
    def beyond_declared_bytes(self) -> int:
        """How much more it uses than its task declares."""
        return self.used.memory_bytes - (self.attempt.task.limits.memory_bytes or 0)

    def look(self, used: Usage, stuck_seconds: float) -> None:
        """Take in what it told and uses, and end it if it is over, beyond a limit, or stuck."""
        over = self._popen.poll() is not None  # before reading, so that nothing it told is left behind
        told = self._read()
        self.used = used
        self.attempt.peak_bytes = max(self.attempt.peak_bytes, used.memory_bytes)
        if over:
            self.end(self._own_failure())
        else:
            failure = self._beyond() or self._stuck(told, stuck_seconds)
            if failure:
                self.end(failure)

    def end(self, failure: Failure | None) -> None:
        """Kill what is left of it and fill in its attempt."""
        self.kill()
        self.attempt.seconds = max(time.monotonic() - self._began, 1e-9)
        if failure is None:
            try:
                self.attempt.result = sealed_result(self.attempt.out)
            except BitsmithError as error:
                failure = Failure("error", str(error))
        if failure is not None:
            self.attempt.failure = failure._replace(evidence={**failure.evidence, **self._traces()})
        self.close()

    def kill(self) -> None:
        """Kill it and its children, at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Wait until it is gone and close what tied it to this process."""
        self._popen.wait()
        if self._popen.stdin:
            self._popen.stdin.close()
        if self.report >= 0:
            os.close(self.report)
            self.report = -1

    def _read(self) -> bool:
        """Read what it told since; return whether that was anything."""
        data = b""
        with suppress(BlockingIOError):
            while chunk := os.read(self.report, 1 << 16):
                data += chunk
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self._told |= message
            if "progress" in message:
                stage, done, total = message["progress"]
                self.attempt.latest = (stage, done, total)
            if "event" in message:
                what, fields, self._place = message["event"]
                tell(what, {"task": self.attempt.task.name, **fields})
        return bool(data)

    def _own_failure(self) -> Failure | None:
        """Return why it ended by itself without an artifact, None if it sealed one."""
        if "end" in self._told:
            return None
        told, code = self._told.get("failure"), self._popen.returncode
        if told is not None:
            message = told["message"].replace(f"{self.attempt.out / FILES}/", "")
            return Failure(told["kind"], message, {"trace": told["trace"]} if "trace" in told else {})
        if code < 0:
            return Failure("killed", f"its process was killed by {_signal_name(-code)}", {"signal": -code})
        return Failure("error", f"its process ended with exit code {code} and no result", {"exit_code": code})

    def _beyond(self) -> Failure | None:
        limits, seconds = self.attempt.task.limits, time.monotonic() - self._began
        used = self.used.memory_bytes
        if limits.memory_bytes is not None and used > limits.memory_bytes:
            figures: dict[str, Any] = {"used_bytes": used, "limit_bytes": limits.memory_bytes}
            return Failure("memory", f"it used {used} bytes, it may use {limits.memory_bytes}", figures)
        if limits.seconds is not None and seconds > limits.seconds:
            figures = {"seconds": seconds, "limit_seconds": limits.seconds}
            return Failure("time", f"it took over {limits.seconds:g} s, which is all it may", figures)
        return None

    def _stuck(self, told: bool, stuck_seconds: float) -> Failure | None:
        if self.attempt.task.limits.stuck_seconds is not None:
            stuck_seconds = self.attempt.task.limits.stuck_seconds
        still = self._alive.still_seconds(told, self.used.cpu_seconds, (self.attempt.out, self._log))
        if still < stuck_seconds:
            return None
        message = f"for {still:.0f} s it wrote nothing, told nothing and used no processor time"
        return Failure("stuck", message, {"still_seconds": still, "limit_seconds": stuck_seconds})

    def _traces(self) -> dict[str, Any]:
        traces: dict[str, Any] = {"peak_bytes": self.attempt.peak_bytes}
        if self._place is not None:
            traces["at"] = self._place
        if self.attempt.latest is not None:
            traces["last_progress"] = list(self.attempt.latest)
        with suppress(OSError):
            tail = self._log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
            traces |= {"log": tail} if tail else {}
        return traces


def _signal_name(number: int) -> str:
    with suppress(ValueError):  # a real-time signal
        name = signal.Signals(number).name
        return f"{name}, as the system ends what takes too much memory" if number == signal.SIGKILL else name
    return f"signal {number}"


class _Alive:
    """When a process last did anything: told of progress, wrote, or used a hundredth of a processor since."""

    def __init__(self, now: float) -> None:
        self._since = self._looked = now
        self._cpu_seconds = 0.0
        self._bytes = 0

    def still_seconds(self, told: bool, cpu_seconds: float, outputs: Sequence[Path]) -> float:
        """Return how long it has done nothing."""
        now = time.monotonic()
        still = now - self._since
        alive = told or cpu_seconds - self._cpu_seconds > max(0.05, still / 100)
        if not alive and now - self._looked > max(0.1, still / 20):  # walking a folder takes time
            self._looked = now
            size = sum(_size(path) for path in outputs)
            alive, self._bytes = size != self._bytes, size
        if alive:
            self._since, self._cpu_seconds = now, cpu_seconds
        return now - self._since


def _size(path: Path) -> int:
    with suppress(OSError):
        return folder_bytes(path) if path.is_dir() else path.stat().st_size
    return 0


def _spawn(
    request: Mapping[str, Any], log: Path, environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a worker and return it with the descriptor on which it reports."""
    report, write_end = os.pipe()
    try:
        with log.open("wb") as stream:
            command = [sys.executable, "-P", "-m", "bitsmith.run.worker", str(write_end)]
            popen = subprocess.Popen(  # noqa: S603 (our own module)
                command,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[write_end],
                start_new_session=True,  # the terminal's Ctrl-C is for us, who then kill it
            )
    except OSError as error:
        os.close(report)
        raise BitsmithError(f"no process can be started: {error.strerror or error}") from error
    finally:
        os.close(write_end)
    os.set_blocking(report, False)
    stdin = popen.stdin
    if stdin is not None:  # stays open: the worker ends when it closes
        with suppress(BrokenPipeError):
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
    return popen, report
