"""Trying a row of the plan: its methods in turn, each gated, until one passes or the row is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitsmith.run.audit import AuditLog
from bitsmith.run.gate import (
    BYTES_OVER_PLAN,
    ERROR_OVER_THEORY,
    FORWARD_COSINE,
    NOT_DOMINATED,
    QUANTIZATION_ERROR,
    SVD_ERROR,
    TOTAL_ERROR,
    Gate,
    Judged,
    all_pass,
    first_failure,
)
from bitsmith.run.sahc_layer import Cosine
from bitsmith.run.sahc_methods import Coded, Method, Weights, relative_error, squared
from bitsmith.run.sahc_plan import INT4, STORED, PlanRow, promised_ratio
from bitsmith.run.sahc_rows import Attempt, SahcRow

Float32 = NDArray[np.float32]
Forward = Callable[[Float32], Cosine | None]
"""The cosine of a forward with one row's weights changed; None where no forward reaches it."""

WHO = "sahc gate"
_RESOLVED = 1e-6  # an error below it is rounding in float32


class Pick(NamedTuple):
    """A row with a method that passed: its place in the chain, its weights, its cosine alone."""

    plan: PlanRow
    weights: Weights
    at: int
    decoded: Float32 | None
    cosine: float | None
    attempts: tuple[Attempt, ...]

    @property
    def method(self) -> Method:
        """The method."""
        return self.plan.chain[self.at]


@dataclass(frozen=True)
class Trials:
    """Gates rows and tells the audit log."""

    audit: AuditLog
    cosine: Gate = FORWARD_COSINE

    def choose(
        self,
        plan: PlanRow,
        weights: Weights,
        forward: Forward,
        first: int = 0,
        before: tuple[Attempt, ...] = (),
    ) -> Pick:
        """Return a row with the first method of its chain, from `first` on, that passes every gate."""
        attempts = list(before)
        rival = INT4.code(weights) if len(plan.chain) > 1 and squared(weights.values) > 0 else None
        for at, method in enumerate(plan.chain[first:], first):
            if method is STORED or rival is None:
                break
            scheme = method.scheme(weights)
            if (early := _too_large(plan, at, weights)) is not None:
                attempts.append(_attempt(method, scheme, method.nbytes(weights), [early], _next(plan, at)))
                self._log(plan, method, [early], _next(plan, at))
                continue
            coded = rival if method is INT4 else method.code(weights)
            judged = _error_gates(plan, method, weights, coded, rival)
            if all_pass(judged):
                judged.append(self._forward_gate(forward(coded.decoded)))
            decision = _decision(plan, at, judged)
            attempts.append(_attempt(method, scheme, coded.stored_bytes, judged, decision))
            self._log(plan, method, judged, decision)
            if all_pass(judged):
                return Pick(plan, weights, at, coded.decoded, judged[-1].value, tuple(attempts))
        return self.kept(plan, weights, tuple(attempts))

    def kept(self, plan: PlanRow, weights: Weights, attempts: tuple[Attempt, ...]) -> Pick:
        """Return a row that is kept as stored."""
        if attempts:
            attempts = (*attempts, Attempt(STORED.name, "BF16", plan.source_bytes, (), "kept as stored"))
            self.audit.add("sahc plan", plan.name, evidence="every method failed", decision="kept as stored")
        return Pick(plan, weights, len(plan.chain) - 1, None, None, attempts)

    def advanced(self, pick: Pick, found: Judged, forward: Forward) -> Pick:
        """Return a row replanned for what a forward of several rows found."""
        decision = _next(pick.plan, pick.at)
        self.audit.judged(WHO, f"{pick.plan.name}: {pick.method.name}", found, decision)
        last = pick.attempts[-1]
        last = replace(last, gates=(*last.gates, found.to_json()), decision=decision)
        before = (*pick.attempts[:-1], last)
        return self.choose(pick.plan, pick.weights, forward, pick.at + 1, before)

    def _forward_gate(self, found: Cosine | None) -> Judged:
        if found is None:
            return self.cosine.judge(None, evidence="no forward of the text model passes through it")
        return self.cosine.judge(found.value, low=found.low, high=found.high, evidence=found.evidence)

    def _log(self, plan: PlanRow, method: Method, judged: list[Judged], decision: str) -> None:
        deciding = first_failure(judged) or judged[-1]
        for one in judged:
            said = decision if one is deciding else "passed" if one.passed else "failed too"
            self.audit.judged(WHO, f"{plan.name}: {method.name}", one, said)


