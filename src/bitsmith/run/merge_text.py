"""Which text a merge is made of and which it is judged on: kept apart, and told when they are not."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import load_tokenizer
from bitsmith.errors import BitsmithError
from bitsmith.run.forward import TextModel
from bitsmith.store.atomic import atomic_file

Tokens = NDArray[np.int64]

TEXT_NAME = "text.txt"
HELD_NAME = "held.txt"
LEAST_HELD_CHUNKS = 4
"""Two to choose on and two to judge on."""

_HELD_SHARE = 5  # a fifth of the text
_MOST_HELD_CHUNKS = 64
_SLACK_TOKENS = 16  # that a cut may add or remove on either side
_RUN_TOKENS = 16
_BASE = np.uint64(6364136223846793005)  # Knuth's multiplier: runs that differ rarely get one number
_FEW = 4
MOST_SHARED = 0.5
"""Of the runs of tokens in one text that may occur in another that is to say something new."""


@dataclass(frozen=True)
class Texts:
    """The bytes of what is paired and of what is held out, and where they lie if they are whole files."""

    fit: bytes
    held: bytes
    fit_path: Path | None
    held_path: Path | None

    @property
    def sha256(self) -> tuple[str, str]:
        """Digests of both."""
        return hashlib.sha256(self.fit).hexdigest(), hashlib.sha256(self.held).hexdigest()

    def placed(self, folder: Path) -> tuple[Path, Path]:
        """Return both as files; what is a part of a file is written to the folder."""
        found = []
        for path, name, raw in (
            (self.fit_path, TEXT_NAME, self.fit),
            (self.held_path, HELD_NAME, self.held),
        ):
            target = folder / name
            if path is None and not (target.is_file() and target.read_bytes() == raw):
                with atomic_file(target, overwrite=True) as stream:
                    stream.write(raw)
            found.append(path or target)
        return found[0], found[1]


def read_texts(
    student: TextModel, text: Path, held: Path | None, tokens: int | None, ctx_tokens: int
) -> Texts:
    """Return what is paired and what is held out: `held`, or the last part of the text.

    The last part is a fifth of the text, at most 64 chunks, at least 4, and with `tokens` no more than they
    leave; it begins at a line where one begins near. Raises BitsmithError for what is not UTF-8, for a text
    that is too short for both.
    """
    raw = _read(text)
    if held is None:
        fit, rest = _cut(student, raw.decode(), tokens, ctx_tokens, text)
        return Texts(fit.encode(), rest.encode(), None, None)
    other = _read(held)
    return Texts(raw, other, text, held)


def shared_runs(seen: Tokens, held: Tokens) -> NDArray[np.float64]:
    """Return for each chunk of `held` (`chunks T`) which share of its runs of 16 tokens is in `seen` too."""
    shares: NDArray[np.float64] = np.isin(_runs(held), _runs(seen)).mean(1, dtype=np.float64)
    return shares


def refuse_shared(shares: NDArray[np.float64], path: Path) -> None:
    """Raise BitsmithError where over a quarter of the held-out chunks is in what the merge is made of."""
    count = int((shares > MOST_SHARED).sum())
    if count > len(shares) // _FEW:
        raise BitsmithError(
            f"{count} of its {len(shares)} chunks are in the text that the merge is made of: it is not held "
            "out",
            path=path,
        )


def _runs(tokens: Tokens) -> NDArray[np.uint64]:
    """Return a number for every run of tokens in each chunk (`chunks n`)."""
    length = min(_RUN_TOKENS, tokens.shape[1])
    count = tokens.shape[1] - length + 1
    found = np.zeros((len(tokens), count), np.uint64)
    for place in range(length):
        found = found * _BASE + tokens[:, place : place + count].astype(np.uint64)
    return found


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        raw.decode()
    except OSError as error:
        raise BitsmithError(f"cannot be read: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise BitsmithError(f"is not UTF-8: {found}", path=path) from error
    if not raw.strip():
        raise BitsmithError("is empty", path=path)
    return raw


def _cut(student: TextModel, text: str, tokens: int | None, ctx_tokens: int, path: Path) -> tuple[str, str]:
    tokenizer = load_tokenizer(student.source)
    tokenizer.encode_special_tokens = True
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    least = LEAST_HELD_CHUNKS * ctx_tokens + _SLACK_TOKENS
    spare = len(offsets) - _SLACK_TOKENS - (2 * ctx_tokens if tokens is None else tokens)
    wanted = min(max(len(offsets) // _HELD_SHARE, least), _MOST_HELD_CHUNKS * ctx_tokens + _SLACK_TOKENS)
    held = min(wanted, spare)
    if held < least:
        asked = "" if tokens is None else f" besides the {tokens} that are asked for"
        raise BitsmithError(
            f"has {len(offsets)} tokens, too few to hold out {LEAST_HELD_CHUNKS} chunks of {ctx_tokens}"
            f"{asked}; give a longer text, a held-out text of its own, or a smaller context",
            path=path,
        )
    first, last = (offsets[len(offsets) - count][0] for count in (held, least))
    line = text.find("\n", first, last)
    place = first if line < 0 else line + 1
    return text[:place], text[place:]
