"""Low rank against int4 at equal bytes, on the actual weights.

Low rank `W ≈ A B` has its factors stored in 16 bits (F16), 8 bits (int8 with a scale per row) or 4 bits (int4
with a scale per row, or Q4_K where whole blocks fit). int4 of `W` itself: a scale per row, a scale per group
of 128 (symmetric, `max / 7`, F16 scales), and Q4_K.

With second moments of the input, `C = E[x xᵀ]` or its diagonal, errors are `|(W - W') C^½|_F / |W C^½|_F`:
the best rank r is then `U_r U_rᵀ W` with `U` from `W C^½` (Eckart, Young, Mirsky), and Q4_K weighs its
rounding by the diagonal of `C`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.formats import Format, format_named
from bitsmith.numerics.rate_distortion import gap_db
from bitsmith.numerics.spectrum import Decomposition
from bitsmith.numerics.tensor_train import RowSource, as_rows, matrix_shape
from bitsmith.passes.factors import (
    F16_CODE,
    INT4_CODE,
    RESOLVED,
    FactorCode,
    Factors,
    Metric,
    factor_codes,
    half,
    row_chunks,
    symmetric,
    symmetric_bytes,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

SEED_RANK, SEED_SIDE, SEED_ERROR = 512, 4096, 0.039
"""The seed's claim: rank 512 of 4096 leaves an error of at most 0.039, as exponential decay would."""
GAP_FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
MEASURED_ROWS, MEASURED_WEIGHTS = 4096, 1 << 23  # of errors, at most
_GROUP = 128


@dataclass(frozen=True)
class Coding:
    """One way of storing one matrix, with the error measured after decoding it.

    `relative_error` is `|W - W'|_F / |W|_F` in the contest's metric, None for a matrix of zeros; storing
    zeros scores 1. `standard_error` is that of measuring a sample of the rows, 0 where all were measured.
    `budget` names the int4 coding whose bytes a low-rank coding may use; `stored_bytes` may be less where the
    matrix has no further rank. `theory_error` is Eckart-Young-Mirsky's at `rank` on the true spectrum,
    `claimed_error` the seed's at that rank.
    """

    method: str
    stored_bytes: int
    bpw: float
    ratio_to_16_bit: float | None
    relative_error: float | None
    standard_error: float | None
    rank: int | None = None
    budget: str | None = None
    theory_error: float | None = None
    claimed_error: float | None = None

    @property
    def worse_than_zeros(self) -> bool:
        """Whether storing nothing at all would have been as close."""
        return self.relative_error is not None and self.relative_error >= 1

    @property
    def measured_over_theory(self) -> float | None:
        """Measured error over that of Eckart-Young-Mirsky; None where that is below what can be resolved."""
        return _quotient(self.relative_error, self.theory_error)

    @property
    def measured_over_claimed(self) -> float | None:
        """Measured error over the seed's claim."""
        return _quotient(self.relative_error, self.claimed_error)


@dataclass(frozen=True)
class Contest:
    """One matrix: int4 codings, low rank in the bytes of each, and the seed's own configuration.

    `with_residual` is low rank in F16 plus int4 by groups of 128 of what that leaves, in the bytes of Q4_K.
    """

    rows: int
    columns: int
    measured_rows: int
    metric: str  # "weights", "input diagonal" or "input covariance"
    int4: tuple[Coding, ...]
    low_rank: tuple[Coding, ...]
    with_residual: tuple[Coding, ...]
    seed: Coding  # rank 512 per 4096 of the shorter side, 4-bit factors

    @property
    def low_rank_wins(self) -> bool | None:
        """Whether a low-rank coding is closer than the int4 coding whose bytes it had; None for zeros."""
        if self.seed.relative_error is None:
            return None
        limits = {coding.method: coding.relative_error for coding in self.int4}
        return any(_below(coding.relative_error, limits[coding.budget or ""]) for coding in self.low_rank)

    @property
    def best_int4(self) -> Coding:
        """The closest int4 coding."""
        return min(self.int4, key=_closeness)

    @property
    def best_low_rank(self) -> Coding:
        """The closest low-rank coding."""
        return min(self.low_rank, key=_closeness)


@dataclass(frozen=True)
class FormatGap:
    """How far one format is from the Gaussian bounds at its rate; positive dB are worse than the bound.

    Gaps are None for an error of 0 or a matrix of zeros; `spectral` hands the decoder the singular directions
    (`numerics.rate_distortion` says what that is worth).
    """

    format: str
    bpw: float
    relative_error: float | None
    gap_white_db: float | None
    gap_spectral_db: float | None


