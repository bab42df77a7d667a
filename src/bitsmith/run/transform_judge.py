"""How much a transform changes what a quantized model says: through the forward, or by outputs alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from bitsmith.archs import TensorSpec
from bitsmith.archs.steps import PermuteRows, ScaleRows
from bitsmith.errors import OutputError
from bitsmith.formats import Format
from bitsmith.numerics.divergence import MIN_CHUNKS, Estimate
from bitsmith.passes.transform import Context, Model
from bitsmith.passes.trial import Trial as OutputTrial
from bitsmith.passes.trial import output_errors
from bitsmith.run.encode import TensorEncoder, blocks_in
from bitsmith.run.evaluation import RESAMPLES
from bitsmith.run.forward import TextModel, Tokens, compare, final_hidden_states
from bitsmith.run.plan import PlanRow, SourceTensor
from bitsmith.store.checkpoint import Bytes, TensorRef, View

Float64 = NDArray[np.float64]

SAMPLE_ROWS = 64
"""Rows of a tensor by which `OutputErrors` judges it."""

FIRST_SHARE = 8
"""`Divergence` scores all positions of a chunk but its first `1 / FIRST_SHARE`, which have little context."""

_FEW_TENSORS = 8
_LEAST_ERROR = 1e-30


@dataclass(frozen=True)
class Change:
    """A mean difference, its standard error and the degrees of freedom that has; None is unmeasured."""

    value: float
    deviation: float | None
    freedom: int

    @classmethod
    def of(cls, differences: Float64) -> Change:
        """Return the mean of paired differences."""
        count = len(differences)
        deviation = float(differences.std(ddof=1) / np.sqrt(count)) if count >= MIN_CHUNKS else None
        return cls(float(differences.mean()), deviation, count - 1)

    def estimate(self, confidence: float) -> Estimate:
        """Return the difference with its Student t interval of that confidence."""
        if self.deviation is None:
            return Estimate(self.value, None, None)
        reach = float(stdtrit(self.freedom, (1 + confidence) / 2)) * self.deviation
        return Estimate(self.value, self.value - reach, self.value + reach)


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate beside the best so far; `state` is what its judge needs to keep it.

    `outputs` is the change of the mean log error of outputs, where `change` is not that itself.
    """

    before: Estimate
    after: Estimate
    change: Change
    state: Any
    outputs: Change | None = None

    def helps(self, confidence: float, keeps_values: bool) -> bool:
        """Tell whether the change is below zero with that confidence.

        Or that of the outputs is, and the change falls by more than its standard error; where values only
        change their order it is enough that it does not rise by more than that.
        """
        if _below_zero(self.change, confidence):
            return True
        if self.outputs is None or self.change.deviation is None:
            return False
        limit = self.change.deviation if keeps_values else -self.change.deviation
        return self.change.value < limit and _below_zero(self.outputs, confidence)


def _below_zero(change: Change, confidence: float) -> bool:
    high = change.estimate(confidence).high
    return high is not None and high < 0


class Judge(ABC):
    """Measures candidates against the best so far."""

    @abstractmethod
    def trial(self, best: Model, model: Model, changed: Sequence[str]) -> Trial:
        """Measure `model`, which differs from the best so far in the quantized tensors `changed`."""

    @abstractmethod
    def settle(self, trials: Sequence[Trial], kept: Trial | None) -> None:
        """Make `kept` the best, and drop what the other trials hold."""


class Divergence(Judge):
    """Mean KLD per chunk, measured through the forward of the original model's own coordinates.

    `outputs` judges the errors of outputs beside it.
    """

    def __init__(
        self, network: TextModel, model: Model, blocks: Blocks, tokens: Tokens, outputs: OutputErrors
    ) -> None:
        self._network, self._blocks, self._tokens = network, blocks, tokens
        self._outputs = outputs
        self._first = tokens.shape[1] // FIRST_SHARE
        self._targets = tokens[:, self._first + 1 :].reshape(-1)
        self._reference = self._final(network)
        names = [name for name, (spec, _) in model.tensors.items() if spec.component == "text"]
        self._coded = blocks.encoded(model, names)
        self._nats = self._measured(model, self._coded)

    def trial(self, best: Model, model: Model, changed: Sequence[str]) -> Trial:
        """Encode what changed, and run all."""
        fresh = self._blocks.encoded(model, changed)
        nats = self._measured(model, self._coded | fresh)
        beside = self._outputs.trial(best, model, changed)
        change = Change.of(nats - self._nats)
        return Trial(_mean(self._nats), _mean(nats), change, (fresh, nats, beside), beside.change)

    def settle(self, trials: Sequence[Trial], kept: Trial | None) -> None:
        """Delete blocks that are no longer of use."""
        for trial in trials:
            fresh, nats, beside = trial.state
            if trial is kept:
                self._outputs.settle([], beside)
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
        states = final_hidden_states(model, self._tokens, self._first)
        return states.reshape(-1, states.shape[-1])


