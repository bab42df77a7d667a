"""A study's tasks: pure functions of their parameters, sources and inputs, named by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bitsmith import __version__
from bitsmith.errors import BitsmithError, printable
from bitsmith.progress import Progress

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

Action = Callable[[Mapping[str, Any], Mapping[str, Path], Path, Progress], Mapping[str, Any]]
"""`action(params, inputs, out, progress)` returns JSON-able facts, the same for the same task.

`inputs` holds the artifact folder of every task in `needs`, by that task's name. `out` is an empty folder of
its own: whatever files the action leaves there are its artifact (none is fine). Results hold no times, dates
or paths of `out`: seconds and bytes of memory are measured by the engine.
"""


class Limits(NamedTuple):
    """What one attempt at a task may use; None is no limit.

    `stuck_seconds` is how long it may do nothing at all; None is what the engine allows every task.
    """

    seconds: float | None = None
    memory_bytes: int | None = None
    stuck_seconds: float | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Task:
    """One step of a study: `action` by name, with JSON `params`, after the tasks in `needs`.

    `sources` names the params whose values are paths of files or folders that the action reads: their content
    counts, not their place. `retries` is how often a failed attempt is repeated.
    """

    name: str
    action: str
    params: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    limits: Limits = NO_LIMITS
    retries: int = 1
    sources: tuple[str, ...] = ()


def task_key(
    task: Task, need_keys: Mapping[str, str], source_digests: Mapping[str, str], version: str = __version__
) -> str:
    """Return the SHA-256 (hex) of all that a task's artifact depends on; equal keys, equal artifacts.

    `need_keys` are the keys of `task.needs` by name, `source_digests` those of `task.sources` by parameter.
    A source counts by its content and by the suffix of its name; what else it is called, which some artifacts
    repeat, is then that of the source first read. Limits and retries do not count.
    """
    facts = {
        "bitsmith": version,
        "action": task.action,
        "params": {name: value for name, value in task.params.items() if name not in task.sources},
        "sources": {
            name: [source_digests[name], Path(str(task.params[name])).suffix] for name in task.sources
        },
        "needs": {name: need_keys[name] for name in task.needs},
    }
    try:
        text = json.dumps(facts, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BitsmithError(f"task {printable(task.name)!r}: its parameters are not JSON: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def in_order(tasks: Iterable[Task]) -> list[Task]:
    """Return the tasks so that each comes after those it needs, otherwise as given.

    Raises BitsmithError for a name given twice, a need that is no task, and a circle, naming the tasks.
    """
    waiting = _by_name(tasks)
    ordered: dict[str, Task] = {}
    while waiting:
        ready = [task for task in waiting.values() if all(need in ordered for need in task.needs)]
        if not ready:
            circle = ", ".join(printable(name) for name in waiting)
            raise BitsmithError(f"tasks need each other in a circle, or a task that does: {circle}")
        for task in ready:
            ordered[task.name] = waiting.pop(task.name)
    return list(ordered.values())


def _by_name(tasks: Iterable[Task]) -> dict[str, Task]:
    named: dict[str, Task] = {}
    for task in tasks:
        if task.name in named:
            raise BitsmithError(f"two tasks are named {printable(task.name)!r}")
        named[task.name] = task
    for task in named.values():
        for need in task.needs:
            if need not in named:
                raise BitsmithError(f"task {printable(task.name)!r} needs {printable(need)!r}, no such task")
        for source in task.sources:
            if not isinstance(task.params.get(source), str):
                raise BitsmithError(
                    f"task {printable(task.name)!r}: its parameter {printable(source)!r} is no path"
                )
    return named
