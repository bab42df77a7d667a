"""A teacher, a student and a text: what has to agree before both are run over the same tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.passes.merge_layers import proportional_layers
from bitsmith.run.evaluate import open_model, text_chunks, tokenizer_keys
from bitsmith.run.evaluation import Protocol
from bitsmith.run.forward import TextModel, check_heads
from bitsmith.run.paired_forward import Side
from bitsmith.store.paired import SideName

Tokens = NDArray[np.int64]
LayerMap = str | Sequence[int]
"""`cka`, `proportional`, or the teacher's layer for each of the student's."""

HELD_SHARE = 8
"""At most one chunk in so many is held out as a sample."""
MAPS = ("cka", "proportional")

_IDENTITY = ("model", "pre", "tokens", "merges")
_NORMALIZER = "bitsmith.tokenizer.normalizer"


@dataclass(frozen=True)
class Sides:
    """A teacher and a student of one family, with one vocabulary; `tokenizer_sha256` is of what encodes."""

    teacher: Side
    student: Side
    tokenizer_sha256: str

    @property
    def named(self) -> tuple[tuple[SideName, Side], tuple[SideName, Side]]:
        """Both by their names."""
        return ("teacher", self.teacher), ("student", self.student)


@dataclass(frozen=True)
class Corpus:
    """The tokens of both models (`chunks T`), and which chunks are held out of the moments."""

    tokens: Tokens
    held: Tokens
    protocol: Protocol

    @property
    def split(self) -> tuple[Tokens, Tokens]:
        """The tokens of the chunks in the moments, and of the held-out ones."""
        fit = np.setdiff1d(np.arange(len(self.tokens)), self.held)
        return self.tokens[fit], self.tokens[self.held]


@contextmanager
def open_sides(teacher: Path, student: Path) -> Iterator[Sides]:
    """Open both models.

    Raises BitsmithError for a teacher narrower or shallower than the student, for tokenizers that differ, and
    where no layer of a kind is left to choose from; UnsupportedError for two families; as `open_model` does.
    """
    with open_model(teacher) as big, open_model(student) as small:
        yield checked_sides(big, small)


def checked_sides(teacher: TextModel, student: TextModel) -> Sides:
    """Return both models as sides; raises as `open_sides` does."""
    path = teacher.checkpoint.path
    if teacher.arch.gguf_arch != student.arch.gguf_arch:
        raise UnsupportedError(
            f"is a {teacher.arch.gguf_arch}, the student a {student.arch.gguf_arch}: expected one family",
            path=path,
        )
    for key, what in (("hidden_size", "values wide"), ("num_hidden_layers", "layers deep")):
        ours, theirs = teacher.arch.number(key), student.arch.number(key)
        if ours < theirs:
            raise BitsmithError(
                f"is {ours} {what}, the student {theirs}: the teacher has to be the larger", path=path
            )
    digest = _same_tokenizer(teacher, student)
    sides = Sides(Side(teacher), Side(student), digest)
    try:
        proportional_layers(sides.teacher.kinds, sides.student.kinds)
    except BitsmithError as error:
        raise BitsmithError(error.message, path=path) from error
    return sides


def checked_map(layer_map: LayerMap, sides: Sides) -> None:
    """Refuse a map that is not known, or that is no increasing choice of layers of the student's kinds."""
    if isinstance(layer_map, str):
        if layer_map not in MAPS:
            raise BitsmithError(f"layer map {printable(layer_map)!r} is unknown; known: {', '.join(MAPS)}")
        return
    ours, theirs = sides.teacher.kinds, sides.student.kinds
    if len(layer_map) != len(theirs):
        raise BitsmithError(f"the layer map names {len(layer_map)} layers, the student has {len(theirs)}")
    steps = zip([-1, *layer_map], layer_map, strict=False)
    if any(after <= before for before, after in steps) or layer_map[-1] >= len(ours):
        raise BitsmithError(f"the layer map has to increase from 0 or more to at most {len(ours) - 1}")
    for layer, (chosen, kind) in enumerate(zip(layer_map, theirs, strict=True)):
        if ours[chosen] != kind:
            raise BitsmithError(
                f"the layer map puts the teacher's layer {chosen} ({ours[chosen]}) beside the student's "
                f"{layer} ({kind})"
            )


