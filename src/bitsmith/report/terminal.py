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

from bitsmith.errors import printable
from bitsmith.run.execute import Record
from bitsmith.run.inspect import Inspection, Share
from bitsmith.run.plan import Plan

if TYPE_CHECKING:  # these load torch, which printing a plan must not
    from bitsmith.lab.demo import Demo
    from bitsmith.run.evaluate import Evaluation

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
    p = evaluation.protocol
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
    console.print(table(*plan_rows(plan), right=("bytes", "bpw")))
    _print_plan_notes(console, plan)
    console.print(
        f"{plan.type}: file {bytes_text(plan.file_bytes)}, tensors {bytes_text(plan.tensor_bytes)}, "
        f"{plan.bpw:.4f} bpw over {plan.parameters:,} weights; nothing written (dry run)",
        highlight=False,
        soft_wrap=True,
    )


def print_record(record: Record) -> None:
    """Print what `compress` wrote: bytes by type, error of each type, warnings."""
    console = Console()
    console.print(table(*_type_rows(record), right=("tensors", "bytes", "share of bytes", "relative error")))
    _print_plan_notes(console, record.plan)
    peak = record.peak_memory_bytes
    memory = "unmeasured" if peak is None else f"{peak / 2**20:,.0f} MiB"
    console.print(
        f"wrote {escape(str(record.out))}\n{record_line(record)}, peak resident memory {memory}",
        highlight=False,
        soft_wrap=True,
    )


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
    console.print(escape(protocol_line(evaluation)), highlight=False, soft_wrap=True)


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
    console.print(escape(protocol_line(demo.evaluation)), highlight=False, soft_wrap=True)
    if demo.sample is None:
        console.print("generation: unmeasured (install bitsmith\\[llama] to run real llama.cpp)")
    else:
        console.print(
            escape(f"generated by llama.cpp after {demo.prompt!r}:\n{demo.sample}"), highlight=False
        )
    console.print(
        f"wrote {escape(str(demo.record.out))} and {escape(str(report))} in {demo.seconds:.1f} s",
        highlight=False,
    )


def print_inspection(inspection: Inspection) -> None:
    """Print components, roles, stored types and the size of every stock mix."""
    console = Console()
    arch = inspection.architecture or "no architecture file"
    console.print(
        f"{escape(printable(str(inspection.path)))}: {arch}, {inspection.parameters:,} parameters, "
        f"{bytes_text(inspection.stored_bytes)} of tensors",
        highlight=False,
        soft_wrap=True,
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
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)


def _print_plan_notes(console: Console, plan: Plan) -> None:
    for row in plan.fallbacks:
        console.print(f"warning: {escape(row.hf_name)}: {row.note}, stored as {row.type}", soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)


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
        table.add_row(*(escape(printable(cell)) for cell in row))
    return table
