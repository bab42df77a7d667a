"""Measure one matrix, or one layer's attention: everything an assay says of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.numerics.power_law import fit_tail, log_slope
from bitsmith.numerics.rate_distortion import bound_points
from bitsmith.numerics.spectrum import (
    LARGE,
    Decomposition,
    Spectrum,
    compare_with_random,
    decompose,
    describe,
    singular_values,
)
from bitsmith.numerics.tensor_train import RowSource, Train, as_rows, svd_core, sweep
from bitsmith.passes.attention import (
    delta_parts,
    head_energies,
    kernel_and_values,
    low_rank_heads,
    query_rows,
)
from bitsmith.passes.low_rank import MEASURED_ROWS, Coding, Contest, contest, format_gaps
from bitsmith.run.assay_result import (
    Curve,
    MatrixAssay,
    MixerAssay,
    PowerLawFigures,
    RandomFigures,
    RateRow,
    Rival,
    SpectrumFigures,
    TrainRow,
    Whitened,
)
from bitsmith.run.claims import component_key
from bitsmith.run.verdict import matrix_verdict
from bitsmith.store.checkpoint import ComputedTensor, TensorRef

Float64 = NDArray[np.float64]
Weights = NDArray[Any]
Source = Weights | TensorRef

HELD_BYTES = 512 << 20  # a matrix up to this size as float32 is read once, a larger one for every measure
QUICK_ROWS, QUICK_BYTES = 512, 256 << 20  # of errors; of a matrix too large to hold, as float32
CURVE_POINTS = 200
_AT_REST_BYTES = 400 << 20
_TOGETHER = 64  # rows read at once of a matrix that is sampled
RATES_BPW = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
TRAIN_ROLES = ("embed", "head")


@dataclass(frozen=True)
class Target:
    """A matrix to assay: where it belongs, and its values folded to (out, rest)."""

    spec: TensorSpec
    ref: TensorRef

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.spec.name

    @property
    def shape(self) -> tuple[int, int]:
        """Shape after folding."""
        return self.ref.shape[0], self.ref.size // self.ref.shape[0]

    @property
    def role(self) -> str:
        """Role, led by the component where that is not text."""
        spec = self.spec
        return spec.role if spec.component in ("text", spec.role) else f"{spec.component}.{spec.role}"

    @property
    def work(self) -> int:
        """Multiplications of its spectrum: what the time goes with."""
        rows, columns = self.shape
        return rows * columns * min(rows, columns)

    @property
    def memory_bytes(self) -> int:
        """Bytes that measuring it takes at most, about: itself where it is held, and Gram matrices."""
        short = min(self.shape)
        return _AT_REST_BYTES + 2 * min(4 * self.ref.size, HELD_BYTES) + 40 * short * short

    def sampled(self) -> Source:
        """Return the folded values; of a matrix too large to hold, groups of rows evenly spaced over it."""
        rows, columns = self.shape
        kept = min(rows, QUICK_BYTES // (4 * columns) // _TOGETHER * _TOGETHER)
        if kept == 0 or 4 * self.ref.size <= HELD_BYTES:
            return self.source()
        starts = np.arange(kept // _TOGETHER) * (rows - _TOGETHER) // max(1, kept // _TOGETHER - 1)
        found = [self.ref.read(int(first), int(first) + _TOGETHER) for first in starts]
        return np.concatenate(found).reshape(-1, columns)

    def source(self) -> Source:
        """Return the folded values: an array if they may be held, else a tensor that reads slices of rows."""
        rows, columns = self.shape
        if 4 * self.ref.size <= HELD_BYTES:
            return np.asarray(self.ref.read()).reshape(rows, columns)
        return ComputedTensor(
            self.name,
            (rows, columns),
            self.ref.dtype,
            lambda start, stop: self.ref.read(start, stop).reshape(-1, columns),
        )


@dataclass(frozen=True)
class Mixer:
    """One layer's q, k, v and o, or a DeltaNet's in_qkv and out; `heads` are query or V heads."""

    layer: int
    kind: Literal["attention", "delta"]
    targets: Mapping[str, Target]
    heads: int
    kv_heads: int
    k_dim: int

    @property
    def work(self) -> int:
        """Multiplications, about: what the time goes with."""
        return sum(target.work for target in self.targets.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes that measuring it takes at most, about."""
        held = sum(4 * target.ref.size for target in self.targets.values())
        return _AT_REST_BYTES + 4 * held


