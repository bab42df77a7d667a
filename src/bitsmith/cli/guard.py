"""A small process beside a command: it can still speak when compiled code or the system silenced that.

It runs as a file, without bitsmith, so that it is there at once and takes little memory. It ends with the
command it guards.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import suppress

ASK_SECONDS = 0.8
KILL_SECONDS = 1.7
_FIRST_TEXT_BYTE = 9  # bytes below are numbers of signals


def watch(process: int, facts: int = 0, answers: int = 1) -> None:
    """Read what the command tells until it ends; end it where it does not by itself after a Ctrl-C.

    `facts` brings lines (`at PLACE`, `kept SENTENCE`, `end`) and, between their bytes, the number of each
    signal that the command's Python has not seen yet. A byte to `answers` asks a thread of it to end all,
    which it cannot while compiled code holds the interpreter's lock: then it is killed.
    """
    told, asked = _Told(), False
    while not told.over:
        if select.select([facts], [], [], told.left(KILL_SECONDS if asked else ASK_SECONDS))[0]:
            told.take(os.read(facts, 1 << 16))
        elif not asked:
            asked = True
            with suppress(OSError):
                os.write(answers, b"!")
        else:
            if not told.ended:
                _say(f"interrupted; no unfinished output is left; {told.kept}")
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            return
    if not told.ended:
        place = f" at {told.place}" if told.place else ""
        _say(f"killed or crashed{place}, as when memory runs out; {told.kept}")


class _Told:
    """What the command told last, when it was interrupted, and whether it said that it ends."""

    def __init__(self) -> None:
        self.place, self.kept = "", "nothing of it is kept: the same command starts anew"
        self.ended = self.over = False
        self._since: float | None = None
        self._rest = b""

    def left(self, seconds: float) -> float | None:
        """Return what is left of `seconds` since the interrupt, None without one."""
        return None if self._since is None else max(0.0, self._since + seconds - time.monotonic())

    def take(self, data: bytes) -> None:
        """Take in a piece of what it told; an empty one says that it is gone."""
        self.over = not data
        if signal.SIGINT in data and self._since is None:
            self._since = time.monotonic()
        data = bytes(byte for byte in data if byte >= _FIRST_TEXT_BYTE)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            word, _, text = line.decode(errors="replace").partition(" ")
            if word == "at":
                self.place = text
            elif word == "kept":
                self.kept = text
            elif word == "end":
                self.ended = True


def _say(message: str) -> None:
    with suppress(OSError):
        os.write(2, f"error: {message}\n".encode())


if __name__ == "__main__":
    os.chdir("/")
    watch(int(sys.argv[1]))
