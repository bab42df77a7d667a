"""Results as terminal tables; the HTML report shows the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bitsmith.errors import printable
from bitsmith.numerics.divergence import Estimate
from bitsmith.passes.transform import transform_of
from bitsmith.report.markdown import lines_of
from bitsmith.run.execute import Record
from bitsmith.run.inspect import Inspection, Share
from bitsmith.run.job import Made
from bitsmith.run.moments import Exported
from bitsmith.run.plan import Plan
from bitsmith.run.transforms import WeightError

if TYPE_CHECKING:  # these load torch, which printing a plan must not
    from bitsmith.lab.demo import Demo
    from bitsmith.run.calibrate import Calibration
    from bitsmith.run.evaluation import Evaluation, Protocol
    from bitsmith.run.transform_search import Search

Rows = tuple[Sequence[str], list[Sequence[str]]]


def bytes_text(count: int) -> str:
    """Return a byte count exactly, and in MiB.

    >>> bytes_text(3145728)
    '3,145,728 bytes (3.00 MiB)'
    """
    return f"{count:,} bytes ({count / 2**20:,.2f} MiB)"


def plan_rows(plan: Plan) -> Rows:
    """Return the plan as columns and rows, a row per tensor."""
    columns = ("GGUF tensor", "HF tensor", "shape", "from", "type", "bytes", "bpw", "note")
    rows: list[Sequence[str]] = [
        (
            row.gguf_name,
            row.hf_name,
            "×".join(map(str, row.shape)),
            row.source_dtype,
            row.type,
            f"{row.nbytes:,}",
            f"{row.bpw:.4f}",
            row.note,
        )
        for row in plan.rows
    ]
    return columns, rows


def evaluation_rows(evaluation: Evaluation) -> Rows:
    """Return the measures with their intervals as columns and rows."""
    return ("measure", "value", "95 % interval"), list(evaluation.rows())


def protocol_line(evaluation: Evaluation) -> str:
    """Return in one line how the figures were measured: text, context, chunks, scored tokens."""
    return protocol_text(evaluation.protocol)


def protocol_text(p: Protocol) -> str:
    """Return a protocol in one line."""
    return (
        f"{p.name}; text {printable(p.text)} (SHA-256 {p.text_sha256[:12]}…), context {p.ctx_tokens} tokens, "
        f"{p.chunks} of {p.chunks_available} chunks, {p.scored_tokens:,} scored tokens; "
        f"intervals: paired bootstrap over chunks, {p.resamples:,} resamples, seed {p.seed}"
    )


def record_line(record: Record) -> str:
    """Return in one line what was written."""
    plan = record.plan
    return (
        f"{plan.type}: {bytes_text(record.file_bytes)}, {plan.bpw:.4f} bpw over {plan.parameters:,} weights, "
        f"{record.seconds:.1f} s, SHA-256 {record.sha256[:12]}…"
    )


def print_plan(plan: Plan) -> None:
    """Print a dry run: every tensor's type and bytes, the file's exact size, what deserves a warning."""
    console = Console()
    _print_transforms(console, plan)
    console.print(table(*plan_rows(plan), right=("bytes", "bpw")))
    _print_plan_notes(console, plan)
    console.print(
        f"{plan.type}: file {bytes_text(plan.file_bytes)}, tensors {bytes_text(plan.tensor_bytes)}, "
        f"{plan.bpw:.4f} bpw over {plan.parameters:,} weights; nothing written (dry run)",
        highlight=False,
        soft_wrap=True,
    )


def print_record(record: Record) -> None:
    """Print what `compress` wrote: bytes and error by type, rounders, what was measured, warnings."""
    console = Console()
    _print_transforms(console, record.plan)
    console.print(table(*_type_rows(record), right=("tensors", "bytes", "share of bytes", "relative error")))
    if record.statistics is not None:
        console.print(table(*_rounder_rows(record), right=("tensors", "held-out output error", "weighted's")))
    _print_plan_notes(console, record.plan)
    if isinstance(record, Made):
        _print_made(console, record)
    peak = record.peak_memory_bytes
    memory = "unmeasured" if peak is None else f"{peak / 2**20:,.0f} MiB"
    say(console, f"wrote {record.out}\n{record_line(record)}, peak resident memory {memory}")


def _print_made(console: Console, made: Made) -> None:
    """Print the candidates, the tuning, and the finished file's measures with their protocol."""
    if made.tried:
        tried: list[Sequence[str]] = [
            (
                one.name,
                f"{one.plan.file_bytes:,}",
                f"{one.predicted_nats:.6f}",
                *_interval(one.measures["mean_kld"], "{:.6f}"),
            )
            for one in made.tried
        ]
        columns = ("candidate", "bytes", "predicted nats", "mean KLD, nats", "95 % interval")
        console.print(table(columns, tried, right=columns[1:]))
    if made.search is not None:
        _print_search(console, made.search)
    if made.tuning is not None:
        found = made.tuning
        kept = f"best step {found.best_step} of {found.steps}" if found.kept else "not kept: no better"
        console.print(
            f"tuned: mean KLD {found.held_kld_before_nats:.6f} → {found.held_kld_after_nats:.6f} nats over "
            f"{found.held_tokens:,} held-out tokens ({kept}), {found.seconds:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
    shown = {"mean_kld": "mean KLD, nats", "kld_99_9": "99.9 % KLD, nats", "ppl_ratio": "perplexity ratio"}
    rows: list[Sequence[str]] = [
        (label, *_interval(made.measured[name], "{:.6f}")) for name, label in shown.items()
    ]
    console.print(table(("measured on held-out text", "value", "95 % interval"), rows))
    say(console, made.protocol)


def _print_search(console: Console, search: Search) -> None:
    """Print every transform that was tried, also those that did not help."""
    rows: list[Sequence[str]] = []
    for one in search.tried:
        before, change = "unmeasured", "unmeasured"
        if one.before is not None and one.change is not None:
            before = f"{one.before.value:.3g}"
            change = f"{one.change.value:+.2g} ({_interval(one.change, '{:+.2g}')[1]})"
        rows.append((one.transform, str(one.instances), before, change, one.reason))
    columns = ("transform", "changes", "before", "change, interval", "outcome")
    console.print(table(columns, rows, right=columns[1:4]))
    say(console, search.protocol)


def _print_transforms(console: Console, plan: Plan) -> None:
    """Print what is done to the model before its tensors are stored, a row per transform."""
    found = [transform_of(name) for name in plan.transforms]
    rows = [(name, one.axis, one.summary) for name, one in zip(plan.transforms, found, strict=True)]
    if rows:
        console.print(table(("transform", "axis", "what it does"), rows))


def print_weight_errors(errors: Sequence[WeightError]) -> None:
    """Print how far each tensor of a file is from its source's."""
    columns = ("GGUF tensor", "HF tensor", "type", "relative error")
    rows = [(one.gguf_name, one.hf_name, one.type, f"{one.relative_error:.3e}") for one in errors]
    console = Console()
    console.print(table(columns, rows, right=("relative error",)))
    console.print(
        "relative error: sum (w - decoded)² / sum w² over what the source stores, transforms undone",
        highlight=False,
        soft_wrap=True,
    )


def _interval(estimate: Estimate, style: str) -> tuple[str, str]:
    if estimate.low is None or estimate.high is None:
        return style.format(estimate.value), "unmeasured"
    return style.format(estimate.value), f"{style.format(estimate.low)} … {style.format(estimate.high)}"


def _rounder_rows(record: Record) -> Rows:
    """Return how many tensors each rounder codes, and their mean held-out output error against weighted's."""
    columns = ("rounder", "tensors", "held-out output error", "weighted's")
    rows: list[Sequence[str]] = []
    quantized = [one for one in record.tensors if one.type not in ("F32", "F16", "BF16")]
    for name in sorted({one.rounding.rounder for one in quantized}):
        group = [one.rounding.held_errors for one in quantized if one.rounding.rounder == name]
        means = [_mean([errors[key] for errors in group if key in errors]) for key in (name, "weighted")]
        rows.append((name, str(len(group)), *means))
    return columns, rows


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3e}" if values else "unmeasured"