def read_corpus(
    sides: Sides, text: Path, tokens: int | None, ctx_tokens: int, samples: int, *, sparse: bool = False
) -> Corpus:
    """Cut a UTF-8 text into chunks and choose which are samples: evenly spread, one in eight at most.

    Raises BitsmithError for a text with fewer than `tokens`, for less than two chunks, for fewer tokens in
    the moments than the student's states are wide (unless `sparse`), and as `text_chunks` does.
    """
    wanted = None if tokens is None else tokens // max(1, ctx_tokens)
    if wanted is not None and wanted < 2:
        raise BitsmithError(f"{tokens} tokens are too few: two chunks of {ctx_tokens} are the least")
    if samples < 1:
        raise BitsmithError(f"{samples} sample tokens leave nothing to compare layers by")
    chunks, protocol = text_chunks(sides.teacher.model, text, ctx_tokens, wanted)
    other, _ = text_chunks(sides.student.model, text, ctx_tokens, wanted)
    if not np.array_equal(chunks, other):
        raise BitsmithError(
            "its tokenizer gives the text other tokens than the student's",
            path=sides.teacher.model.checkpoint.path,
        )
    if wanted is not None and len(chunks) < wanted:
        raise BitsmithError(f"has {protocol.text_tokens} tokens, {tokens} are asked for", path=text)
    if len(chunks) < 2:
        raise BitsmithError(
            f"has {protocol.text_tokens} tokens, two chunks of {ctx_tokens} are the least", path=text
        )
    held = held_chunks(len(chunks), ctx_tokens, samples)
    fit_tokens, width = (len(chunks) - len(held)) * ctx_tokens, sides.student.hidden
    if fit_tokens < width and not sparse:
        raise BitsmithError(
            f"leaves {fit_tokens} tokens for the moments of states {width} wide, too few to tell their "
            "directions apart; give a longer text, or ask for sparse data",
            path=text,
        )
    return Corpus(chunks, held, protocol)


def held_chunks(chunks: int, ctx_tokens: int, samples: int) -> Tokens:
    """Return which chunks are held out: enough for `samples` tokens, one in eight at most, evenly spread.

    >>> held_chunks(16, 512, 2048).tolist()
    [4, 12]
    """
    count = max(1, min(-(-samples // ctx_tokens), chunks // HELD_SHARE))
    spread: Tokens = (2 * np.arange(count, dtype=np.int64) + 1) * chunks // (2 * count)
    return spread


def _same_tokenizer(teacher: TextModel, student: TextModel) -> str:
    """Return the digest of what both tokenizers encode by."""
    check_heads(student, teacher)
    ours, theirs = _identity(teacher), _identity(student)
    path = teacher.checkpoint.path
    if ours == theirs:
        return hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()
    tables = zip(ours["tokens"] or [], theirs["tokens"] or [], strict=False)
    for index, (own, other) in enumerate(tables):
        if own != other:
            raise BitsmithError(
                f"token {index} is {printable(own)!r}, the student's is {printable(other)!r}: merging takes "
                "one vocabulary",
                path=path,
            )
    differing = ", ".join(key for key in ours if ours[key] != theirs[key])
    raise BitsmithError(f"its tokenizer is not the student's: {differing} differ", path=path)


def _identity(model: TextModel) -> dict[str, Any]:
    keys = tokenizer_keys(model)
    return {key: keys.get(f"tokenizer.ggml.{key}") for key in _IDENTITY} | {
        "normalizer": keys.get(_NORMALIZER)
    }
