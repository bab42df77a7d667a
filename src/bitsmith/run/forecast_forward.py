"""What calibrate and evaluate will take: a layer of each kind rehearsed on a few tokens by their own code."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitsmith.numerics.threads import one_blas_thread
from bitsmith.run.calibrate import calibrate_tokens, room_for
from bitsmith.run.evaluate import check_vocabulary, open_model, text_chunks
from bitsmith.run.execute import peak_memory_bytes
from bitsmith.run.forecast import (
    Budget,
    Forecast,
    Part,
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
_LEAST_TOKENS = 16
_CLEAR_SECONDS = 0.12


@dataclass(frozen=True)
class Line:
    """Seconds that are `fixed`, and more for every token."""

    fixed: float
    token: float

    def seconds(self, tokens: int) -> float:
        """Return the seconds of so many tokens."""
        return self.fixed + tokens * self.token

    def less(self, other: Line) -> Line:
        """Return the difference, nothing below zero."""
        return Line(max(0.0, self.fixed - other.fixed), max(0.0, self.token - other.token))


@dataclass(frozen=True)
class ForwardCost:
    """A forward's seconds: of each kind of layer, of what goes on outside of them, and of the first start."""

    kinds: dict[str, Line]
    outside: Line
    start: float


Run = Callable[[TextModel, Tokens], object]


class Rehearsal:
    """Runs of something over miniatures of a model."""

    def __init__(self, model: TextModel, run: Run, ctx_tokens: int) -> None:
        self._model, self._run, self._ctx = model, run, ctx_tokens
        self._vocabulary = min(_VOCABULARY, model.head.n_rows)
        self.kinds = layer_kinds(model)
        self._few = _tokens(2, min(_LEAST_TOKENS, ctx_tokens))

    def cost(self) -> ForwardCost:
        """Measure the first kind of layer once and doubled, the others once."""
        first, *others = sorted(set(self.kinds), key=self.kinds.index)
        begun = self.seconds([first], self._few)
        few = self.seconds([first], self._few)
        more = self._more(first, few)
        once = self._line([first], more)
        twice = self._line([first, first], more)
        own = twice.less(once)
        outside = once.less(own)
        kinds = {first: own} | {kind: self._line([kind], more).less(outside) for kind in others}
        return ForwardCost(kinds, outside, max(0.0, begun - few))

    def seconds(self, kinds: Sequence[str], tokens: Tokens, vocabulary: int | None = None) -> float:
        """Run a layer of each of `kinds` over tokens and return the seconds."""
        layers = [self.kinds.index(kind) for kind in kinds]
        model = miniature(self._model, layers, vocabulary or self._vocabulary)
        began = time.perf_counter()
        self._run(model, tokens)
        return time.perf_counter() - began

    def _more(self, kind: str, few: float) -> Tokens:
        """Return tokens whose layer takes clearly longer than `few`: two contexts a core at the most."""
        tokens, most = self._few, usable_cores()
        while True:
            chunks, width = tokens.shape
            if width < self._ctx:
                tokens = _tokens(max(2, most), min(self._ctx, 2 * width))
            elif chunks < 2 * most:
                tokens = _tokens(2 * chunks, width)
            else:
                return tokens
            if self.seconds([kind], tokens) > few + _CLEAR_SECONDS:
                return tokens

    def _line(self, kinds: Sequence[str], more: Tokens) -> Line:
        few = self.seconds(kinds, self._few)
        if more.size == self._few.size:
            return Line(few, 0.0)
        token = max(0.0, self.seconds(kinds, more) - few) / (more.size - self._few.size)
        return Line(max(0.0, few - token * self._few.size), token)


def _tokens(chunks: int, ctx_tokens: int) -> Tokens:
    """Return seeded token ids within every miniature's vocabulary."""
    return np.random.default_rng(0).integers(0, 256, (chunks, ctx_tokens), np.int64)