def measure(
    target: Target, resamples: int, seed: int, second_moment: Float64 | None = None, quick: bool = False
) -> MatrixAssay:
    """Measure one matrix.

    `quick` computes in float32 where the matrix is large, measures errors on fewer rows, a matrix that is too
    large to hold on a sample of its rows, and no Tensor-Train of it; the figures' bounds say what that costs.
    Raises BitsmithError naming the tensor and the first value that is NaN or infinite.
    """
    started = time.monotonic()
    try:
        source = target.sampled() if quick else target.source()
        found = decompose(source, np.float32 if quick and min(target.shape) >= LARGE else np.float64)
        sample = QUICK_ROWS if quick else MEASURED_ROWS
        spectrum = found.spectrum
        zero = spectrum.energy == 0
        measured = None if zero else contest(source, measured_rows=sample, known=found)
        rivals = () if measured is None else _rivals(measured)
        figures = None if zero else spectrum_figures(spectrum)
        gaps = () if measured is None else _rates(source, spectrum, sample, measured.int4)
        trains = None if zero or quick or target.role not in TRAIN_ROLES else _trains(source, found)
        del found
        whitened = None if zero or second_moment is None else _whitened(source, second_moment)
    except UnsupportedError:
        raise
    except BitsmithError as error:
        raise BitsmithError(error.message, tensor=target.name) from error
    return MatrixAssay(
        name=target.name,
        role=target.role,
        component=component_key(target.spec),
        layer=target.spec.layer,
        shape=target.shape,
        dtype=target.ref.dtype,
        parameters=target.ref.size,
        spectrum=figures,
        random=_random(spectrum),
        power_law=None if zero else _power_law(spectrum, resamples, seed),
        rivals=rivals,
        rate=gaps,
        bounds=() if zero else bound_points(spectrum.sigma, RATES_BPW),
        tensor_train=trains,
        whitened=whitened,
        verdict=matrix_verdict(spectrum, rivals),
        seconds=time.monotonic() - started,
    )


def spectrum_figures(spectrum: Spectrum) -> SpectrumFigures:
    """Return the plain figures of a spectrum that is not all zeros."""
    found = describe(spectrum)
    largest = float(spectrum.sigma[0])
    return SpectrumFigures(
        method=found.method,
        sigma_bound=float(spectrum.error.max()) / largest,
        sigma_max=largest,
        sigma_min=float(spectrum.sigma[-1]),
        condition=found.condition_number,
        frobenius=found.frobenius,
        stable_rank=float(found.stable_rank or 0),
        effective_rank=float(found.effective_rank or 0),
        nuclear_rank=float(found.nuclear_rank or 0),
        r90=found.r90,
        rank_for_error=tuple(found.rank_for_error.items()),
        energy_at=tuple(found.energy_at.items()),
        sigma_at=tuple(found.sigma_at.items()),
        sigma=_curve(spectrum.sigma, 1),
        error=_curve(spectrum.truncation_error(), 0),
    )


def _curve(values: Float64, first: int) -> Curve:
    """Return at most CURVE_POINTS values, half spaced evenly and half by ratio, with their indices."""
    count, half = len(values), CURVE_POINTS // 2
    if count <= CURVE_POINTS:
        at = np.arange(count)
    else:
        even = np.linspace(0, count - 1, half)
        at = np.unique(np.round(np.append(even, np.geomspace(1, count, half) - 1)).astype(np.int64))
    return Curve(tuple(int(i) + first for i in at), tuple(float(values[i]) for i in at))


