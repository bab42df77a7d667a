"""Which transforms help: each is tried as the plan would store it, and kept only where it helps for sure."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bitsmith.errors import BitsmithError
from bitsmith.formats import Format
from bitsmith.numerics.divergence import MIN_CHUNKS, Estimate
from bitsmith.passes.permute import PermuteDelta, PermuteFfn, PermuteResidual, PermuteV
from bitsmith.passes.rescale import ScaleDelta, ScaleFfn, ScaleNormReaders, ScaleVo
from bitsmith.passes.rotate import Rotate
from bitsmith.passes.transform import Applied, Context, Model, Transform, with_needs
from bitsmith.progress import Progress, silent
from bitsmith.run.encode import TensorEncoder, check_rounder
from bitsmith.run.evaluation import RESAMPLES
from bitsmith.run.forward import TextModel, Tokens
from bitsmith.run.transform_judge import (
    FIRST_SHARE,
    SAMPLE_ROWS,
    Blocks,
    Divergence,
    Judge,
    OutputErrors,
    Trial,
    mixes_columns,
)
from bitsmith.store.statistics import Statistics

Bundle = Sequence[Transform]
Measure = Literal["kld", "output error"]

SEARCH_WORK = 6e12
"""Weights times held-out tokens times candidates up to which KLD is measured, unless told otherwise."""

_SCALES = (ScaleNormReaders, ScaleFfn, ScaleVo, ScaleDelta)
_ORDERS = (PermuteResidual, PermuteFfn, PermuteV, PermuteDelta)
_FLOAT_BITS = 16
_ERROR_RATE = 0.05
_NOTHING = "cannot help: nothing to change"
_SAYS = {"kld": "mean KLD (nats), held-out", "output error": "log ratio of held-out output error"}


@dataclass(frozen=True)
class TriedTransform:
    """One line of the record: a transform that was tried, or why it was not; None is unmeasured.

    `instances` counts the layers or axes that it changes. `change` is `after - before`, paired, with an
    interval of `confidence`; those of `before` and `after` have 95 %. `outputs` is the change of the mean
    of `log(sum |E x|² / sum |W x|²)` over the changed tensors, as all three are with measure output error.
    """

    transform: str
    instances: int
    measure: str
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None
    outputs: Estimate | None
    confidence: float | None
    kept: bool
    reason: str


@dataclass(frozen=True)
class Search:
    """What `search` applied to the model, in order, all that it tried, and how it measured."""

    applied: tuple[Applied, ...]
    tried: tuple[TriedTransform, ...]
    protocol: str

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {
            "applied": [str(one.transform) for one in self.applied],
            "tried": [asdict(one) for one in self.tried],
            "protocol": self.protocol,
        }


def default_candidates() -> list[Bundle]:
    """Return what `search` tries: all permutations at once, all scales, the rotation, then each alone.

    What acts on several axes adds up, and shows where none by itself would.
    """
    orders = [order() for order in _ORDERS]
    scales = [scale() for scale in _SCALES]
    residual = [(PermuteResidual({"by": by}),) for by in ("moment", "scale")]
    singly = [(one,) for one in (*scales, *orders)]
    return [tuple(orders), tuple(scales), (Rotate(),), *residual, *singly]


def all_that_may_apply(model: Model) -> list[Transform]:
    """Return every transform that `search` may keep for `model`, all of which a header may have to name."""
    rotated = [] if _missing(model, (Rotate(),)) else with_needs([Rotate()])
    longest = [order({"by": "moment"}) for order in _ORDERS]
    return [*rotated, *(scale() for scale in _SCALES), *longest]


def search(
    network: TextModel,
    model: Model,
    formats: Mapping[str, Format],
    statistics: Statistics,
    rounder: str,
    tokens: Tokens,
    *,
    candidates: Sequence[Bundle] | None = None,
    measure: Measure | None = None,
    progress: Progress = silent,
) -> Search:
    """Try `candidates` one after the other on top of what was kept so far, and keep what helps.

    Every tensor is stored in its format (`formats`, by Hugging Face name; others stay floats) by `rounder`
    with the original model's statistics. Measure `kld` runs that model over `tokens` (`chunks T`, held out)
    against `network`; measure `output error` runs no forward: it averages `log(after / before)` of the
    changed tensors' errors on held-out inputs, over a sample of rows. A candidate, one transform or several
    together, is kept if the upper end of the change's interval is below zero: Student's t over chunks, or
    over tensors (fewer than 8: over inputs). Under `kld` it is also kept if that holds of the output errors
    and the KLD falls by more than its standard error, or, where values only change their order, does not rise
    by more than that. The interval's confidence is 95 % for the first that is measured and its remainder is
    halved with each further one, so that chance passes that test in one search of twenty at most. Of
    variants, next to each other in `candidates`, the best that passes is kept; they share their remainder.
    Default: `kld` up to `SEARCH_WORK`. Formats store row by row, so what only scales or reorders rows of
    quantized tensors cannot help and is not measured.

    A transform that needs tensors added or dropped first is not tried, as the file's bytes would change. The
    decisions fit the held-out tokens, of which error feedback's guard has seen samples too: figures to quote
    need a text of their own. Deterministic; memory holds the states of the tokens and a slice of a tensor,
    blocks of all tensors lie in a temporary folder.

    Raises BitsmithError for fewer than two chunks and as `check_rounder` does, OutputError for a full disk.
    """
    chosen = default_candidates() if candidates is None else list(candidates)
    if len(tokens) < MIN_CHUNKS:
        raise BitsmithError(
            f"transforms are chosen on held-out chunks, {MIN_CHUNKS} at least; these have {len(tokens)}",
            path=statistics.path,
        )
    encoder = TensorEncoder(
        statistics, check_rounder(rounder, statistics, statistics.path), network.checkpoint.path
    )
    if measure is None:
        work = sum(ref.size for _, ref in model.tensors.values()) * tokens.size * max(1, len(chosen))
        measure = "kld" if work <= SEARCH_WORK else "output error"
    context = Context(formats, statistics)
    with tempfile.TemporaryDirectory(prefix="bitsmith-transforms-") as folder:
        outputs = OutputErrors(context, rounder)
        judge: Judge = outputs
        if measure == "kld":
            judge = Divergence(network, model, Blocks(Path(folder), encoder, formats), tokens, outputs)
        found = _Greedy(model, context, judge, _SAYS[measure], len(chosen), progress)
        for variants in _variants(chosen):
            found.take(variants)
    return Search(found.best.applied, tuple(found.tried), _protocol(measure, statistics, rounder, tokens))


def _variants(candidates: Sequence[Bundle]) -> Iterator[list[Bundle]]:
    """Yield runs of candidates of the same names."""
    run: list[Bundle] = []
    for candidate in candidates:
        if run and [one.name for one in run[0]] != [one.name for one in candidate]:
            yield run
            run = []
        run.append(candidate)
    if run:
        yield run


def _protocol(measure: Measure, statistics: Statistics, rounder: str, tokens: Tokens) -> str:
    chunks, ctx = tokens.shape
    text = f"held-out part of {statistics.text or 'the text'}, context {ctx} tokens, {chunks} chunks"
    how = f"95 % bootstrap, {RESAMPLES} resamples, seed 0; changes paired, Student's t"
    if measure == "output error":
        rows = f"{SAMPLE_ROWS} rows of each tensor, its site's sample of inputs"
        return f"{_SAYS[measure]}: {rows}; {text}; {how}, over tensors or, of few, inputs; rounder {rounder}"
    scored = f"positions ctx/{FIRST_SHARE} to ctx-2 of each chunk are scored"
    return f"{scored}; {text}; {how}, over chunks; rounder {rounder}, statistics of the original model"


class _Greedy:
    """The best model so far and the record of how it came about."""

    def __init__(
        self, model: Model, context: Context, judge: Judge, says: str, total: int, progress: Progress
    ) -> None:
        self.best, self.tried = model, list[TriedTransform]()
        self._context, self._judge, self._says = context, judge, says
        self._total, self._progress = total, progress
        self._remainder = _ERROR_RATE
        progress("transforms", 0, total)

    def take(self, variants: Sequence[Bundle]) -> None:
        """Try the variants of one candidate and keep the best of them, if any helps."""
        prepared = [self._prepared(bundle) for bundle in variants]
        trials: list[Trial | None] = []
        for one in prepared:
            changed = self._changed(one.model)
            matters = any(mixes_columns(self.best.spec(name), one.model.spec(name)) for name in changed)
            trials.append(self._judge.trial(self.best, one.model, changed) if matters else None)
            self._progress("transforms", len(self.tried) + len(trials), self._total)
        measured = [trial for trial in trials if trial is not None]
        confidence = 1 - self._remainder / max(1, len(measured))
        orders = all(transform.keeps_values for bundle in variants for transform in bundle)
        helping = [trial for trial in measured if trial.helps(confidence, orders)]
        kept = min(helping, key=lambda trial: trial.change.value) if helping else None
        winner = str(prepared[trials.index(kept)]) if kept else None
        for one, trial in zip(prepared, trials, strict=True):
            self.tried.append(self._line(one, trial, confidence, trial in helping, winner))
        self._judge.settle(measured, kept)
        self._remainder /= 2 if measured else 1
        if kept is not None:
            self.best = prepared[trials.index(kept)].model

    def _prepared(self, bundle: Bundle) -> _Prepared:
        """Return the best model with the candidate applied on top."""
        model, count = self.best, 0
        done = {one.transform.name for one in self.best.applied}
        if all(one.name in done for one in bundle):
            return _Prepared(bundle, self.best, 0, "not tried: kept already")
        if missing := _missing(model, bundle):
            return _Prepared(bundle, self.best, 0, f"not tried: needs {missing}")
        for step in with_needs(bundle):
            if step.name in done:
                continue
            if reason := step.refusal(model):
                return _Prepared(bundle, self.best, 0, f"refused: {reason}")
            vectors = step.vectors(model, self._context)
            count += len(vectors)
            model = model.applying(step, vectors) if vectors else model
        reason = "cannot help: no quantized tensor's rows are stored otherwise" if count else _NOTHING
        return _Prepared(bundle, model, count, reason)

    def _changed(self, model: Model) -> list[str]:
        """Return the quantized tensors that differ from the best model's."""
        return [
            name
            for name, form in self._context.formats.items()
            if name in model.tensors
            and form.bpw < _FLOAT_BITS
            and model.spec(name).component == "text"
            and model.spec(name).transforms != self.best.spec(name).transforms
        ]

    def _line(
        self,
        one: _Prepared,
        trial: Trial | None,
        confidence: float,
        helps: bool,
        winner: str | None,
    ) -> TriedTransform:
        if trial is None:
            return TriedTransform(
                str(one), one.instances, self._says, None, None, None, None, None, False, one.reason
            )
        change = trial.change.estimate(confidence)
        outputs = None if trial.outputs is None else trial.outputs.estimate(confidence)
        kept = winner == str(one)
        if kept:
            reason = "kept" if change.high is not None and change.high < 0 else "kept: outputs' errors fall"
        elif helps:
            reason = f"helped, but {winner} helped more"
        elif change.low is not None and change.low > 0:
            reason = "did not help: it made things worse"
        else:
            reason = "did not help: the interval of the change reaches 0"
        return TriedTransform(
            str(one),
            one.instances,
            self._says,
            trial.before,
            trial.after,
            change,
            outputs,
            confidence,
            kept,
            reason,
        )


@dataclass(frozen=True)
class _Prepared:
    """A candidate as a model: the best so far where `reason` forbids it; else that is for no change."""

    bundle: Bundle
    model: Model
    instances: int
    reason: str

    def __str__(self) -> str:
        return " + ".join(map(str, self.bundle))


def _missing(model: Model, bundle: Bundle) -> str:
    """Return which tensors would have to be added or dropped first, with their bytes; empty where none."""
    said = []
    for step in with_needs(bundle):
        changed = step.restructured(model)
        if changed is not model:
            said.append(f"{step.name} ({'; '.join(step.notes(model))})")
        model = changed
    return ", ".join(said)
