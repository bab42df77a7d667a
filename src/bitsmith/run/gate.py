"""Gates: a measured value against a limit. What was not measured does not pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal

Direction = Literal["below", "at most", "at least"]


class Verdict(StrEnum):
    """What a gate says; only PASS lets anything through."""

    PASS = "PASS"  # noqa: S105 (a verdict, no password)
    FAIL = "FAIL"
    UNMEASURED = "UNMEASURED"


@dataclass(frozen=True)
class Gate:
    """A limit on one measure: values `below` it, `at most` it or `at least` it pass."""

    name: str
    limit: float
    direction: Direction
    unit: str

    def judge(
        self,
        value: float | None,
        *,
        low: float | None = None,
        high: float | None = None,
        evidence: str = "",
    ) -> Judged:
        """Judge a value by the worse end of its interval `low … high`, by itself where it has none.

        None is UNMEASURED. A NaN or infinite value FAILs: it was measured, and it is broken.
        """
        outcome = Verdict.UNMEASURED
        if value is not None:
            outcome = Verdict.PASS if self._holds(value, low, high) else Verdict.FAIL
        if value is not None and not math.isfinite(value):
            said = f"measured {value}"
            value, low, high = None, None, None
            evidence = f"{said}: {evidence}" if evidence else said
        return Judged(self.name, outcome, value, self.limit, self.unit, low, high, evidence, self.direction)

    def _holds(self, value: float, low: float | None, high: float | None) -> bool:
        worse = low if self.direction == "at least" else high
        ends = [value, value if worse is None else worse]
        if not all(map(math.isfinite, ends)):
            return False
        if self.direction == "at least":
            return min(ends) >= self.limit
        return max(ends) < self.limit if self.direction == "below" else max(ends) <= self.limit


@dataclass(frozen=True)
class Judged:
    """A gate's verdict on a value.

    `value` is None where nothing, or no number, was measured; `low` and `high` where there is no interval.
    """

    name: str
    outcome: Verdict
    value: float | None
    limit: float
    unit: str
    low: float | None = None
    high: float | None = None
    evidence: str = ""
    direction: Direction = "at most"

    @property
    def passed(self) -> bool:
        """Whether the gate lets it through."""
        return self.outcome is Verdict.PASS

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {**asdict(self), "outcome": self.outcome.value}


def all_pass(judged: Iterable[Judged]) -> bool:
    """Tell whether there are verdicts, and all are PASS: nothing measured is nothing passed."""
    outcomes = [one.passed for one in judged]
    return bool(outcomes) and all(outcomes)


def first_failure(judged: Iterable[Judged]) -> Judged | None:
    """Return the first verdict that is not PASS."""
    return next((one for one in judged if not one.passed), None)


SVD_ERROR = Gate("SVD error", 0.10, "below", "relative error")
"""|W - W_r| / |W|; the limit is the one the seed gives its ranks for."""
QUANTIZATION_ERROR = Gate("quantization error", 0.25, "below", "relative error")
"""|W_r - Ŵ_r| / |W_r|; the limit is what an ideal code of 2 bits leaves of Gaussian weights, 2^-2."""
TOTAL_ERROR = Gate("total error", 1.0, "below", "relative error")
"""|W - Ŵ| / |W|; storing zeros scores 1."""
ERROR_OVER_THEORY = Gate("error over theory", 2.0, "at most", "ratio")
"""The measured error over the one that the plan promised: of truncation, or of rounding where that is all."""
BYTES_OVER_PLAN = Gate("bytes over plan", 1.25, "at most", "ratio")
"""Stored bytes, scales and padding included, over the bytes that the claimed ratio stands for."""
NOT_DOMINATED = Gate("smaller or closer than row-int4", 1.0, "below", "ratio")
"""The smaller of bytes over row-int4's and total error over row-int4's: at 1 it is larger and errs more."""
FORWARD_COSINE = Gate("forward cosine", 0.95, "at least", "cosine")
"""Between what a layer adds to held-out hidden states with original and with compressed weights."""
SHAPES = Gate("shapes missing", 0, "at most", "tensors")
FINITE = Gate("values not finite", 0, "at most", "values")
PPL = Gate("perplexity", 100.0, "below", "perplexity")
"""The seed's absolute limit."""
PPL_RATIO = Gate("perplexity over the original's", 2.0, "at most", "ratio")