def row_of(pick: Pick) -> SahcRow:
    """Return a row as it is reported."""
    plan, attempts = pick.plan, pick.attempts
    size = int(np.prod(plan.shape, dtype=np.int64))
    error, nbytes, scheme = 0.0, plan.source_bytes, "BF16"
    if pick.decoded is not None:
        error = relative_error(pick.weights.values, pick.decoded) or 0.0
        nbytes, scheme = attempts[-1].stored_bytes, attempts[-1].scheme
    passed = pick.decoded is None or attempts[-1].failed is None
    ratio = 2 * size / nbytes if passed and nbytes else None
    return SahcRow(
        plan.name,
        plan.component,
        plan.role,
        plan.layer,
        plan.shape,
        pick.method.name,
        scheme,
        nbytes,
        ratio,
        error,
        attempts,
    )


def _error_gates(plan: PlanRow, method: Method, weights: Weights, coded: Coded, rival: Coded) -> list[Judged]:
    values = weights.values
    total = relative_error(values, coded.decoded)
    if coded.truncated is None:
        truncated, rounding, judged = total, total, []
    else:
        truncated = relative_error(values, coded.truncated)
        rounding = relative_error(coded.truncated, coded.decoded)
        where = "the true spectrum" if coded.weighed is None else "the spectrum that the inputs see"
        said = "" if coded.best is None else f"Eckart-Young-Mirsky on {where}: {coded.best:.4f}"
        judged = [SVD_ERROR.judge(truncated, evidence=said)]
    said = "" if coded.weighed is None else f"{coded.weighed:.4f} in the metric of the inputs"
    judged += [QUANTIZATION_ERROR.judge(rounding), TOTAL_ERROR.judge(total, evidence=said)]
    if coded.promised is not None:
        said = f"promised {coded.promised:.4g}"
        judged.append(ERROR_OVER_THEORY.judge(_over(truncated, coded.promised), evidence=said))
    if (size := _bytes_gate(plan, method, weights, coded.stored_bytes)) is not None:
        judged.append(size)
    if method is not INT4:
        judged.append(_dominated(total, coded, rival, values))
    return judged


def _bytes_gate(plan: PlanRow, method: Method, weights: Weights, nbytes: int) -> Judged | None:
    """Judge a method's size, which its shape alone decides; None where nothing was promised."""
    ratio = promised_ratio(plan, method)
    if ratio is None:
        return None
    actual = 2 * weights.values.size / nbytes
    said = f"promised {ratio:g}x, stored {actual:.2f}x"
    return BYTES_OVER_PLAN.judge(ratio / actual, evidence=said)


def _too_large(plan: PlanRow, at: int, weights: Weights) -> Judged | None:
    """Return the verdict on a method that fails by its size alone; nothing is computed for it."""
    method = plan.chain[at]
    judged = _bytes_gate(plan, method, weights, method.nbytes(weights))
    return None if judged is None or judged.passed else judged


def _dominated(total: float | None, coded: Coded, rival: Coded, values: Float32) -> Judged:
    smaller = coded.stored_bytes / rival.stored_bytes
    closer = _over(total, relative_error(values, rival.decoded))
    worse = None if closer is None else min(smaller, closer)
    said = f"{smaller:.3f} of row-int4's bytes" + ("" if closer is None else f", {closer:.3f} of its error")
    return NOT_DOMINATED.judge(worse, evidence=said)


def _over(found: float | None, expected: float | None) -> float | None:
    """Return a quotient of errors; None where either is unknown, 0 over 0 is 0."""
    if found is None or expected is None:
        return None
    if expected <= 0:
        return 0.0 if found < _RESOLVED else float("inf")
    return found / expected


def _attempt(method: Method, scheme: str, nbytes: int, judged: list[Judged], decision: str) -> Attempt:
    gates = tuple(one.to_json() for one in judged)
    return Attempt(method.name, scheme, nbytes, gates, decision)


def _decision(plan: PlanRow, at: int, judged: list[Judged]) -> str:
    failed = first_failure(judged)
    return f"keep {plan.chain[at].name}" if failed is None else _next(plan, at)


def _next(plan: PlanRow, at: int) -> str:
    return f"replan: {plan.chain[at + 1].name}"
