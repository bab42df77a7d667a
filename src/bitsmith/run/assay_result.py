"""What an assay found, as plain values: the schema of `assay.json`.

Errors are relative: ||W - W'||_F / ||W||_F. Energies and shares lie between 0 and 1. `None` means unmeasured
or undefined; no field holds NaN or infinity.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA = 1
"""Version of the JSON; grows when a field changes its meaning."""

VerdictKind = Literal["low_rank_wins", "int4_wins", "unmeasured"]


@dataclass(frozen=True)
class Curve:
    """At most 200 points of a function of the 1-based index or rank `x`, for plots."""

    x: tuple[int, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class SpectrumFigures:
    """The singular values of one matrix, summed up.

    `method` is how they were computed (`gram`, `svd`), `sigma_bound` the bound on every σ's absolute error
    over σ_max. `condition` is None for a matrix that is singular to within that bound. `rank_for_error`
    maps an error to the smallest rank that reaches it, `energy_at` a rank to the kept share of Σσ²,
    `sigma_at` a 1-based index to σ. `r90` is the smallest k with Σ_{i≤k} σ ≥ 0.9 Σσ. `zeros_error` is not
    stored: it is 1.
    """

    method: str
    sigma_bound: float
    sigma_max: float
    sigma_min: float
    condition: float | None
    frobenius: float
    stable_rank: float
    effective_rank: float
    nuclear_rank: float
    r90: int
    rank_for_error: tuple[tuple[float, int], ...]
    energy_at: tuple[tuple[int, float], ...]
    sigma_at: tuple[tuple[int, float], ...]
    sigma: Curve
    error: Curve  # x: rank kept; y: error of that truncation


@dataclass(frozen=True)
class RandomFigures:
    """The same shape and variance filled at random (Marchenko-Pastur).

    `lower_edge` and `upper_edge` bound the bulk of σ, `spikes` counts the σ above it and `spike_energy`
    their share of Σσ²; `sigma` is the random matrix's expected σ at the indices of the measured curve.
    """

    std: float
    lower_edge: float
    upper_edge: float
    spikes: int
    spike_energy: float
    sigma: Curve | None


@dataclass(frozen=True)
class PowerLawFigures:
    """Power law of the spectrum.

    `slope` is the log-log slope of σ against its index; `alpha` the maximum-likelihood exponent of the
    density of λ = σ² above the KS-chosen `x_min` with its bootstrap interval and KS distance `ks`;
    `p_value` the goodness of fit; `tail` the number of values used.
    """

    slope: float | None
    alpha: float | None
    alpha_low: float | None
    alpha_high: float | None
    x_min: float | None
    ks: float | None
    p_value: float | None
    tail: int | None


@dataclass(frozen=True)
class Rival:
    """One way to store the matrix, measured on the actual weights.

    `kind` is `int4`, `low_rank` or `zeros`. `claimed_error` is the error a claimed spectral decay would
    give at this rank, `error_over_claim` the measured one over it. `bpw` is 8 bytes / weights.
    """

    method: str
    kind: Literal["int4", "low_rank", "zeros"]
    nbytes: int
    bpw: float
    error: float
    rank: int | None = None
    factor_bits: int | None = None
    claimed_error: float | None = None
    error_over_claim: float | None = None
    worse_than_zeros: bool = False


@dataclass(frozen=True)
class RateRow:
    """One format beside the Gaussian bound at its rate; `gap_db` is 20 log10(error / bound_error)."""

    method: str
    bpw: float
    error: float
    bound_error: float
    gap_db: float | None


@dataclass(frozen=True)
class TrainRow:
    """One Tensor-Train of the matrix: its ranks, bytes with factors of `factor_bits`, and quality.

    `ratio` is 16-bit bytes over these bytes, `cosine` the mean row cosine, `passes` whether it is ≥ 0.95.
    """

    method: str
    ranks: tuple[int, ...]
    modes: tuple[tuple[int, int], ...]  # (row factor, column factor) per core
    nbytes: int
    ratio: float
    error: float
    cosine: float | None
    passes: bool | None


@dataclass(frozen=True)
class HeadRow:
    """One attention head (or group of heads): share of the matrix's energy, and whether a rule prunes it."""

    head: int
    energy: float
    prunable: bool


