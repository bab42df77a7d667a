"""Encode one tensor of a plan, slice by slice, guided by statistics of its inputs where there are any."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import Step
from bitsmith.archs.steps import PermuteRows
from bitsmith.errors import BitsmithError, DamagedFileError, printable
from bitsmith.formats import Format, format_named
from bitsmith.formats.accelerator import accelerator
from bitsmith.formats.blocks import BlockFormat
from bitsmith.log import event
from bitsmith.numerics.finite import first_non_finite
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.numerics.threads import ahead, in_order
from bitsmith.passes.choice import CHOICE_ROWS, Choice, SiteInputs, choose, narrowed
from bitsmith.passes.correction import Correction, paired_error
from bitsmith.passes.rounding import output_error, round_rows
from bitsmith.passes.trial import sample_runs
from bitsmith.run.finite import file_of
from bitsmith.run.plan import PlanRow, SourceTensor
from bitsmith.store.checkpoint import Bytes, ComputedTensor, Rows, TensorRef
from bitsmith.store.content import HashedTensor
from bitsmith.store.statistics import SiteStatistics, Statistics
from bitsmith.store.stored import FLOATS

Float32 = NDArray[np.float32]
Rounder = Literal["nearest", "weighted", "gptq", "auto"]
ROUNDERS: tuple[Rounder, ...] = get_args(Rounder)

SLICE_BYTES = 8 << 20
"""Float32 bytes of the rows in hand at a time."""

HELD_BYTES = 1 << 28
"""Up to this size a stored tensor whose rows are written in another order is kept in memory meanwhile."""

_NONE = np.empty((0, 0), np.float32)


MEASURED_ROWS = 1024
"""Rows of a matrix whose outputs are compared on held-out inputs; of more, slices spread evenly."""


@dataclass(frozen=True)
class Rounding:
    """How a tensor's codes were found, and what that does to its outputs on held-out text.

    `held_errors` are `sum |E x|² / sum |W x|²` over the held-out inputs x of the tensor's site, for the
    rounder that was kept and for the plain weighted search it had to beat, over all rows of a matrix or
    slices with about `MEASURED_ROWS` in all; empty where nothing was held out.
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
    """One tensor as written; `relative_error` is `sum (w - decoded)^2 / sum w^2` over what the file holds.

    `seconds` are those that encoding took: of one core, or with statistics from its beginning to its end.
    """

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
        self._tried_moment: Float32 | None = None
        self._metrics: dict[tuple[float, float, tuple[int, ...]], InputMetric] = {}
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

    def pieces(self, tensor: SourceTensor, row: PlanRow) -> Iterator[Piece]:
        """Yield what `coded` takes: the tensor's rows in order, read."""
        event("encode", tensor=row.hf_name, type=row.type, bytes=row.nbytes)
        copied = is_copied(tensor, row)
        with in_memory(tensor):
            for start, stop in tensor.ref.slices(_slice_bytes()):
                is_last = stop == tensor.ref.n_rows
                if copied:
                    yield Piece(tensor, row, _NONE, tensor.ref.raw(start, stop), is_last)
                else:
                    yield Piece(tensor, row, self._rows(tensor, row, start, stop), None, is_last)

    def coded(self, piece: Piece) -> Coded:
        """Return a piece's blocks by the plain search, and its errors; may run in any thread.

        Raises DamagedFileError for a weight that is not finite.
        """
        started = time.thread_time()
        if piece.blocks is not None:
            return Coded(piece, piece.blocks, Sums(), 0.0)
        form = format_named(piece.row.type)
        weights = self._finite(piece.tensor, piece.weights)
        blocks = form.encode(weights)
        return Coded(piece, blocks, _sums(form, weights, blocks, None), time.thread_time() - started)

    def encode(self, tensor: SourceTensor, row: PlanRow) -> Generator[Bytes]:
        """Yield the tensor's blocks slice by slice by the plain search; to be closed as `in_order` is."""
        with closing(in_order(self.coded, self.pieces(tensor, row))) as found:
            for coded in found:
                yield coded.blocks

    def encode_guided(
        self, tensor: SourceTensor, row: PlanRow, write: Callable[[Iterable[Bytes]], None]
    ) -> Written:
        """Write the tensor's blocks slice by slice through `write`, which may be called again to start over.

        The guard: should the rounder that the sample of rows chose do worse on held-out inputs than the
        weighted search, over the rows that are measured, the tensor is encoded once more by that.
        """
        with in_memory(tensor):
            return self._guided(tensor, row, write)

    def _guided(
        self, tensor: SourceTensor, row: PlanRow, write: Callable[[Iterable[Bytes]], None]
    ) -> Written:
        started = time.monotonic()
        event("encode", tensor=row.hf_name, type=row.type, bytes=row.nbytes)
        form, inputs = format_named(row.type), self._inputs(tensor)
        sample = self._sample(tensor, row)
        strength = self._strength(sample, inputs)
        sample = self._target(sample, strength)
        known = self._known(inputs)
        choice = choose(
            form, sample[:, : len(known.importance)], known, self._rounder, metric_for=self._trial
        )
        total, plain = self._attempt(tensor, row, inputs, choice, strength, write)
        errors = _errors(choice.rounder, total, plain) if _measures(inputs) else {}
        if plain is not None and errors[choice.rounder] > errors["weighted"]:
            choice, strength = Choice("weighted", None, choice.held_errors), 0.0
            total, _ = self._attempt(tensor, row, inputs, choice, strength, write)
        held = 0 if inputs.held is None else len(inputs.held)
        tried = dict(choice.held_errors)
        rounding = Rounding(choice.rounder, choice.damping, errors, held, tried, choice.shrink, strength)
        return written(row, total, time.monotonic() - started, rounding)

    def _attempt(
        self,
        tensor: SourceTensor,
        row: PlanRow,
        inputs: SiteStatistics,
        choice: Choice,
        strength: float,
        write: Callable[[Iterable[Bytes]], None],
    ) -> tuple[Sums, Sums | None]:
        """Encode as chosen; return its errors and, to compare, those of the weighted search."""
        form = format_named(row.type)
        if choice.rounder == "gptq" and choice.damping is not None:
            self._metric(choice.damping, choice.shrink, inputs.moment)  # made once, before threads ask for it
        compares = _measures(inputs) and choice.rounder != "weighted"
        total, plain = Sums(), Sums()

        def attempt(piece: tuple[Float32, bool]) -> tuple[Bytes, Sums, Sums]:
            rows, is_measured = piece
            weights = self._finite(tensor, rows)
            encoded = self._encoded(form, self._target(weights, strength), inputs, choice)
            own, other = _sums(form, weights, encoded, inputs if is_measured else None), Sums()
            if compares and is_measured:
                searched = form.encode(weights, inputs.importance)
                other = Sums(
                    held_error=_held_error(form, weights, searched, inputs), held_energy=own.held_energy
                )
            return encoded, own, other

        def blocks() -> Generator[Bytes]:
            nonlocal total, plain
            with closing(in_order(attempt, ahead(self._slices(tensor, row), 2))) as found:
                for encoded, own, other in found:
                    total, plain = total.plus(own), plain.plus(other)
                    yield encoded

        with closing(blocks()) as found:
            write(found)
        return total, plain if compares else None

    def _encoded(self, form: Format, weights: Float32, inputs: SiteStatistics, choice: Choice) -> Bytes:
        if choice.rounder == "gptq" and choice.damping is not None:
            return round_rows(form, weights, self._metric(choice.damping, choice.shrink, inputs.moment))
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
            self._site, self._metrics, self._correction, self._tried_moment = site, {}, None, None
            if inputs.cross is not None and inputs.moment is not None and self._rounder != "weighted":
                self._correction = Correction(inputs.cross, inputs.moment)
        return inputs

    def _known(self, inputs: SiteStatistics) -> SiteInputs:
        """Return what is known of the columns that the choice is made by."""
        known = narrowed(inputs)
        if self._tried_moment is None:
            self._tried_moment = known.moment
        return known

    def _trial(self, damping: float, shrink: float) -> InputMetric:
        """Return the metric of the columns that the choice is made by."""
        return self._metric(damping, shrink, self._tried_moment)

    def _metric(self, damping: float, shrink: float, moment: Float32 | None) -> InputMetric:
        if moment is None:
            raise BitsmithError("error feedback needs second moments", path=self._path)
        key = damping, shrink, moment.shape
        if key not in self._metrics:
            self._metrics[key] = InputMetric(moment, damping, shrink=shrink)
        return self._metrics[key]

    def _sample(self, tensor: SourceTensor, row: PlanRow) -> Float32:
        """Return runs of rows spread evenly over the tensor, `CHOICE_ROWS` at most."""
        runs = [self._rows(tensor, row, *run) for run in sample_runs(tensor.ref.n_rows, CHOICE_ROWS)]
        return self._finite(tensor, np.concatenate(runs))

    def _slices(self, tensor: SourceTensor, row: PlanRow) -> Iterator[tuple[Float32, bool]]:
        """Yield the rows, and whether their outputs are measured: slices spread evenly over the tensor."""
        share, due = min(1.0, MEASURED_ROWS / max(1, tensor.ref.n_rows)), 1.0
        for start, stop in tensor.ref.slices(_slice_bytes()):
            yield self._rows(tensor, row, start, stop), due >= 1
            due += share - (due >= 1)

    def _rows(self, tensor: SourceTensor, row: PlanRow, start: int, stop: int) -> Float32:
        width = row.shape[-1] if len(row.shape) > 1 else stop - start
        return _read(tensor.ref, start, stop).reshape(-1, width)

    def _finite(self, tensor: SourceTensor, weights: Float32) -> Float32:
        if first_non_finite(weights) is not None:
            _refuse_non_finite(tensor, self._path)
        return weights


