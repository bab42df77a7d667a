"""The figures of `sahc`: its table, its comparison with int4 alone, its quantizer's part of the error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitsmith.numerics.resampling import ratio_of_sums
from bitsmith.run.evaluation import INTERVAL, Measure
from bitsmith.run.gate import QUANTIZATION_ERROR, SVD_ERROR, TOTAL_ERROR, Verdict
from bitsmith.run.sahc_plan import COMPONENTS
from bitsmith.run.sahc_rows import Attempt, ComponentRow, SahcRow, Written

MATRICES = "95 % bootstrap over matrices"


def component_rows(rows: Sequence[SahcRow]) -> tuple[ComponentRow, ...]:
    """Return the table: what was claimed of each component, what its plan takes here, what is stored."""
    total = sum(map(_size, rows))
    found = []
    for plan in COMPONENTS:
        own = [row for row in rows if row.component == plan.name]
        if not own:
            continue
        size, stored = sum(map(_size, own)), sum(row.stored_bytes for row in own)
        theory = sum(row.attempts[0].stored_bytes if row.attempts else row.stored_bytes for row in own)
        known = stored and all(row.ratio is not None for row in own)
        found.append(
            ComponentRow(
                name=plan.name,
                what=plan.what,
                parameters=size,
                share=size / total,
                claimed_ratio=plan.claimed_ratio,
                theory_ratio=2 * size / theory if theory else None,
                actual_bytes=stored,
                ratio=2 * size / stored if known else None,
                published_ratio=plan.published_ratio,
                methods=dict(sorted(Counter(row.method for row in own).items())),
            )
        )
    return tuple(found)


def compared(one: Written, other: Written) -> Measure:
    """Return the ratio of two perplexities on the same chunks, with its interval."""
    differences = np.subtract(one.chunk_nll_nats, other.chunk_nll_nats)
    found = ratio_of_sums(differences, np.ones_like(differences))
    if found is None or found.low is None or found.high is None:
        return Measure(float(np.exp(differences.mean())), "ratio", None, None, None)
    value, low, high = (float(np.exp(nats)) for nats in (found.value, found.low, found.high))
    return Measure(value, "ratio", low, high, INTERVAL)


def counted(rows: Sequence[SahcRow], more: Sequence[Mapping[str, Any]]) -> tuple[int, int, int]:
    """Return how many verdicts were PASS, FAIL and UNMEASURED, of rows and of the artifact."""
    outcomes = Counter(
        gate["outcome"] for gate in [*more, *(g for row in rows for one in row.attempts for g in one.gates)]
    )
    return tuple(outcomes[verdict.value] for verdict in Verdict)  # type: ignore[return-value]


def quantizer_faults(rows: Sequence[SahcRow]) -> dict[str, Measure]:
    """Return the mean errors of the planned low rank: truncated, of its rounding, in total.

    The seed's rounding took .834 to .982, which stands for a rounding error of .94 of what was left.
    """
    tried = [attempt for row in rows if row.component == "C1" for attempt in row.attempts[:1]]
    return {
        gate.name: mean
        for gate in (SVD_ERROR, QUANTIZATION_ERROR, TOTAL_ERROR)
        if (mean := _mean([_value(attempt, gate.name) for attempt in tried])) is not None
    }


def _value(attempt: Attempt, name: str) -> float | None:
    return next((gate["value"] for gate in attempt.gates if gate["name"] == name), None)


def _mean(values: Sequence[float | None]) -> Measure | None:
    known = [value for value in values if value is not None]
    found = ratio_of_sums(known, [1.0] * len(known)) if known else None
    if found is None:
        return None
    interval = None if found.low is None else MATRICES
    return Measure(found.value, "relative error", found.low, found.high, interval)


def _size(row: SahcRow) -> int:
    return int(np.prod(row.shape, dtype=np.int64))
