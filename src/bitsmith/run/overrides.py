"""Rules `REGEX=TYPE` that give single tensors another type; none may be without effect."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bitsmith.errors import BitsmithError, printable


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