def _random(spectrum: Spectrum) -> RandomFigures | None:
    compared = compare_with_random(spectrum)
    if compared is None:
        return None
    beside = compared.bulk or compared.same_variance
    return RandomFigures(
        float(np.sqrt(beside.variance)),
        beside.lower_edge,
        beside.upper_edge,
        beside.spikes,
        beside.spike_energy,
        beside.ks_distance,
    )


def _power_law(spectrum: Spectrum, resamples: int, seed: int) -> PowerLawFigures | None:
    known = spectrum.sigma[: spectrum.rank]
    slope, tail = log_slope(known), fit_tail(np.square(known), resamples, seed)
    if tail is None:
        return None if slope is None else PowerLawFigures(slope.slope, *[None] * 7)
    return PowerLawFigures(
        slope=None if slope is None else slope.slope,
        alpha=tail.alpha,
        alpha_low=tail.low,
        alpha_high=tail.high,
        x_min=tail.x_min,
        ks=tail.ks_distance,
        p_value=tail.p_value,
        tail=tail.n_tail,
    )


def _rivals(found: Contest) -> tuple[Rival, ...]:
    kinds = (
        ("int4", found.int4),
        ("low_rank", found.low_rank),
        ("residual", found.with_residual),
        ("seed", (found.seed,)),
    )
    return tuple(
        _rival(kind, coding, coding.relative_error)
        for kind, codings in kinds
        for coding in codings
        if coding.relative_error is not None  # unmeasured is left out, never an error of zero
    )


def _rival(kind: Any, coding: Coding, error: float) -> Rival:
    return Rival(
        method=coding.method,
        kind=kind,
        nbytes=coding.stored_bytes,
        bpw=coding.bpw,
        error=error,
        standard_error=coding.standard_error,
        rank=coding.rank,
        budget=coding.budget,
        theory_error=coding.theory_error,
        error_over_theory=coding.measured_over_theory,
        claimed_error=coding.claimed_error,
        error_over_claim=coding.measured_over_claimed,
        worse_than_zeros=coding.worse_than_zeros,
    )


def _rates(source: Source, spectrum: Spectrum, sample: int, known: tuple[Coding, ...]) -> tuple[RateRow, ...]:
    return tuple(
        RateRow(gap.format, gap.bpw, gap.relative_error, gap.gap_white_db, gap.gap_spectral_db)
        for gap in format_gaps(source, spectrum.sigma, measured_rows=sample, known=known)
        if gap.relative_error is not None
    )


def _trains(source: Source, found: Decomposition) -> tuple[TrainRow, ...]:
    rows, large = as_rows(source), min(source.shape) >= LARGE
    dtype, known = (np.float32, found.right_vectors) if large else (np.float64, None)
    trains = (*sweep(rows, dtype=dtype), svd_core(rows, known=known, dtype=dtype))
    return tuple(_train(train) for train in trains)


def _train(train: Train) -> TrainRow:
    return TrainRow(
        method=train.method,
        asked=train.asked_ranks,
        ranks=train.ranks,
        modes=tuple(zip(train.modes.rows, train.modes.columns, strict=True)),
        core_rank=train.core_rank,
        parameters=train.parameters,
        ratio=train.ratio,
        error=train.relative_error,
        cosine=train.mean_row_cosine,
        passes=train.passes_gate,
    )


def _whitened(source: Source, second_moment: Float64) -> Whitened | None:
    found = contest(source, second_moment)
    weighed = _Weighed(as_rows(source), second_moment)
    spectrum = singular_values(weighed)
    if spectrum.energy == 0:
        return None
    rivals = _rivals(found)
    return Whitened(found.metric, spectrum_figures(spectrum), rivals, matrix_verdict(spectrum, rivals))


