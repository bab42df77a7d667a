"""Terminal tables of what `compress` wrote or would write, whatever its kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from bitsmith.errors import printable
from bitsmith.report.sahc_table import print_sahc, print_sahc_plan
from bitsmith.report.terminal import bytes_text, print_plan, print_record, say, table
from bitsmith.run.cellm import CellmPlan, CellmRecord
from bitsmith.run.compress import Planned, Written
from bitsmith.run.critical import Selection
from bitsmith.run.execute import Record
from bitsmith.run.folder import FolderPlan, FolderRecord, FolderRow
from bitsmith.run.plan import Plan
from bitsmith.run.sahc_planned import SahcPlan
from bitsmith.run.spi import SpiPlan, SpiRecord


class _Line(NamedTuple):
    type: str
    weights: int
    nbytes: int
    error: float
    rounder: str
    held_error: float | None


def print_planned(plan: Planned) -> None:
    """Print a dry run: every tensor's type and bytes, and the exact size."""
    if isinstance(plan, Plan):
        print_plan(plan)
        return
    if isinstance(plan, SahcPlan):
        print_sahc_plan(plan)
        return
    console = Console()
    if isinstance(plan, SpiPlan):
        _print_selection(console, plan.selection)
        plan = plan.folder
    columns = ("tensor", "shape", "type", "bytes", "note")
    console.print(table(columns, _plan_rows(plan), right=("bytes",)))
    what = plan.kind if isinstance(plan, CellmPlan) else plan.scheme
    console.print(f"{_size(what, plan)}; nothing written (dry run)", highlight=False, soft_wrap=True)


def print_written(record: Written) -> None:
    """Print what was written: bytes and error by type, rounders, notes; of recipe `sahc` its components."""
    if isinstance(record, Record):
        print_record(record)
        return
    if not isinstance(record, CellmRecord | FolderRecord | SpiRecord):
        print_sahc(record)
        return
    console = Console()
    if isinstance(record, SpiRecord):
        _print_selection(console, record.selection)
        record = record.folder
    lines = list(_lines(record))
    columns = ("type", "tensors", "bytes", "share of bytes", "relative error")
    console.print(table(columns, _by_type(lines), right=columns[1:]))
    rounders = _by_rounder(lines)
    if rounders:
        names = ("rounder", "tensors", "held-out output error")
        console.print(table(names, rounders, right=names[1:]))
    for row in record.tensors:
        if isinstance(row, FolderRow) and row.note:
            say(console, f"note: {row.name}: {row.note}")
    what = record.kind if isinstance(record, CellmRecord) else record.scheme
    console.print(
        f"wrote {escape(printable(str(record.out)))}\n{_size(what, record)}, {record.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def _size(what: str, made: CellmPlan | CellmRecord | FolderPlan | FolderRecord) -> str:
    return (
        f"{what}: {bytes_text(made.file_bytes)}, {made.bpw:.4f} bpw over {made.parameters:,} parameters, "
        "everything included"
    )


def _plan_rows(plan: CellmPlan | FolderPlan) -> list[Sequence[str]]:
    if isinstance(plan, FolderPlan):
        return [(row.name, _shape(row.shape), _typed(row), f"{row.nbytes:,}", row.note) for row in plan.rows]
    return [
        (info.name, _shape(info.shape), info.dtype, f"{info.nbytes:,}", grid or "")
        for info, grid in plan.tensors
    ]


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def _typed(row: FolderRow) -> str:
    """Return what a tensor is stored as: its dtype where it is not packed."""
    if row.group is None:
        return row.dtype
    return f"{row.scheme} g{row.group}" if row.group else row.scheme


def _lines(record: CellmRecord | FolderRecord) -> Iterable[_Line]:
    for one in record.tensors:
        kind = _typed(one) if isinstance(one, FolderRow) else one.grid or one.dtype
        rounder = one.rounder if one.held_error is not None or kind not in ("f16", one.dtype) else ""
        yield _Line(kind, prod(one.shape), one.nbytes, one.relative_error, rounder, one.held_error)


def _by_type(lines: Sequence[_Line]) -> list[Sequence[str]]:
    total = sum(line.nbytes for line in lines)
    rows: list[Sequence[str]] = []
    for name in sorted({line.type for line in lines}):
        group = [line for line in lines if line.type == name]
        nbytes, weights = sum(line.nbytes for line in group), sum(line.weights for line in group)
        error = sum(line.error * line.weights for line in group) / max(1, weights)
        rows.append((name, str(len(group)), f"{nbytes:,}", f"{nbytes / max(1, total):.2%}", f"{error:.3e}"))
    return rows


def _by_rounder(lines: Sequence[_Line]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for name in sorted({line.rounder for line in lines} - {""}):
        group = [line for line in lines if line.rounder == name]
        held = [line.held_error for line in group if line.held_error is not None]
        rows.append((name, str(len(group)), f"{sum(held) / len(held):.3e}" if held else "unmeasured"))
    return rows


def _print_selection(console: Console, selection: Selection) -> None:
    console.print(
        f"kept in 16 bits: {escape(printable(selection.rule))}; {bytes_text(selection.kept_bytes)}",
        highlight=False,
        soft_wrap=True,
    )
    if selection.protocol is not None:
        say(console, printable(selection.protocol))
