"""Spread independent pieces of work over threads; compiled loops release the interpreter's lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numba
import scipy.linalg  # noqa: F401 (a limit reaches only libraries that are loaded: scipy brings a BLAS of its own)
from threadpoolctl import threadpool_limits

_GRAIN = 64
_Piece = TypeVar("_Piece")
_Found = TypeVar("_Found")


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


def in_order(
    work: Callable[[_Piece], _Found], pieces: Iterable[_Piece], *, spare: int = 1, overlaps: bool = False
) -> Generator[_Found]:
    """Yield `work(piece)` in the order of the pieces, from as many threads as `numba.get_num_threads()` says.

    Compiled loops inside use one thread each. At most `spare` more than the threads are under way or wait to
    be taken, so that memory stays bounded. With `overlaps` one thread, too, works while its last result is in
    the caller's hands. Pieces that can be closed are, at the end. Whoever may stop before the end closes this
    too: a collector of garbage would wait for the threads from whatever thread it is in, maybe one of them.
    """
    threads = numba.get_num_threads()
    with _closing(pieces):
        if threads == 1 and not overlaps:
            yield from map(work, pieces)
        else:
            yield from _by_threads(work, pieces, threads, spare)


@contextmanager
def _closing(pieces: Iterable[object]) -> Iterator[None]:
    try:
        yield
    finally:
        if isinstance(pieces, Generator):
            pieces.close()


def _by_threads(
    work: Callable[[_Piece], _Found], pieces: Iterable[_Piece], threads: int, spare: int
) -> Iterator[_Found]:
    with ThreadPoolExecutor(threads, initializer=numba.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[_Found]] = deque()
        try:
            for piece in pieces:
                waiting.append(pool.submit(work, piece))
                if len(waiting) >= threads + spare:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()


@contextmanager
def at_most(threads: int | None) -> Iterator[None]:
    """Let compiled loops of the calling thread, and of those it starts here, use so many threads at most.

    None: as many as they use now. There are never more than cores that the process may run on.
    """
    before = numba.get_num_threads()
    numba.set_num_threads(min(before, threads or before))
    try:
        yield
    finally:
        numba.set_num_threads(before)


def ahead(pieces: Iterable[_Piece], most: int) -> Generator[_Piece]:
    """Yield pieces that a thread of its own takes from `pieces`, up to `most` before they are asked for.

    To be closed as `in_order` is, which does it.
    """
    iterator, threads = iter(pieces), numba.get_num_threads()
    with ThreadPoolExecutor(1, initializer=numba.set_num_threads, initargs=(threads,)) as pool:
        waiting = deque(pool.submit(_next, iterator) for _ in range(most))
        try:
            while found := waiting.popleft().result():
                waiting.append(pool.submit(_next, iterator))
                yield found[0]
        finally:
            for one in waiting:
                one.cancel()


def _next(iterator: Iterator[_Piece]) -> tuple[_Piece] | None:
    """Return the next piece in a tuple, None where there is none."""
    for piece in iterator:
        return (piece,)
    return None


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
