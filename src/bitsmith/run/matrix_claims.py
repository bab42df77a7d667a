"""Claims that weights alone decide: spectra, ranks, Tensor-Trains, the bytes of int4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from bitsmith.numerics.resampling import ratio_of_sums
from bitsmith.numerics.tensor_train import COSINE_GATE
from bitsmith.passes.low_rank import SEED_RANK, SEED_SIDE
from bitsmith.run.assay_result import Assay, MatrixAssay, Rival
from bitsmith.run.claim_evidence import Evidence, row_int4
from bitsmith.run.evaluate import Measure
from bitsmith.run.seed_claims import (
    OVER_MATRICES,
    SAHC,
    Judged,
    LackingError,
    SeedClaim,
    above,
    exact,
    measured,
    opposite,
    outcome_of,
)
from bitsmith.run.train_search import TrainPoint

LEAST_SIDE = 32
"""Matrices with a shorter side are left out of spectra: an eighth of their directions is too few."""
FLAT_SHARE = 0.5
RANK_ERROR = 0.1
RANK_SHARE = 0.9
WIN_SHARE = 0.01
TARGET_RATIO = 5.0
OTHERS_RATIO = 4.0
INT4_BITS = 4.0
GATE_ERROR = sqrt(1 - COSINE_GATE**2)
"""The relative error at which the cosine is at the gate, if the error is orthogonal to what is kept."""

_RANDOM_SIDE, _RANDOM_ASPECT = 256, 16.0
_NAMES = {"C1": "FFN", "C2": "full attention", "C3": "linear attention"}


class FlatSpectra(SeedClaim):
    """The spectra of layers are flat."""

    name = "flat-spectra"
    seed = SAHC
    words = (
        "“The spectrum is essentially flat”; “The same near-full-rank property holds across all attention "
        "projections (Q, K, V, O) in all 32 layers”"
    )
    test = (
        "share of Σσ² in the leading eighth of the directions (rank 512 of 4,096), mean over the layers' "
        f"matrices with a shorter side of at least {LEAST_SIDE}, weighed by parameters; 12.5 % is flat, "
        "over 99.9 % what the write-up expected of exponential decay, 30 % what its error of .834 means; "
        "beside it what random matrices of these shapes have"
    )
    rule = (
        f"HELD if the whole interval is below {FLAT_SHARE:.0%}, NOT HELD if it is at or above; the write-up "
        "names no limit, this one is ours"
    )
    needs = ("assay",)

    def judge(self, evidence: Evidence) -> Judged:
        """Judge the matrices of all layers."""
        chosen = _layers(evidence.assay)
        measure = _mean(chosen, _leading_share, "share of Σσ²")
        parts = ", ".join(
            f"{_NAMES[key]} {_mean(part, _leading_share, '').value:.3f}"
            for key in _NAMES
            if (part := [one for one in chosen if one.component == key])
        )
        conditions = sorted(c for m in chosen if m.spectrum and (c := m.spectrum.condition) is not None)
        spread = f"{conditions[0]:.1f} to {conditions[-1]:.1f}" if conditions else "undefined"
        return Judged(
            outcome_of(opposite(above(measure, FLAT_SHARE))),
            f"{parts}; random {_mean(chosen, _random_leading, '').value:.3f}; condition numbers {spread} "
            "(published: 4.9)",
            measure,
            f"singular values of {len(chosen)} matrices",
        )


class NearFullRank(SeedClaim):
    """An error of 10 % needs nearly the full rank."""

    name = "rank-for-10-percent"
    seed = SAHC
    words = (
        "“Minimum rank needed for SVD error < 0.10: gate_proj: 3,794 / 4,096 → 92.6% of full rank, up_proj "
        "93.1%, down_proj 91.7%”"
    )
    test = "smallest rank whose truncation leaves at most 10 % of the Frobenius norm, over the full rank: FFN"
    rule = (
        f"HELD if the whole interval is at or above {RANK_SHARE:.0%} (the published ones are 91.7 % to 93.1 "
        "%), NOT HELD if it is below"
    )
    needs = ("assay",)

    def judge(self, evidence: Evidence) -> Judged:
        """Judge the FFN's matrices."""
        chosen = [one for one in _layers(evidence.assay) if one.component == "C1"]
        if not chosen:
            raise LackingError("the model has no FFN matrices")
        measure = _mean(chosen, _rank_share, "of full rank")
        shares = [_rank_share(one) for one in chosen]
        even = [one.shape[0] * one.shape[1] / sum(one.shape) / min(one.shape) for one in chosen]
        return Judged(
            outcome_of(above(measure, RANK_SHARE)),
            f"{min(shares):.3f} to {max(shares):.3f}, random matrices of these shapes "
            f"{_mean(chosen, _random_rank, '').value:.3f}; two 16-bit factors are smaller than the matrix "
            f"below {min(even):.2f} of full rank",
            measure,
            f"singular values of {len(chosen)} matrices",
            _checked(evidence, "gate_proj"),
        )