class _Weighed:
    """Rows times the square root of the inputs' second moment, so that errors count as outputs see them."""

    def __init__(self, source: RowSource, second_moment: Float64) -> None:
        self.source = source
        self.shape = source.shape
        if second_moment.ndim == 1:
            self.root = np.sqrt(second_moment)
        else:
            values, vectors = np.linalg.eigh(second_moment)
            self.root = vectors * np.sqrt(np.maximum(values, 0.0))

    def read(self, start: int = 0, stop: int | None = None) -> Weights:
        rows: Weights = np.asarray(self.source.read(start, stop), dtype=np.float64)
        return rows * self.root if self.root.ndim == 1 else rows @ self.root


def mixers(targets: Sequence[Target], config: Mapping[str, Any]) -> Iterator[Mixer]:
    """Yield every text layer whose attention or DeltaNet projections are all there and fit its heads.

    `config` is the text config, which gives the numbers of heads.
    """
    layers: dict[tuple[str, int], dict[str, Target]] = {}
    for target in targets:
        layer = target.spec.layer
        if target.spec.component == "text" and layer is not None:
            stack = target.name.partition(f".{layer}.")[0]  # an encoder's layers are not its decoder's
            layers.setdefault((stack, layer), {}).setdefault(target.role, target)
    for (_, layer), roles in layers.items():
        mixer = _attention(layer, roles, config) or _delta(layer, roles, config)
        if mixer is not None:
            yield mixer


def _attention(layer: int, roles: Mapping[str, Target], config: Mapping[str, Any]) -> Mixer | None:
    chosen = {role: roles[role] for role in ("attn.q", "attn.k", "attn.v", "attn.o") if role in roles}
    heads = _number(config, "num_attention_heads")
    kv_heads = _number(config, "num_key_value_heads") or heads
    if len(chosen) < 4 or not heads or heads % kv_heads:
        return None
    q, k, v, o = (target.shape for target in chosen.values())
    dim = o[1] // heads
    fits = o[1] == heads * dim and k[0] == v[0] == kv_heads * dim and q[0] in (o[1], 2 * o[1])
    return Mixer(layer, "attention", chosen, heads, kv_heads, dim) if fits else None


def _delta(layer: int, roles: Mapping[str, Target], config: Mapping[str, Any]) -> Mixer | None:
    chosen = {role: roles[role] for role in ("delta.in_qkv", "delta.out") if role in roles}
    keys = ("linear_num_value_heads", "linear_num_key_heads", "linear_key_head_dim")
    v_heads, k_heads, k_dim = (_number(config, key) for key in keys)
    if len(chosen) < 2 or not (v_heads and k_heads and k_dim) or v_heads % k_heads:
        return None
    in_qkv, out = (target.shape for target in chosen.values())
    fits = in_qkv[0] == 2 * k_heads * k_dim + out[1] and out[1] % v_heads == 0
    return Mixer(layer, "delta", chosen, v_heads, k_heads, k_dim) if fits else None


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def measure_mixer(mixer: Mixer) -> MixerAssay:
    """Measure one layer's projections together: energies by head, and the seed's method for its kind."""
    started = time.monotonic()
    read = [np.asarray(target.ref.read(), dtype=np.float32) for target in mixer.targets.values()]
    names = tuple(target.name for target in mixer.targets.values())
    heads = None
    if mixer.kind == "attention":
        q, k, v, o = read
        q = q if q.shape[0] == o.shape[1] else query_rows(q, mixer.heads)
        heads = head_energies(q, k, v, o, mixer.heads, mixer.kv_heads)
        coding = low_rank_heads(q, k, v, o, mixer.heads, mixer.kv_heads)
    else:
        in_qkv, out = read
        v_dim = out.shape[1] // mixer.heads
        q, k, v = delta_parts(in_qkv, mixer.kv_heads, mixer.k_dim, mixer.heads, v_dim)
        coding = kernel_and_values(q, k, v, out, mixer.kv_heads, mixer.heads)
    return MixerAssay(mixer.layer, mixer.kind, names, heads, (coding,), time.monotonic() - started)