@dataclass(frozen=True)
class StructuredRow:
    """One method made for attention or DeltaNet (head pruning, value pruning), with its measured error."""

    method: str
    nbytes: int
    ratio: float
    error: float
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """Can low rank beat int4 here? `text` says so in one sentence with the number that decides.

    Quality is int4's own measured error `target_error`. `rank_needed` of `rank_full` is the smallest rank
    with exact factors that reaches it; `low_rank_bytes` the least that a measured factor width needs for it
    (None where none reaches it), `int4_bytes` what int4 took. For a component or the model ranks are None,
    bytes are sums and `share` is the share of weights where low rank wins.
    """

    kind: VerdictKind
    text: str
    target_error: float | None = None
    rank_needed: int | None = None
    rank_full: int | None = None
    low_rank_bytes: int | None = None
    low_rank_method: str | None = None
    int4_bytes: int | None = None
    int4_method: str | None = None
    share: float | None = None


@dataclass(frozen=True)
class Whitened:
    """The spectrum of W C^(1/2), C the second moment of the layer's inputs: what data-aware low rank sees."""

    tokens: int | None
    spectrum: SpectrumFigures
    rivals: tuple[Rival, ...]
    verdict: Verdict


@dataclass(frozen=True)
class MatrixAssay:
    """Everything measured on one matrix; `shape` is (out, in), a convolution folded to (out, rest)."""

    name: str
    role: str
    component: str
    layer: int | None
    shape: tuple[int, int]
    dtype: str
    parameters: int
    spectrum: SpectrumFigures | None  # None: a zero matrix
    random: RandomFigures | None
    power_law: PowerLawFigures | None
    rivals: tuple[Rival, ...]
    rate: tuple[RateRow, ...]
    tensor_train: tuple[TrainRow, ...] | None
    heads: tuple[HeadRow, ...] | None
    structured: tuple[StructuredRow, ...] | None
    whitened: Whitened | None
    verdict: Verdict
    seconds: float


@dataclass(frozen=True)
class ComponentRow:
    """One of the seed's components C1 to C5 in this model.

    `share` is the measured share of all parameters, `seed_share` and `seed_ratio` what the seed claims for
    it; `best_method` is the smallest measured method whose error is at most `quality`, `ratio` its 16-bit
    bytes over its bytes, `error` its energy-weighted error.
    """

    key: str
    name: str
    tensors: int
    assayed: int
    parameters: int
    share: float
    seed_share: float | None
    seed_method: str | None
    seed_ratio: float | None
    quality: float | None
    best_method: str | None
    ratio: float | None
    error: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Totals:
    """Ratios of 16-bit bytes to compressed bytes for the whole model.

    `claimed` combines the seed's own ratios with this model's true shares, `seed_table` with the seed's
    shares; `reachable` the best measured method per component; `int4` direct int4. None where something is
    unmeasured.
    """

    seed_table: float
    claimed: float | None
    reachable: float | None
    int4: float | None


@dataclass(frozen=True)
class Ranked:
    """One matrix in a ranking, with the figure that ranks it."""

    name: str
    layer: int | None
    role: str
    value: float


@dataclass(frozen=True)
class Ranking:
    """Matrices by α and by r90 over the full rank, ascending; both tails are meant to be looked at."""

    alpha: tuple[Ranked, ...]
    r90: tuple[Ranked, ...]


@dataclass(frozen=True)
class SeedCheck:
    """One published claim re-derived: what it says, what its own numbers give, and whether it can hold."""

    claim: str
    found: str
    possible: bool


@dataclass(frozen=True)
class Skipped:
    """A tensor that was not assayed, and why."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    why: str


@dataclass(frozen=True)
class Protocol:
    """How the figures were obtained, enough to repeat them."""

    version: str
    schema: int
    match: str | None
    int4_formats: tuple[str, ...]
    tensor_train_max_elements: int | None
    bootstrap: int
    seed: int
    statistics: str | None
    text: str | None


@dataclass(frozen=True)
class Assay:
    """The assay of one checkpoint; `activations` comes from `bitsmith.run.activations`, given text."""

    path: str
    architecture: str | None
    parameters: int
    stored_bytes: int
    protocol: Protocol
    matrices: tuple[MatrixAssay, ...]
    components: tuple[ComponentRow, ...]
    totals: Totals
    ranking: Ranking
    verdict: Verdict
    seed_checks: tuple[SeedCheck, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    activations: Any | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the assay as plain values, ready for `json.dumps(..., allow_nan=False)`."""
        return asdict(self)
