"""Errors that a user can act on: one line that names the file, the tensor, and what was expected."""

from __future__ import annotations

import errno
import os
from pathlib import Path


class BitsmithError(Exception):
    """Refuse with one line: `PATH: tensor 'NAME': MESSAGE`.

    The command line prints it as it is and exits with `exit_code`; nothing is written by then.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, path: Path | str | os.PathLike[str] | None = None, tensor: str | None = None
    ) -> None:
        self.message = message
        self.path = None if path is None else Path(path)
        self.tensor = tensor
        where = ([f"{self.path}"] if path is not None else []) + (
            [f"tensor {printable(tensor)!r}"] if tensor is not None else []
        )
        super().__init__(": ".join([*where, message]))


class DamagedFileError(BitsmithError):
    """A file does not keep its format's rules: truncated, overlapping, overflowing or mislabelled."""


class UnsupportedError(BitsmithError):
    """The input is sound but is something that bitsmith does not handle."""


class OutputError(BitsmithError):
    """The output cannot be written: it exists, is the input, or the disk is full."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory could not be had: Python's, the system's or torch's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "bad_alloc" in said)
    )


def printable(text: str, limit: int = 200) -> str:
    """Return `text` with control characters escaped and cut at `limit` characters, safe for a terminal."""
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return clean if len(text) <= limit else clean + "…"
