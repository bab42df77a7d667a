"""The claims of a published study of .cellm files, and ours, held against the rows of one `study formats`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bitsmith.numerics.resampling import ratio_of_sums
from bitsmith.run.evaluation import INTERVAL, Measure
from bitsmith.run.format_rows import ClaimCheck, FormatRow, FormatsStudy, Outcome, Source
from bitsmith.run.studied_formats import FEEDBACK, SCALES

KLD_GOAL = 0.5
"""Mean KLD of int2 with better scales and error feedback over that of the published int2, at most."""


def with_claims(study: FormatsStudy) -> FormatsStudy:
    """Return the study with every claim's outcome; what it lacks for one makes that NOT TESTED."""
    return replace(study, claims=tuple(_checks(study)))


def _checks(study: FormatsStudy) -> Iterator[ClaimCheck]:
    yield _everything(study)
    yield _verdict(study, "int4 writes coherently", "int4-row", coherent=True)
    yield _verdict(study, "int2 is garbage", "int2", coherent=False)
    yield _verdict(study, "1 bit is garbage", "1-bit", coherent=False)
    yield _larger(study)
    yield _below_four(study)
    for name in ("int2", "1-bit", "int4-row"):
        yield _gain(study, name, SCALES, "scales of least error")
        yield _gain(study, name, FEEDBACK, "error feedback")
    for name in ("int4-g32", "int4-g128", "int4-mixed"):
        yield _gain(study, name, FEEDBACK, "error feedback")


def _everything(study: FormatsStudy) -> ClaimCheck:
    claim, row = "int4 quantized everything", study.row("int4-row")
    if row is None or not row.file_bytes:
        return _untested(claim, "published", row)
    left = sum(row.float_bytes.values())
    parts = ", ".join(f"{part} {size:,}" for part, size in row.float_bytes.items())
    found = f"{left:,} of {row.file_bytes:,} bytes ({left / row.file_bytes:.1%}) are matrices left in float16"
    return ClaimCheck(claim, "published", _held(left == 0), f"{found}: {parts}" if parts else found)


def _verdict(study: FormatsStudy, claim: str, name: str, *, coherent: bool) -> ClaimCheck:
    row = study.row(name)
    if row is None or row.coherence is None:
        return _untested(claim, "published", row)
    verdict, over = row.coherence.verdict, row.coherence.sampled.nll_over
    found = f"{verdict}; NLL of its sampled text over the original's own text"
    if verdict == "undecided":
        return ClaimCheck(claim, "published", "NOT TESTED", found, over)
    return ClaimCheck(claim, "published", _held(coherent is (verdict == "coherent")), found, over)


def _larger(study: FormatsStudy) -> ClaimCheck:
    claim = "int2's file is larger than int4's, as int2 keeps embedding and head in float16"
    four, two = study.row("int4-row"), study.row("int2")
    if four is None or two is None or not four.file_bytes or not two.file_bytes:
        return _untested(claim, "published", two if four is not None and four.file_bytes else four)
    outer = two.float_bytes.get("embedding and head", 0)
    found = (
        f"int2 {two.file_bytes:,} bytes, {outer:,} of them embedding and head in float16; "
        f"int4 {four.file_bytes:,} bytes"
    )
    larger = two.file_bytes > four.file_bytes
    if larger and two.file_bytes - outer > four.file_bytes:
        return ClaimCheck(claim, "published", "NOT HELD", f"{found}: larger for another reason")
    return ClaimCheck(claim, "published", _held(larger), found)


def _below_four(study: FormatsStudy) -> ClaimCheck:
    """Return whether nothing under 4 bits is coherent untrained; the files keep other tensors wider."""
    claim = "under 4 bits nothing but training makes text coherent"
    needed = [base + suffix for base in ("int2", "1-bit") for suffix in ("", SCALES, FEEDBACK)]
    more = [base + suffix for base in ("Q1_0", "Q2_0") for suffix in ("", FEEDBACK)]
    rows = [row for name in (*needed, *more) if (row := study.row(name)) is not None]
    said = [(row, row.coherence.verdict) for row in rows if row.coherence is not None]
    found = ", ".join(f"{row.name} {verdict} (file of {row.bpw or 0:.2f} bpw)" for row, verdict in said)
    verdicts = {verdict for _, verdict in said}
    if "coherent" in verdicts:
        return ClaimCheck(claim, "published", "NOT HELD", found)
    whole = set(needed) <= {row.name for row, _ in said} and "undecided" not in verdicts
    outcome: Outcome = "HELD" if whole else "NOT TESTED"
    return ClaimCheck(claim, "published", outcome, found or "no such row was measured")


def _gain(study: FormatsStudy, name: str, suffix: str, what: str) -> ClaimCheck:
    """Return how a row's mean KLD compares with the seed's in the same layout, paired by chunk."""
    goal = KLD_GOAL if (name, suffix) == ("int2", FEEDBACK) else 1.0
    base, row = study.row(name), study.row(name + suffix)
    claim = (
        f"{name}: {what} leaves " + (f"at most {goal:g} of" if goal < 1 else "less than") + " the mean KLD"
    )
    if base is None or row is None or not base.chunk_kld_nats or not row.chunk_kld_nats:
        return _untested(claim, "ours", row if base is not None and base.chunk_kld_nats else base)
    protocol = study.protocol
    found = ratio_of_sums(row.chunk_kld_nats, base.chunk_kld_nats, protocol.resamples, protocol.seed)
    sizes = f"{row.file_bytes:,} bytes against {base.file_bytes:,}"
    if found is None:
        return ClaimCheck(claim, "ours", "NOT TESTED", f"{sizes}; the seed's row does not diverge")
    measure = Measure(
        found.value, "ratio", found.low, found.high, INTERVAL if found.low is not None else None
    )
    if found.low is None or found.high is None:
        return ClaimCheck(claim, "ours", "NOT TESTED", f"{sizes}; one chunk has no interval", measure)
    held, failed = found.high <= goal, found.low > goal
    if goal == 1:  # "less than": the same figures are not less
        held, failed = found.high < goal, found.low >= goal
    if not held and not failed:
        return ClaimCheck(claim, "ours", "NOT TESTED", f"{sizes}; the interval is on both sides", measure)
    return ClaimCheck(claim, "ours", _held(held), f"mean KLD ratio; {sizes}", measure)


def _held(held: bool) -> Outcome:
    return "HELD" if held else "NOT HELD"


def _untested(claim: str, source: Source, row: FormatRow | None) -> ClaimCheck:
    why = "the study has no such row" if row is None else row.unmeasured or "unmeasured"
    return ClaimCheck(claim, source, "NOT TESTED", why)
