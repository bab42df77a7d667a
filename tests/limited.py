"""Runs bitsmith's command line until a tensor begins: then without more memory, or not at all.

Arguments: `memory`, `wait` or `free`, the tensor, the command.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from pathlib import Path

import bitsmith.report.written
import bitsmith.run.compress  # what the command imports, before memory is limited
from bitsmith.cli.main import main
from bitsmith.log import LOGGER, fields_of
from bitsmith.run import gguf_job

IN_FLIGHT_BYTES = 32 << 20  # more than the tensors before, which are still being encoded, give back


class At(logging.Handler):
    """Does as it is told when the tensor begins, behind all the other handlers."""

    def __init__(self, mode: str, tensor: str) -> None:
        super().__init__(logging.INFO)
        self._mode, self._tensor = mode, tensor

    def emit(self, record: logging.LogRecord) -> None:
        """Take in a record."""
        if record.getMessage() == "start":
            LOGGER.removeHandler(self)
            LOGGER.addHandler(self)
        if record.getMessage() != "encode" or fields_of(record)["tensor"] != self._tensor:
            return
        if self._mode == "wait":
            time.sleep(600)
        elif self._mode == "memory":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() - IN_FLIGHT_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    assert bitsmith.run.compress and bitsmith.report.written
    gguf_job.KEPT_BYTES = 1  # tensors of a tiny model are as dear as a big one's
    mode, tensor, *command = sys.argv[1:]
    LOGGER.addHandler(At(mode, tensor))
    sys.argv = ["bitsmith", *command]
    main()
