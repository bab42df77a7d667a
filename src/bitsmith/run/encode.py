"""Encode one tensor of a plan, slice by slice, guided by statistics of its inputs where there are any."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import Step
from bitsmith.errors import BitsmithError, DamagedFileError, printable
from bitsmith.formats import Format, format_named
from bitsmith.formats.blocks import BlockFormat
from bitsmith.log import event
from bitsmith.numerics.finite import first_non_finite
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.passes.choice import Choice, choose
from bitsmith.passes.correction import Correction, paired_error
from bitsmith.passes.rounding import output_error, round_rows
from bitsmith.passes.trial import sample_runs
from bitsmith.run.finite import file_of
from bitsmith.run.plan import PlanRow, SourceTensor
from bitsmith.store.checkpoint import Bytes, ComputedTensor, Rows, TensorRef
from bitsmith.store.statistics import SiteStatistics, Statistics
from bitsmith.store.stored import FLOATS

Float32 = NDArray[np.float32]
Rounder = Literal["nearest", "weighted", "gptq", "auto"]
ROUNDERS: tuple[Rounder, ...] = get_args(Rounder)

SLICE_BYTES = 8 << 20
"""Float32 bytes of the rows in hand at a time."""


@dataclass(frozen=True)
class Rounding:
    """How a tensor's codes were found, and what that does to its outputs on held-out text.

    `held_errors` are `sum |E x|² / sum |W x|²` over the held-out inputs x of the tensor's site, for the
    rounder that was kept and for the plain weighted search it had to beat; empty where nothing was held out.
    `tried` has the same on the sample of rows that the choice was made by. `damping` and `shrink` are the
    metric's (`InputMetric`). Behind compressed layers x̂ enters instead of x: `held_errors` are then those of
    `W x - Q x̂`, `correction` says how far the weights were moved to make up for it (`Correction`), and
    `tried` is about the moved weights.
    """

    rounder: str
    damping: float | None = None
    held_errors: dict[str, float] = field(default_factory=dict)
    held_tokens: int = 0
    tried: dict[str, float] = field(default_factory=dict)
    shrink: float = 0.0
    correction: float = 0.0


@dataclass(frozen=True)
class Written:
    """One tensor as written; `relative_error` is `sum (w - decoded)^2 / sum w^2` over what the file holds."""

    hf_name: str
    gguf_name: str
    type: str
    nbytes: int
    relative_error: float
    seconds: float
    rounding: Rounding = Rounding("nearest")


class TensorEncoder:
    """Encodes tensors with one rounder; metrics are shared by the tensors of a site.

    `nearest` minimises the plain squared error, `weighted` the one weighted by E[x²], `gptq` the error of the
    outputs by error feedback; `auto` takes for each tensor what does best on held-out inputs. What the
    statistics do not know is encoded as `nearest`.
    """

    def __init__(self, statistics: Statistics | None, rounder: Rounder, path: Path) -> None:
        self._statistics = statistics
        self._rounder = rounder
        self._path = path
        self._site: tuple[str, tuple[Step, ...]] = "", ()
        self._moment: Float32 | None = None
        self._metrics: dict[tuple[float, float], InputMetric] = {}
        self._correction: Correction | None = None

    def is_guided(self, tensor: SourceTensor, row: PlanRow) -> bool:
        """Tell whether statistics decide how the tensor is encoded."""
        return (
            not is_copied(tensor, row)
            and self._statistics is not None
            and self._rounder != "nearest"
            and isinstance(format_named(row.type), BlockFormat)
            and self._statistics.knows(tensor.spec)
        )

    def encode(self, tensor: SourceTensor, row: PlanRow, done: Callable[[Written], None]) -> Iterator[Bytes]:
        """Yield the tensor's blocks slice by slice by the plain search, then tell what was written."""
        started = time.monotonic()
        event("encode", tensor=row.hf_name, type=row.type, bytes=row.nbytes)
        total = _Total(format_named(row.type), None)
        copied = is_copied(tensor, row)
        for start, stop in tensor.ref.slices(SLICE_BYTES):
            weights = self._read(tensor, row, start, stop)
            blocks = tensor.ref.raw(start, stop) if copied else total.form.encode(weights)
            if not copied:
                total.add(weights, blocks)
            yield blocks
        done(total.written(row, time.monotonic() - started, Rounding("nearest")))

    def encode_guided(
        self, tensor: SourceTensor, row: PlanRow, write: Callable[[Iterable[Bytes]], None]
    ) -> Written:
        """Write the tensor's blocks slice by slice through `write`, which may be called again to start over.

        The guard: should the rounder that the sample of rows chose do worse on held-out inputs than the
        weighted search over all rows, the tensor is encoded once more by that.
        """
        started = time.monotonic()
        event("encode", tensor=row.hf_name, type=row.type, bytes=row.nbytes)
        form, inputs = format_named(row.type), self._inputs(tensor)
        sample = self._sample(tensor, row)
        strength = self._strength(sample, inputs)
        sample = self._target(sample, strength)
        choice = choose(form, sample, inputs, self._rounder, metric_for=self._metric)
        total, plain = self._attempt(tensor, row, inputs, choice, strength, write)
        errors = _errors(choice.rounder, total, plain)
        if plain is not None and choice.rounder != "weighted" and errors[choice.rounder] > errors["weighted"]:
            choice, strength = Choice("weighted", None, choice.held_errors), 0.0
            total, _ = self._attempt(tensor, row, inputs, choice, strength, write)
        held = 0 if inputs.held is None else len(inputs.held)
        tried = dict(choice.held_errors)
        rounding = Rounding(choice.rounder, choice.damping, errors, held, tried, choice.shrink, strength)
        return total.written(row, time.monotonic() - started, rounding)

    def _attempt(
        self,
        tensor: SourceTensor,
        row: PlanRow,
        inputs: SiteStatistics,
        choice: Choice,
        strength: float,
        write: Callable[[Iterable[Bytes]], None],
    ) -> tuple[_Total, _Total | None]:
        """Encode as chosen; return its errors and, to compare, those of the weighted search."""
        form = format_named(row.type)
        total = _Total(form, inputs)
        plain = _Total(form, inputs) if total.measures and choice.rounder != "weighted" else None

        def blocks() -> Iterator[Bytes]:
            for weights in self._slices(tensor, row):
                encoded = self._encoded(form, self._target(weights, strength), inputs, choice)
                total.add(weights, encoded)
                if plain is not None:
                    plain.add(weights, form.encode(weights, inputs.importance))
                yield encoded

        write(blocks())
        return total, plain

    def _encoded(self, form: Format, weights: Float32, inputs: SiteStatistics, choice: Choice) -> Bytes:
        if choice.rounder == "gptq" and choice.damping is not None:
            return round_rows(form, weights, self._metric(choice.damping, choice.shrink))
        return form.encode(weights, inputs.importance if choice.rounder == "weighted" else None)

    def _strength(self, sample: Float32, inputs: SiteStatistics) -> float:
        """Return how much correction helps most on held-out inputs."""
        if self._correction is None or inputs.held is None or inputs.held_original is None:
            return 0.0
        return self._correction.best(sample, inputs.held, inputs.held_original)

    def _target(self, weights: Float32, strength: float) -> Float32:
        return weights if self._correction is None else self._correction.target(weights, strength)

    def _inputs(self, tensor: SourceTensor) -> SiteStatistics:
        inputs = None if self._statistics is None else self._statistics.of(tensor.spec)
        if inputs is None:
            raise BitsmithError("has no statistics", path=self._path, tensor=tensor.hf_name)
        site = inputs.site, tensor.spec.column_steps
        if site != self._site:
            self._site, self._metrics, self._correction = site, {}, None
            if inputs.cross is not None and inputs.moment is not None and self._rounder != "weighted":
                self._correction = Correction(inputs.cross, inputs.moment)
        self._moment = inputs.moment
        return inputs

    def _metric(self, damping: float, shrink: float) -> InputMetric:
        if self._moment is None:
            raise BitsmithError("error feedback needs second moments", path=self._path)
        key = damping, shrink
        if key not in self._metrics:
            self._metrics[key] = InputMetric(self._moment, damping, shrink=shrink)
        return self._metrics[key]

    def _sample(self, tensor: SourceTensor, row: PlanRow) -> Float32:
        """Return runs of rows spread evenly over the tensor, `SAMPLE_ROWS` at most."""
        return np.concatenate([self._read(tensor, row, *run) for run in sample_runs(tensor.ref.n_rows)])

    def _slices(self, tensor: SourceTensor, row: PlanRow) -> Iterator[Float32]:
        for start, stop in tensor.ref.slices(SLICE_BYTES):
            yield self._read(tensor, row, start, stop)

    def _read(self, tensor: SourceTensor, row: PlanRow, start: int, stop: int) -> Float32:
        width = row.shape[-1] if len(row.shape) > 1 else stop - start
        weights = _read(tensor.ref, start, stop).reshape(-1, width)
        if first_non_finite(weights) is not None:
            _refuse_non_finite(tensor, self._path)
        return weights