def is_copied(tensor: SourceTensor, row: PlanRow) -> bool:
    """Tell whether the source holds exactly the blocks that the plan asks for."""
    return tensor.ref is tensor.origin and tensor.origin.dtype == row.type and row.type not in FLOATS


@dataclass(frozen=True)
class Sums:
    """Sums over rows: `sum (w - decoded)²`, `sum w²`, and with held-out inputs `sum |E x|²`, `sum |W x|²`.

    The last two are 0 where nothing is held out.
    """

    error: float = 0.0
    energy: float = 0.0
    held_error: float = 0.0
    held_energy: float = 0.0

    def plus(self, other: Sums) -> Sums:
        """Return the sums over both."""
        return Sums(
            self.error + other.error,
            self.energy + other.energy,
            self.held_error + other.held_error,
            self.held_energy + other.held_energy,
        )

    @property
    def relative(self) -> float:
        """`sum (w - decoded)² / sum w²`, 0 where all w are 0."""
        return self.error / self.energy if self.energy else 0.0

    @property
    def held(self) -> float:
        """`sum |E x|² / sum |W x|²` over the held-out inputs, 0 where the outputs are 0."""
        return self.held_error / self.held_energy if self.held_energy else 0.0


class Piece(NamedTuple):
    """Rows of a tensor as they were read: weights (`out in`), or the blocks of a tensor that is copied."""

    tensor: SourceTensor
    row: PlanRow
    weights: Float32
    blocks: Bytes | None
    is_last: bool


