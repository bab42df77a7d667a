"""How fast this machine is at what runs are made of: disk, memory, float32 products, digests."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitsmith.numerics.threads import one_blas_thread

_READ_BYTES = 8 << 20
_SAMPLE_BYTES = 256 << 20
_MATRIX = 768


@dataclass(frozen=True)
class MachineRates:
    """Measured rates, in bytes or floating-point operations per second.

    `disk_read` is past the page cache, None where no file was to be read; `disk_write` includes the wait
    until the bytes lie on the disk. `memory` is a copy's bytes read and written. `matrix` is float32 products
    on `threads` threads, one product each; `sha256` is on one thread.
    """

    threads: int
    disk_read: float | None
    disk_write: float
    memory: float
    matrix: float
    sha256: float


def machine_rates(
    files: Sequence[Path], folder: Path, threads: int, *, work_seconds: float = 10.0
) -> MachineRates:
    """Measure reads of `files`, writes into `folder` of a file without a name, and what needs no disk.

    Takes a second, less for work of less than `work_seconds` = 10. Memory held stays under 64 MiB.
    """
    share = min(1.0, max(0.1, work_seconds / 10)) / 5
    return MachineRates(
        threads=threads,
        disk_read=disk_read_rate(files, share),
        disk_write=disk_write_rate(folder, share),
        memory=_memory_rate(share),
        matrix=_matrix_rate(threads, share),
        sha256=_hash_rate(share),
    )


def cached_bytes(files: Iterable[Path]) -> int:
    """Return how many bytes of files lie in the page cache now; 0 on a system that does not tell."""
    return sum(_cached(path) for path in files)


def _cached(path: Path) -> int:
    with suppress(OSError, ValueError, AttributeError), path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        with mmap.mmap(
            stream.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE
        ) as view:
            pages = -(-size // mmap.PAGESIZE)
            found = (ctypes.c_ubyte * pages)()
            start = ctypes.addressof(ctypes.c_char.from_buffer(view))
            told = ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found)
            if told == 0:
                return min(size, int((np.frombuffer(bytes(found), np.uint8) & 1).sum()) * mmap.PAGESIZE)
    return 0


def disk_read_rate(files: Sequence[Path], seconds: float = 0.2) -> float | None:
    """Return bytes per second of reading the largest of `files` from its middle, not from the page cache.

    Pages in the way are given back first, where the system can; None without a file that holds anything.
    """
    sizes = [(path.stat().st_size, path) for path in files if path.is_file()]
    if not sizes or max(sizes)[0] == 0:
        return None
    size, path = max(sizes)
    first = size // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), first, _SAMPLE_BYTES, os.POSIX_FADV_DONTNEED)
        stream.seek(first)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds and done < _SAMPLE_BYTES:
            if not (count := stream.readinto(buffer)):
                break
            done += count
    return done / (time.perf_counter() - began) if done else None


def disk_write_rate(folder: Path, seconds: float = 0.2) -> float:
    """Return bytes per second of writing a file without a name into `folder` until it lies on the disk."""
    block = np.random.default_rng(0).integers(0, 256, _READ_BYTES, np.uint8).tobytes()
    with tempfile.TemporaryFile(dir=folder) as stream:
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds and done < _SAMPLE_BYTES:
            done += stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
    return done / (time.perf_counter() - began)


def _memory_rate(seconds: float) -> float:
    source = np.ones(4 << 20, np.float32)
    target = np.empty_like(source)

    def copy() -> float:
        target[...] = source
        return 2.0 * source.nbytes

    return _rate(copy, seconds)


@one_blas_thread()
def _matrix_rate(threads: int, seconds: float) -> float:
    """Return operations per second of `threads` products at a time, each on one thread."""
    rng = np.random.default_rng(0)
    factors = [rng.standard_normal((2, _MATRIX, _MATRIX), np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def products() -> float:
            list(pool.map(lambda pair: pair[0] @ pair[1], factors))
            return 2.0 * threads * _MATRIX**3

        return _rate(products, seconds)


def _hash_rate(seconds: float) -> float:
    block = bytes(1 << 20)

    def digest() -> float:
        hashlib.sha256(block)
        return float(len(block))

    return _rate(digest, seconds)


def _rate(work: Callable[[], float], seconds: float) -> float:
    """Return what `work` says it did, per second, over repeats of it; the first is not counted."""
    work()
    began, done = time.perf_counter(), 0.0
    while (spent := time.perf_counter() - began) < seconds:
        done += work()
    return done / spent
