"""What an assay found, as plain values: the schema of `assay.json`.

Errors are relative: ||W - W'||_F / ||W||_F. Energies and shares lie between 0 and 1. `None` means unmeasured
or undefined; no field holds NaN or infinity.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from bitsmith.numerics.rate_distortion import BoundPoint
from bitsmith.passes.attention import HeadEnergies, SetCoding

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
    `sigma_at` a 1-based index to σ. `r90` is the smallest k with Σ_{i≤k} σ ≥ 0.9 Σσ.
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
    """A random matrix of the same shape beside this one (Marchenko-Pastur).

    Its entries have the variance `std`² that gives this matrix's median σ². `lower_edge` and `upper_edge`
    bound its σ; `spikes` counts the measured σ above what chance allows there, `spike_energy` is their
    share of Σσ², `ks_distance` how far the others are from the law (0 to 1).
    """

    std: float
    lower_edge: float
    upper_edge: float
    spikes: int
    spike_energy: float
    ks_distance: float | None


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

    `budget` names the int4 coding whose bytes a low-rank coding was given. `theory_error` is
    Eckart-Young-Mirsky's on the true spectrum at this rank, `claimed_error` what the seed's claimed decay
    implies, `error_over_claim` the measured error over it. `bpw` is 8 bytes / weights; `standard_error`
    that of having measured a sample of the rows.
    """

    method: str
    kind: Literal["int4", "low_rank", "residual", "seed"]
    nbytes: int
    bpw: float
    error: float
    standard_error: float | None
    rank: int | None
    budget: str | None
    theory_error: float | None
    error_over_theory: float | None
    claimed_error: float | None
    error_over_claim: float | None
    worse_than_zeros: bool


@dataclass(frozen=True)
class RateRow:
    """One format's error, and how many dB it lies above the Gaussian bounds at its rate.

    `gap_db` is to independent weights, `gap_spectral_db` to the bound on this spectrum, whose decoder knows
    the singular directions.
    """

    method: str
    bpw: float
    error: float
    gap_db: float | None
    gap_spectral_db: float | None


@dataclass(frozen=True)
class TrainRow:
    """One Tensor-Train of the matrix; `asked` ranks may be impossible, `ranks` were used.

    `modes` has (row factor, column factor) of each core. `ratio` compares numbers of parameters, `cosine`
    is the mean row cosine, `passes` whether it reaches 0.95.
    """

    method: str
    asked: tuple[int, ...]
    ranks: tuple[int, ...]
    modes: tuple[tuple[int, int], ...]
    core_rank: int | None
    parameters: int
    ratio: float
    error: float | None
    cosine: float | None
    passes: bool | None


@dataclass(frozen=True)
class MixerAssay:
    """One layer's attention or DeltaNet projections together: energies by head, and the seed's methods."""

    layer: int | None
    kind: Literal["attention", "delta"]
    names: tuple[str, ...]
    heads: HeadEnergies | None
    codings: tuple[SetCoding, ...]
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """Can low rank beat int4 here? `text` says so in one sentence with the number that decides.

    Quality is int4's own measured error `target_error`, in `int4_bytes`. `rank_needed` of `rank_full` is
    the smallest rank that reaches it with exact factors, `low_rank_bytes` what 16-bit factors of that rank
    take; `low_rank_method` is the closest low-rank coding measured in int4's bytes, `low_rank_error` its
    error. For a component or the model ranks are None, bytes are sums, errors are over all its matrices,
    and `share` is the share of its assayed weights where low rank wins.
    """

    kind: VerdictKind
    text: str
    target_error: float | None = None
    rank_needed: int | None = None
    rank_full: int | None = None
    low_rank_bytes: int | None = None
    low_rank_method: str | None = None
    low_rank_error: float | None = None
    int4_bytes: int | None = None
    int4_method: str | None = None
    share: float | None = None


@dataclass(frozen=True)
class Whitened:
    """The spectrum of W C^½, C the second moment of the layer's inputs: what data-aware low rank sees."""

    metric: str  # "input diagonal" or "input covariance"
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
    bounds: tuple[BoundPoint, ...]
    tensor_train: tuple[TrainRow, ...] | None  # of embeddings and heads
    whitened: Whitened | None
    verdict: Verdict
    seconds: float


@dataclass(frozen=True)
class ComponentRow:
    """One of the seed's components C1 to C5 in this model.

    `share` is the true share of all parameters, `seed_share` and `seed_ratio` what the seed claims for it.
    `quality` is int4's error over the component; `best` counts, by method, the matrices for which it is the
    smallest measured one of at most that matrix's int4 error; `ratio` is 16-bit bytes over the bytes that
    follow and `error` the error, everything else kept in 16 bits. None unless every matrix was assayed.
    """

    key: str
    name: str
    tensors: int
    assayed: int
    parameters: int
    share: float
    seed_share: float
    seed_method: str
    seed_ratio: float
    quality: float | None
    best: tuple[tuple[str, int], ...]
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
    component: str
    why: str


@dataclass(frozen=True)
class Protocol:
    """How the figures were obtained, enough to repeat them; of `sample` matrices of each role if not None."""

    version: str
    schema: int
    match: str | None
    resamples: int
    seed: int
    statistics: str | None
    text: str | None
    sample: int | None = None


@dataclass(frozen=True)
class Assay:
    """The assay of one checkpoint; `activations` comes from `bitsmith.run.activations`, given text."""

    path: str
    architecture: str | None
    parameters: int
    stored_bytes: int
    protocol: Protocol
    matrices: tuple[MatrixAssay, ...]
    mixers: tuple[MixerAssay, ...]
    components: tuple[ComponentRow, ...]
    totals: Totals
    ranking: Ranking
    verdict: Verdict
    data_aware: Verdict | None  # over the matrices with input statistics, errors as the outputs see them
    seed_checks: tuple[SeedCheck, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    activations: Any | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the assay as plain values, ready for `json.dumps(..., allow_nan=False)`."""
        return asdict(self)
