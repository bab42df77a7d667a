"""Spread an assay's matrices over processes: LAPACK holds Python's lock, so threads would wait.

What a matrix's result says does not depend on where it was measured, nor on what was measured beside it.
"""

from __future__ import annotations

import os
import pickle
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import IO, Any, cast

from bitsmith.errors import BitsmithError
from bitsmith.log import event
from bitsmith.run.assay_jobs import Job, Request
from bitsmith.run.engine import THREADS
from bitsmith.run.machine import available_bytes, usable_cores

_SHARE = 0.8  # of the memory that can be had, for matrices measured at the same time
_WORTHWHILE = 2e10  # multiplications that take as long as a process to start


def usable_workers(jobs: Sequence[Job], asked: int | None) -> int:
    """Return how many processes measure: as many as asked for, else a core each where that pays."""
    if asked is not None:
        return min(asked, len(jobs))
    worthwhile = 1 + int(sum(job.work for job in jobs) / _WORTHWHILE)
    return max(1, min(usable_cores(), len(jobs), worthwhile))


def measured(request: Request, jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, Any]]:
    """Yield each job with its result as it ends; the largest are begun first.

    Beside another one, a job is begun only if both fit into the memory that could be had at the start.
    Raises what a job raises, or BitsmithError where a process ended without an answer.
    """
    if workers <= 1:
        for job in jobs:
            event("assay", tensor=job.name)
            yield job, _named(job, job.run)
        return
    with _Pool(request, workers) as pool:
        yield from pool.run(sorted(jobs, key=lambda job: -job.work))


def _named(job: Job, answer: Callable[[], Any]) -> Any:
    try:
        return answer()
    except BitsmithError as error:
        raise type(error)(error.message, path=error.path, tensor=error.tensor or job.name) from error


class _Worker:
    """One process, idle or with a job."""

    def __init__(self, request: Request) -> None:
        command = [sys.executable, "-m", "bitsmith.run.assay_worker"]
        # a group of its own: Ctrl-C reaches the parent alone, which ends the others
        self.process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603 (this interpreter)
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **dict.fromkeys(THREADS, "1")},
            process_group=0,
        )
        self.commands = cast(IO[bytes], self.process.stdin)
        self.answers = cast(IO[bytes], self.process.stdout)
        self.job: Job | None = None
        self._send(request)

    def begin(self, job: Job) -> None:
        """Give it a job."""
        event("assay", tensor=job.name)
        self.job = job
        self._send(job.name)

    def answer(self) -> tuple[Job, Any]:
        """Return its job and the result. Raises what the job raised."""
        job, self.job = cast(Job, self.job), None
        return job, _named(job, self._result)

    def _result(self) -> Any:
        try:
            result = pickle.load(self.answers)  # noqa: S301 (from a process of ours)
        except (EOFError, pickle.UnpicklingError) as error:
            raise BitsmithError(f"the process that measured it ended ({self._end()})") from error
        if isinstance(result, Exception):
            raise result
        return result

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.commands, self.answers):
            with suppress(OSError):
                pipe.close()

    def _send(self, what: Any) -> None:
        with suppress(BrokenPipeError):  # it ended; its answer will tell
            pickle.dump(what, self.commands)
            self.commands.flush()

    def _end(self) -> str:
        code = self.process.wait()
        return f"signal {-code}, often for want of memory" if code < 0 else f"status {code}"


class _Pool:
    """Processes that measure; all of them are gone when the block ends."""

    def __init__(self, request: Request, workers: int) -> None:
        self._workers: list[_Worker] = []
        self._budget_bytes = _SHARE * available_bytes()
        try:
            for _ in range(workers):
                self._workers.append(_Worker(request))
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.stop()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Any]]:
        """Yield jobs and results as they come."""
        waiting = list(jobs)
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.answers, selectors.EVENT_READ, worker)
            self._begin(waiting)
            while any(worker.job for worker in self._workers):
                for key, _ in selector.select():
                    found = key.data.answer()
                    self._begin(waiting)
                    yield found

    def _begin(self, waiting: list[Job]) -> None:
        """Give every idle process the largest job that fits beside those under way."""
        for worker in self._workers:
            if worker.job is not None:
                continue
            held = sum(other.job.memory_bytes for other in self._workers if other.job)
            fitting = (job for job in waiting if not held or held + job.memory_bytes <= self._budget_bytes)
            job = next(fitting, None)
            if job is None:
                return
            waiting.remove(job)
            worker.begin(job)
