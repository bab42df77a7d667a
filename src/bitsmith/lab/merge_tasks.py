"""Two tasks of one language model: code without its docstrings, and the docstrings' prose.

Both come out of the Python standard library on this machine, whose sources every lab model was trained on;
what is to be measured on comes out of the files that none of them saw.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from bitsmith.errors import BitsmithError, printable
from bitsmith.run.corpus import is_held_out, source_files
from bitsmith.store.atomic import atomic_file

_DOCUMENT_CHARACTERS = 8_000  # of each source, so that many are in a text
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def code_of(source: str) -> str:
    r"""Return Python source without the lines of its docstrings.

    Raises SyntaxError or ValueError for what is no Python.

    >>> code_of('def f():\n    "Double."\n    return 2\n')
    'def f():\n    return 2\n'
    """
    lines = source.splitlines(keepends=True)
    dropped: set[int] = set()
    for literal in _docstrings(source):
        first, last = literal.lineno - 1, literal.end_lineno or literal.lineno
        if lines[first].lstrip()[:1] in "\"'rRuUbB":  # else it follows its def on the same line
            dropped.update(range(first, last))
    return "".join(line for number, line in enumerate(lines) if number not in dropped)


def prose_of(source: str) -> str:
    r"""Return the docstrings of Python source in their order, an empty line between them.

    Raises SyntaxError or ValueError for what is no Python.

    >>> prose_of('def f():\n    "Double."\n    return 2\n')
    'Double.\n'
    """
    texts = [str(literal.value).expandtabs().strip() for literal in _docstrings(source)]
    return "\n\n".join("\n".join(line.strip() for line in text.splitlines()) for text in texts if text) + "\n"


TASKS: Mapping[str, Callable[[str], str]] = MappingProxyType({"code": code_of, "prose": prose_of})
"""What each task's text is made by, of one source file."""


def task_text(task: str, limit_bytes: int, *, held_out: bool = False) -> str:
    """Return a task's text of one split, at most `limit_bytes` of UTF-8, from files spread over all of it.

    Files come in the order of their names' SHA-256. Raises BitsmithError for an unknown task.
    """
    if task not in TASKS:
        raise BitsmithError(f"unknown task {printable(task)!r}; known: {' '.join(TASKS)}")
    parts: list[bytes] = []
    size = 0
    for source in _spread(held_out):
        made = _made(TASKS[task], source)[:_DOCUMENT_CHARACTERS].strip("\n")
        if made:
            parts.append(made.encode() + b"\n\n")
            size += len(parts[-1])
        if size >= limit_bytes:
            break
    return b"".join(parts)[:limit_bytes].decode("utf-8", "ignore")


def write_task_text(task: str, out: Path, limit_bytes: int, *, held_out: bool = False) -> Path:
    """Write `task_text` to `out`, replacing it, and return its path."""
    with atomic_file(out, overwrite=True) as stream:
        stream.write(task_text(task, limit_bytes, held_out=held_out).encode())
    return out


def _docstrings(source: str) -> Iterator[ast.Constant]:
    """Yield the literals of a source's docstrings, in the order of the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.append(first.value)
    for literal in sorted(found, key=lambda one: one.lineno):
        if isinstance(literal.value, str):
            yield literal


def _made(task: Callable[[str], str], source: str) -> str:
    try:
        return task(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""


@cache
def _sources() -> list[tuple[str, Path]]:
    """Return the standard library's sources in the order of their names' digests."""
    return sorted(source_files(), key=lambda one: hashlib.sha256(one[0].encode()).hexdigest())


def _spread(held_out: bool) -> Iterator[str]:
    """Yield the sources of a split, those in UTF-8, in the order of their names' digests."""
    for name, path in _sources():
        if is_held_out(name) != held_out:
            continue
        try:
            yield path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