def print_calibration(calibration: Calibration | Exported) -> None:
    """Print where the statistics lie and what they were collected on."""
    console = Console()
    if isinstance(calibration, Exported):
        line = (
            f"wrote {calibration.path}: imatrix of {calibration.entries} matrices from {calibration.source}"
        )
    else:
        c = calibration
        line = (
            f"wrote {c.path}: {c.sites} activation sites, {bytes_text(c.size_bytes)}; "
            f"text {printable(c.text)} (SHA-256 {c.text_sha256[:12]}…), "
            f"{c.chunks} chunks of {c.ctx_tokens} tokens, "
            f"{c.held_chunks} of them held out"
        )
    say(console, line)


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the measures, both artifacts' sizes and the protocol."""
    console = Console()
    console.print(table(*evaluation_rows(evaluation), right=("value", "95 % interval")))
    for label, artifact in (("reference", evaluation.reference), ("candidate", evaluation.candidate)):
        console.print(
            f"{label}: {escape(printable(artifact.path))}, {bytes_text(artifact.file_bytes)}, "
            f"{artifact.bpw:.4f} bpw",
            highlight=False,
            soft_wrap=True,
        )
    say(console, protocol_line(evaluation))
    for warning in evaluation.warnings:
        say(console, f"warning: {warning}")


