"""What a run tells as it goes: one structured record for each thing that begins, to whoever listens."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from bitsmith.errors import BitsmithError, OutputError, printable

LOGGER = logging.getLogger("bitsmith")

_FIELDS = "bitsmith_fields"
_LINE_CHARACTERS = 4000
_NAMES = ("task", "step", "part", "layer", "tensor", "file")


class _Latest:
    """What this process began last, the tensor it read since, and where its finished pieces are kept."""

    def __init__(self) -> None:
        self.what = ""
        self.fields: dict[str, Any] = {}
        self.read: tuple[str, Path] | None = None
        self.kept: dict[Path, str] = {}

    def named(self) -> dict[str, str]:
        """Return the names of what is being worked on: those of what began, and the tensor read since."""
        names = {name: str(self.fields[name]) for name in _NAMES if name in self.fields}
        return names if self.read is None else {"tensor": self.read[0], **names}


_latest = _Latest()


def event(what: str, **fields: Any) -> None:
    """Tell that something begins or happened: a record of level INFO on the logger `bitsmith`.

    `fields` are values that JSON knows, paths, and numpy's numbers. What takes memory or time is told
    *before* it is done, so that the last line of a run that the system killed names it.
    """
    _latest.what, _latest.fields, _latest.read = what, fields, None
    tell(what, fields)


def reading(tensor: str, path: Path, nbytes: int) -> None:
    """Tell that a stored tensor of `nbytes` is read, unless it was told last: slices of one are one event."""
    if _latest.read is None or _latest.read != (tensor, path):
        _latest.read = tensor, path
        tell("read", {"tensor": tensor, "file": path, "bytes": nbytes})


def tell(what: str, fields: Mapping[str, Any]) -> None:
    """Tell of something without its being what this process works on: what another process told."""
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info(what, extra={_FIELDS: fields})


def warn(message: str, **fields: Any) -> None:
    """Tell of something that the user should know and that does not stop the run: level WARNING."""
    LOGGER.warning("%s", printable(message, _LINE_CHARACTERS), extra={_FIELDS: fields})


def progressed(stage: str, done: int, total: int) -> None:
    """Tell how far a stage is, with the names of what began last; as `bitsmith.progress.Progress`."""
    if LOGGER.isEnabledFor(logging.INFO):
        tell("progress", {"stage": stage, "done": int(done), "total": int(total), **_latest.named()})


def fail(message: str, *, tensor: str | None = None, error: BaseException | None = None) -> None:
    """Tell why the run ends: level ERROR, with the trace of `error` where it is no refusal."""
    fields = {"message": message, **({} if tensor is None else {"tensor": tensor})}
    LOGGER.error("error", extra={_FIELDS: fields}, exc_info=error)


def latest_place() -> str | None:
    """Return what is being worked on, as `encode, tensor 'blk.0.ffn_up.weight'`; None before any."""
    if not _latest.what and _latest.read is None:
        return None
    names = [f"{name} {printable(text)!r}" for name, text in _latest.named().items()]
    return ", ".join([_latest.what or "read", *names])


def keeps(path: Path, how: str = "the same command goes on with it") -> None:
    """Note that finished pieces are in `path` from now on, as long as it is there, and how a run goes on."""
    if path not in _latest.kept:
        _latest.kept[path] = how
        tell("keeps", {"path": path, "how": how})


def how_to_resume() -> str:
    """Return a sentence on what this process left for a next run."""
    for path, how in reversed(_latest.kept.items()):
        if path.exists():
            return f"what is finished is kept in {printable(str(path))}: {how}"
    return "nothing of it is kept: the same command starts anew"


class JsonLines(logging.Handler):
    """Writes each record as one line of JSON: `time` (UTC), `event`, the fields.

    Warnings are events `warning`, the reason of a run's end an event `error`, both with a `message`.
    Every line is flushed to the system at once: what a process told survives its being killed.
    """

    def __init__(self, stream: TextIO, *, owned: bool = False) -> None:
        super().__init__(logging.INFO)
        self._stream, self._owned = stream, owned

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; a stream that is gone ends no run."""
        with suppress(OSError, ValueError):
            self._stream.write(json_line(record) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Close the stream if it is this handler's own."""
        super().close()
        if self._owned:
            with suppress(OSError):
                self._stream.close()


def json_line(record: logging.LogRecord) -> str:
    """Return a record as one line of JSON in ASCII, control characters escaped."""
    when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    line: dict[str, Any] = {"time": when, "event": record.getMessage()}
    if record.levelno == logging.WARNING:
        line |= {"event": "warning", "message": record.getMessage()}
    line |= getattr(record, _FIELDS, {})
    if record.exc_info and record.exc_info[0] is not None:
        line["trace"] = logging.Formatter().formatException(record.exc_info)
    return json.dumps(line, default=_plain)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return what `event` was given, as values that JSON knows."""
    found: dict[str, Any] = json.loads(json.dumps(getattr(record, _FIELDS, {}), default=_plain))
    return found


def to_json_lines(target: TextIO | Path) -> JsonLines:
    """Send every record to a stream, or to the end of a file of such lines, and return the handler.

    Raises OutputError for a file that cannot be written and for one that holds anything else.
    """
    own = isinstance(target, Path)
    handler = JsonLines(_opened(target) if isinstance(target, Path) else target, owned=own)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    return handler


def _opened(path: Path) -> TextIO:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        stream = os.fdopen(descriptor, "rb+", buffering=0)
        start = stream.read(_LINE_CHARACTERS) if stream.seekable() else b""
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=path) from error
    if start and not start.startswith(b'{"time":'):
        stream.close()
        raise OutputError("is no log of bitsmith's; name another file for --log-json", path=path)
    return io.TextIOWrapper(io.BufferedWriter(stream), encoding="ascii", write_through=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Path | BitsmithError):
        return str(value)
    if hasattr(value, "item"):  # numpy's numbers
        return value.item()
    return str(value)