def is_copied(tensor: SourceTensor, row: PlanRow) -> bool:
    """Tell whether the source holds exactly the blocks that the plan asks for."""
    return tensor.ref is tensor.origin and tensor.origin.dtype == row.type and row.type not in FLOATS


class _Total:
    """Sums over a tensor's slices: weights, errors and, with held-out inputs, what both produce."""

    def __init__(self, form: Format, inputs: SiteStatistics | None) -> None:
        self.form = form
        held = None if inputs is None else inputs.held
        self._held = held if held is not None and len(held) else None
        self._original = None if inputs is None else inputs.held_original
        self._error = self._energy = self._held_error = self._held_energy = 0.0

    def add(self, weights: Float32, blocks: Bytes) -> None:
        """Take a slice and its blocks."""
        self._energy += _squares(weights)
        if self.form.name == "F32":
            return
        coded = self.form.decode(blocks)
        errors = coded - weights
        self._error += _squares(errors)
        if self._held is None:
            return
        if self._original is None:
            self._held_error += output_error(errors, self._held)
            self._held_energy += output_error(weights, self._held)
        else:
            self._held_error += paired_error(weights, coded, self._original, self._held)
            self._held_energy += output_error(weights, self._original)

    @property
    def measures(self) -> bool:
        """Whether there are held-out inputs."""
        return self._held is not None

    @property
    def held_error(self) -> float | None:
        """`sum |E x|² / sum |W x|²` over the held-out inputs."""
        if self._held is None:
            return None
        return self._held_error / self._held_energy if self._held_energy else 0.0

    def written(self, row: PlanRow, seconds: float, rounding: Rounding) -> Written:
        """Return the record of the tensor."""
        relative = self._error / self._energy if self._energy else 0.0
        return Written(row.hf_name, row.gguf_name, row.type, row.nbytes, relative, seconds, rounding)


