"""Where tasks run: the contract of an engine, and the one that runs processes on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from bitsmith.run.task import Action, Task

FailureKind = Literal["error", "killed", "memory", "time", "stuck"]
RESOURCE_KINDS: frozenset[str] = frozenset({"killed", "memory", "time", "stuck"})


class Failure(NamedTuple):
    """Why an attempt ended without a result, and the figures that show it."""

    kind: FailureKind
    message: str
    evidence: Mapping[str, Any] = {}


@dataclass(eq=False)
class Attempt:
    """One run of a task: the handle that `Engine.start` returns and `Engine.wait` fills in."""

    task: Task
    out: Path
    result: Mapping[str, Any] | None = None
    failure: Failure | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    latest: tuple[str, int, int] | None = field(default=None)  # what it last reported as progress


class Engine(Protocol):
    """Starts tasks and tells which have ended; knows nothing of their order."""

    def has_room(self, task: Task) -> bool:
        """Whether `task` can be started now. Raises BitsmithError if it never can."""

    def start(self, task: Task, action: Action, inputs: Mapping[str, Path], out: Path) -> Attempt:
        """Begin one attempt, which leaves a sealed artifact at `out` (see `bitsmith.run.worker.perform`)."""

    def wait(self, timeout_seconds: float) -> Sequence[Attempt]:
        """Return the attempts that ended, each once: at the first end, or empty when the time is over."""

    def stop(self) -> None:
        """Kill what runs, with all its children, and return when it is gone."""
