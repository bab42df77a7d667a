"""Sides that take turns, and the spread of what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from children import Ran

OURS = "bitsmith"


@dataclass(frozen=True)
class Spread:
    """Median of `n` values with the lowest and the highest; no range where n is 1."""

    median: float
    low: float | None
    high: float | None
    n: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        all_ = sorted(values)
        ends = (all_[0], all_[-1]) if len(all_) > 1 else (None, None)
        return Spread(median(all_), *ends, len(all_))

    def to_json(self) -> dict[str, Any]:
        """Return its fields."""
        return asdict(self)


class Turns(dict[str, Spread]):
    """Seconds of each side by name, with every round's in `rounds`."""

    def __init__(self, rounds: Mapping[str, Sequence[float]]) -> None:
        super().__init__({name: Spread.of(seconds) for name, seconds in rounds.items()})
        self.rounds = {name: list(seconds) for name, seconds in rounds.items()}

    def times_faster(self, than: str, ours: str = OURS) -> Spread:
        """Return how many times less time ours took than another side, round by round."""
        return Spread.of(
            theirs / mine for mine, theirs in zip(self.rounds[ours], self.rounds[than], strict=True)
        )


def seconds_of(work: Callable[[], object]) -> float:
    """Return the wall seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(sides: Mapping[str, Callable[[], object]], repeats: int = 5, warmups: int = 1) -> Turns:
    """Let the sides take turns, in the opposite order every other round; warm-ups are not counted.

    A side that returns a `Ran` (a child process) is counted by the child's own seconds.
    """
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warmups, repeats):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            started = time.perf_counter()
            result = sides[name]()
            took = result.seconds if isinstance(result, Ran) else time.perf_counter() - started
            if turn >= 0:
                rounds[name].append(took)
    return Turns(rounds)
