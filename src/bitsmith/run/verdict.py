"""Can low rank beat int4 here? Per matrix, per component and for the model, with the number that says so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from bitsmith.numerics.spectrum import Spectrum
from bitsmith.run.assay_result import ComponentRow, MatrixAssay, Ranked, Ranking, Rival, Totals, Verdict
from bitsmith.run.claims import CLAIMS, Claim, combined_ratio, seed_table_ratio

_NOTHING = Verdict("unmeasured", "unmeasured: no matrix was assayed")
_ZEROS = Verdict("unmeasured", "unmeasured: every weight is zero")
_KEPT_BYTES = 2  # of a weight that stays in 16 bits


@dataclass(frozen=True)
class Population:
    """All of a component's tensors, assayed or not: how many, their parameters, and matrices left out."""

    tensors: int = 0
    parameters: int = 0
    left_out: int = 0


def matrix_verdict(spectrum: Spectrum, rivals: Sequence[Rival]) -> Verdict:
    """Return whether low rank in int4's bytes is closer than the closest int4 coding.

    The rank needed comes from the spectrum: the best approximation of that rank in exact arithmetic.
    Factors of full rank, which fit into the bytes of a matrix that is very tall, are a change of basis and
    cannot win.
    """
    int4 = [rival for rival in rivals if rival.kind == "int4"]
    if not int4:
        return _ZEROS
    target = min(int4, key=lambda rival: rival.error)
    full = min(spectrum.shape)
    entrants = [rival for rival in rivals if rival.kind == "low_rank" and rival.budget == target.method]
    winners = [rival for rival in entrants if (rival.rank or 0) < full and rival.error < target.error]
    best = min(winners or entrants, key=lambda rival: rival.error)
    needed = spectrum.rank_for_error(target.error)
    needed_bytes = _KEPT_BYTES * needed * sum(spectrum.shape)
    wins = bool(winners)
    needs = (
        f"rank {needed:,} of {full:,} needed for {target.method}'s error {target.error:.4f}: "
        f"{needed_bytes:,} bytes in 16-bit factors against {target.nbytes:,}"
    )
    rank = f"full rank {full:,}, a change of basis," if best.rank == full else f"rank {best.rank or 0:,}"
    measured = f"in {target.method}'s bytes {best.method} of {rank} leave {best.error:.4f}"
    text = (
        f"low rank wins: {measured} against {target.error:.4f}; {needs}"
        if wins
        else f"low rank cannot beat int4 at this quality: {needs}; {measured}"
    )
    return Verdict(
        kind="low_rank_wins" if wins else "int4_wins",
        text=text,
        target_error=target.error,
        rank_needed=needed,
        rank_full=full,
        low_rank_bytes=needed_bytes,
        low_rank_method=best.method,
        low_rank_error=best.error,
        int4_bytes=target.nbytes,
        int4_method=target.method,
    )


def group_verdict(matrices: Iterable[MatrixAssay]) -> Verdict:
    """Return the verdict over several matrices: low rank wins if it does for over half of the weights."""
    judged = [matrix for matrix in matrices if matrix.verdict.kind != "unmeasured"]
    if not judged:
        return _NOTHING
    winners = [matrix for matrix in judged if matrix.verdict.kind == "low_rank_wins"]
    share = sum(m.parameters for m in winners) / sum(m.parameters for m in judged)
    middle = _median(judged).verdict
    int4_error = _joint_error((m, m.verdict.target_error) for m in judged)
    low_rank_error = _joint_error((m, m.verdict.low_rank_error) for m in judged)
    numbers = (
        f"rank {middle.rank_needed:,} of {middle.rank_full:,} needed for the median weight; in int4's bytes "
        f"low rank leaves {low_rank_error:.4f} against {int4_error:.4f}; it wins {len(winners)} of "
        f"{len(judged)} matrices, {share:.1%} of the weights"
    )
    wins = share > 0.5
    return Verdict(
        kind="low_rank_wins" if wins else "int4_wins",
        text=f"low rank {'wins' if wins else 'cannot beat int4 at this quality'}: {numbers}",
        target_error=int4_error,
        low_rank_error=low_rank_error,
        low_rank_bytes=sum(m.verdict.low_rank_bytes or 0 for m in judged),
        int4_bytes=sum(m.verdict.int4_bytes or 0 for m in judged),
        share=share,
    )


def data_aware_verdict(matrices: Iterable[MatrixAssay]) -> Verdict | None:
    """Return the verdict over the matrices whose inputs' statistics are known, in their outputs' metric."""
    seen = [
        replace(matrix, verdict=matrix.whitened.verdict, spectrum=matrix.whitened.spectrum)
        for matrix in matrices
        if matrix.whitened is not None
    ]
    return group_verdict(seen) if seen else None


