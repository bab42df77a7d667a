"""How long work reports where it is: a callback that the library calls and the command line draws."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`; `done` counts up to `total` in the stage's own unit, bytes or tokens."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing: the default of every library call."""
