"""What every benchmark shares: sides that take turns, children that are watched, limits, one form of result.

A script measures bitsmith and its peers on one input in one run and hands `report` its rows:

    turns = alternate({OURS: ours, "ggml": theirs}, repeats=5)
    known = limits("memory_write", threads=1)
    rows = [rate_row("Q4_K", turns, n, "weights/s", limit=known["memory_write"], limit_amount=4 * n)]
    report("decode", {"statement": "…", "threads": 1}, rows, known, out=options.out)

`problems` finds what in a result has not the form that `docs/performance.md` is made from.
"""

from children import MEASURES, ChildFailedError, Ran, child, drop_cache
from rates import LIMITS, Limit, limits
from result import RESULTS, ROOT, Row, arguments, machine, problems, rate_row, report, seconds_row, value_row
from turns import OURS, Spread, Turns, alternate, seconds_of

__all__ = [
    "LIMITS",
    "MEASURES",
    "OURS",
    "RESULTS",
    "ROOT",
    "ChildFailedError",
    "Limit",
    "Ran",
    "Row",
    "Spread",
    "Turns",
    "alternate",
    "arguments",
    "child",
    "drop_cache",
    "limits",
    "machine",
    "problems",
    "rate_row",
    "report",
    "seconds_of",
    "seconds_row",
    "value_row",
]  # fmt: skip
