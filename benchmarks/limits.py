"""What this machine can do at most, by one thread and by all: memory, matrix products, SHA-256, disk.

    python benchmarks/limits.py [--threads 2] [--folder DIR] [--repeats 5] [--out FILE]

Every other benchmark measures those it is judged against in its own run; this one shows them all. Files are
256 MiB large, in `--folder` (default: the temporary folder), memory is 256 MiB per thread. A disk's cache of
its own, or its host's, is not emptied.
"""

from __future__ import annotations

import os
from pathlib import Path

from measuring import LIMITS, Limit, Row, arguments, limits, report

THREADED = ("memory_read", "memory_write", "memory_copy", "matrix", "sha256")


def rows_of(threads: int, known: dict[str, Limit]) -> list[Row]:
    """Return a row for each limit as measured with so many threads."""
    words = "1 thread" if threads == 1 else f"{threads} threads"
    return [
        Row(
            f"{name}, {words}" if name in THREADED else name,
            limit.unit,
            "higher",
            {"machine": limit.rate},
            facts={"how": limit.how},
        )
        for name, limit in known.items()
    ]


def main() -> None:
    """Measure all limits and print or write them."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where files are written; default: the temporary folder")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    single = limits(folder=chosen.folder, repeats=chosen.repeats)
    rows = rows_of(1, single)
    if chosen.threads > 1:
        rows += rows_of(chosen.threads, limits(*THREADED, threads=chosen.threads, repeats=chosen.repeats))
    order = [*LIMITS]
    rows.sort(key=lambda row: order.index(row.case.split(",")[0]))
    statement = "Rates of this machine, each repeated; memory and disk by 256 MiB, matrices by 2048³ float32."
    report("limits", {"statement": statement, "repeats": chosen.repeats}, rows, single, out=chosen.out)


if __name__ == "__main__":
    main()
