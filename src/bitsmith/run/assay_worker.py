"""A process that measures matrices for an assay: `python -m bitsmith.run.assay_worker`, told by a pipe.

Reads a pickled `Request`, then names of jobs; answers each with its result or its error, pickled.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
from contextlib import suppress
from typing import Any, BinaryIO

from bitsmith.numerics.threads import one_blas_thread
from bitsmith.run.assay_jobs import Job, opened_work

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer until the pipe ends: its other end is closed, or the process that held it is gone."""
    with suppress(OSError, AttributeError):  # Linux ends this process with its parent, also amid a matrix
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    commands = os.fdopen(os.dup(0), "rb")
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what is printed does not get among the answers
        with one_blas_thread():
            _serve(commands, answers)


def _serve(commands: BinaryIO, answers: BinaryIO) -> None:
    with opened_work(pickle.load(commands)) as work:  # noqa: S301 (from our own parent)
        jobs = {job.name: job for job in work.jobs}
        while True:
            try:
                name = pickle.load(commands)  # noqa: S301
            except EOFError:
                return
            pickle.dump(_answer(jobs[name]), answers)
            answers.flush()


def _answer(job: Job) -> Any:
    """Return a job's result, or the error it raises."""
    try:
        return job.run()
    except Exception as error:
        return error


if __name__ == "__main__":
    main()