class WorseThanZeros(SeedClaim):
    """SVD with 4-bit factors is worse than storing zeros."""

    name = "svd-worse-than-zeros"
    seed = SAHC
    words = (
        "“in 7 of 32 layers, the error exceeded 1.0 — the compressed matrix is worse than replacing it with "
        "zeros” (SVD rank 512 + 4 bits; mean SVD error .834, mean total error .982)"
    )
    test = (
        "largest relative error over the FFN's matrices at rank 512 per 4,096 of the shorter side, factors "
        "in int4, decoded; zeros score 1. The write-up does not say what shares a scale: both a row of a "
        "factor and a whole factor are tried, and the worse counts"
    )
    rule = (
        "HELD if at least one matrix scores 1 or more in either reading, with its whole interval where rows "
        "were sampled; NOT HELD if none does in both"
    )
    needs = ("assay", "factors")

    def judge(self, evidence: Evidence) -> Judged:
        """Judge the FFN's matrices."""
        rivals = [rival for one in evidence.assay.matrices if one.component == "C1" for rival in _seeds(one)]
        if not rivals:
            raise LackingError("the model has no FFN matrices")
        rows = [_sampled(rival) for rival in rivals]
        whole = [exact(one.error, "relative error") for one in evidence.whole_factors]
        worst = max((*rows, *whole), key=lambda one: one.value)
        svd = sum(rival.theory_error or 0.0 for rival in rivals) / len(rivals)
        return Judged(
            outcome_of(above(worst, 1.0)),
            f"a scale per row: {_at_zeros(rows)}; per factor: {_at_zeros(whole)}; SVD alone leaves {svd:.3f} "
            "on average",
            worst,
            f"decoded factors of {len(rivals)} matrices",
            _checked(evidence, "rank 512 leaves an error"),
        )


class TrainGate(SeedClaim):
    """Only a Tensor-Train of full rank passes the cosine gate."""

    name = "tt-gate"
    seed = SAHC
    words = (
        "“Only full-rank (SVD core at 4,096) passed, giving 3.92x — indistinguishable from direct int4”; "
        "[1, 256, 256, 1] fails the gate of .95 with cosine .941"
    )
    test = (
        "largest ratio to 16 bits of a three-core Tensor-Train, its middle core in int4 with a scale per "
        f"row, that decodes with a mean row cosine of at least {COSINE_GATE}, over that of int4 with a scale "
        "per row of the matrix itself; embedding and head, the better of the two; the interval is to the "
        "next that fails"
    )
    rule = (
        "HELD if even that next one saves nothing over int4, a ratio of at most 1; NOT HELD if the one that "
        "passes does"
    )
    needs = ("assay", "trains")

    def judge(self, evidence: Evidence) -> Judged:
        """Judge embedding and head, by the one that compresses further."""
        matrices = {one.name: one for one in evidence.assay.matrices}
        brackets = {
            name: bracket(points, 16 / row_int4(matrices[name]).bpw)
            for name, points in _by_name(evidence.trains).items()
        }
        name, measure = max(brackets.items(), key=lambda one: one[1].value)
        seeds = [
            row
            for one in evidence.assay.matrices
            for row in one.tensor_train or ()
            if row.cosine is not None and row.ratio > 1
        ]
        best = max(seeds, key=lambda row: row.cosine or 0.0, default=None)
        ratio = measure.value * 16 / row_int4(matrices[name]).bpw
        found = f"best {name} at {ratio:.2f}× to 16 bits; the write-up's ranks in proportion: " + (
            "none saves parameters"
            if best is None
            else f"{sum(bool(row.passes) for row in seeds)} of {len(seeds)} that save parameters pass, the "
            f"highest cosine is {best.cosine:.3f} at {best.ratio:.2f}×"
        )
        return Judged(
            outcome_of(opposite(above(measure, 1.0 + 1e-9))),
            found,
            measure,
            f"{len(evidence.trains)} trains, all rows compared",
        )