def layer_parts(name: str, cost: ForwardCost, kinds: Sequence[str], tokens: int) -> list[Part]:
    """Return the parts of a forward over so many tokens."""
    parts = []
    for kind, line in cost.kinds.items():
        layers = kinds.count(kind)
        seconds = layers * line.seconds(tokens)
        parts.append(
            Part(
                f"{name}: {kind} layers",
                seconds,
                layers * tokens,
                "tokens × layers",
                layers * tokens / max(seconds, 1e-9),
            )
        )
    seconds = cost.outside.seconds(tokens)
    parts.append(
        Part(f"{name}: outside of the layers", seconds, tokens, "tokens", tokens / max(seconds, 1e-9))
    )
    return parts


@one_blas_thread()
def forecast_evaluate(
    ref: Path, candidate: Path, text: Path, ctx_tokens: int = 512, chunks: int | None = None
) -> Forecast:
    """Predict what `evaluate` takes: both forwards, layer by layer, and both heads over the vocabulary.

    Raises as `evaluate` does for what it refuses before its first forward.
    """
    budget, before = Budget(), io_so_far()
    with open_model(ref) as reference, open_model(candidate) as other:
        tokens, _ = text_chunks(reference, text, ctx_tokens, chunks)
        check_vocabulary(reference, other)
        started, budget = seconds_of_process(), Budget()
        parts, start = list[Part](), started
        for name, model in (("reference", reference), ("candidate", other)):
            rehearsal = Rehearsal(model, _forward, ctx_tokens)
            cost = rehearsal.cost()
            start += cost.start
            parts += layer_parts(name, cost, rehearsal.kinds, tokens.size)
        parts.append(_both_heads(reference, other, tokens))
        files = (*reference.source.files, *other.source.files)
        rates = machine_rates(
            files, Path(tempfile.gettempdir()), usable_cores(), work_seconds=total_seconds(tuple(parts))
        )
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
        started, budget = seconds_of_process(), Budget()

        def run(mini: TextModel, part: Tokens) -> None:
            calibrate_tokens(
                mini, part, protocol, work / out.name, block=block, saliency=saliency, overwrite=True
            )

        rehearsal = Rehearsal(opened, run, ctx_tokens)
        cost = rehearsal.cost()
        parts = layer_parts("layers", cost, rehearsal.kinds, tokens.size)
        parts.append(_saliency_head(rehearsal, opened, tokens))
        rates = machine_rates(
            opened.source.files, folder, usable_cores(), work_seconds=total_seconds(tuple(parts))
        )
        full = not is_imatrix_name(out)
        room = room_for(opened, tokens, protocol, block=block, saliency=saliency, full=full)
        stored = _text_bytes(opened)
    started += cost.start
    return Forecast(
        command="calibrate",
        seconds=total_seconds((_started(started), *parts)),
        peak_memory_bytes=peak_memory_bytes() or 0,
        output_bytes=room.kept,
        scratch_bytes=room.most - room.kept,
        read_bytes=before.read + stored * (3 if saliency and full else 1),
        written_bytes=room.most,
        parts=(_started(started), *parts),
        rates=rates,
        calibrated_seconds=budget.spent,
        folder=folder,
    )


def _saliency_head(rehearsal: Rehearsal, model: TextModel, tokens: Tokens) -> Part:
    """Return the part of the head's rows that no miniature has, from one that has more of them."""
    vocabulary = model.head.n_rows
    small, large = min(_VOCABULARY, vocabulary), min(_VOCABULARY + _HEAD_ROWS // 2, vocabulary)
    part, kind = _tokens(2, min(tokens.shape[1], 64)), rehearsal.kinds[:1]
    rate = 0.0
    if large > small:
        seconds = [rehearsal.seconds(kind, part, rows) for rows in (small, large)]
        rate = max(0.0, seconds[1] - seconds[0]) / ((large - small) * part.size)
    logits = (vocabulary - small) * tokens.size
    return Part("head of the saliency", rate * logits, logits, "logits", 1 / max(rate, 1e-15))
