"""What `study formats` found: terminal tables and the same rows as Markdown."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from bitsmith.errors import printable
from bitsmith.report.markdown import UNMEASURED, code, markdown_table, measure_text, plain, write_markdown
from bitsmith.report.terminal import Rows, say, table
from bitsmith.run.coherence import GRAM_TOKENS, SAMPLED, Coherence, rule
from bitsmith.run.evaluation import Measure
from bitsmith.run.format_rows import ORIGINAL, FormatRow, FormatsStudy

MARKDOWN_NAME = "formats.md"

_SAMPLE_CHARACTERS = 300
_DIVERGENCE = {
    "PPL": ("ppl_cand", "{:.3f}"),
    "mean KLD, nats": ("mean_kld", "{:.5f}"),
    "99.9 % KLD, nats": ("kld_99_9", "{:.4f}"),
    "top-1 agreement": ("top1_agreement", "{:.2%}"),
}


def size_rows(study: FormatsStudy) -> Rows:
    """Return sizes and divergence, a row per format; intervals in parentheses."""
    columns = ("format", "bytes", "bpw", "× f16", "× original", *_DIVERGENCE)
    return columns, [
        (
            row.name,
            UNMEASURED if row.file_bytes is None else f"{row.file_bytes:,}",
            UNMEASURED if row.bpw is None else f"{row.bpw:.3f}",
            *(_times(study.ratio(row, to)) for to in ("f16", ORIGINAL)),
            *(measure_text(row.measures.get(name), style) for name, style in _DIVERGENCE.values()),
        )
        for row in study.rows
    ]


def coherence_rows(study: FormatsStudy) -> Rows:
    """Return how each format writes: repetition and the original's NLL of its text, and the verdict."""
    columns = (
        "format", "repetition, greedy", "repetition, sampled", "NLL, greedy, nats/token",
        "NLL, sampled, nats/token", "sampled NLL over the original's", "verdict",
    )  # fmt: skip
    return columns, [(row.name, *_coherence_cells(row.coherence)) for row in study.rows]


def claim_rows(study: FormatsStudy) -> Rows:
    """Return every claim with its outcome, what was found, and the figure with its interval."""
    columns = ("claim", "of", "outcome", "found", "figure")
    return columns, [
        (one.claim, one.source, one.outcome, one.found, _claimed(one.measure)) for one in study.claims
    ]


def note_rows(study: FormatsStudy) -> Rows:
    """Return what each format is, how it was rounded, and why something was not measured."""
    columns = ("format", "what", "rounding: matrices", "unmeasured because")
    rows = [(row.name, row.what, row.rounding, row.unmeasured or "") for row in study.rows]
    return columns, list(rows)


def protocol_lines(study: FormatsStudy) -> list[str]:
    """Return how the figures were measured, a sentence or two each."""
    p = study.protocol
    return [
        f"model {study.model}; {p.name}; text {printable(p.text)} (SHA-256 {p.text_sha256[:12]}…), "
        f"context {p.ctx_tokens} tokens, {p.chunks} of {p.chunks_available} chunks, {p.scored_tokens:,} "
        f"scored tokens; intervals: 95 % paired bootstrap over chunks, {p.resamples:,} resamples, "
        f"seed {p.seed}",
        "bytes: of the weight files, a GGUF's with its tokenizer; bpw: 8 × bytes / weights in them; "
        f"statistics: {study.statistics or 'none'}",
        f"coherence: {len(study.prompts)} prompts of up to {study.prompt_tokens} tokens, up to "
        f"{study.written_tokens} tokens written after each, greedily and at temperature "
        f"{SAMPLED.temperature:g} (top-k {SAMPLED.top_k}, seeds from {p.seed}), no repeat penalty; "
        f"repetition: share of {GRAM_TOKENS}-grams of tokens that occurred before in the same continuation; "
        "NLL: the original's, of what was written; intervals: 95 % bootstrap over prompts, paired for "
        "differences",
        f"verdict: {rule()}",
    ]


def sample_of(row: FormatRow, *, greedy: bool = False) -> str:
    """Return what a format wrote after the first prompt, sampled unless `greedy`, escaped and cut."""
    if row.coherence is None:
        return f"{UNMEASURED}: {row.unmeasured}"
    way = row.coherence.greedy if greedy else row.coherence.sampled
    return printable(way.passages[0].text, _SAMPLE_CHARACTERS)


def print_formats(study: FormatsStudy) -> None:
    """Print the tables, a sample of text per format, and the protocol."""
    console = Console()
    for columns, rows in (size_rows(study), coherence_rows(study)):
        console.print(table(columns, rows, right=columns[1:]))
    console.print(table(*claim_rows(study), right=("figure",)))
    lines = [f"sampled after {printable(study.prompts[0], _SAMPLE_CHARACTERS)}"]
    for line in (*lines, *(f"{row.name}: {sample_of(row)}" for row in study.rows)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in protocol_lines(study):
        say(console, line)


def formats_markdown(study: FormatsStudy) -> str:
    """Return the whole study as Markdown; texts of models and files are escaped."""
    parts = [f"# Formats of {plain(study.model)}", *(plain(line) for line in protocol_lines(study))]
    for title, rows in (
        ("Size and divergence from the original", size_rows(study)),
        ("Coherence", coherence_rows(study)),
        ("Claims", claim_rows(study)),
        ("How each was made", note_rows(study)),
    ):
        parts += [f"## {title}", markdown_table(*rows)]
    parts += ["## Samples", "After the first prompt, sampled, then greedily:", code(study.prompts[0])]
    for row in study.rows:
        shown = (code(sample_of(row, greedy=greedy)) for greedy in (False, True))
        parts += [f"{plain(row.name)}:", "\n".join(shown)]
    return "\n\n".join(parts) + "\n"


def write_formats_markdown(study: FormatsStudy, out: Path) -> Path:
    """Write `formats.md` into the folder `out`, over an earlier one, and return its path."""
    return write_markdown(out / MARKDOWN_NAME, formats_markdown(study))


def _coherence_cells(found: Coherence | None) -> tuple[str, ...]:
    if found is None:
        return (*[UNMEASURED] * 5, UNMEASURED)
    ways = found.greedy, found.sampled
    own = found.verdict == ORIGINAL
    return (
        *(measure_text(way.repetition, "{:.1%}") for way in ways),
        *(measure_text(way.nll, "{:.2f}") for way in ways),
        "is the yardstick" if own else measure_text(found.sampled.nll_over, "{:+.2f}"),
        found.verdict,
    )


def _claimed(measure: Measure | None) -> str:
    return "" if measure is None else f"{measure_text(measure, '{:.3f}')} {measure.unit}"


def _times(ratio: float | None) -> str:
    return UNMEASURED if ratio is None else f"{ratio:.2f}"
