"""What a command will take, told before it starts: seconds, peak memory, disk, bytes read."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from bitsmith import __version__
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.run.machine import available_bytes
from bitsmith.run.machine_rates import MachineRates, cached_bytes

CALIBRATION_SECONDS = 5.0
"""What measuring may take, nearly: the last measurement begun is finished."""

MARGIN = 0.3
"""The relative interval promised around seconds and peak memory, on a machine that does nothing else."""

OTHER_DEVICE = "a run on another device than the processor"
"""What forecasts have not been held against."""


class Part(NamedTuple):
    """A share of the time: `amount` of some `unit` of work at `rate` of it per second."""

    name: str
    seconds: float
    amount: float
    unit: str
    rate: float


@dataclass(frozen=True)
class Forecast:
    """A prediction; `seconds` and `peak_memory_bytes` hold within `MARGIN`, the bytes nearly.

    Where a run does what no forecast has been held against, `unmeasured` names it: seconds, peak memory,
    bytes read and written are then without it, and nothing is promised. `output_bytes` stay on the
    disk, `scratch_bytes` lie there besides at the most. `read_bytes` and `written_bytes` are what the run
    asks the system for, whether or not it comes from the page cache.
    `calibrated_seconds` were spent on measuring.
    """

    command: str
    seconds: float
    peak_memory_bytes: int
    output_bytes: int
    scratch_bytes: int
    read_bytes: int
    written_bytes: int
    parts: tuple[Part, ...]
    rates: MachineRates
    calibrated_seconds: float
    unmeasured: tuple[str, ...] = ()
    folder: Path = field(default_factory=Path)

    @property
    def seconds_interval(self) -> tuple[float, float] | None:
        """The interval that is promised for the seconds; None where part of the run is unmeasured."""
        return None if self.unmeasured else ((1 - MARGIN) * self.seconds, (1 + MARGIN) * self.seconds)

    @property
    def memory_interval(self) -> tuple[int, int] | None:
        """The interval that is promised for the peak memory, bytes; None as for the seconds."""
        told = self.peak_memory_bytes
        return None if self.unmeasured else (int((1 - MARGIN) * told), int((1 + MARGIN) * told))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        found = asdict(self) | {"parts": [part._asdict() for part in self.parts], "folder": str(self.folder)}
        return {
            "kind": "forecast",
            "bitsmith": __version__,
            **found,
            "margin": MARGIN,
            "seconds_interval": self.seconds_interval,
            "peak_memory_interval_bytes": self.memory_interval,
        }

    def behind(self, other: Forecast) -> Forecast:
        """Return the forecast of a run that does what `other` tells first, for its own scratch."""
        return replace(
            self,
            seconds=self.seconds + other.seconds,
            peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes),
            scratch_bytes=self.scratch_bytes + other.output_bytes + other.scratch_bytes,
            read_bytes=self.read_bytes + other.read_bytes,
            written_bytes=self.written_bytes + other.written_bytes,
            parts=(*other.parts, *self.parts),
            calibrated_seconds=self.calibrated_seconds + other.calibrated_seconds,
            unmeasured=(*other.unmeasured, *self.unmeasured),
        )

    def refuse_too_large(self) -> None:
        """Raise OutputError where the disk, BitsmithError where memory has no room for the run.

        Memory is not refused where part of the run is unmeasured.
        """
        needed, free = self.output_bytes + self.scratch_bytes, free_bytes(self.folder)
        if needed > free:
            raise OutputError(
                f"{self.command} needs {needed:,} bytes of disk, {free:,} are free", path=self.folder
            )
        if not self.unmeasured and self.peak_memory_bytes > (free := available_bytes()):
            raise BitsmithError(
                f"{self.command} needs {self.peak_memory_bytes:,} bytes of memory, {free:,} can be had"
            )


class Io(NamedTuple):
    """Bytes that this process has asked the system to read and to write so far."""

    read: int = 0
    written: int = 0

    def since(self, before: Io) -> Io:
        """Return what came after `before`."""
        return Io(self.read - before.read, self.written - before.written)


def io_so_far() -> Io:
    """Return this process's counters; zeros on a system without them."""
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/self/io").read_text("utf-8").splitlines()
        found = dict(line.split(": ") for line in lines)
        return Io(int(found["rchar"]), int(found["wchar"]))
    return Io()


def seconds_of_process() -> float:
    """Return how long this process has been running; its processor time where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.process_time()


def free_bytes(folder: Path) -> int:
    """Return the room on the disk that holds `folder`."""
    return shutil.disk_usage(folder).free


def folder_of(out: Path) -> Path:
    """Return the folder that an output goes into, or would; the temporary one where there is none."""
    parent = out.absolute().parent
    return parent if parent.is_dir() and os.access(parent, os.W_OK) else Path(tempfile.gettempdir())


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Make a folder to rehearse in, beside the output and so on its disk; it goes at the end."""
    with tempfile.TemporaryDirectory(prefix=".forecast-", dir=folder) as made:
        yield Path(made)


@dataclass
class Budget:
    """The seconds that measuring has left."""

    seconds: float = CALIBRATION_SECONDS
    began: float = field(default_factory=time.perf_counter)

    @property
    def spent(self) -> float:
        """Seconds since the first measurement."""
        return time.perf_counter() - self.began

    def share(self, parts: float) -> float:
        """Return an equal share of what is left for each of so many measurements."""
        return max(0.0, self.seconds - self.spent) / max(1.0, parts)


def disk_part(files: Sequence[Path], rates: MachineRates, meanwhile_seconds: float = 0.0) -> Part:
    """Return the wait for what is not in the page cache, beyond the work that goes on meanwhile."""
    missing = max(0, sum(path.stat().st_size for path in files) - cached_bytes(files))
    rate = rates.disk_read or float("inf")
    wait = max(0.0, missing / rate - meanwhile_seconds)
    return Part("waiting for the disk", wait, missing, "bytes not in the page cache", rate)


def total_seconds(parts: Iterable[Part]) -> float:
    """Return the sum over parts."""
    return sum(part.seconds for part in parts)