def contest(
    matrix: RowSource | NDArray[Any],
    second_moment: Float64 | None = None,
    measured_rows: int = MEASURED_ROWS,
    known: Decomposition | None = None,
) -> Contest:
    """Measure low rank against int4 on a matrix (`out in`), errors on at most `measured_rows` rows.

    Measured rows are evenly spaced over all, and hold at most 2^23 weights. `second_moment` is E[x xᵀ]
    (`in in`) or its diagonal (`in`). A decomposition that is `known` is not computed again.
    Raises BitsmithError for anything but a matrix, for values that are not finite and a second moment that is
    not one.
    """
    source = as_rows(matrix)
    rows, columns = matrix_shape(source)
    metric = Metric(second_moment, columns)
    factors = Factors(source, metric, known)
    entrants = _int4_entrants(rows, columns, metric)
    rivals = [coding for entrant in entrants for coding in entrant.codings]
    entrants += [
        *_low_rank_entrants(rivals, factors),
        *_residual_entrants(rivals, factors),
        _seed_entrant(factors),
    ]
    index = _spaced(rows, columns, measured_rows)
    scores = [[_Score(rows) for _ in entrant.codings] for entrant in entrants]
    for at, piece in row_chunks(source, index):
        left, energy = factors.left(at, piece), metric.energies(piece)
        for entrant, own in zip(entrants, scores, strict=True):
            for decoded, score in zip(entrant.decoded(piece, left), own, strict=True):
                score.add(metric.errors(piece, decoded), energy)
    found: dict[str, tuple[Coding, ...]] = {"int4": (), "low rank": (), "residual": (), "seed": ()}
    for entrant, own in zip(entrants, scores, strict=True):
        found[entrant.kind] += tuple(map(_scored, entrant.codings, own))
    kinds = found["int4"], found["low rank"], found["residual"], found["seed"][0]
    return Contest(rows, columns, index.size, metric.name, *kinds)


def format_gaps(
    matrix: RowSource | NDArray[Any],
    singular_values: Float64,
    formats: Sequence[str] = GAP_FORMATS,
    measured_rows: int = MEASURED_ROWS,
    known: Sequence[Coding] = (),
) -> tuple[FormatGap, ...]:
    """Encode and decode evenly spaced rows in each format that fits them and compare with the bounds.

    The errors of codings that are `known`, measured on these rows, are not measured again.
    Raises BitsmithError for an unknown format.
    """
    source = as_rows(matrix)
    fitting = [coder for coder in map(format_named, formats) if coder.fits(source.shape[1])]
    errors = {coding.method: coding.relative_error for coding in known}
    sums = {coder: np.zeros(2) for coder in fitting if coder.name not in errors}
    for _, rows in row_chunks(source, _spaced(*matrix_shape(source), measured_rows)):
        for coder in sums:
            found = coder.squared_error(rows, coder.encode(rows))
            sums[coder] += (found.error, found.energy)
    for coder, (error, energy) in sums.items():
        errors[coder.name] = float(np.sqrt(error / energy)) if energy > 0 else None
    return tuple(_gap(coder, errors[coder.name], singular_values) for coder in fitting)


def claimed_error(rank: int, shorter_side: int) -> float:
    """Return the error that the seed's claim implies at `rank`: `0.039^(8 r / n)`, exponential decay."""
    return float(SEED_ERROR ** (rank / shorter_side * SEED_SIDE / SEED_RANK))


def _quotient(measured: float | None, expected: float | None) -> float | None:
    resolved = measured is not None and expected is not None and expected > RESOLVED
    return measured / expected if resolved and measured is not None and expected is not None else None


def _below(left: float | None, right: float | None) -> bool:
    return left is not None and right is not None and left < right


def _closeness(coding: Coding) -> float:
    return np.inf if coding.relative_error is None else coding.relative_error


