"""Rules `REGEX=TYPE` that give single tensors another type; none may be without effect."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bitsmith.errors import BitsmithError, printable

_RULE = re.compile(r"(.+?)=([A-Za-z][\w+]*(?::[\w=.+:-]*)?)")
"""A type's options may hold equals signs of their own, as `SVD:r=64` does; a regex may, too."""


def split_rule(rule: str) -> tuple[str, str] | None:
    """Return the regex and the type of `REGEX=TYPE`, None for what is no such rule."""
    found = _RULE.fullmatch(rule)
    pattern, wanted = found.groups() if found else rule.rpartition("=")[::2]
    return (pattern, wanted) if pattern and wanted else None


class Override:
    """A regex, searched in names regardless of case, and the type it asks for, with what became of it.

    Raises BitsmithError for a pattern that is no regular expression.
    """

    def __init__(self, pattern: str, type_name: str) -> None:
        self.pattern = pattern
        self.type = type_name
        self.applied = False
        self.idle_because: str | None = None
        try:
            self._regex = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise BitsmithError(
                f"tensor type {printable(pattern)!r}: bad regular expression: {error}"
            ) from error

    def matches(self, *names: str) -> bool:
        """Tell whether the regex is found in one of a tensor's names."""
        return any(self._regex.search(name) for name in names)

    def refuse_idle(self, unmatched: str = "no tensor has a name that matches") -> None:
        """Raise BitsmithError if no tensor took its type from this override; `unmatched` says of which."""
        if not self.applied:
            raise BitsmithError(
                f"tensor type {printable(self.pattern)}={self.type} changes nothing: "
                f"{self.idle_because or unmatched}"
            )


def first_match(overrides: Iterable[Override], *names: str) -> Override | None:
    """Return the first override that matches one of a tensor's names, None if none does; note its effect."""
    matching = [override for override in overrides if override.matches(*names)]
    for override in matching[1:]:
        override.idle_because = f"{matching[0].pattern} comes before it"
    if not matching:
        return None
    matching[0].applied = True
    return matching[0]