class Coded(NamedTuple):
    """A piece with its blocks, its errors, and the seconds of a core that they took."""

    piece: Piece
    blocks: Bytes
    sums: Sums
    seconds: float


def written(row: PlanRow, total: Sums, seconds: float, rounding: Rounding) -> Written:
    """Return the record of a tensor from the sums over all of it."""
    return Written(row.hf_name, row.gguf_name, row.type, row.nbytes, total.relative, seconds, rounding)


def in_memory(tensor: SourceTensor) -> AbstractContextManager[None]:
    """Hold a tensor whose rows change their order, so that its bytes are read once, in theirs."""
    origin = tensor.origin
    reordered = any(isinstance(step, PermuteRows) for step in tensor.spec.all_steps)
    if reordered and isinstance(origin, HashedTensor) and origin.nbytes <= HELD_BYTES:
        return origin.held()
    return nullcontext()


def _slice_bytes() -> int:
    fast = accelerator()
    return SLICE_BYTES if fast is None else fast.slice_bytes


def _measures(inputs: SiteStatistics | None) -> bool:
    return inputs is not None and inputs.held is not None and len(inputs.held) > 0


def _sums(form: Format, weights: Float32, blocks: Bytes, inputs: SiteStatistics | None) -> Sums:
    """Return the errors of `weights` (`out in`) in `blocks`, with held-out inputs those of outputs too."""
    if form.name == "F32":
        return Sums()
    if inputs is None or inputs.held is None or not len(inputs.held):
        return Sums(*form.squared_error(weights, blocks))
    error, energy = form.squared_error(weights, blocks)
    original = inputs.held if inputs.held_original is None else inputs.held_original
    return Sums(error, energy, _held_error(form, weights, blocks, inputs), output_error(weights, original))


def _held_error(form: Format, weights: Float32, blocks: Bytes, inputs: SiteStatistics) -> float:
    if inputs.held is None:
        return 0.0
    coded = form.decode(blocks)
    if inputs.held_original is None:
        return output_error(coded - weights, inputs.held)
    return paired_error(weights, coded, inputs.held_original, inputs.held)


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


def blocks_in(path: Path, name: str, shape: tuple[int, ...], form: Format, at: int = 0) -> TensorRef:
    """Return a tensor (GGUF layout) whose blocks a file holds from byte `at` on, decoded on read."""
    row_bytes = form.row_bytes(shape[-1])

    def read(start: int, stop: int) -> Rows:
        count = max(0, stop - start) * row_bytes
        blocks = np.fromfile(path, np.uint8, count, offset=at + start * row_bytes)
        return form.decode(blocks.reshape(-1, row_bytes))

    return ComputedTensor(name, shape, form.name, read)


def _errors(rounder: str, total: Sums, plain: Sums | None) -> dict[str, float]:
    """Return the errors of the outputs by rounder."""
    return {rounder: total.held} if plain is None else {rounder: total.held, "weighted": plain.held}


def _read(ref: TensorRef, start: int, stop: int) -> Float32:
    with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is refused
        return np.ascontiguousarray(ref.read(start, stop), dtype=np.float32)


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
