"""Gates and the audit log: what was not measured does not pass, and every line is on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitsmith.errors import BitsmithError, DamagedFileError
from bitsmith.run.audit import FIELDS, AuditLog, read_audit
from bitsmith.run.gate import FORWARD_COSINE, PPL, TOTAL_ERROR, Gate, Verdict, all_pass, first_failure


@pytest.mark.parametrize(
    ("gate", "value", "outcome"),
    [
        (TOTAL_ERROR, 0.999, "PASS"),
        (TOTAL_ERROR, 1.0, "FAIL"),  # zeros are no better than zeros
        (FORWARD_COSINE, 0.95, "PASS"),
        (FORWARD_COSINE, 0.9499, "FAIL"),
        (Gate("x", 2.0, "at most", "ratio"), 2.0, "PASS"),
        (PPL, float("inf"), "FAIL"),
        (FORWARD_COSINE, float("inf"), "FAIL"),
        (FORWARD_COSINE, float("nan"), "FAIL"),
        (TOTAL_ERROR, float("nan"), "FAIL"),
        (TOTAL_ERROR, float("-inf"), "FAIL"),
        (TOTAL_ERROR, None, "UNMEASURED"),
    ],
)
def test_a_value_against_its_limit(gate: Gate, value: float | None, outcome: str) -> None:
    judged = gate.judge(value)
    assert judged.outcome == outcome
    assert judged.passed == (outcome == "PASS")
    json.dumps(judged.to_json(), allow_nan=False)


def test_the_worse_end_of_an_interval_decides() -> None:
    assert FORWARD_COSINE.judge(0.96, low=0.94, high=0.98).outcome is Verdict.FAIL
    assert FORWARD_COSINE.judge(0.96, low=0.951, high=0.98).outcome is Verdict.PASS
    assert TOTAL_ERROR.judge(0.9, low=0.5, high=1.2).outcome is Verdict.FAIL
    assert TOTAL_ERROR.judge(1.1, low=0.5, high=0.9).outcome is Verdict.FAIL


def test_unmeasured_and_nothing_never_pass() -> None:
    good, unknown = TOTAL_ERROR.judge(0.1), FORWARD_COSINE.judge(None, evidence="no forward")
    assert all_pass([good])
    assert not all_pass([good, unknown])
    assert not all_pass([])
    assert first_failure([good, unknown]) is unknown
    assert first_failure([good]) is None


def test_lines_say_who_what_value_limit_evidence_decision(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        log.judged("gate", "w: SVD", TOTAL_ERROR.judge(1.02, low=1.0, high=1.1, evidence="e"), "replan: int4")
        log.add("plan", "w", value=float("inf"), decision="stop")
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(tuple(record) == FIELDS for record in raw)
    first, second = read_audit(path)
    assert (first.who, first.value, first.limit, first.decision) == ("gate", 1.02, 1.0, "replan: int4")
    assert first.what == "w: SVD: total error"
    assert first.evidence["outcome"] == "FAIL"
    assert (first.evidence["low"], first.evidence["found"]) == (1.0, "e")
    assert second.value == "inf"


def test_a_torn_last_line_is_dropped_and_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        log.add("a", "one", decision="go")
    with path.open("ab") as stream:
        stream.write(b'{"when": "2026')
    assert [line.what for line in read_audit(path)] == ["one"]
    with AuditLog(path) as log, AuditLog(path) as other:
        log.add("a", "two", decision="go")
        other.add("b", "three", decision="go")
    assert [line.what for line in read_audit(path)] == ["one", "two", "three"]


def test_what_is_no_audit_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"key": 1}\n')
    with pytest.raises(DamagedFileError, match=r"audit\.jsonl: line 1 is no audit line"):
        list(read_audit(path))
    with pytest.raises(BitsmithError, match="cannot be read"):
        list(read_audit(tmp_path / "none"))
    with pytest.raises(BitsmithError, match="cannot be written"):
        AuditLog(tmp_path / "none" / "audit.jsonl")
