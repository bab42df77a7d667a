"""Spread independent pieces of work over threads; compiled loops release the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba


def for_ranges(count: int, piece: int, work: Callable[[int, int], None]) -> None:
    """Call `work(first, last)` for consecutive ranges of at most `piece` items out of `count`.

    Runs on as many threads as `numba.get_num_threads()` says. The ranges do not depend on that number.
    """
    starts = range(0, count, piece)
    threads = min(numba.get_num_threads(), len(starts))
    if threads <= 1:
        for first in starts:
            work(first, min(first + piece, count))
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda first: work(first, min(first + piece, count)), starts):
            pass
