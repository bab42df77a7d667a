"""Claims as tested on one model: a terminal table, the same rows as Markdown, and the cost said first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bitsmith.report.markdown import UNMEASURED, markdown_table, plain, write_markdown
from bitsmith.report.terminal import Rows, say, table
from bitsmith.run.evaluation import Measure
from bitsmith.run.format_rows import Outcome
from bitsmith.run.seed_claims import EXACT, ClaimsStudy, Cost

PAGE_NAME = "claims.md"

_NOTHING = 1e-12

_OUTCOMES: tuple[Outcome, ...] = ("HELD", "NOT HELD", "NOT TESTED")


def claim_rows(study: ClaimsStudy) -> Rows:
    """Return a row per claim: outcome, figure with its interval, what was found."""
    columns = ("claim", "seed", "outcome", "figure", "found")
    return columns, [
        (one.name, one.seed.split(",")[0], one.outcome, figure_text(one.measure), one.found)
        for one in study.claims
    ]


def cost_rows(cost: Sequence[Cost]) -> Rows:
    """Return a row per piece of evidence: what it takes, and for which claims."""
    columns = ("evidence", "work", "multiply-adds", "for")
    return columns, [(one.piece, one.work, f"{one.multiply_adds:.2g}", ", ".join(one.claims)) for one in cost]


def figure_text(measure: Measure | None) -> str:
    """Return a figure with its unit and interval.

    >>> figure_text(Measure(0.5, "of the weights", 0.4, 0.6, "95 %"))
    '0.5 (0.4 … 0.6) of the weights'
    """
    if measure is None:
        return UNMEASURED
    value = _short(measure.value)
    if measure.interval == EXACT:
        return f"{value} (exact) {measure.unit}"
    if measure.low is None or measure.high is None:
        return f"{value} (interval {UNMEASURED}) {measure.unit}"
    return f"{value} ({_short(measure.low)} … {_short(measure.high)}) {measure.unit}"


def print_cost(cost: Sequence[Cost]) -> None:
    """Print what a study will take, before it starts."""
    console = Console()
    console.print(table(*cost_rows(cost), right=("multiply-adds",)))
    total = sum(one.multiply_adds for one in cost)
    console.print(f"{total:.2g} multiply-adds in all; --only NAME,… does less", highlight=False)


def print_claims(study: ClaimsStudy) -> None:
    """Print the table, the tally and how it was measured."""
    console = Console()
    console.print(table(*claim_rows(study)))
    for line in (tally(study), *protocol_lines(study)):
        say(console, line)


def tally(study: ClaimsStudy) -> str:
    """Return how many claims came out each way."""
    return ", ".join(f"{study.count(outcome)} {outcome}" for outcome in _OUTCOMES)


def protocol_lines(study: ClaimsStudy) -> list[str]:
    """Return what the study was given."""
    text = "none" if study.text is None else f"{study.text} (SHA-256 {(study.text_sha256 or '')[:12]}…)"
    given = study.statistics or ("of the calibration text" if study.calibration else "none")
    return [
        f"model {study.model}; text {text}, context {study.ctx_tokens} tokens, at most {study.chunks} chunks"
        f"; calibration text {study.calibration or 'none'}; statistics {given}; seed {study.seed}; "
        f"{study.seconds:.0f} s",
        "one model says nothing of others: NOT HELD here is not held here",
    ]


def claims_markdown(study: ClaimsStudy) -> str:
    """Return the study as Markdown: the table, then each claim with its words, test and rule."""
    parts = [f"# Claims on {plain(study.model)}", plain(tally(study)), markdown_table(*claim_rows(study))]
    for one in study.claims:
        rows = [
            ("source", one.seed),
            ("its words", one.words),
            ("tested by", one.test),
            ("rule", one.rule),
            ("outcome", one.outcome),
            ("figure", figure_text(one.measure)),
            ("interval", (one.measure.interval or UNMEASURED) if one.measure else UNMEASURED),
            ("found", one.found),
            ("protocol", one.protocol or UNMEASURED),
        ]
        if one.published:
            rows.append(("its own numbers", one.published))
        parts += [f"## {plain(one.name)}", markdown_table(("", ""), rows)]
    parts += ["## What it took", markdown_table(*cost_rows(study.cost)), *map(plain, protocol_lines(study))]
    return "\n\n".join(parts) + "\n"


def write_claims_page(study: ClaimsStudy, out: Path) -> Path:
    """Write `claims.md` into the folder `out`, over an earlier one, and return its path."""
    return write_markdown(out / PAGE_NAME, claims_markdown(study))


def _short(value: float) -> str:
    """Return four significant digits; rounding errors are zeros."""
    return f"{value:.4g}" if abs(value) > _NOTHING else "0"
