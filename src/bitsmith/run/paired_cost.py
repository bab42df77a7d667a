"""What pairing two models' activations takes, said before it starts: arithmetic, disk, memory and time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bitsmith import __version__
from bitsmith.passes.merge_layers import proportional_layers
from bitsmith.run.paired_forward import (
    TASK_TOKENS,
    WIDEST_SQUARE,
    Side,
    Step,
    pair_bytes,
    pair_shapes,
    run_pair,
)
from bitsmith.run.paired_inputs import Sides, held_chunks, open_sides
from bitsmith.run.paired_sums import PlaceShape, PlaceSums
from bitsmith.run.sites import States, site_threads
from bitsmith.store.paired import STATE_PLACES

CKA_TOKENS = 2048
# Interpreter, libraries and tokenizers (326 to 531 MiB were measured), what freed layers leave in the heap
# and products in flight (beyond 512 MiB: 190 MiB at Qwen3-1.7B's and 0.6B's shapes, 300 at 32B's and 4B's).
_ALLOWANCE_BYTES = 1 << 30
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class PairedCost:
    """The cost of one run over `tokens` tokens, `held_tokens` of them samples.

    Multiply-adds are those of weight matrices and of moments, without attention's own. `disk_bytes` is the
    most that lies on the disk at a time: `kept_bytes`, which stay, and the states of all tokens.
    `memory_bytes` is one layer of each model in float32, the moments of a pair and the activations in flight.
    `seconds` is judged from one layer of each kind that was run, None where none was.
    """

    tokens: int
    held_tokens: int
    teacher_multiply_adds: int
    student_multiply_adds: int
    moment_multiply_adds: int
    kept_bytes: int
    disk_bytes: int
    memory_bytes: int
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {"kind": "paired_cost", "bitsmith": __version__, **asdict(self)}


def paired_cost(
    teacher: Path,
    student: Path,
    tokens: int,
    *,
    ctx_tokens: int = 512,
    samples: int = 2048,
    widest_square: int = WIDEST_SQUARE,
    measure: bool = True,
) -> PairedCost:
    """Return what `paired` takes for two models and so many tokens.

    With `measure` one layer of each kind is read and run with its moments, which takes their memory. Raises
    as `open_sides` does.
    """
    with open_sides(teacher, student) as sides:
        return cost_of(
            sides,
            tokens,
            ctx_tokens=ctx_tokens,
            samples=samples,
            widest_square=widest_square,
            measure=measure,
        )


def cost_of(
    sides: Sides, tokens: int, *, ctx_tokens: int, samples: int, widest_square: int, measure: bool
) -> PairedCost:
    """Return what two opened models take."""
    held = len(held_chunks(max(1, tokens // ctx_tokens), ctx_tokens, samples)) * ctx_tokens
    teacher, student, fit = sides.teacher, sides.student, max(0, tokens - held)
    layers = proportional_layers(teacher.kinds, student.kinds)
    shapes = [
        pair_shapes(teacher, student, (layer, pair), widest_square) for pair, layer in enumerate(layers)
    ]
    hidden = teacher.hidden, student.hidden
    ends = {"states": PlaceShape(*hidden, *hidden)}
    states = sum((2 * side.n_layers + 1) * side.hidden for _, side in sides.named)
    summed = (*shapes, *[ends] * 3)  # behind the embeddings, before and behind the final norms
    kept = sum(_kept_bytes(one) for one in summed) + 4 * held * states + 8 * tokens
    return PairedCost(
        tokens=tokens,
        held_tokens=held,
        teacher_multiply_adds=tokens * sum(teacher.matrix_weights),
        student_multiply_adds=tokens * sum(student.matrix_weights),
        moment_multiply_adds=fit * sum(_multiply_adds(one) for one in summed),
        kept_bytes=kept,
        disk_bytes=kept + 4 * max(2 * fit * sum(hidden), 3 * held * max(hidden)),
        memory_bytes=_memory_bytes(sides, shapes, ctx_tokens, min(held, CKA_TOKENS)),
        seconds=_seconds(sides, shapes, layers, (fit, held), ctx_tokens) if measure else None,
    )


def _kept_bytes(shapes: Mapping[str, PlaceShape]) -> int:
    return sum((8 if place in STATE_PLACES else 4) * shape.values for place, shape in shapes.items())


def _multiply_adds(shapes: Mapping[str, PlaceShape]) -> int:
    return sum(shape.multiply_adds for shape in shapes.values())


def _memory_bytes(
    sides: Sides, shapes: Sequence[Mapping[str, PlaceShape]], ctx_tokens: int, compared: int
) -> int:
    """Return the larger of a pair of layers with its moments and of the comparison of layers."""
    teacher, student = sides.teacher, sides.student
    weights = 4 * (max(teacher.matrix_weights) + max(student.matrix_weights))
    sums = max(8 * sum(shape.values for shape in pair.values()) for pair in shapes)
    one = pair_bytes(teacher, student, ctx_tokens)
    grams = 4 * compared * compared * (student.n_layers + 4)
    return _ALLOWANCE_BYTES + max(weights + sums + site_threads(one) * one, grams)


def _seconds(
    sides: Sides,
    shapes: Sequence[Mapping[str, PlaceShape]],
    layers: Sequence[int],
    tokens: tuple[int, int],
    ctx_tokens: int,
) -> float:
    """Return the seconds of all layers, from a pair of each kind run on random states."""
    teacher, student = sides.teacher, sides.student
    (fit, held), total = tokens, 0.0
    for kind in sorted(set(student.kinds)):
        pair = student.kinds.index(kind)
        rates = _measured(sides, (layers[pair], pair), shapes[pair], ctx_tokens)
        pairs, others = student.kinds.count(kind), teacher.kinds.count(kind)
        weights = teacher.matrix_weights[layers[pair]], student.matrix_weights[pair]
        share = weights[0] / sum(weights)
        forward = rates.forward * (others * share + pairs * (1 - share))
        total += forward * (fit + held) + pairs * rates.moments * fit
        total += 2 * (others * rates.teacher_read + pairs * rates.student_read)
    return total


@dataclass(frozen=True)
class _Rates:
    """Seconds for reading a layer of each model, and for a token in both layers and in their moments."""

    teacher_read: float
    student_read: float
    forward: float
    moments: float


def _measured(
    sides: Sides, layers: tuple[int, int], shapes: Mapping[str, PlaceShape], ctx_tokens: int
) -> _Rates:
    """Run one pair of layers on random states, a task for each thread; first runs are to warm up."""
    chunks = site_threads(pair_bytes(sides.teacher, sides.student, ctx_tokens))
    chunks *= max(1, TASK_TOKENS // ctx_tokens)
    ours, t_read = _timed(partial(sides.teacher.loaded, layers[0]))
    theirs, s_read = _timed(partial(sides.student.loaded, layers[1]))
    with tempfile.TemporaryDirectory() as folder:
        step = Step(*(_random(Path(folder) / name, chunks, ctx_tokens, side) for name, side in sides.named))
        sums = {place: PlaceSums(shape) for place, shape in shapes.items()}
        _, forward, _, both = (
            _timed(partial(_exhaust, run_pair(ours, theirs, step, places)))[1]
            for places in ({}, {}, sums, sums)
        )
    run = chunks * ctx_tokens
    return _Rates(t_read, s_read, forward / run, max(0.0, both - forward) / run)


def _random(path: Path, chunks: int, ctx_tokens: int, side: Side) -> tuple[States, States]:
    shape = chunks, ctx_tokens, side.hidden
    before, after = States(path.with_suffix(".0"), shape), States(path.with_suffix(".1"), shape)
    after.create()
    before.create()
    before.write(0, np.random.default_rng(0).standard_normal(shape, np.float32))
    return before, after


def _exhaust(tasks: Iterator[int]) -> None:
    for _ in tasks:
        pass


def _timed(work: Callable[[], _Found]) -> tuple[_Found, float]:
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began
