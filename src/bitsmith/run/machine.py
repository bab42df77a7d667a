"""What this machine has, and what processes on it use, as the kernel tells."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMINFO = Path("/proc/meminfo")
_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """Memory now and processor time so far of some processes; memory without the pages of mapped files."""

    memory_bytes: int = 0
    cpu_seconds: float = 0.0


def available_bytes() -> int:
    """Return the memory that can be had now; where that is not known, all of the machine's."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no control group, or one without a limit
        found = min(found, int(_CGROUP_LIMIT.read_text("utf-8")))
    with suppress(OSError):  # not Linux
        for line in _MEMINFO.read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                found = min(found, int(line.split()[1]) * 1024)
    return found


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows


def usage_of_sessions(sessions: Collection[int]) -> dict[int, Usage]:
    """Return what the processes of each session use together; nothing where none is left, or is not known."""
    total = dict.fromkeys(sessions, Usage())
    for entry in _PROC.iterdir() if _PROC.is_dir() and sessions else ():
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):  # it ended while being read
                fields = (entry / "stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()
                session = int(fields[3])
                if session in total:
                    cpu_seconds = sum(map(int, fields[11:15])) / _TICKS
                    held = total[session]
                    total[session] = Usage(
                        held.memory_bytes + _own_bytes(entry), held.cpu_seconds + cpu_seconds
                    )
    return total


def _own_bytes(entry: Path) -> int:
    """Return a process's anonymous and shared memory: mapped files go when memory is short."""
    found = {}
    for line in (entry / "status").read_text("utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssShmem", "VmRSS"):
            found[name] = int(value.split()[0]) * 1024
    if "RssAnon" in found:
        return found["RssAnon"] + found.get("RssShmem", 0)
    return found.get("VmRSS", 0)
