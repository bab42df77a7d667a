"""Spread independent pieces of work over threads; compiled loops release the interpreter's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numba
from threadpoolctl import threadpool_limits

_GRAIN = 64


def for_ranges(count: int, least: int, most: int, work: Callable[[int, int], None]) -> None:
    """Call `work(first, last)` for consecutive ranges that cover `count` items.

    Runs on as many threads as `numba.get_num_threads()` says while each gets `least` items, in ranges of at
    most `most`, as many for each thread. The cuts depend on the number of threads, so what `work` does to an
    item must not depend on the cuts.
    """
    threads = max(1, min(numba.get_num_threads(), count // least))
    pieces = max(1, -(-count // (most * threads))) * threads
    size = -(-count // (pieces * _GRAIN)) * _GRAIN
    starts = range(0, count, max(size, 1))
    if threads == 1:
        for first in starts:
            work(first, min(first + size, count))
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda first: work(first, min(first + size, count)), starts):
            pass


class _BlasLimit:
    """The process's limit of BLAS threads, and how many ask for it now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = 0
        self._limits: threadpool_limits | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._held == 0:
                self._limits = threadpool_limits(1, user_api="blas")  # type: ignore[no-untyped-call]
            self._held += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._held -= 1
            if self._held == 0 and self._limits is not None:
                self._limits.restore_original_limits()  # type: ignore[no-untyped-call]


_BLAS = _BlasLimit()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let BLAS and LAPACK use one thread of the process: what they return depends on how many they use.

    Also a decorator; may be nested, and held by several threads at once.
    """
    with _BLAS:
        yield