def _spaced(count: int, columns: int, most: int) -> NDArray[np.intp]:
    kept = max(1, min(count, most, MEASURED_WEIGHTS // columns))
    return np.arange(kept, dtype=np.intp) * count // kept


def _gap(coder: Format, error: float | None, singular_values: Float64) -> FormatGap:
    if error is None:
        return FormatGap(coder.name, coder.bpw, None, None, None)
    gaps = gap_db(error, coder.bpw), gap_db(error, coder.bpw, singular_values)
    return FormatGap(coder.name, coder.bpw, error, *gaps)


@dataclass(frozen=True)
class _Entrant:
    """Codings that share work, before they are measured: what each makes of some rows, one after the other.

    `decoded(rows, left rows)` may change what it yielded for the next.
    """

    kind: str
    codings: tuple[Coding, ...]
    decoded: Callable[[Float32, Float32], Iterable[Float32]]


def _coding(method: str, stored_bytes: int, shape: tuple[int, int], **more: Any) -> Coding:
    weights = shape[0] * shape[1]
    ratio = 2 * weights / stored_bytes if stored_bytes else None
    return Coding(method, stored_bytes, 8 * stored_bytes / weights, ratio, None, None, **more)


def _int4_entrants(rows: int, columns: int, metric: Metric) -> list[_Entrant]:
    def rounded(group: int | None) -> Callable[[Float32, Float32], Iterable[Float32]]:
        return lambda piece, _: [symmetric(piece, 7, group)]

    entrants = []
    for name, group in (("int4 row", None), (f"int4 group {_GROUP}", _GROUP)):
        coding = _coding(name, symmetric_bytes(rows, columns, 4, group), (rows, columns))
        entrants.append(_Entrant("int4", (coding,), rounded(group)))
    coder, weight = format_named("Q4_K"), metric.diagonal
    if coder.fits(columns):
        coding = _coding(coder.name, rows * coder.row_bytes(columns), (rows, columns))
        entrants.append(
            _Entrant("int4", (coding,), lambda piece, _: [coder.decode(coder.encode(piece, weight))])
        )
    return entrants


def _low_rank_entrants(rivals: Sequence[Coding], factors: Factors) -> list[_Entrant]:
    entrants = []
    for code in factor_codes(factors.columns):
        ranks = [code.largest_rank(factors.shape, factors.rank, rival.stored_bytes) for rival in rivals]
        budgets = {rival.method: rank for rival, rank in zip(rivals, ranks, strict=True)}
        if code.multiple > 1:
            budgets = {method: rank for method, rank in budgets.items() if rank}
        if budgets:
            entrants.append(_truncated("low rank", code, budgets, factors))
    return entrants


def _seed_entrant(factors: Factors) -> _Entrant:
    rank = min(factors.rank, max(1, round(factors.side * SEED_RANK / SEED_SIDE)))
    return _truncated("seed", INT4_CODE, {None: rank}, factors)


def _truncated(
    kind: str, code: FactorCode, budgets: Mapping[str, int] | Mapping[None, int], factors: Factors
) -> _Entrant:
    """Return factors of each budget's rank, which ascend with the bytes of the rivals."""
    ranks = list(budgets.values())
    right = code.decoded(factors.right[: ranks[-1]])
    codings = (
        _coding(
            f"{code.name} factors",
            code.size(factors.shape, rank),
            factors.shape,
            rank=rank,
            budget=budget,
            theory_error=factors.theory(rank),
            claimed_error=claimed_error(rank, factors.side),
        )
        for budget, rank in budgets.items()
    )
    return _Entrant(kind, tuple(codings), lambda _, left: code.products(left, right, ranks))


def _residual_entrants(rivals: Sequence[Coding], factors: Factors) -> list[_Entrant]:
    """Low rank in F16 beside int4 by groups, in the bytes of the int4 coding that has more of them (Q4_K)."""
    group = next(rival for rival in rivals if rival.method == f"int4 group {_GROUP}")
    largest = max(rivals, key=lambda coding: coding.stored_bytes)
    spare = largest.stored_bytes - group.stored_bytes
    rank = F16_CODE.largest_rank(factors.shape, factors.rank, spare)
    if rank == 0:
        return []
    right = half(factors.right[:rank])

    def decoded(rows: Float32, left: Float32) -> Iterable[Float32]:
        approximate = half(left[:, :rank]) @ right
        return [approximate + symmetric(rows - approximate, 7, _GROUP)]

    coding = _coding(
        f"F16 factors + int4 group {_GROUP}",
        group.stored_bytes + F16_CODE.size(factors.shape, rank),
        factors.shape,
        rank=rank,
        budget=largest.method,
    )
    return [_Entrant("residual", (coding,), decoded)]


class _Score:
    """Errors and energies of the measured rows, out of `population` rows."""

    def __init__(self, population: int) -> None:
        self.population = population
        self.errors: list[Float64] = []
        self.energies: list[Float64] = []

    def add(self, errors: Float64, energies: Float64) -> None:
        self.errors.append(errors)
        self.energies.append(energies)

    @property
    def relative_error(self) -> float | None:
        total = float(sum(part.sum() for part in self.energies))
        return float(np.sqrt(sum(part.sum() for part in self.errors) / total)) if total > 0 else None

    @property
    def standard_error(self) -> float | None:
        """Standard error of the ratio estimate from a sample without replacement (Cochran 1977, 6.4)."""
        error, rows = self.relative_error, sum(part.size for part in self.errors)
        if error is None or rows == self.population or error == 0:
            return None if error is None else 0.0
        errors, energies = np.concatenate(self.errors), np.concatenate(self.energies)
        spread = np.square(errors - error**2 * energies).sum() / max(rows - 1, 1)
        squared = np.sqrt(spread * (1 - rows / self.population) / rows) / energies.mean()
        return float(squared / (2 * error))


def _scored(coding: Coding, score: _Score) -> Coding:
    return replace(coding, relative_error=score.relative_error, standard_error=score.standard_error)
