"""A verification as a terminal table: files, types of tensors, and whatever is not as it was written."""

from __future__ import annotations

from rich.console import Console

from bitsmith.errors import printable
from bitsmith.report.terminal import table
from bitsmith.run.record import MODELS
from bitsmith.run.verify import TensorCheck, Verification

_SHOWN = 20


def print_verification(found: Verification) -> None:
    """Print what was checked and every fault, up to some; the last line says whether all is as written."""
    console = Console()
    if found.tensors:
        console.print(_tensors(found.tensors))
    for fault in found.faults[:_SHOWN]:
        _say(console, str(fault.error()))
    if len(found.faults) > _SHOWN:
        _say(console, f"{len(found.faults) - _SHOWN} more")
    if found.skipped:
        _say(console, found.skipped)
    _say(console, f"{found.out}: {_verdict(found)}")


def _tensors(checks: tuple[TensorCheck, ...]) -> object:
    """Return how many tensors of each type agree, and the largest error of each."""
    columns = ("type", "tensors", "agree", "largest relative error")
    rows = []
    for name in sorted({one.type for one in checks}):
        group = [one for one in checks if one.type == name]
        errors = [one.relative_error for one in group if one.relative_error is not None]
        largest = f"{max(errors):.3e}" if errors else "unmeasured"
        rows.append((name, f"{len(group)}", f"{sum(one.agrees for one in group)}", largest))
    return table(columns, rows, right=columns[1:])


def _verdict(found: Verification) -> str:
    if not found.passed:
        return "does not verify"
    files = f"{found.files} file{'s' if found.files != 1 else ''} as written"
    if found.digests_only:
        return f"{files}; tensors were not asked for"
    if found.kind not in MODELS:
        return f"{files}; a {found.kind} holds no tensors to compare"
    return f"{files}; {len(found.tensors)} tensors decoded, errors as recorded, against {found.source}"


def _say(console: Console, text: str) -> None:
    console.print(printable(text, 2000), markup=False, highlight=False, soft_wrap=True)
