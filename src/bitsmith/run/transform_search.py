"""Which transforms help: each is tried as the plan would store it, and kept only where it helps for sure."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from bitsmith.archs import TensorSpec
from bitsmith.archs.steps import PermuteRows, ScaleRows
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.formats import Format
from bitsmith.numerics.divergence import MIN_CHUNKS, Estimate
from bitsmith.passes.permute import PermuteDelta, PermuteFfn, PermuteResidual, PermuteV
from bitsmith.passes.rescale import ScaleConv, ScaleDelta, ScaleFfn, ScaleNormReaders, ScaleVo
from bitsmith.passes.rotate import Rotate
from bitsmith.passes.transform import Applied, Context, Model, Transform, with_needs
from bitsmith.passes.trial import Trial as OutputTrial
from bitsmith.passes.trial import output_errors
from bitsmith.progress import Progress, silent
from bitsmith.run.encode import TensorEncoder, check_rounder
from bitsmith.run.evaluate import PROTOCOL, RESAMPLES
from bitsmith.run.forward import TextModel, Tokens, compare, final_hidden_states
from bitsmith.run.plan import PlanRow, SourceTensor
from bitsmith.store.checkpoint import Bytes, ComputedTensor, Rows, TensorRef, View
from bitsmith.store.statistics import Statistics

Float64 = NDArray[np.float64]
Measure = Literal["kld", "output error"]

SEARCH_WORK = 6e12
"""Weights times held-out tokens times candidates up to which KLD is measured, unless told otherwise."""

_SCALES = (ScaleNormReaders, ScaleFfn, ScaleVo, ScaleDelta, ScaleConv)
_ORDERS = (PermuteResidual, PermuteFfn, PermuteV, PermuteDelta)
_BY = ("best", "moment", "scale")
_FLOAT_BITS = 16
_SAMPLE_ROWS = 64
_FEW_TENSORS = 8
_LEAST_ERROR = 1e-30
_NORMAL = 1.959964  # 97.5 % quantile
_NOTHING = "cannot help: nothing to change"
_SAYS = {"kld": "mean KLD (nats), held-out", "output error": "log ratio of held-out output error"}


@dataclass(frozen=True)
class TriedTransform:
    """One line of the record: a transform that was tried, or why it was not; None is unmeasured.

    `instances` counts the layers or axes that it changes. `change` is `after - before`, paired. With measure
    output error all three are means of `log(sum |E x|² / sum |W x|²)` over the changed tensors.
    """

    transform: str
    instances: int
    measure: str
    before: Estimate | None
    after: Estimate | None
    change: Estimate | None
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


def default_candidates() -> list[Transform]:
    """Return what `search` tries, in its order: scales, permutations by three rules, the rotation."""
    orders = (order({"by": by}) for order in _ORDERS for by in _BY)
    return [*(scale() for scale in _SCALES), *orders, Rotate()]


def search(
    network: TextModel,
    model: Model,
    formats: Mapping[str, Format],
    statistics: Statistics,
    rounder: str,
    tokens: Tokens,
    *,
    candidates: Sequence[Transform] | None = None,
    measure: Measure | None = None,
    progress: Progress = silent,
) -> Search:
    """Try `candidates` one after the other on top of what was kept so far, and keep what helps.

    Every tensor is stored in its format (`formats`, by Hugging Face name; others stay floats) by `rounder`
    with the original model's statistics. Measure `kld` runs that model over `tokens` (`chunks T`, held out)
    against `network`; a transform is kept if the upper end of the 95 % bootstrap interval, paired over
    chunks, of the change in mean KLD is below zero; few chunks widen it by Student's t. Measure `output
    error` runs no forward: it averages `log(after / before)` of the changed tensors' errors on held-out
    inputs, over a sample of rows, with an interval over tensors (fewer than 8: over inputs). Of variants of
    one transform, next to each other in `candidates`, the best that passes is kept. Default: `kld` up to
    `SEARCH_WORK`. Formats store row by row, so what only scales or reorders rows of quantized tensors cannot
    help and is not measured.

    A transform that needs tensors added or dropped first is not tried, as the file's bytes would change. The
    decisions fit the held-out tokens, of which error feedback's guard has seen samples too: figures to quote
    need a text of their own, and some of many candidates may pass by chance. Deterministic; memory holds the
    states of the tokens and a slice of a tensor, blocks of all tensors lie in a temporary folder.

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
    with _folder() as folder:
        blocks = _Blocks(folder, encoder, formats)
        judge: _Judge = _OutputError(context, rounder)
        if measure == "kld":
            judge = _Kld(network, model, blocks, tokens)
        found = _Greedy(model, context, judge, _SAYS[measure], len(chosen), progress)
        for variants in _variants(chosen):
            found.take(variants)
    return Search(found.best.applied, tuple(found.tried), _protocol(measure, statistics, rounder, tokens))


def _variants(candidates: Sequence[Transform]) -> Iterator[list[Transform]]:
    """Yield runs of candidates of one name."""
    run: list[Transform] = []
    for candidate in candidates:
        if run and run[0].name != candidate.name:
            yield run
            run = []
        run.append(candidate)
    if run:
        yield run


def _protocol(measure: Measure, statistics: Statistics, rounder: str, tokens: Tokens) -> str:
    chunks, ctx = tokens.shape
    text = f"held-out part of {statistics.text or 'the text'}, context {ctx} tokens, {chunks} chunks"
    how = f"95 % paired bootstrap, {RESAMPLES} resamples, seed 0, a change's widened by Student's t"
    if measure == "output error":
        rows = f"{_SAMPLE_ROWS} rows of each tensor, its site's sample of inputs"
        return f"{_SAYS[measure]}: {rows}; {text}; {how}, over tensors or, of few, their inputs; rounder {rounder}"
    return f"{PROTOCOL}; {text}; {how}, over chunks; rounder {rounder}, statistics of the original model"


@dataclass(frozen=True, eq=False)
class _Trial:
    """A candidate beside the best so far; `state` is what its judge needs to keep it."""

    before: Estimate
    after: Estimate
    change: Estimate
    state: Any

    @property
    def helps(self) -> bool:
        return self.change.high is not None and self.change.high < 0


class _Judge(ABC):
    """Measures candidates against the best so far."""

    @abstractmethod
    def trial(self, best: Model, model: Model, changed: Sequence[str]) -> _Trial:
        """Measure `model`, which differs from the best so far in the quantized tensors `changed`."""

    @abstractmethod
    def settle(self, trials: Sequence[_Trial], kept: _Trial | None) -> None:
        """Make `kept` the best, and drop what the other trials hold."""


class _Greedy:
    """The best model so far and the record of how it came about."""

    def __init__(
        self, model: Model, context: Context, judge: _Judge, says: str, total: int, progress: Progress
    ) -> None:
        self.best, self.tried = model, list[TriedTransform]()
        self._context, self._judge, self._says = context, judge, says
        self._total, self._progress = total, progress
        progress("transforms", 0, total)

    def take(self, variants: Sequence[Transform]) -> None:
        """Try the variants of one transform and keep the best of them, if any helps."""
        prepared = [self._prepared(transform) for transform in variants]
        trials: list[_Trial | None] = []
        for one in prepared:
            changed = self._changed(one.model)
            matters = any(_mixes_columns(self.best.spec(name), one.model.spec(name)) for name in changed)
            trials.append(self._judge.trial(self.best, one.model, changed) if matters else None)
            self._progress("transforms", len(self.tried) + len(trials), self._total)
        measured = [trial for trial in trials if trial is not None]
        helping = [trial for trial in measured if trial.helps]
        kept = min(helping, key=lambda trial: trial.change.value) if helping else None
        self.tried += [
            self._line(one, trial, kept, prepared[trials.index(kept)].transform if kept else None)
            for one, trial in zip(prepared, trials, strict=True)
        ]
        self._judge.settle(measured, kept)
        if kept is not None:
            self.best = prepared[trials.index(kept)].model

    def _prepared(self, transform: Transform) -> _Prepared:
        """Return the best model with `transform`, and what it needs, applied on top."""
        model, done, count = self.best, {one.transform.name for one in self.best.applied}, 0
        if missing := _missing(model, transform):
            return _Prepared(transform, self.best, 0, f"not tried: needs {missing}")
        for step in with_needs([transform]):
            if step.name in done and step is not transform:
                continue
            if reason := step.refusal(model):
                return _Prepared(transform, self.best, 0, f"refused: {reason}")
            vectors = step.vectors(model, self._context)
            count = len(vectors)
            model = model.applying(step, vectors) if vectors else model
        reason = "cannot help: no quantized tensor's rows are stored otherwise" if count else _NOTHING
        return _Prepared(transform, model, count, reason)

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
        self, one: _Prepared, trial: _Trial | None, kept: _Trial | None, winner: Transform | None
    ) -> TriedTransform:
        name = str(one.transform)
        if trial is None:
            return TriedTransform(name, one.instances, self._says, None, None, None, False, one.reason)
        if trial is kept:
            reason = "kept"
        elif trial.helps:
            reason = f"helped, but {winner} helped more"
        elif trial.change.low is not None and trial.change.low > 0:
            reason = "did not help: it made things worse"
        else:
            reason = "did not help: the interval of the change reaches 0"
        return TriedTransform(
            name, one.instances, self._says, trial.before, trial.after, trial.change, trial is kept, reason
        )


@dataclass(frozen=True)
class _Prepared:
    """A model to try, which is the best so far where `reason` forbids to; else `reason` is for no change."""

    transform: Transform
    model: Model
    instances: int
    reason: str


class _Kld(_Judge):
    """Mean KLD per chunk, measured through the forward of the original model's own coordinates."""

    def __init__(self, network: TextModel, model: Model, blocks: _Blocks, tokens: Tokens) -> None:
        self._network, self._blocks, self._tokens = network, blocks, tokens
        self._targets = tokens[:, tokens.shape[1] // 2 + 1 :].reshape(-1)
        self._reference = self._final(network)
        names = [name for name, (spec, _) in model.tensors.items() if spec.component == "text"]
        self._coded = blocks.encoded(model, names)
        self._nats = self._measured(model, self._coded)

    def trial(self, best: Model, model: Model, changed: Sequence[str]) -> _Trial:
        """Encode what changed, and run all."""
        fresh = self._blocks.encoded(model, changed)
        nats = self._measured(model, self._coded | fresh)
        return _Trial(_mean(self._nats), _mean(nats), _mean_change(nats - self._nats), (fresh, nats))

    def settle(self, trials: Sequence[_Trial], kept: _Trial | None) -> None:
        """Delete blocks that are no longer of use."""
        for trial in trials:
            fresh, nats = trial.state
            if trial is kept:
                for name, coded in fresh.items():
                    self._coded[name].path.unlink()
                    self._coded[name] = coded
                self._nats = nats
            else:
                for coded in fresh.values():
                    coded.path.unlink()

    def _measured(self, model: Model, coded: Mapping[str, _Coded]) -> Float64:
        """Return the mean KLD of each chunk (`chunks`) in nats."""
        tensors = {name: ref for name, (_, ref) in model.tensors.items()}
        tensors |= {name: one.spec.from_gguf(one.ref) for name, one in coded.items()}
        view = View(self._network.checkpoint, tensors)
        candidate = TextModel(view, model.arch, self._network.source)
        states = self._reference, self._final(candidate)
        scores = compare(self._network, candidate, states, self._targets)
        nats: Float64 = scores.reshape(len(self._tokens)).kld.mean(axis=1)
        return nats

    def _final(self, model: TextModel) -> NDArray[np.float32]:
        states = final_hidden_states(model, self._tokens, self._tokens.shape[1] // 2)
        return states.reshape(-1, states.shape[-1])


class _OutputError(_Judge):
    """Errors of the outputs of sampled rows on held-out inputs."""

    def __init__(self, context: Context, rounder: str) -> None:
        self._context = context
        has_moments = context.statistics is not None and context.statistics.tokens() is not None
        self._rounder = rounder if rounder != "auto" else "gptq" if has_moments else "weighted"
        self._known: dict[str, OutputTrial] = {}

    def trial(self, best: Model, model: Model, changed: Sequence[str]) -> _Trial:
        """Try the rows of tensors that are stored otherwise."""
        names = [name for name in changed if _mixes_columns(best.spec(name), model.spec(name))]
        self._known |= self._tried(best, [name for name in names if name not in self._known])
        fresh = self._tried(model, names)
        before, after = [self._known[name] for name in names], [fresh[name] for name in names]
        return _Trial(*_log_errors(before, after), fresh)

    def settle(self, trials: Sequence[_Trial], kept: _Trial | None) -> None:
        """Take over the errors of what is kept."""
        if kept is not None:
            self._known |= kept.state

    def _tried(self, model: Model, names: Sequence[str]) -> dict[str, OutputTrial]:
        return output_errors(
            model, names, self._context, sample_rows=_SAMPLE_ROWS, rounder=self._rounder, split="held"
        )


def _log_errors(
    before: Sequence[OutputTrial], after: Sequence[OutputTrial]
) -> tuple[Estimate, Estimate, Estimate]:
    """Return the mean log error before and after, and its change, with intervals over tensors.

    Those of a few tensors are over held-out inputs; without those there are none.
    """
    old, new = (np.log([max(one.error, _LEAST_ERROR) for one in side]) for side in (before, after))
    if len(old) >= _FEW_TENSORS:
        return _mean(old), _mean(new), _mean_change(new - old)
    values = float(old.mean()), float(new.mean()), float((new - old).mean())
    sides = [[_resampled(one) for one in side] for side in (before, after)]
    found = [[draw for draw in side if draw is not None] for side in sides]
    if any(len(side) < len(old) for side in found):
        first, second, change = (Estimate(value, None, None) for value in values)
    else:
        earlier, later = (np.mean(side, axis=0) for side in found)
        draws = earlier, later, later - earlier
        first, second, change = (_interval(value, draw) for value, draw in zip(values, draws, strict=True))
    return first, second, change


def _resampled(trial: OutputTrial) -> Float64 | None:
    """Return the log error with the inputs drawn anew (`resamples`), the same draws for as many inputs."""
    lost, whole = trial.token_errors, trial.token_energies
    if lost is None or whole is None or len(lost) < MIN_CHUNKS:
        return None
    draws = _draws(len(lost))
    ratio: Float64 = (draws @ lost) / np.maximum(draws @ whole, _LEAST_ERROR)
    return np.log(np.maximum(ratio, _LEAST_ERROR))


@dataclass(frozen=True)
class _Coded:
    """A tensor's blocks in a file, and the spec that leads back to the source."""

    spec: TensorSpec
    path: Path
    form: Format
    shape: tuple[int, ...]

    @property
    def ref(self) -> TensorRef:
        """The tensor in GGUF layout, decoded on read."""
        row_bytes = self.form.row_bytes(self.shape[-1])

        def read(start: int, stop: int) -> Rows:
            count = max(0, stop - start) * row_bytes
            blocks = np.fromfile(self.path, np.uint8, count, offset=start * row_bytes)
            return self.form.decode(blocks.reshape(-1, row_bytes))

        return ComputedTensor(self.spec.name, self.shape, "F32", read)


class _Blocks:
    """Encodes tensors into a folder, each time into a new file."""

    def __init__(self, folder: Path, encoder: TensorEncoder, formats: Mapping[str, Format]) -> None:
        self._folder, self._encoder, self._formats = folder, encoder, formats
        self._count = 0

    def encoded(self, model: Model, names: Iterable[str]) -> dict[str, _Coded]:
        """Return those of `names` that are stored in fewer bits than float32, encoded."""
        rounded = [name for name in names if name in self._formats and self._formats[name].bpw < 32]
        return {name: self._one(model, name, self._formats[name]) for name in rounded}

    def _one(self, model: Model, name: str, form: Format) -> _Coded:
        spec, stored = model.tensors[name]
        ref = spec.to_gguf(stored)
        tensor = SourceTensor(spec, spec.gguf_name or name, ref, stored)
        nbytes = ref.size // form.block_size * form.block_bytes
        row = PlanRow(name, tensor.gguf_name, ref.shape, stored.dtype, form.name, nbytes, form.bpw, "plan")
        path = self._folder / str(self._count)
        self._count += 1
        if self._encoder.is_guided(tensor, row):
            self._encoder.encode_guided(tensor, row, lambda blocks: _write(path, blocks))
        else:
            _write(path, self._encoder.encode(tensor, row, lambda _: None))
        return _Coded(spec, path, form, ref.shape)


def _write(path: Path, blocks: Iterable[Bytes]) -> None:
    try:
        with path.open("wb") as stream:
            for part in blocks:
                stream.write(np.ascontiguousarray(part).data)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=path) from error


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bitsmith-transforms-") as folder:
        yield Path(folder)


def _missing(model: Model, transform: Transform) -> str:
    """Return which tensors would have to be added or dropped first, with their bytes; empty where none."""
    said = []
    for step in with_needs([transform]):
        changed = step.restructured(model)
        if changed is not model:
            said.append(f"{step.name} ({'; '.join(step.notes(model))})")
        model = changed
    return ", ".join(said)


def _mixes_columns(before: TensorSpec, after: TensorSpec) -> bool:
    """Tell whether rows are stored otherwise after than before, not only scaled or in another order."""
    added = after.transforms[len(before.transforms) :]
    return any(not isinstance(step, PermuteRows | ScaleRows) for step in added)


def _mean(values: Float64) -> Estimate:
    """Return the mean of `values` with its 95 % percentile bootstrap interval."""
    return _interval(float(values.mean()), _draws(len(values)) @ values / len(values))


def _mean_change(values: Float64) -> Estimate:
    """Return the mean of `values` with the interval of `_mean`, widened for few values.

    Resampling n values spreads by the root of (n - 1) / n too little, and its tails are the normal ones: of
    two values that are negative by chance every resample is. Both are made up for: `sqrt(n / (n - 1)) t / z`.
    """
    found, count = _mean(values), len(values)
    if found.low is None or found.high is None:
        return found
    wider = np.sqrt(count / (count - 1)) * float(stdtrit(count - 1, 0.975)) / _NORMAL
    spread = (found.value - found.low) * wider, (found.high - found.value) * wider
    return Estimate(found.value, float(found.value - spread[0]), float(found.value + spread[1]))


def _draws(count: int) -> NDArray[np.int64]:
    """Return how often each of `count` is drawn (`resamples count`)."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def _interval(value: float, resampled: Float64) -> Estimate:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(value, float(low), float(high))
