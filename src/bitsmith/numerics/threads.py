"""Spread independent pieces of work over threads; compiled loops release the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba

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
