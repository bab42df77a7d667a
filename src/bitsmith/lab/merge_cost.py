"""What the merge experiments take, said before they start."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from bitsmith.lab.merge_cases import AnyCase, Distilled, Merged, Sizes, Source, Turned
from bitsmith.run.paired_cost import cost_of
from bitsmith.run.paired_forward import WIDEST_SQUARE, Side
from bitsmith.run.paired_inputs import Sides
from bitsmith.run.seed_claims import Cost

_Piece = TypeVar("_Piece", bound=Hashable)

SAMPLES = 2048
"""Held-out tokens of a pairing, at most."""


def sources_of(case: AnyCase) -> Iterator[Source]:
    """Yield the paired activations that a row reads."""
    if isinstance(case, Merged):
        yield case.source
        yield from (source for source, _ in case.blend)
    elif isinstance(case, Turned):
        yield Source()
        yield from case.sources


def experiments_cost(
    sides: Sides, sizes: Sizes, rows: Mapping[str, Sequence[AnyCase]], chunks: int
) -> tuple[Cost, ...]:
    """Return a row per kind of work: what it is, multiply-adds in all, and which experiments it is for.

    Multiply-adds count weights times tokens of forwards (a backward twice that) and the moments of paired
    activations; folding comes on top. Rows that measure the same are counted once.
    """
    judged = chunks * sizes.ctx_tokens
    teacher, student = _weights(sides.teacher), _weights(sides.student)
    pairs = _users(rows, sources_of)
    texts = _users(rows, lambda case: [] if isinstance(case, Turned) else [case.judged])
    merges = _users(rows, lambda case: [case.key] if isinstance(case, Merged) else [])
    taught = _users(rows, lambda c: [c.source] if isinstance(c, Distilled) else [])
    lessons = sum(map(sizes.of, taught))
    found = [
        Cost(
            "paired activations",
            _names(pairs),
            f"{len(pairs)} times both models, over {sum(map(sizes.of, pairs)):,} tokens in all",
            float(sum(_pairing(sides, sizes, source) for source in pairs)),
        ),
        Cost(
            "both models",
            _names(texts),
            f"{len(texts)} texts of {judged:,} tokens at most",
            len(texts) * judged * (teacher + student),
        ),
        Cost(
            "merges",
            _names(merges),
            f"{len(merges)} merges measured on {judged:,} tokens at most",
            len(merges) * judged * student,
        ),
        Cost(
            "distillation",
            _names(taught),
            f"forward and backward of the student over {lessons:,} tokens, forward of the teacher",
            lessons * (teacher + 3 * student),
        ),
    ]
    return tuple(one for one in found if one.claims)


def _users(
    rows: Mapping[str, Sequence[AnyCase]], pieces: Callable[[AnyCase], Iterable[_Piece]]
) -> dict[_Piece, list[str]]:
    """Return which experiments read each piece."""
    found: dict[_Piece, list[str]] = {}
    for name, cases in rows.items():
        for case in cases:
            for piece in pieces(case):
                found.setdefault(piece, []).append(name)
    return found


def _names(users: Mapping[Any, Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in users.values() for name in names))


def _weights(side: Side) -> float:
    return float(sum(side.matrix_weights) + side.model.head.size)


def _pairing(sides: Sides, sizes: Sizes, source: Source) -> int:
    cost = cost_of(
        sides,
        sizes.of(source),
        ctx_tokens=sizes.ctx_tokens,
        samples=SAMPLES,
        widest_square=WIDEST_SQUARE,
        measure=False,
    )
    return cost.teacher_multiply_adds + cost.student_multiply_adds + cost.moment_multiply_adds
