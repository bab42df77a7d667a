"""What calibrate and evaluate will take: a layer of each kind rehearsed on a few tokens by their own code."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bitsmith.numerics.threads import one_blas_thread
from bitsmith.run.calibrate import calibrate_tokens, room_for
from bitsmith.run.evaluate import check_vocabulary, open_model, text_chunks
from bitsmith.run.execute import peak_memory_bytes
from bitsmith.run.forecast import (
    Budget,
    Forecast,
    Io,
    Part,
    disk_part,
    folder_of,
    io_so_far,
    scratch,
    seconds_of_process,
    total_seconds,
)
from bitsmith.run.forward import SPILL_BYTES, TextModel, Tokens, compare, final_hidden_states
from bitsmith.run.machine import usable_cores
from bitsmith.run.machine_rates import machine_rates
from bitsmith.run.miniature import layer_kinds, miniature
from bitsmith.store.imatrix import is_imatrix_name

_VOCABULARY = 1024
_HEAD_ROWS = 8192
_HEAD_STATES = 256
_CHUNKS = 4
"""Chunks that are rehearsed: of so many one is held out, which takes less than the others."""
_LEAST_TOKENS = 8
_LAYER_WORK = 2e10
"""Weights of a layer times tokens that tell what a token takes."""
_OVERLAP = 0.85
"""Share of the workers' time that they are at work: they wait for one another at the ends of layers."""


class Spent(NamedTuple):
    """What a run took: seconds of the clock and of the processor, bytes that it asked the system for."""

    wall_seconds: float
    cpu_seconds: float
    io: Io

    @staticmethod
    def on(run: Callable[[], object]) -> Spent:
        """Run something and return what it took."""
        before, began, worked = io_so_far(), time.perf_counter(), time.process_time()
        run()
        wall, cpu = time.perf_counter() - began, time.process_time() - worked
        return Spent(wall, cpu, io_so_far().since(before))


@dataclass(frozen=True)
class Line:
    """What is `fixed`, and more for every token: seconds, and bytes read."""

    fixed: float
    token: float
    fixed_read: float = 0.0
    token_read: float = 0.0

    @staticmethod
    def through(few: Spent, more: Spent, tokens: tuple[int, int], workers: int) -> Line:
        """Return the line through two runs over so many tokens.

        A token's seconds are those of the processor, shared by the `workers`: two short runs of a few chunks
        wait for one another and for the disk, long ones do not.
        """
        further = max(1, tokens[1] - tokens[0])
        at_once = _OVERLAP * workers if workers > 1 else 1.0
        token = max(0.0, more.cpu_seconds - few.cpu_seconds) / further / at_once
        read = max(0, more.io.read - few.io.read) / further
        return Line(
            max(0.0, few.wall_seconds - token * tokens[0]), token, few.io.read - read * tokens[0], read
        )

    def seconds(self, tokens: int) -> float:
        """Return the seconds of so many tokens."""
        return self.fixed + tokens * self.token

    def read_bytes(self, tokens: int) -> float:
        """Return the bytes read for so many tokens."""
        return self.fixed_read + tokens * self.token_read

    def times(self, factor: float) -> Line:
        """Return the multiple."""
        return Line(*(factor * own for own in astuple(self)))

    def less(self, other: Line) -> Line:
        """Return the difference, nothing below zero."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Line(*(max(0.0, own - others) for own, others in pairs))


@dataclass(frozen=True)
class ForwardCost:
    """What a forward takes: each kind of layer, what is outside of them, and the first start's seconds."""

    kinds: dict[str, Line]
    outside: Line
    start: float

    def read_bytes(self, kinds: Sequence[str], tokens: int) -> int:
        """Return the bytes read for so many tokens."""
        layers = sum(self.kinds[kind].read_bytes(tokens) for kind in kinds)
        return int(layers + self.outside.read_bytes(tokens))


Run = Callable[[TextModel, Tokens], object]