class OutputErrors(Judge):
    """Errors of the outputs of sampled rows on held-out inputs."""

    def __init__(self, context: Context, rounder: str) -> None:
        self._context = context
        has_moments = context.statistics is not None and context.statistics.tokens() is not None
        self._rounder = rounder if rounder != "auto" else "gptq" if has_moments else "weighted"
        self._known: dict[str, OutputTrial] = {}

    def trial(self, best: Model, model: Model, changed: Sequence[str]) -> Trial:
        """Try the rows of tensors that are stored otherwise."""
        names = [name for name in changed if mixes_columns(best.spec(name), model.spec(name))]
        self._known |= self._tried(best, [name for name in names if name not in self._known])
        fresh = self._tried(model, names)
        before, after = [self._known[name] for name in names], [fresh[name] for name in names]
        return Trial(*_log_errors(before, after), fresh)

    def settle(self, trials: Sequence[Trial], kept: Trial | None) -> None:
        """Take over the errors of what is kept."""
        if kept is not None:
            self._known |= kept.state

    def _tried(self, model: Model, names: Sequence[str]) -> dict[str, OutputTrial]:
        return output_errors(
            model, names, self._context, sample_rows=SAMPLE_ROWS, rounder=self._rounder, split="held"
        )


def _log_errors(
    before: Sequence[OutputTrial], after: Sequence[OutputTrial]
) -> tuple[Estimate, Estimate, Change]:
    """Return the mean log error before and after, and its change, with deviations over tensors.

    That of a few tensors is over held-out inputs, drawn anew; without those it is unmeasured.
    """
    old, new = (np.log([max(one.error, _LEAST_ERROR) for one in side]) for side in (before, after))
    if len(old) >= _FEW_TENSORS:
        return _mean(old), _mean(new), Change.of(new - old)
    values = float(old.mean()), float(new.mean())
    sides = [[_resampled(one) for one in side] for side in (before, after)]
    found = [[draw for draw in side if draw is not None] for side in sides]
    if any(len(side) < len(old) for side in found):
        first, second = (Estimate(value, None, None) for value in values)
        return first, second, Change(values[1] - values[0], None, 0)
    draws = [np.mean(side, axis=0) for side in found]
    first, second = (_interval(value, draw) for value, draw in zip(values, draws, strict=True))
    deviation = float(np.std(draws[1] - draws[0]))
    return first, second, Change(values[1] - values[0], deviation, RESAMPLES)


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
        return blocks_in(self.path, self.spec.name, self.shape, self.form)


class Blocks:
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
            with closing(self._encoder.encode(tensor, row)) as blocks:
                _write(path, blocks)
        return _Coded(spec, path, form, ref.shape)


def _write(path: Path, blocks: Iterable[Bytes]) -> None:
    try:
        with path.open("wb") as stream:
            for part in blocks:
                stream.write(np.ascontiguousarray(part).data)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=path) from error


def mixes_columns(before: TensorSpec, after: TensorSpec) -> bool:
    """Tell whether rows are stored otherwise after than before, not only scaled or in another order."""
    added = after.transforms[len(before.transforms) :]
    return any(not isinstance(step, PermuteRows | ScaleRows) for step in added)


def _mean(values: Float64) -> Estimate:
    """Return the mean of `values` with its 95 % percentile bootstrap interval."""
    return _interval(float(values.mean()), _draws(len(values)) @ values / len(values))


def _draws(count: int) -> NDArray[np.int64]:
    """Return how often each of `count` is drawn (`resamples count`)."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def _interval(value: float, resampled: Float64) -> Estimate:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(value, float(low), float(high))
