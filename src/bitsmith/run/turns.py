"""Work of several threads that has to be done in the order of its tasks, whoever runs them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Turn = Callable[[str], AbstractContextManager[object]]
"""Waits for the turn at what is named, and ends it on exit."""


class Turns:
    """Gives tasks 0, 1, 2, … their turns at what is named: float sums depend on their order.

    Every task takes a turn at every name, and all tasks take the names in the same order.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._changed = threading.Condition()
        self._next: defaultdict[str, int] = defaultdict(int)
        self._failure: BaseException | None = None

    @contextmanager
    def task(self, number: int) -> Iterator[None]:
        """Run task `number` on this thread; if it fails, no task waits for it any longer."""
        self._here.number = number
        try:
            yield
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()
            raise

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Wait until all earlier tasks have had their turn at `name`; raise what another task failed by."""
        number = self._here.number
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._next[name] == number)
            if self._failure is not None:
                raise self._failure
        yield
        with self._changed:
            self._next[name] = number + 1
            self._changed.notify_all()

    def under(self, prefix: str) -> Turn:
        """Return turns at names that begin with `prefix`."""
        return lambda name: self.turn(f"{prefix}.{name}")
