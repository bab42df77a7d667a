"""Measure merges in memory on held-out text, beside their student and their teacher: nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from typing import Protocol as TypingProtocol

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import architecture_of
from bitsmith.numerics.divergence import Estimate, TokenScores, estimates
from bitsmith.passes.merge_fold import MergedView
from bitsmith.progress import Progress, silent
from bitsmith.run.evaluate import check_finite, check_vocabulary, open_model, scored_states, text_chunks
from bitsmith.run.evaluation import INTERVAL, Measure, Protocol
from bitsmith.run.forward import TextModel, compare
from bitsmith.run.merge_written import as_written

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Tokens = NDArray[np.int64]

UNMEASURED = "unmeasured"
_BASELINE = "baseline"


@dataclass(frozen=True)
class TrialMeasure:
    """What a model does on held-out chunks: `nll` (`chunks`) is the mean of each one's tokens, in nats.

    `student_nll` is the student's on the same chunks, `kld` the mean KL(teacher‖model), None where there is
    no teacher. Intervals are `evaluate`'s: 95 % percentile intervals of a paired bootstrap over chunks.
    """

    nll: Float64
    student_nll: Float64
    kld: Float64 | None
    protocol: Protocol

    @property
    def ppl(self) -> Measure:
        """The perplexity."""
        return _measure(self._estimates["ppl_cand"], "perplexity")

    @property
    def ppl_over_student(self) -> Measure:
        """The perplexity over the student's."""
        return _measure(self._estimates["ppl_ratio"], "ratio")

    @property
    def kld_to_teacher(self) -> Measure | None:
        """Mean KL(teacher‖model) of a token."""
        return None if self.kld is None else _measure(self._estimates["mean_kld"], "nats")

    def to_json(self) -> dict[str, Any]:
        """Return the three figures as plain values."""
        found = {"ppl": self.ppl, "ppl_over_student": self.ppl_over_student}
        return {name: figure(measure) for name, measure in found.items()} | {
            "kld_to_teacher": None if self.kld_to_teacher is None else figure(self.kld_to_teacher)
        }

    @cached_property
    def _estimates(self) -> dict[str, Estimate]:
        kld = np.zeros_like(self.nll) if self.kld is None else self.kld
        scores = TokenScores(self.student_nll, self.nll, kld, np.zeros(self.nll.shape, np.bool_))
        return estimates(scores.reshape(len(self.nll)), self.protocol.resamples, self.protocol.seed)


def figure(measure: Measure) -> dict[str, Any]:
    """Return a measure as plain values; an interval that is missing is called `unmeasured`."""
    return asdict(measure) | {"interval": measure.interval or UNMEASURED}


class Kept(TypingProtocol):
    """What outlives a killed run, as a journal does."""

    entries: dict[str, Any]

    def add(self, name: str, value: Any) -> None:
        """Keep one thing more."""


class HeldOut:
    """Chunks of held-out text on which merges are measured; student and teacher are run when first needed."""

    def __init__(self, baseline: _Baseline, part: slice, protocol: Protocol) -> None:
        self._baseline, self._part, self.protocol = baseline, part, protocol

    @property
    def student(self) -> TrialMeasure:
        """The student's own measure."""
        return self._of(lambda scores: (scores.nll_cand, scores.kld))

    @property
    def teacher(self) -> TrialMeasure | None:
        """The teacher's, None where there is none."""
        if not self._baseline.has_teacher:
            return None
        return self._of(lambda scores: (scores.nll_ref, np.zeros_like(scores.kld)))

    def measure(self, candidate: MergedView | Path) -> TrialMeasure:
        """Run a merge as it would be written, or a model that is.

        Raises BitsmithError for another vocabulary and for states or logits that are not finite.
        """
        baseline = self._baseline
        if isinstance(candidate, MergedView):
            view = as_written(candidate)
            model = TextModel(view, architecture_of(view), view)
            return self._of(lambda _: _means(baseline.scores_of(model, self._part)), whole=False)
        with open_model(candidate) as opened:
            check_vocabulary(baseline.reference, opened)
            return self._of(lambda _: _means(baseline.scores_of(opened, self._part)), whole=False)

    def split(self) -> tuple[HeldOut, HeldOut]:
        """Return the even and the odd chunks: those to choose on and those to judge on."""
        count = self.protocol.chunks
        even = (count + 1) // 2
        return self._at(slice(0, even)), self._at(slice(even, count))

    def _at(self, part: slice) -> HeldOut:
        count = part.stop - part.start
        tokens = self.protocol.scored_tokens // self.protocol.chunks * count
        return HeldOut(self._baseline, part, replace(self.protocol, chunks=count, scored_tokens=tokens))

    def _of(
        self, found: Callable[[TokenScores], tuple[Float64, Float64]], *, whole: bool = True
    ) -> TrialMeasure:
        """Return per-chunk means, of all chunks or (not `whole`) of this part's, in the order of the text."""
        baseline, part = self._baseline, self._part
        nll, kld = found(baseline.scores)
        nll, kld = (nll[part], kld[part]) if whole else (nll, kld)
        order = np.argsort(baseline.order[part], kind="stable")
        student = baseline.scores.nll_cand[part]
        return TrialMeasure(
            nll[order], student[order], kld[order] if baseline.has_teacher else None, self.protocol
        )


