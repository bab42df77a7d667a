"""Markdown of tables and texts in which nothing from a file or a model has a meaning of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitsmith.errors import printable
from bitsmith.store.atomic import atomic_file

if TYPE_CHECKING:  # this loads torch, which printing a plan must not
    from bitsmith.run.evaluate import Measure

UNMEASURED = "unmeasured"

_MARKS = re.compile(r"([\\`*_{}\[\]<>|#~$&!])")
_CHARACTERS = 2000  # of one cell or text


def plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return _MARKS.sub(r"\\\1", printable(text, _CHARACTERS))


def code(text: str) -> str:
    """Return text as an indented code block."""
    return f"    {printable(text, _CHARACTERS)}"


def lines_of(text: str, characters: int = 4000) -> str:
    """Return text with its line breaks and tabs, other control characters escaped, each line cut."""
    return "\n".join(
        "\t".join(printable(part, characters) for part in line.split("\t")) for line in text.split("\n")
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with escaped cells."""
    lines = [columns, ["---"] * len(columns), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measure_text(measure: Measure | None, style: str) -> str:
    """Return a measure as `value (low … high)`; what follows the number in `style` stays with the value."""
    if measure is None:
        return UNMEASURED
    value = style.format(measure.value)
    if measure.low is None or measure.high is None:
        return f"{value} (interval {UNMEASURED})"
    bare = style.split("}", maxsplit=1)[0] + "}"
    return f"{value} ({bare.format(measure.low)} … {bare.format(measure.high)})"


def write_markdown(path: Path, text: str) -> Path:
    """Write a page, over an earlier one, and return its path."""
    with atomic_file(path, overwrite=True) as stream:
        stream.write(text.encode())
    return path