class LowRankCeiling(SeedClaim):
    """No low rank beats int4 in its bytes."""

    name = "low-rank-cannot-beat-int4"
    seed = SAHC
    words = (
        "“Every 'smart' decomposition — SVD, Tensor-Train, kernel methods — collapsed to the same ~4x "
        "ceiling”; “post-hoc low-rank methods cannot beat int4 on this generation of LLM weights”"
    )
    test = (
        "share of the matrices' weights for which low rank with 16-, 8- or 4-bit factors, or low rank beside "
        "int4 of what it leaves, is closer than the closest int4 coding, in its bytes"
    )
    rule = (
        f"HELD if that is less than {WIN_SHARE:.0%}, NOT HELD otherwise; the hundredth is ours, for matrices "
        "so small that scales outweigh them"
    )
    needs = ("assay",)

    def judge(self, evidence: Evidence) -> Judged:
        """Judge all matrices."""
        verdict, totals = evidence.assay.verdict, evidence.assay.totals
        judged = [one for one in evidence.assay.matrices if one.verdict.kind != "unmeasured"]
        if verdict.share is None or not judged:
            raise LackingError(verdict.text)
        winners = [one for one in judged if one.verdict.kind == "low_rank_wins" or _residual_wins(one)]
        share = sum(one.parameters for one in winners) / sum(one.parameters for one in judged)
        total = "" if totals.reachable is None else f"; best measured total {totals.reachable:.2f}×"
        return Judged(
            outcome_of(share < WIN_SHARE),
            f"in int4's bytes low rank leaves {verdict.low_rank_error:.4f}, int4 {verdict.target_error:.4f}; "
            f"beside int4 it wins on {sum(map(_residual_wins, judged))} of {len(judged)} matrices{total}",
            exact(share, "of the weights"),
            f"decoded codings of {len(judged)} matrices",
        )


class EmbeddingWall(SeedClaim):
    """Embedding and head keep the model from 5×."""

    name = "embedding-wall"
    seed = SAHC
    words = (
        "“to reach 5x total compression when FFN and Attention are capped at ~4x by int4, Embedding + LM "
        "Head must deliver ≥100x compression. That's the only path”; “not under any decomposition”"
    )
    test = (
        "ratio needed of embedding and head for 5× in total with everything else at 4×, by this model's "
        f"shares, against the best measured one within the write-up's own gate (error at most "
        f"{GATE_ERROR:.3f}, which is cosine .95): formats of 2 bits and up, low rank and Tensor-Trains, in 4 "
        "bits with what int4 with a scale per row loses on the same matrix"
    )
    rule = (
        "HELD if the ratio needed is larger than the one measured, and finite; NOT HELD if it is reached, or "
        "if everything else alone takes more than a fifth, as then embedding and head are not what blocks"
    )
    needs = ("assay", "trains")

    def judge(self, evidence: Evidence) -> Judged:
        """Judge by this model's shares."""
        share = next(row.share for row in evidence.assay.components if row.key == "C4")
        parts = [one for one in evidence.assay.matrices if one.component == "C4" and one.spectrum]
        if not parts:
            raise LackingError("the model has no embedding or head")
        left = 1 / TARGET_RATIO - (1 - share) / OTHERS_RATIO
        said = f"embedding and head are {share:.1%} of the parameters"
        if left <= 0:
            return Judged(
                "NOT HELD",
                f"{said}: everything else alone takes more than a fifth",
                exact(OTHERS_RATIO / (1 - share), "× in total with none of them"),
                "shapes of the model",
                _checked(evidence, "5× in total"),
            )
        found = _best_ratio(parts, evidence.trains)
        needed = share / left
        return Judged(
            outcome_of(needed > found[0]),
            f"{said}; needed {needed:.1f}×, measured {found[0]:.2f}× by {found[1]}",
            exact(needed, "× needed"),
            f"shapes of the model; codings of {len(parts)} matrices",
            _checked(evidence, "5× in total"),
        )


def _layers(found: Assay) -> list[MatrixAssay]:
    """Return the layers' matrices that are large enough for an eighth to mean something."""
    chosen = [
        one for one in found.matrices
        if one.component in _NAMES and min(one.shape) >= LEAST_SIDE and one.spectrum and _seeds(one)
    ]  # fmt: skip
    if not chosen:
        raise LackingError(f"no matrix of a layer has a shorter side of {LEAST_SIDE} or more")
    return chosen


def _seeds(one: MatrixAssay) -> list[Rival]:
    return [rival for rival in one.rivals if rival.kind == "seed"]


def _leading_share(one: MatrixAssay) -> float:
    """Return 1 - ε², ε the error of the best rank of an eighth."""
    return 1 - (_seeds(one)[0].theory_error or 0.0) ** 2


def _rank_share(one: MatrixAssay) -> float:
    ranks = dict(one.spectrum.rank_for_error if one.spectrum else ())
    return ranks[RANK_ERROR] / min(one.shape)


def _mean(chosen: Sequence[MatrixAssay], figure: Callable[[MatrixAssay], float], unit: str) -> Measure:
    """Return the mean of a figure weighed by parameters."""
    weights = [one.parameters for one in chosen]
    top = [one.parameters * figure(one) for one in chosen]
    estimate = ratio_of_sums(top, weights)
    if estimate is None:
        raise LackingError("the matrices have no parameters")
    return measured(estimate, unit, OVER_MATRICES)