def print_demo(demo: Demo, report: Path) -> None:
    """Print the demo's one table: size and quality against the original, then a sample."""
    console = Console()
    reference, candidate = demo.evaluation.reference, demo.evaluation.candidate
    sizes = [
        ("size of the original", f"{reference.file_bytes:,} bytes", "exact"),
        (f"size of {demo.record.plan.type}", f"{candidate.file_bytes:,} bytes", "exact"),
        ("bits per weight, original", f"{reference.bpw:.4f} bpw", "exact"),
        (f"bits per weight, {demo.record.plan.type}", f"{candidate.bpw:.4f} bpw", "exact"),
    ]
    columns, rows = evaluation_rows(demo.evaluation)
    console.print(table(columns, [*sizes, *rows], right=("value", "95 % interval")))
    say(console, protocol_line(demo.evaluation))
    if demo.sample is None:
        console.print("generation: unmeasured (install bitsmith\\[llama] to run real llama.cpp)")
    else:
        say(console, f"generated by llama.cpp after {demo.prompt!r}:\n{demo.sample}")
    say(console, f"wrote {demo.record.out} and {report} in {demo.seconds:.1f} s")


def print_inspection(inspection: Inspection) -> None:
    """Print components, roles, stored types and the size of every stock mix."""
    console = Console()
    arch = inspection.architecture or "no architecture file"
    say(
        console,
        f"{inspection.path}: {arch}, {inspection.parameters:,} parameters, "
        f"{bytes_text(inspection.stored_bytes)} of tensors",
    )
    for title, shares in (
        ("component", inspection.components),
        ("role", inspection.roles),
        ("stored type", inspection.types),
    ):
        if shares:
            console.print(_share_table(title, shares))
    if inspection.sizes:
        rows = [
            (s.type, f"{s.file_bytes:,}", f"{s.file_bytes / 2**20:,.2f}", f"{s.bpw:.4f}")
            for s in inspection.sizes
        ]
        numbers = ("bytes", "MiB", "bpw")
        console.print(table(("as", *numbers), rows, right=numbers))
    for note in inspection.notes:
        say(console, f"note: {note}")


def _print_plan_notes(console: Console, plan: Plan) -> None:
    for row in plan.fallbacks:
        say(console, f"warning: {row.hf_name}: {row.note}, stored as {row.type}")
    for note in plan.notes:
        say(console, f"note: {note}")


def _type_rows(record: Record) -> Rows:
    columns = ("type", "tensors", "bytes", "share of bytes", "relative error")
    total = record.plan.tensor_bytes
    weights = {row.gguf_name: prod(row.shape) for row in record.plan.rows}
    rows: list[Sequence[str]] = []
    for name in sorted({written.type for written in record.tensors}):
        group = [written for written in record.tensors if written.type == name]
        nbytes = sum(written.nbytes for written in group)
        size = sum(weights[written.gguf_name] for written in group)
        error = sum(written.relative_error * weights[written.gguf_name] for written in group) / size
        rows.append((name, str(len(group)), f"{nbytes:,}", f"{nbytes / total:.2%}", f"{error:.3e}"))
    return columns, rows


def _share_table(title: str, shares: Iterable[Share]) -> Table:
    numbers = ("tensors", "parameters", "share", "stored bytes")
    rows = [
        (s.name, str(s.tensors), f"{s.parameters:,}", f"{s.share:.2%}", f"{s.stored_bytes:,}") for s in shares
    ]
    return table((title, *numbers), rows, right=numbers)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """Return a table of escaped cells; the columns named in `right` are numbers."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def say(console: Console, text: str) -> None:
    """Print text as it is but for control characters: no markup, no emoji, no breaking of lines."""
    console.print(lines_of(text), markup=False, emoji=False, highlight=False, soft_wrap=True)
