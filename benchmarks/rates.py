"""What this machine can do at most: memory, matrix products, hashing and disk, measured in the same run."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import drop_cache
from turns import Spread, seconds_of


@dataclass(frozen=True)
class Limit:
    """One rate of the machine, in bytes or operations per second, and how it was measured."""

    name: str
    rate: Spread
    unit: str
    how: str

    def to_json(self) -> dict[str, Any]:
        """Return its fields, without the name."""
        return {"rate": self.rate.to_json(), "unit": self.unit, "how": self.how}


MEMORY_BYTES = 256 << 20
DISK_BYTES = 256 << 20
MATRIX = 2048
CHUNK_BYTES = 8 << 20


def limits(*names: str, threads: int = 1, folder: Path | None = None, repeats: int = 5) -> dict[str, Limit]:
    """Measure rates of the machine by name (all of `LIMITS` when none is named), about a second each.

    `threads` threads work at once in those of memory and matrices; the disk's are of files in `folder`
    (default: the temporary folder), 256 MB large.
    """
    unknown = set(names) - set(LIMITS)
    if unknown:
        raise ValueError(f"unknown limits {sorted(unknown)}; known: {', '.join(LIMITS)}")
    found = {}
    for name in names or LIMITS:
        unit, how, measure = LIMITS[name]
        if name.startswith(("disk", "cp", "safetensors")):
            with tempfile.TemporaryDirectory(dir=folder) as made:
                rates = measure(Path(made), min(repeats, 3))
        else:
            rates, how = measure(threads, repeats), f"{how}; {threads} thread{'s' * (threads > 1)}"
        found[name] = Limit(name, Spread.of(rates), unit, how)
    return found


def _together(work: Callable[[int], object], threads: int) -> float:
    """Return the seconds until `threads` threads have each done their part; numpy lets them run at once."""
    running = [threading.Thread(target=work, args=(part,)) for part in range(threads)]
    started = time.perf_counter()
    for one in running:
        one.start()
    for one in running:
        one.join()
    return time.perf_counter() - started


def _memory(work: Callable[[Any, Any], object], moved: int) -> Callable[[int, int], list[float]]:
    def measure(threads: int, repeats: int) -> list[float]:
        import numpy as np  # noqa: PLC0415

        count = MEMORY_BYTES // 4
        pairs = [(np.ones(count, np.float32), np.ones(count, np.float32)) for _ in range(threads)]
        _together(lambda part: work(*pairs[part]), threads)
        return [
            threads * moved * MEMORY_BYTES / _together(lambda part: work(*pairs[part]), threads)
            for _ in range(repeats)
        ]

    return measure


def _matrix(threads: int, repeats: int) -> list[float]:
    import numpy as np  # noqa: PLC0415
    from threadpoolctl import threadpool_limits  # noqa: PLC0415

    a, b = (np.random.default_rng(i).standard_normal((MATRIX, MATRIX), np.float32) for i in (0, 1))
    out = np.empty_like(a)
    with threadpool_limits(threads):
        np.matmul(a, b, out=out)
        return [2 * MATRIX**3 / seconds_of(lambda: np.matmul(a, b, out=out)) for _ in range(repeats)]


def _sha256(threads: int, repeats: int) -> list[float]:
    data = os.urandom(64 << 20)
    work = lambda _: hashlib.sha256(data).digest()  # noqa: E731
    return [threads * len(data) / _together(work, threads) for _ in range(repeats)]


def _written(file: Path, *, synced: bool = True) -> None:
    chunk = os.urandom(CHUNK_BYTES)
    with file.open("wb") as out:
        for _ in range(DISK_BYTES // CHUNK_BYTES):
            out.write(chunk)
        if synced:
            out.flush()
            os.fsync(out.fileno())


def _read(file: Path) -> None:
    space = bytearray(CHUNK_BYTES)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(space):
            pass


def _disk_write(folder: Path, repeats: int) -> list[float]:
    return [DISK_BYTES / seconds_of(lambda: _written(folder / "file")) for _ in range(repeats)]


def _disk_read(folder: Path, repeats: int) -> list[float]:
    _written(folder / "file")
    rates = []
    for _ in range(repeats):
        drop_cache(folder / "file")
        rates.append(DISK_BYTES / seconds_of(lambda: _read(folder / "file")))
    return rates


def _disk_read_cached(folder: Path, repeats: int) -> list[float]:
    _written(folder / "file")
    _read(folder / "file")
    return [DISK_BYTES / seconds_of(lambda: _read(folder / "file")) for _ in range(repeats)]


def _cp(folder: Path, repeats: int) -> list[float]:
    _written(folder / "file")
    copy = shutil.which("cp") or "cp"
    rates = []
    for _ in range(repeats):
        drop_cache(folder / "file")
        command = [copy, "--reflink=never", str(folder / "file"), str(folder / "copy")]

        def work(command: list[str] = command) -> None:
            subprocess.run(command, check=True)
            with (folder / "copy").open("rb") as opened:
                os.fsync(opened.fileno())

        rates.append(DISK_BYTES / seconds_of(work))
        (folder / "copy").unlink()
    return rates


def _safetensors(folder: Path, repeats: int) -> list[float]:
    import numpy as np  # noqa: PLC0415
    from safetensors.numpy import load_file, save_file  # noqa: PLC0415

    rows = np.random.default_rng(0).standard_normal((DISK_BYTES // 16 // 1024, 1024), np.float32)
    save_file({f"{n}": rows for n in range(4)}, folder / "file")
    load_file(folder / "file")
    return [DISK_BYTES / seconds_of(lambda: load_file(folder / "file")) for _ in range(repeats)]


def _fill(_: Any, out: Any) -> None:
    out.fill(1.5)


def _sum(rows: Any, _: Any) -> None:
    rows.view("u8").max()


def _copy(rows: Any, out: Any) -> None:
    out[:] = rows


LIMITS: dict[str, tuple[str, str, Callable[..., list[float]]]] = {
    "memory_read": ("bytes/s", "largest of 256 MiB of integers per thread", _memory(_sum, 1)),
    "memory_write": ("bytes/s", "256 MiB per thread filled with one float32", _memory(_fill, 1)),
    "memory_copy": ("bytes/s", "256 MiB per thread copied, bytes copied once", _memory(_copy, 1)),
    "matrix": ("operations/s", f"float32 matrix product of {MATRIX}³, 2 operations each", _matrix),
    "sha256": ("bytes/s", "64 MiB per thread", _sha256),
    "disk_write": ("bytes/s", "256 MiB written and fsynced", _disk_write),
    "disk_read": ("bytes/s", "256 MiB read after their cached pages are dropped", _disk_read),
    "disk_read_cached": ("bytes/s", "256 MiB read out of the page cache", _disk_read_cached),
    "cp": ("bytes/s", "256 MiB copied by cp from dropped pages, then fsynced", _cp),
    "safetensors": ("bytes/s", "256 MiB of cached float32 tensors loaded by safetensors", _safetensors),
}
