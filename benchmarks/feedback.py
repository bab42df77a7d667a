"""What error feedback costs over the plain weighted search of its type in the same run, and what it brings.

    python benchmarks/feedback.py [--widths 1024,4096] [--types Q4_K,IQ4_XS] [--out FILE]

Both take turns on the same Gaussian rows, whose inputs are correlated (64 directions and noise, columns of
log-normal size). `times` is the cost of the feedback in plain searches, `times_with_factors` that with the
factors of the site's second moments, for a matrix of as many rows as columns, and `output_error` the
feedback's `tr(E H Eᵀ)` over the search's. The limit is the matrix products that bring each column's target
up to date, a multiply-add per earlier column, at the rate of float32 products measured in the same run;
`floor_times` is these and one plain search, in plain searches: no feedback by float32 products costs less.
`times_of_ggml` is the cost in searches of ggml's own with the same importance on the same rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
from measuring import OURS, Limit, Row, alternate, arguments, limits, rate_row, report
from numpy.typing import NDArray

from bitsmith.formats import FORMATS, format_named
from bitsmith.formats.integer import GRIDS
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes import grid_feedback
from bitsmith.passes.rounding import round_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import ggml_oracle

Float32 = NDArray[np.float32]
ROWS = 512
TYPES = "Q4_K,IQ4_XS,IQ4_NL,Q4_0,Q5_K,Q6_K,Q3_K,Q2_K,int4_g128"
DAMPING = 0.03


def moment_of(width: int) -> Float32:
    """Return E[x x\u1d40] of correlated inputs (`width width`)."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((width, width), np.float32)
    inputs += (
        0.3 * rng.standard_normal((width, 64), np.float32) @ rng.standard_normal((64, width), np.float32)
    )
    inputs *= rng.lognormal(0, 0.7, width).astype(np.float32)
    found: Float32 = inputs.T @ inputs / np.float32(width)
    return found


def sides_of(
    name: str, rows: Float32, importance: Float32, metric: InputMetric
) -> tuple[Callable[[], Float32], Callable[[], Float32], Callable[[], object], Callable[[], object]]:
    """Return what the feedback and the search decode to, and the two to be timed."""
    if name in GRIDS:
        grid = GRIDS[name]

        def fed() -> object:
            return grid_feedback.feedback(grid, rows, metric)

        def searched() -> object:
            return grid.quantize(rows, importance)

        return (
            lambda: grid.dequantize(grid_feedback.feedback(grid, rows, metric)),
            lambda: grid.dequantize(grid.quantize(rows, importance)),
            fed,
            searched,
        )
    form = format_named(name)
    return (
        lambda: form.decode(round_rows(form, rows, metric)),
        lambda: form.decode(form.encode(rows, importance)),
        lambda: round_rows(form, rows, metric),
        lambda: form.encode(rows, importance),
    )


def measured(name: str, width: int, moment: Float32, metric: InputMetric, factors: float, repeats: int,
             limit: Limit) -> Row:  # fmt: skip
    """Return the throughput of both on rows of `width` weights; `factors` is the seconds a metric took."""
    rows = (np.random.default_rng(1).standard_normal((ROWS, width)) * 0.02).astype(np.float32)
    importance = np.diagonal(moment).copy()
    fed, searched, timed, plain = sides_of(name, rows, importance, metric)

    def cost(decoded: Float32) -> float:
        error = (decoded - rows).astype(np.float32)
        return float(np.einsum("ij,ij->", error @ moment, error, dtype=np.float64))

    ratio = cost(fed()) / cost(searched())
    sides = {OURS: timed, "weighted search": plain}
    if name in FORMATS:
        sides["ggml's search"] = lambda: ggml_oracle.quantize(name, rows, importance)
    turns = alternate(sides, repeats)
    own, other = turns[OURS].median, turns["weighted search"].median
    products = rows.size * width / (limit.rate.high or limit.rate.median)
    whole = (own * width / ROWS + factors) / (other * width / ROWS)
    facts = {"output_error": ratio, "times": own / other, "times_with_factors": whole}
    facts["floor_times"] = 1 + products / other
    if "ggml's search" in turns:
        facts["times_of_ggml"] = own / turns["ggml's search"].median
    facts["beside"] = (
        f"{own / other:.1f} times the search, {whole:.1f} with factors, {facts['floor_times']:.1f} at least; "
        + (f"{facts['times_of_ggml']:.2f} times ggml's; " if "times_of_ggml" in facts else "")
        + f"output error {ratio:.3f}"
    )
    done = rows.size * width
    return rate_row(
        f"{name}, {width} columns", turns, rows.size, "weights/s", limit=limit, limit_amount=done, **facts
    )


def main() -> None:
    """Run the comparison and print or write it."""
    parser = arguments(__doc__)
    parser.add_argument("--widths", default="1024,2048,4096")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    numba.set_num_threads(1)
    known = limits("matrix", threads=1)
    rows = []
    for width in map(int, chosen.widths.split(",")):
        with one_blas_thread():
            moment = moment_of(width)
            started = time.perf_counter()
            metric = InputMetric(moment, DAMPING)
            metric.groups(256)
            factors = time.perf_counter() - started
            for name in chosen.types.split(","):
                row = measured(name, width, moment, metric, factors, chosen.repeats, known["matrix"])
                rows.append(row)
                print(row.case, row.facts["beside"], row.limit_fraction, file=sys.stderr, flush=True)
    protocol = {
        "statement": f"{ROWS} Gaussian rows in one thread, feedback and weighted search in turns; damping "
        f"{DAMPING:g}.",
        "threads": 1,
        "repeats": chosen.repeats,
    }
    report("feedback", protocol, rows, known, out=chosen.out)


if __name__ == "__main__":
    main()
