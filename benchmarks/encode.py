"""Encoding and decoding every type against ggml in the same run: throughput, squared error, bandwidth.

    python benchmarks/encode.py [--threads 1] [--repeats 5] [--types Q4_K,Q6_K] [--out FILE]

Ours and `ggml_quantize_chunk` take turns on the same rows (Gaussian, 2048 wide), without importance and with
one (chi-square, as of squared activations); `error_ratio` is our importance-weighted squared error over
ggml's. Decoding is to float32 in memory that is there already, ours and ggml's `dequantize_row_…` (one thread
each), judged against the rate at which this machine fills memory. ggml's rows are shared out evenly over
threads. Of some types the same encoding is also done by one thread and by all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
from measuring import OURS, Limit, Row, alternate, arguments, limits, rate_row, report

from bitsmith.formats import FORMATS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import ggml_oracle

N_IN = 2048
SLOW = ("IQ4_NL", "IQ4_XS")  # in ggml
PLAIN = ("F32", "F16", "BF16")
SPREAD = ("Q4_K", "IQ4_XS", "Q6_K", "Q8_0")
DECODED_ROWS = 32_768


def rows_for(name: str) -> np.ndarray:
    """Return rows that take ggml about as long for any type."""
    count = 256 if name in SLOW else 1024 if name.endswith("_K") else 2048
    drawn = np.random.default_rng(0).standard_normal((count, N_IN)) * 0.02
    return drawn.astype(np.float32)


def error(rows: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None) -> float:
    weights = 1.0 if importance is None else importance.astype(np.float64)
    return float((weights * (rows.astype(np.float64) - decoded) ** 2).sum())


def encoded(name: str, importance: np.ndarray | None, threads: int, repeats: int) -> Row:
    """Return throughput and error of encoding with or without importance."""
    rows = rows_for(name)
    turns = alternate(
        {
            OURS: lambda: FORMATS[name].encode(rows, importance),
            "ggml": lambda: ggml_oracle.quantize(name, rows, importance, threads=threads),
        },
        repeats,
    )
    facts = {}
    if name not in PLAIN:
        ours = FORMATS[name].decode(FORMATS[name].encode(rows, importance))
        theirs = ggml_oracle.dequantize(name, ggml_oracle.quantize(name, rows, importance, threads=2))
        facts["error_ratio"] = error(rows, ours, importance) / error(rows, theirs, importance)
        facts["beside"] = f"squared error {facts['error_ratio']:.3f} of ggml's"
    how = "without importance" if importance is None else "with importance"
    return rate_row(f"{name}, encode {how}", turns, rows.size, "weights/s", **facts)


def decoded(name: str, repeats: int, limit: Limit) -> Row:
    """Return throughput of decoding by one thread, in bytes of float32."""
    few = FORMATS[name].encode(rows_for(name)[:256])
    blocks = np.tile(few, (DECODED_ROWS // len(few), 1))
    out = np.empty((DECODED_ROWS, N_IN), np.float32)
    sides = {OURS: lambda: FORMATS[name].decode(blocks, out)}
    if name != "F32":  # ggml has nothing to do there
        sides["ggml"] = lambda: ggml_oracle.dequantize(name, blocks, out)
    turns = alternate(sides, repeats)
    return rate_row(f"{name}, decode", turns, out.nbytes, "bytes/s", limit=limit, limit_amount=out.nbytes)


def scaled(name: str, importance: np.ndarray, repeats: int) -> Row:
    """Return what all threads encode beside what one does."""
    rows = np.tile(rows_for(name), (4, 1))
    every = numba.config.NUMBA_NUM_THREADS

    def work(threads: int) -> None:
        numba.set_num_threads(threads)
        FORMATS[name].encode(rows, importance)

    many = f"{every} threads"
    turns = alternate({many: lambda: work(every), "1 thread": lambda: work(1)}, repeats)
    return rate_row(
        f"{name}, encode with importance by {many}",
        turns,
        rows.size,
        "weights/s",
        ours=many,
        measure="threads",
    )


def all_rows(types: list[str], threads: int, repeats: int, limit: Limit) -> Iterator[Row]:
    """Yield everything, type by type."""
    importance = np.random.default_rng(1).chisquare(1, N_IN).astype(np.float32)
    for name in types:
        for weights in (None, importance):
            numba.set_num_threads(threads)
            yield encoded(name, weights, threads, repeats)
        numba.set_num_threads(1)
        yield decoded(name, repeats, limit)
    for name in SPREAD:
        if name in types and numba.config.NUMBA_NUM_THREADS > 1:
            yield scaled(name, importance, repeats)


def main() -> None:
    """Run the comparison and print or write it."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of encoding, on both sides")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--types", default=",".join(FORMATS))
    chosen = parser.parse_args()
    known = limits("memory_write", "memory_copy", threads=1)
    rows = []
    for row in all_rows(chosen.types.split(","), chosen.threads, chosen.repeats, known["memory_write"]):
        rows.append(row)
        ratio = {name: round(spread.median, 2) for name, spread in row.ratios.items()}
        print(
            row.case,
            ratio,
            row.limit_fraction or "",
            row.facts.get("beside", ""),
            file=sys.stderr,
            flush=True,
        )
    protocol = {
        "statement": f"Gaussian rows of {N_IN} weights; encoding with {chosen.threads} thread(s) on each "
        "side, decoding with one, in turns.",
        "threads": chosen.threads,
        "repeats": chosen.repeats,
        "cores": os.cpu_count(),
    }
    report("encode", protocol, rows, known, out=chosen.out)


if __name__ == "__main__":
    main()
