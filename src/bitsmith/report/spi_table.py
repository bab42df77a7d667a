"""A study of the SPI recipe as terminal tables and as a Markdown page: the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from bitsmith.report.markdown import markdown_table, measure_text, plain, write_markdown
from bitsmith.report.terminal import Rows, bytes_text, protocol_text, say, table
from bitsmith.run.evaluation import Measure
from bitsmith.run.spi_rows import SpiRow, SpiStudy, SpiTable

PAGE_NAME = "spi.md"

_NUMBERS = ("linears kept", "bytes kept", "file bytes", "bpw", "PPL", "PPL / original", "mean KLD, nats")


def print_spi_study(study: SpiStudy) -> None:
    """Print both tables, the comparisons with controls, rank correlations, claims and the protocol."""
    console = Console()
    for title, (columns, rows) in _parts(study):
        console.print(f"\n{escape(title)}", highlight=False, soft_wrap=True)
        console.print(table(columns, rows, right=_NUMBERS))
    for line in _protocol(study):
        say(console, line)


def spi_markdown(study: SpiStudy) -> str:
    """Return the study as Markdown."""
    parts = [f"# SPI on {plain(study.model)}"]
    for title, rows in _parts(study):
        parts += [f"## {plain(title)}", markdown_table(*rows)]
    return "\n\n".join([*parts, *map(plain, _protocol(study))]) + "\n"


def write_spi_page(study: SpiStudy, out: Path) -> Path:
    """Write the Markdown page into the folder `out` and return where."""
    return write_markdown(out / PAGE_NAME, spi_markdown(study))


def _parts(study: SpiStudy) -> Iterator[tuple[str, Rows]]:
    for one in study.tables:
        yield f"At equal {one.equal}: {one.asked}", _table_rows(study, one)
    if study.comparisons:
        yield "Rules beside their controls, by mean KLD", _comparison_rows(study)
    if study.correlations:
        yield "Rank correlations over linears", _correlation_rows(study)
    yield "Claims", _claim_rows(study)


def _table_rows(study: SpiStudy, one: SpiTable) -> Rows:
    columns = ("row", *_NUMBERS)
    original = study.original
    first = (
        "original", "all", "", f"{original.file_bytes:,}", f"{original.bpw:.3f}",
        measure_text(study.original_ppl, "{:.4f}"), "1", "0",
    )  # fmt: skip
    return columns, [first, *(_row(row) for row in one.rows)]


def _row(row: SpiRow) -> Sequence[str]:
    return (
        row.name,
        str(len(row.names)),
        f"{row.kept_bytes:,}",
        f"{row.file_bytes:,}",
        f"{row.bpw:.3f}",
        f"{row.measures['ppl_cand'].value:.4f}",
        measure_text(row.measures["ppl_ratio"], "{:.4f}"),
        measure_text(row.measures["mean_kld"], "{:.6f}"),
    )


def _comparison_rows(study: SpiStudy) -> Rows:
    rows: list[Sequence[str]] = []
    for one in study.comparisons:
        verdict = {True: "better", False: "worse", None: "undecided"}[one.better]
        rank = "" if one.rank is None else f", rank {one.rank} of {one.of}"
        control = f"{one.control} ({one.against})" if one.against != "random" else one.control
        rows.append((f"equal {one.equal}", one.rule, control, _figure(one.measure), verdict + rank))
    return ("table", "rule", "against", "mean KLD: difference, or ratio to random", "the rule is"), rows


def _correlation_rows(study: SpiStudy) -> Rows:
    rows = [(one.one, one.other, str(one.linears), _figure(one.measure)) for one in study.correlations]
    return ("measure", "with", "linears", "Spearman's ρ"), list(rows)


def _claim_rows(study: SpiStudy) -> Rows:
    rows = [
        (one.claim, one.outcome, "" if one.measure is None else _figure(one.measure), one.found)
        for one in study.claims
    ]
    return ("claim", "outcome", "figure", "what was found"), list(rows)


def _figure(measure: Measure) -> str:
    """Return a figure in its unit's precision."""
    styles = {"nats": "{:+.6f} nats", "ratio": "{:.4g} ×"}
    return measure_text(measure, styles.get(measure.unit, "{:+.3f}"))


def _protocol(study: SpiStudy) -> Iterator[str]:
    yield protocol_text(study.protocol)
    if study.calibration is not None:
        yield (
            f"KLD of each linear alone: {study.calibration}; linears rank by it at equal count, by KLD per "
            "byte at equal bytes"
        )
    else:
        yield "KLD of each linear alone: unmeasured, no calibration text was given"
    random = next((one for one in study.comparisons if one.against == "random"), None)
    if random is not None:
        yield f"against random choices: {random.measure.interval}"
    yield (
        f"original: {bytes_text(study.original.file_bytes)}; linears not kept: NF4, blocks of 64, nearest "
        f"rounding, double quantization; bpw over all stored weights; {study.seconds:.0f} s"
    )