class Rehearsal:
    """Runs of something over miniatures of a model and a few short chunks."""

    def __init__(self, model: TextModel, run: Run, shape: tuple[int, int], work: float = _LAYER_WORK) -> None:
        self._model, self._run, self._shape, self._work = model, run, shape, work
        self._vocabulary = min(_VOCABULARY, model.head.n_rows)
        self.kinds = layer_kinds(model)
        self.workers = max(1, min(torch.get_num_threads(), usable_cores(), shape[0]))
        self.chunks = min(_CHUNKS, shape[0])
        self._few = _tokens(self.chunks, min(_LEAST_TOKENS, shape[1]))
        self._lines: dict[tuple[tuple[str, ...], int | None], Line] = {}

    def cost(self) -> ForwardCost:
        """Measure a layer of the last kind alone, and one of the other kind with it (a single kind twice).

        The last kind, of which there are fewest, is taken to cost what the other does for each weight.
        """
        first, *_, last = [*dict.fromkeys(self.kinds), self.kinds[-1]]
        begun = self.spent([last], self._few)
        alone, both = self.line([last]), self.line([first, last])
        found = {first: both.less(alone)}
        found[last] = found[first].times(self._weights(last) / self._weights(first))
        return ForwardCost(found, alone.less(found[last]), max(0.0, begun.wall_seconds - alone.fixed))

    def spent(self, kinds: Sequence[str], tokens: Tokens, vocabulary: int | None = None) -> Spent:
        """Run a layer of each of `kinds` over tokens and return what that takes."""
        layers = [self.kinds.index(kind) for kind in kinds]
        model = miniature(self._model, layers, vocabulary or self._vocabulary)
        return Spent.on(lambda: self._run(model, tokens))

    def rows(self, count: int) -> Line:
        """Return what `count` further rows of the head take."""
        kinds = self.kinds[-1:]
        return self.line(kinds, self._vocabulary + count).less(self.line(kinds))

    def line(self, kinds: Sequence[str], vocabulary: int | None = None) -> Line:
        """Measure a layer of each of `kinds`, and what is outside of layers; the same asked again is kept."""
        key = tuple(kinds), vocabulary
        if key not in self._lines:
            more = _tokens(self.chunks, self._width())
            spent = [self.spent(kinds, tokens, vocabulary) for tokens in (self._few, more)]
            self._lines[key] = Line.through(spent[0], spent[1], (self._few.size, more.size), self.workers)
        return self._lines[key]

    def _width(self) -> int:
        """Return the tokens of a chunk that make clear what a token takes: a context at the most."""
        wanted = int(self._work / self._weights(self.kinds[0]) / self.chunks)
        return min(self._shape[1], max(4 * _LEAST_TOKENS, wanted))

    def _weights(self, kind: str) -> int:
        """Return the weights of a layer."""
        layer = f"{self._model.arch.text_prefix}layers.{self.kinds.index(kind)}."
        return sum(ref.size for name, ref in self._model.checkpoint.items() if name.startswith(layer))


def _tokens(chunks: int, ctx_tokens: int) -> Tokens:
    """Return seeded token ids within every miniature's vocabulary."""
    return np.random.default_rng(0).integers(0, 256, (chunks, ctx_tokens), np.int64)


def layer_parts(name: str, cost: ForwardCost, kinds: Sequence[str], tokens: int) -> list[Part]:
    """Return the parts of a forward over so many tokens."""
    parts = []
    for kind, line in cost.kinds.items():
        layers = kinds.count(kind)
        amount, seconds = layers * tokens, layers * line.seconds(tokens)
        rate = amount / max(seconds, 1e-9)
        parts.append(Part(f"{name}: {kind} layers", seconds, amount, "tokens × layers", rate))
    seconds = cost.outside.seconds(tokens)
    parts.append(
        Part(f"{name}: outside of the layers", seconds, tokens, "tokens", tokens / max(seconds, 1e-9))
    )
    return parts