def check_rounder(rounder: str, statistics: Statistics | None, path: Path | None) -> Rounder:
    """Return `rounder` as one of `ROUNDERS`.

    Raises BitsmithError for an unknown one, and for one that needs statistics which are not there.
    """
    for known in ROUNDERS:
        if rounder == known:
            break
    else:
        raise BitsmithError(f"unknown rounder {printable(rounder)!r}; known: {', '.join(ROUNDERS)}")
    if statistics is None and known in ("weighted", "gptq"):
        raise BitsmithError(f"rounder {known} needs statistics of the inputs: pass --stats (see calibrate)")
    if statistics is not None and known == "gptq" and statistics.tokens() is None:
        raise BitsmithError(
            "holds E[x²] alone, rounder gptq needs the second moments that calibrate keeps", path=path
        )
    return known


def blocks_in(path: Path, name: str, shape: tuple[int, ...], form: Format) -> TensorRef:
    """Return a tensor (GGUF layout) whose blocks a file holds and nothing else, decoded on read."""
    row_bytes = form.row_bytes(shape[-1])

    def read(start: int, stop: int) -> Rows:
        count = max(0, stop - start) * row_bytes
        blocks = np.fromfile(path, np.uint8, count, offset=start * row_bytes)
        return form.decode(blocks.reshape(-1, row_bytes))

    return ComputedTensor(name, shape, form.name, read)


def _errors(rounder: str, total: _Total, plain: _Total | None) -> dict[str, float]:
    found = {rounder: total.held_error, **({} if plain is None else {"weighted": plain.held_error})}
    return {name: error for name, error in found.items() if error is not None}


def _read(ref: TensorRef, start: int, stop: int) -> Float32:
    with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is refused
        return np.ascontiguousarray(ref.read(start, stop), dtype=np.float32)


def _squares(values: Float32) -> float:
    flat = values.reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


def _refuse_non_finite(tensor: SourceTensor, path: Path) -> NoReturn:
    """Raise DamagedFileError with the first NaN or infinity: in the stored tensor, else as exported."""
    for ref, layout in ((tensor.origin, ""), (tensor.ref, f" of {tensor.gguf_name}")):
        for start, stop in ref.slices(SLICE_BYTES):
            rows = _read(ref, start, stop)
            for first, *rest in np.argwhere(~np.isfinite(rows))[:1].tolist():
                place = [start + first, *rest]
                raise DamagedFileError(
                    f"is {rows[first, *rest]} at {place}{layout}, expected finite weights",
                    path=file_of(tensor.origin, path),
                    tensor=tensor.hf_name,
                )
    raise DamagedFileError("changed while it was read", path=path, tensor=tensor.hf_name)
