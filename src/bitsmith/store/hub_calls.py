"""Calls to a hub: tried again where that may help, within bounds, and every failure told in one line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from bitsmith import log
from bitsmith.errors import BitsmithError, printable

ATTEMPTS = 5
"""Tries without any progress before giving up."""

LONGEST_WAIT_SECONDS = 60
"""A hub that asks to wait longer is not waited for."""

FIRST_ATTEMPTS = 3
"""Tries of the first question, which the cache may answer as well."""

_FIRST_WAIT_SECONDS = 1.0
_PASSING = {408, 429, 500, 502, 503, 504}
_SERVER_FAILS = 500
_GATED = "is gated ({status}): accept its terms on its page, then log in with HF_TOKEN or `hf auth login`"
_BY_STATUS = {
    401: "the hub asks for a valid token ({status}): set HF_TOKEN or log in with `hf auth login`",
    403: "the hub forbids it ({status}): the token may lack the right",
    404: "the hub has none ({status}), or it is private: then log in with HF_TOKEN or `hf auth login`",
    429: "the hub has had too many requests ({status}): try again {when}",
}
_Found = TypeVar("_Found")


class HubError(BitsmithError):
    """A hub refused or failed: the line says which, and what to do."""


class NoSuchModelError(HubError):
    """The hub, or offline its cache, has no such repository."""


class UnreachableError(HubError):
    """The hub could not be reached, or asks to come back later: what the cache has may do."""

    exit_code = 4


def retried(what: str, call: Callable[[], _Found], attempts: int = ATTEMPTS) -> _Found:
    """Return what `call` returns, tried again after failures that pass. Raises HubError, UnreachableError."""
    failures = 0
    while True:
        try:
            return call()
        except failure_types() as error:
            failures += 1
            wait_or_raise(what, error, failures, attempts)


def failure_types() -> tuple[type[Exception], ...]:
    """Return what the hub's client raises: HTTP errors, those of sockets, and of answers that are none."""
    from huggingface_hub import get_session  # noqa: PLC0415 (imported only where a hub is named)

    client = import_module(type(get_session()).__module__.partition(".")[0])  # httpx or its successor
    return (client.HTTPError, client.InvalidURL, OSError, ValueError, TypeError, KeyError)


def wait_or_raise(what: str, error: Exception, failures: int, attempts: int = ATTEMPTS) -> None:
    """Wait before another try; raise the failure as a HubError where none may help, or enough were tried."""
    status = _status(error)
    passing = (
        status in _PASSING if status is not None else not isinstance(error, ValueError | TypeError | KeyError)
    )
    wait = _asked_wait(error)
    wait = _FIRST_WAIT_SECONDS * 2 ** (failures - 1) if wait is None else wait
    if not passing or failures >= attempts or wait > LONGEST_WAIT_SECONDS:
        raise explained(what, error) from error
    log.event("wait", repo=what, seconds=wait, why=_said(error))
    time.sleep(wait)


def explained(what: str, error: Exception) -> HubError:
    """Return a failure of the hub's client as one line."""
    status, said = _status(error), _said(error)
    if status is None:
        if isinstance(error, ValueError | TypeError | KeyError):
            return HubError(f"the hub's answer cannot be read{said}", path=what)
        return UnreachableError(f"the hub cannot be reached{said}", path=what)
    wait = _asked_wait(error)
    when = "later" if wait is None else f"in {wait:.0f} seconds"
    kind = UnreachableError if status in _PASSING or status >= _SERVER_FAILS else _kind(error)
    return kind(f"{_words(error, status).format(status=status, when=when)}{said}", path=what)


def _kind(error: Exception) -> type[HubError]:
    from huggingface_hub import errors  # noqa: PLC0415

    missing = isinstance(error, errors.RepositoryNotFoundError) and not isinstance(
        error, errors.GatedRepoError
    )
    return NoSuchModelError if missing else HubError


def _words(error: Exception, status: int) -> str:
    from huggingface_hub import errors  # noqa: PLC0415

    known: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, _GATED),
        (errors.RevisionNotFoundError, "the hub has no such revision ({status})"),
        (errors.EntryNotFoundError, "the hub has no such file ({status})"),
        (errors.RepositoryNotFoundError, _BY_STATUS[404]),
    ]
    for kind, words in known:
        if isinstance(error, kind):
            return words
    if status >= _SERVER_FAILS:
        return "the hub fails ({status}); try again {when}"
    return _BY_STATUS.get(status, "the hub refuses ({status})")


def _response(error: Exception) -> Any:
    return getattr(error, "response", None)


def _status(error: Exception) -> int | None:
    status = getattr(_response(error), "status_code", None)
    return status if isinstance(status, int) else None


def _asked_wait(error: Exception) -> float | None:
    """Return the seconds that the hub asks to wait, by Retry-After or its rate limit, if it does."""
    headers: Mapping[str, str] = getattr(_response(error), "headers", None) or {}
    given = headers.get("Retry-After", "")
    if re.fullmatch(r"\d{1,9}", given):
        return float(given)
    limited = re.search(r"\br=0;t=(\d{1,9})", headers.get("ratelimit", ""))
    return float(limited[1]) if limited else None


def _said(error: Exception) -> str:
    """Return what the server or the system says of a failure, in a few words."""
    headers: Mapping[str, str] = getattr(_response(error), "headers", None) or {}
    text = headers.get("X-Error-Message") or ("" if _status(error) else str(error) or type(error).__name__)
    text = printable(" ".join(text.split()), 160)
    return f": {text}" if text else ""
