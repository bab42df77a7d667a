"""What holds for every command: the global flags, where its log goes, and how a process ends."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bitsmith import __version__
from bitsmith.errors import BitsmithError, is_out_of_memory, printable
from bitsmith.log import LOGGER, event, fail, how_to_resume, latest_place, to_json_lines

OUT_OF_MEMORY = 3
INTERRUPTED = 130
EXIT_CODES = (
    "Exit codes: 0 done; 1 refused or failed, as the one line on stderr says, or a gate did not pass; "
    "2 the command line is wrong; 3 out of memory; 4 the hub cannot be reached or is busy, try again; "
    "130 interrupted (Ctrl-C); 137 killed by the system (128 + the signal's number)."
)

_LINE_CHARACTERS = 20_000
_LOG_SUFFIXES = (".json", ".jsonl", ".ndjson", ".log")
_TEXTS = ("-p", "--prompt")  # whose value may look like a flag


@dataclass
class Flags:
    """What the global flags of the running command say."""

    quiet: bool = False
    log_on_stderr: bool = False

    @property
    def shows_progress(self) -> bool:
        """Whether anything but errors may be shown on stderr."""
        return not (self.quiet or self.log_on_stderr)


flags = Flags()


def hoisted(words: Sequence[str]) -> list[str]:
    """Return a command line with its global flags first, where they are understood.

    `--log-json` takes a file as `--log-json=FILE`, or as the next word if that ends as a log does; `-` is
    stderr. Behind `--` and as a prompt, words are left as they are.
    """
    front: list[str] = []
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word in ("--quiet", "--offline") or word.startswith("--log-json="):
            front.append(word)
        elif word == "--log-json":
            given = left.pop(0) if left and _is_log_name(left[0]) else "-"
            front.append(f"--log-json={given}")
        elif word == "--":
            return [*front, *rest, word, *left]
        else:
            rest.append(word)
            if word in _TEXTS and left:
                rest.append(left.pop(0))
    return front + rest


def _is_log_name(word: str) -> bool:
    return word == "-" or (not word.startswith("-") and word.lower().endswith(_LOG_SUFFIXES))


def begin(*, quiet: bool, log_json: str | None, offline: bool) -> None:
    """Take in the global flags. Raises OutputError for a log that cannot be written."""
    flags.quiet, flags.log_on_stderr = quiet, log_json == "-"
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if not flags.shows_progress:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        warnings.simplefilter("ignore")
    if log_json is not None:
        to_json_lines(sys.stderr if log_json == "-" else Path(log_json))
    if flags.shows_progress:
        LOGGER.addHandler(_Warnings(logging.WARNING))
    event("start", bitsmith=__version__, command=sys.argv[1:], process=os.getpid())


class _Warnings(logging.Handler):
    """Shows warnings as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR:
            with suppress(OSError, ValueError):
                sys.stderr.write(f"warning: {record.getMessage()}\n")


def run(app: Callable[[Sequence[str]], object]) -> NoReturn:
    """Run the command line that sys.argv holds and exit; what is foreseeable is one line on stderr.

    Ctrl-C ends it within two seconds even while compiled code runs: nothing needs to be cleaned up for the
    outputs to stay whole, since a run that is killed at any moment leaves none under its name.
    """
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # what is done is not interrupted
    with _restored(), _guarded() as guard:
        code = _exit_code(app)
        if code == INTERRUPTED:
            guard.say_interrupted()
        event("end", exit_code=code)
        if code == INTERRUPTED:  # now, not when threads have ended
            sys.stdout.flush()
            os._exit(code)
    sys.exit(code)


def _exit_code(app: Callable[[Sequence[str]], object]) -> int:
    try:
        app(hoisted(sys.argv[1:]))
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BitsmithError as error:
        return _failed(str(error), error.exit_code, error)
    except Exception as error:
        if is_out_of_memory(error):
            return _failed(f"{_out_of_memory(error)}; {how_to_resume()}", OUT_OF_MEMORY, error)
        if isinstance(error, OSError):
            return _failed(f"{error.filename or 'input/output'}: {error.strerror or error}", 1, error)
        fail("a defect of bitsmith", error=error)
        raise
    return 0


def _out_of_memory(error: Exception) -> str:
    place = latest_place()
    return f"out of memory{f' at {place}' if place else ''}: {printable(str(error)) or 'no more can be had'}"


def _failed(message: str, code: int, error: Exception) -> int:
    _show(message, error)
    return code


def _show(message: str, error: BaseException | None = None) -> None:
    clean = printable(message, _LINE_CHARACTERS)
    fail(clean, tensor=getattr(error, "tensor", None))
    if not flags.log_on_stderr:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"error: {clean}\n")
            sys.stderr.flush()


class _Guard:
    """The process of `bitsmith.cli.guard` beside this one, which learns where this one is.

    Without it, where none can be started, a Ctrl-C waits for compiled code to return.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        facts, self._facts = os.pipe()
        self._answers, answers = os.pipe()
        os.set_blocking(self._facts, False)
        files = [(os.POSIX_SPAWN_DUP2, facts, 0), (os.POSIX_SPAWN_DUP2, answers, 1)]
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")), str(os.getpid())]
        self._process, self._before = 0, -1
        with suppress(OSError):
            self._process = os.posix_spawn(command[0], command, {}, file_actions=files, setsid=True)
        os.close(facts)
        os.close(answers)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.set_wakeup_fd(self._facts, warn_on_full_buffer=False)
        threading.Thread(target=self._obey, name="ctrl-c", daemon=True).start()

    def tell(self, line: str) -> None:
        """Tell it a line; one that it does not take in time is lost."""
        with suppress(OSError):
            os.write(self._facts, f"{line}\n".encode())

    def say_interrupted(self) -> None:
        """Say that a Ctrl-C ends the run, and how it goes on, once."""
        if self._lock.acquire(blocking=False):
            self.tell("end")
            _show(f"interrupted; no unfinished output is left; {how_to_resume()}")

    def end(self) -> None:
        """Let it go."""
        self.tell("end")
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._before)
        os.close(self._facts)
        if self._process:
            os.waitpid(self._process, 0)

    def _obey(self) -> None:
        if os.read(self._answers, 1):
            self.say_interrupted()
            os._exit(INTERRUPTED)
        os.close(self._answers)


class _ToGuard(logging.Handler):
    """Tells the guard what is being worked on and what is kept."""

    def __init__(self, guard: _Guard) -> None:
        super().__init__(logging.INFO)
        self._guard, self._place = guard, ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "keeps":
            self._guard.tell(f"kept {how_to_resume()}")
        elif (place := latest_place() or "") != self._place:
            self._place = place
            self._guard.tell(f"at {place}")


@contextmanager
def _guarded() -> Iterator[_Guard]:
    """Within the block, a Ctrl-C that Python code does not see in time ends the process."""
    guard = _Guard()
    LOGGER.addHandler(_ToGuard(guard))
    LOGGER.setLevel(logging.INFO)
    try:
        yield guard
    finally:
        guard.end()


@contextmanager
def _restored() -> Iterator[None]:
    """Leave the process's log, warnings and flags as they were: tests and notebooks call `main` too."""
    handlers, level, environment = list(LOGGER.handlers), LOGGER.level, dict(os.environ)
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for handler in [one for one in LOGGER.handlers if one not in handlers]:
                LOGGER.removeHandler(handler)
                handler.close()
            LOGGER.setLevel(level)
            flags.quiet = flags.log_on_stderr = False
            for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
                if name in environment:
                    os.environ[name] = environment[name]
                else:
                    os.environ.pop(name, None)