def _random_leading(one: MatrixAssay) -> float:
    energy = _random_energy(_aspect(one))
    return float(energy[: len(energy) * SEED_RANK // SEED_SIDE].sum())


def _random_rank(one: MatrixAssay) -> float:
    energy = _random_energy(_aspect(one))
    left = np.sqrt(np.clip(1 - np.cumsum(energy), 0.0, None))
    return float(np.argmax(left <= RANK_ERROR) + 1) / len(energy)


def _aspect(one: MatrixAssay) -> float:
    return min(max(one.shape) / min(one.shape), _RANDOM_ASPECT)


@cache
def _random_energy(aspect: float) -> NDArray[np.float64]:
    """Return the shares of Σσ² of a random matrix with sides of this ratio, the largest first."""
    drawn = np.random.default_rng(0).standard_normal((round(aspect * _RANDOM_SIDE), _RANDOM_SIDE))
    energy = np.linalg.eigvalsh(drawn.T @ drawn)[::-1]
    shares: NDArray[np.float64] = energy / energy.sum()
    return shares


def _checked(evidence: Evidence, start: str) -> str:
    """Return what the write-up's own numbers make of its claim."""
    one = next(one for one in evidence.assay.seed_checks if one.claim.startswith(start))
    return f"{one.claim}: {one.found}"


def _at_zeros(errors: Sequence[Measure]) -> str:
    bad, mean = sum(one.value >= 1 for one in errors), sum(one.value for one in errors) / len(errors)
    return f"{bad} of {len(errors)} at 1 or more, mean {mean:.3f}"


def _residual_wins(one: MatrixAssay) -> bool:
    """Return whether low rank beside int4 of what it leaves is closer than the closest int4 coding."""
    target = min((rival for rival in one.rivals if rival.kind == "int4"), key=lambda rival: rival.error)
    return any(
        rival.kind == "residual" and rival.nbytes <= target.nbytes and rival.error < target.error
        for rival in one.rivals
    )


def _sampled(rival: Rival) -> Measure:
    """Return an error; where rows were sampled, with two standard errors."""
    if not rival.standard_error:
        return exact(rival.error, "relative error")
    half = 1.96 * rival.standard_error
    return Measure(
        rival.error, "relative error", rival.error - half, rival.error + half, "95 %, sampled rows"
    )


def _by_name(points: Sequence[TrainPoint]) -> dict[str, list[TrainPoint]]:
    names = dict.fromkeys(one.name for one in points)
    return {name: [one for one in points if one.name == name] for name in names}


def bracket(points: Sequence[TrainPoint], base: float = 1.0) -> Measure:
    """Return the largest ratio that passes the gate over `base`, up to the next one that fails."""
    passing = [one.ratio for one in points if one.cosine >= COSINE_GATE]
    best = max(passing, default=0.0)
    failing = [one.ratio for one in points if one.cosine < COSINE_GATE and one.ratio > best]
    low, high = best / base, min(failing, default=best) / base
    return Measure(low, "× of int4's ratio", low, high, "to the next that fails")


def _best_ratio(parts: Sequence[MatrixAssay], trains: Sequence[TrainPoint]) -> tuple[float, str]:
    """Return the best total ratio of 16-bit bytes within the gate, and the methods that make it."""
    best = []
    for one in parts:
        codings = [(rival.bpw, rival.method) for rival in one.rivals if rival.error <= GATE_ERROR]
        codings += [(row.bpw, row.method) for row in one.rate if row.error <= GATE_ERROR]
        own = [point for point in trains if point.name == one.name]
        if own and (ratio := bracket(own).value) > 0:
            codings.append((16 / ratio, "a 4-bit Tensor-Train"))
        codings += _low_rank(one)
        best.append((*min(codings, default=(16.0, "16 bits")), one.parameters))
    bits = sum(bpw * count for bpw, _, count in best) / sum(count for *_, count in best)
    return 16 / bits, " and ".join(dict.fromkeys(method for _, method, _ in best))


def _low_rank(one: MatrixAssay) -> list[tuple[float, str]]:
    """Return bits per weight of 4-bit factors of the smallest known rank within the gate."""
    limit = sqrt(max(0.0, GATE_ERROR**2 - row_int4(one).error ** 2))
    ranks = [rank for rank, error in zip(*_points(one), strict=True) if error <= limit and rank > 0]
    return [(INT4_BITS * min(ranks) * sum(one.shape) / one.parameters, "4-bit low rank")] if ranks else []


def _points(one: MatrixAssay) -> tuple[Sequence[int], Sequence[float]]:
    return (one.spectrum.error.x, one.spectrum.error.y) if one.spectrum else ((), ())