def _in_turns(tokens: Tokens, workers: int) -> int:
    """Return the tokens that take as long where all workers are busy: the last turn may have fewer chunks."""
    return int(-(-len(tokens) // workers) * workers * tokens.shape[1])


@one_blas_thread()
def forecast_evaluate(
    ref: Path, candidate: Path, text: Path, ctx_tokens: int = 512, chunks: int | None = None
) -> Forecast:
    """Predict what `evaluate` takes: both forwards, layer by layer, and both heads over the vocabulary.

    Raises as `evaluate` does for what it refuses before its first forward.
    """
    before = io_so_far()
    with open_model(ref) as reference, open_model(candidate) as other:
        tokens, _ = text_chunks(reference, text, ctx_tokens, chunks)
        check_vocabulary(reference, other)
        rehearsals = [Rehearsal(model, _forward, tokens.shape) for model in (reference, other)]
        parts, start, budget = list[Part](), seconds_of_process(), Budget()  # transformers is loaded by now
        for name, rehearsal in zip(("reference", "candidate"), rehearsals, strict=True):
            cost = rehearsal.cost()
            start += cost.start
            parts += layer_parts(name, cost, rehearsal.kinds, _in_turns(tokens, rehearsal.workers))
        parts.append(_both_heads(reference, other, tokens))
        files = (*reference.source.files, *other.source.files)
        rates = machine_rates(
            files, Path(tempfile.gettempdir()), usable_cores(), work_seconds=total_seconds(tuple(parts))
        )
        parts.append(disk_part(files, rates))
        states = _state_bytes(reference, tokens)
        stored = sum(map(_text_bytes, (reference, other)))
    return Forecast(
        command="evaluate",
        seconds=total_seconds((_started(start), *parts)),
        peak_memory_bytes=(peak_memory_bytes() or 0) + min(states, 3 * SPILL_BYTES),
        output_bytes=0,
        scratch_bytes=states if states > SPILL_BYTES else 0,
        read_bytes=before.read + stored,
        written_bytes=0,
        parts=(_started(start), *parts),
        rates=rates,
        calibrated_seconds=budget.spent,
        folder=Path(tempfile.gettempdir()),
    )


def _forward(model: TextModel, tokens: Tokens) -> None:
    final_hidden_states(model, tokens, 0)


def _both_heads(reference: TextModel, candidate: TextModel, tokens: Tokens) -> Part:
    """Return the part of `compare`, judged from a slice of both vocabularies and a few states."""
    rows, vocabulary = min(_HEAD_ROWS, reference.head.n_rows), reference.head.n_rows
    scored = len(tokens) * (tokens.shape[1] - 1 - tokens.shape[1] // 2)
    count = min(scored, _HEAD_STATES * usable_cores())
    models = miniature(reference, [0], rows), miniature(candidate, [0], rows)
    rng = np.random.default_rng(0)
    ours, theirs = (rng.standard_normal((count, model.head.shape[1]), np.float32) for model in models)
    targets = rng.integers(0, min(256, rows), count, np.int64)
    few = max(1, count // 8)

    def seconds_of(states: int) -> float:
        began = time.perf_counter()
        compare(*models, (ours[:states], theirs[:states]), targets[:states])
        return time.perf_counter() - began

    seconds_of(few)
    short, whole = seconds_of(few), seconds_of(count)
    logit = max(0.0, whole - short) / max(1, count - few)
    seconds = vocabulary / rows * (max(0.0, short - few * logit) + scored * logit)
    logits = 2 * scored * vocabulary
    return Part("both heads", seconds, logits, "logits", logits / max(seconds, 1e-9))


def _started(seconds: float) -> Part:
    return Part("start", seconds, 1, "process", 1 / max(seconds, 1e-9))


def _state_bytes(model: TextModel, tokens: Tokens) -> int:
    """Return the bytes of all hidden states, and of the scored half of both models."""
    return 2 * 4 * int(tokens.size) * model.head.shape[1]


def _text_bytes(model: TextModel) -> int:
    """Return the stored bytes of what a forward reads: every layer and the head."""
    names = {model.head.name, f"{model.arch.text_prefix}norm.weight"}
    prefix = f"{model.arch.text_prefix}layers."
    used = (ref for name, ref in model.checkpoint.items() if name in names or name.startswith(prefix))
    return sum(getattr(ref, "nbytes", 0) for ref in used)


@one_blas_thread()
def forecast_calibrate(
    model: Path,
    text: Path,
    out: Path,
    *,
    ctx_tokens: int = 512,
    chunks: int | None = None,
    block: int | None = None,
    saliency: bool = True,
) -> Forecast:
    """Predict what `calibrate` takes: one layer of each kind rehearsed with its moments, and the head.

    Raises as `calibrate` does for what it refuses before its first forward.
    """
    before, folder = io_so_far(), folder_of(out)
    with open_model(model) as opened, scratch(folder) as work:
        tokens, protocol = text_chunks(opened, text, ctx_tokens, chunks)

        def run(mini: TextModel, part: Tokens) -> None:
            calibrate_tokens(
                mini, part, protocol, work / out.name, block=block, saliency=saliency, overwrite=True
            )

        full = not is_imatrix_name(out)
        weighs = saliency and full
        rehearsal = Rehearsal(opened, run, tokens.shape, _LAYER_WORK / (2 if weighs else 1))
        started, budget = seconds_of_process(), Budget()  # transformers is loaded by now
        cost = rehearsal.cost()
        busy = _in_turns(tokens, rehearsal.workers)
        kinds = [*rehearsal.kinds, *_mtp_kinds(opened)]
        parts = layer_parts("layers", cost, kinds, busy)
        head, head_read = _head(rehearsal, opened, tokens) if weighs else (None, 0)
        parts += [] if head is None else [head]
        rates = machine_rates(
            opened.source.files, folder, usable_cores(), work_seconds=total_seconds(tuple(parts))
        )
        room = room_for(opened, tokens, protocol, block=block, saliency=saliency, full=full)
        kept = room.kept if full else _imatrix_bytes(opened)
        aside = _digested_bytes(opened)
        parts.append(
            Part("digest of what no layer holds", aside / rates.sha256, aside, "bytes", rates.sha256)
        )
    started += cost.start
    return Forecast(
        command="calibrate",
        seconds=total_seconds((_started(started), *parts)),
        peak_memory_bytes=peak_memory_bytes() or 0,
        output_bytes=kept,
        scratch_bytes=room.most if kept < room.kept else room.most - kept,
        read_bytes=before.read + cost.read_bytes(kinds, tokens.size) + head_read + aside,
        written_bytes=room.most,
        parts=(_started(started), *parts),
        rates=rates,
        calibrated_seconds=budget.spent,
        unmeasured=("how near the run comes to this: runs have taken .3 to 1.6 times as long",),
        folder=folder,
    )


def _mtp_kinds(model: TextModel) -> list[str]:
    """Return the kind of the MTP layer, if there is one: it is taken as a layer more."""
    has = any(spec.component == "mtp" for spec in model.arch.specs())
    return ["full_attention"] if has and "full_attention" in layer_kinds(model) else []


def _imatrix_bytes(model: TextModel) -> int:
    """Return the bytes of llama.cpp's imatrix: a float for every column of every matrix."""
    specs = [spec for spec in model.arch.specs() if spec.site is not None]
    return sum(4 * spec.shape[-1] for spec in specs)


def _digested_bytes(model: TextModel) -> int:
    """Return the stored bytes of what a calibration digests beside the layers."""
    layers = f"{model.arch.text_prefix}layers.", "mtp."
    own = sum(getattr(ref, "nbytes", 0) for name, ref in model.checkpoint.items() if name.startswith(layers))
    return max(0, sum(ref.nbytes for ref in model.source.values()) - own)


def _head(rehearsal: Rehearsal, model: TextModel, tokens: Tokens) -> tuple[Part, int]:
    """Return the part of the head's rows that no miniature has, and the bytes that are read of them.

    Every chunk takes all of them by itself.
    """
    further = model.head.n_rows - min(_VOCABULARY, model.head.n_rows)
    if not further:
        return Part("head of the saliency", 0.0, 0, "logits", 1.0), 0
    count = min(_HEAD_ROWS, further)
    found, turns = rehearsal.rows(count), -(-len(tokens) // rehearsal.workers)
    busy = turns * rehearsal.workers * tokens.shape[1]
    turn = found.fixed * rehearsal.workers / rehearsal.chunks
    seconds = further / count * (turns * turn + busy * found.token)
    logits = further * tokens.size
    read = further / count * len(tokens) * (found.fixed_read / rehearsal.chunks)
    return Part("head of the saliency", seconds, logits, "logits", logits / max(seconds, 1e-9)), int(read)