def component_rows(
    matrices: Sequence[MatrixAssay], population: dict[str, Population]
) -> tuple[ComponentRow, ...]:
    """Return the seed's table C1 to C5 for this model: true shares, and the best that was measured."""
    total = sum(part.parameters for part in population.values()) or 1
    return tuple(
        _component(
            claim,
            [m for m in matrices if m.component == claim.key],
            population.get(claim.key, Population()),
            total,
        )
        for claim in CLAIMS
    )


def totals(
    rows: Sequence[ComponentRow], matrices: Sequence[MatrixAssay], population: dict[str, Population]
) -> Totals:
    """Return the seed's projected totals beside what was measured; None where matrices were left out."""
    present = [row for row in rows if row.parameters]
    whole = bool(present) and all(row.ratio is not None for row in present)
    saved = sum(_KEPT_BYTES * m.parameters - (m.verdict.int4_bytes or 0) for m in matrices if m.spectrum)
    kept = _KEPT_BYTES * sum(part.parameters for part in population.values())
    return Totals(
        seed_table=seed_table_ratio(),
        claimed=combined_ratio([(row.share, row.seed_ratio) for row in present]) if present else None,
        reachable=combined_ratio([(row.share, row.ratio or 1.0) for row in present]) if whole else None,
        int4=kept / (kept - saved) if whole else None,
    )


def ranking(matrices: Sequence[MatrixAssay]) -> Ranking:
    """Rank the matrices by α and by r90 over the full rank, ascending."""
    by_alpha = [
        Ranked(m.name, m.layer, m.role, m.power_law.alpha)
        for m in matrices
        if m.power_law is not None and m.power_law.alpha is not None
    ]
    by_r90 = [Ranked(m.name, m.layer, m.role, m.spectrum.r90 / min(m.shape)) for m in matrices if m.spectrum]
    return Ranking(
        tuple(sorted(by_alpha, key=lambda ranked: ranked.value)),
        tuple(sorted(by_r90, key=lambda ranked: ranked.value)),
    )


def _component(claim: Claim, matrices: list[MatrixAssay], part: Population, total: int) -> ComponentRow:
    judged = [matrix for matrix in matrices if matrix.spectrum is not None]
    best = [_smallest(matrix) for matrix in judged]
    ratio = None
    if part.parameters and not part.left_out:
        kept = part.parameters - sum(matrix.parameters for matrix in judged)
        stored = sum(nbytes for _, nbytes, _ in best) + _KEPT_BYTES * kept
        ratio = _KEPT_BYTES * part.parameters / stored
    return ComponentRow(
        key=claim.key,
        name=claim.name,
        tensors=part.tensors,
        assayed=len(matrices),
        parameters=part.parameters,
        share=part.parameters / total,
        seed_share=claim.share,
        seed_method=claim.method,
        seed_ratio=claim.ratio,
        quality=_joint_error((m, m.verdict.target_error) for m in judged) if judged else None,
        best=tuple(Counter(method for method, _, _ in best).most_common()),
        ratio=ratio,
        error=_joint_error(zip(judged, (e for _, _, e in best), strict=True)) if judged else None,
        verdict=group_verdict(matrices),
    )


def _smallest(matrix: MatrixAssay) -> tuple[str, int, float]:
    """Return (method, bytes, error) of the smallest coding that is as close as the closest int4."""
    verdict = matrix.verdict
    limit = verdict.target_error or 0.0
    codings = [(r.method, r.nbytes, r.error) for r in matrix.rivals if r.error <= limit]
    codings += [
        (row.method, round(row.bpw * matrix.parameters / 8), row.error)
        for row in matrix.rate
        if row.error <= limit
    ]
    if verdict.kind == "low_rank_wins" and verdict.low_rank_bytes is not None:
        codings.append(("F16 factors at the rank needed", verdict.low_rank_bytes, limit))
    return min(codings, key=lambda coding: coding[1])


def _joint_error(parts: Iterable[tuple[MatrixAssay, float | None]]) -> float:
    """Return the relative error of several matrices together."""
    errors = energies = 0.0
    for matrix, error in parts:
        energy = matrix.spectrum.frobenius**2 if matrix.spectrum else 0.0
        energies += energy
        errors += energy * (error or 0.0) ** 2
    return math.sqrt(errors / energies)


def _median(matrices: Sequence[MatrixAssay]) -> MatrixAssay:
    """Return the matrix that holds the median weight when ordered by the share of its rank that is needed."""
    ordered = sorted(matrices, key=_rank_share)
    half = sum(matrix.parameters for matrix in ordered) / 2
    passed = accumulate(matrix.parameters for matrix in ordered)
    return next(matrix for matrix, so_far in zip(ordered, passed, strict=True) if so_far >= half)


def _rank_share(matrix: MatrixAssay) -> float:
    return (matrix.verdict.rank_needed or 0) / (matrix.verdict.rank_full or 1)