class Trial(HeldOut):
    """A student, and a teacher if given, on the chunks of a UTF-8 text, cut and scored as `evaluate` does.

    A context manager that closes both models. What the two of them scored is `kept` for a run that goes on
    later. Raises as `open_model` and `text_chunks` do, BitsmithError for a teacher with another vocabulary.
    """

    def __init__(
        self,
        student: Path,
        text: Path,
        *,
        ctx_tokens: int = 512,
        chunks: int | None = None,
        seed: int = 0,
        teacher: Path | None = None,
        progress: Progress = silent,
        kept: Kept | None = None,
    ) -> None:
        with ExitStack() as opened:
            ours = opened.enter_context(open_model(student))
            theirs = None if teacher is None else opened.enter_context(open_model(teacher))
            if theirs is not None:
                check_vocabulary(theirs, ours)
            tokens, protocol = text_chunks(ours, text, ctx_tokens, chunks, seed)
            self._opened = opened.pop_all()
        super().__init__(_Baseline(ours, theirs, tokens, progress, kept), slice(0, len(tokens)), protocol)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


def held_out(
    student: TextModel,
    teacher: TextModel,
    text: Path,
    *,
    ctx_tokens: int,
    chunks: int | None,
    seed: int,
    progress: Progress,
    kept: Kept,
) -> HeldOut:
    """Return the chunks of a text for models that are open: whatever becomes of their files meanwhile.

    Raises as `text_chunks` does.
    """
    tokens, protocol = text_chunks(student, text, ctx_tokens, chunks, seed)
    return HeldOut(_Baseline(student, teacher, tokens, progress, kept), slice(0, len(tokens)), protocol)


class _Baseline:
    """What merges are measured against: of all chunks, the even ones first, in text `order`.

    The reference is the teacher, without one the student.
    """

    def __init__(
        self,
        student: TextModel,
        teacher: TextModel | None,
        tokens: Tokens,
        progress: Progress,
        kept: Kept | None,
    ) -> None:
        self.reference, self.has_teacher = teacher or student, teacher is not None
        self.order = np.concatenate([np.arange(0, len(tokens), 2), np.arange(1, len(tokens), 2)])
        self._student, self._tokens, self._progress = student, tokens[self.order], progress
        self._kept = kept

    @cached_property
    def scores(self) -> TokenScores:
        """Means of each chunk: `nll_ref` the reference's, `nll_cand` the student's, `kld` between them."""
        if self._kept is not None and _BASELINE in self._kept.entries:
            return TokenScores(**{name: np.array(v) for name, v in self._kept.entries[_BASELINE].items()})
        whole = slice(0, len(self._tokens))
        states = self._states if not self.has_teacher else None
        found = self.scores_of(self._student, whole, states)
        means = {name: values.mean(1) for name, values in vars(found).items()}
        if self._kept is not None:
            self._kept.add(_BASELINE, {name: values.tolist() for name, values in means.items()})
        return TokenScores(**means)

    def scores_of(self, model: TextModel, part: slice, states: Float32 | None = None) -> TokenScores:
        """Return a model's scores (`chunks tokens`) on a part of the chunks, against the reference."""
        tokens = self._tokens[part]
        if states is None:
            states = scored_states(model, tokens, self._progress, "candidate")
        first = tokens.shape[1] // 2
        each = tokens.shape[1] - 1 - first
        ours = self._states[part.start * each : part.stop * each]
        targets = tokens[:, first + 1 :].reshape(-1)
        scores = compare(self.reference, model, (ours, states), targets, self._progress)
        check_finite(scores, self.reference, model)
        return scores.reshape(len(tokens))

    @cached_property
    def _states(self) -> Float32:
        return scored_states(self.reference, self._tokens, self._progress, "reference")


def _means(scores: TokenScores) -> tuple[Float64, Float64]:
    return scores.nll_cand.mean(1), scores.kld.mean(1)


def _measure(estimate: Estimate, unit: str) -> Measure:
    interval = None if estimate.low is None else INTERVAL
    return Measure(estimate.value, unit, estimate.low, estimate.high, interval)
