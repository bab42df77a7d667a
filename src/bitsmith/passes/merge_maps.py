"""Maps from a teacher's residual stream to a student's narrower one, found from second moments.

Activations are rows: `X_t` (`N D_t`) of the teacher and `X_s` (`N D_s`) of the student, of the same tokens. A
map is a pair `A`, `B` (both `D_t D_s`) with `x_t A ≈ x_s` and `x_s Bᵀ ≈ x_t`: what writes the stream becomes
`Aᵀ W`, what reads it `W B`. From orthonormal columns V and a scale s it is `A = s V`, `B = V / s`. All maps
land in the student's own coordinates, so that those of two layers differ by `T = Bᵀ A'`, ideally I.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from bitsmith.errors import BitsmithError
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.merge_axes import best_matches

Float64 = NDArray[np.float64]

RIDGE = 1e-6
"""Added to a moment's diagonal before it is inverted, as a share of the diagonal's mean."""
SOLVE_RIDGE = 1e-4
"""The same where a reader is solved for: what the text hardly shows stays the student's."""
_LEAST_RIDGE = 1e-12
_UNKNOWN = 1e-12
_ORTHONORMAL = 1e-10
_HALF_TURN = 1e-6
_STRIPE = 512


@dataclass(frozen=True)
class PairMoments:
    """Uncentred second moments of a teacher's and a student's activations of the same tokens.

    `tt` is E[x_t x_tᵀ] (`D_t D_t`), `ss` that of the student (`D_s D_s`), `ts` is E[x_t x_sᵀ] (`D_t D_s`).
    Raises BitsmithError for shapes that do not fit, values that are not finite, and a teacher that is
    narrower than the student.
    """

    tt: Float64
    ss: Float64
    ts: Float64

    def __post_init__(self) -> None:
        """Check shapes and values."""
        wide, narrow = self.ts.shape
        if self.tt.shape != (wide, wide) or self.ss.shape != (narrow, narrow):
            raise BitsmithError(
                f"moments have shapes {self.tt.shape}, {self.ss.shape} and {self.ts.shape}, which do not fit"
            )
        if wide < narrow:
            raise BitsmithError(f"the teacher's width {wide} is smaller than the student's {narrow}")
        if not all(np.isfinite(part).all() for part in (self.tt, self.ss, self.ts)):
            raise BitsmithError("moments hold values that are not finite")

    @classmethod
    def of(cls, teacher: NDArray[Any], student: NDArray[Any]) -> PairMoments:
        """Return the moments of activations (`N D_t`, `N D_s`)."""
        x, y = teacher.astype(np.float64), student.astype(np.float64)
        with one_blas_thread():
            return cls(x.T @ x / len(x), y.T @ y / len(x), x.T @ y / len(x))

    @property
    def width(self) -> int:
        """The student's width."""
        return len(self.ss)


@dataclass(frozen=True)
class ResidualMap:
    """A map `x_t forward ≈ x_s`, `x_s backwardᵀ ≈ x_t` (both `D_t D_s`) and how it was found."""

    forward: Float64
    backward: Float64
    method: str

    @property
    def shape(self) -> tuple[int, int]:
        """`D_t`, `D_s`."""
        wide, narrow = self.forward.shape
        return wide, narrow

    @property
    def frame(self) -> Float64:
        """The orthonormal columns nearest to `forward`: `U Wᵀ` of its SVD."""
        return _polar(self.forward)


@dataclass(frozen=True)
class SolvedReading:
    """A reader's rows `w_t` (teacher's) and `w_s` (student's) solved for the student's states.

    They become `w_t theirs + w_s own` (`D_t D_s`, `D_s D_s`).
    """

    theirs: Float64
    own: Float64


def pooled(moments: Iterable[PairMoments]) -> PairMoments:
    """Return the mean of several layers' moments, each divided by its student's `trace(ss)`.

    So no layer outweighs the others by the size of its activations. They are taken one at a time. Raises
    BitsmithError for none.
    """
    total: dict[str, Float64] = {}
    count = 0
    for one in moments:
        count += 1
        weight = 1 / max(float(np.trace(one.ss)), np.finfo(np.float64).tiny)
        for part in ("tt", "ss", "ts"):
            given: Float64 = getattr(one, part)
            total.setdefault(part, np.zeros_like(given))
            for start in range(0, len(given), _STRIPE):
                total[part][start : start + _STRIPE] += weight * given[start : start + _STRIPE]
    if not count:
        raise BitsmithError("there are no moments to pool")
    return PairMoments(*(np.divide(total[part], count, out=total[part]) for part in ("tt", "ss", "ts")))


@one_blas_thread()
def principal_axes(moment: Float64, rank: int | None = None) -> tuple[Float64, Float64]:
    """Return the top eigenvectors (`D rank`) of a second moment and all its variances, largest first.

    Signs make each vector's largest entry positive. Raises BitsmithError for a rank beyond the width.
    """
    rank = len(moment) if rank is None else rank
    if not 0 < rank <= len(moment):
        raise BitsmithError(f"rank {rank} is not within 1 … {len(moment)}")
    values, vectors = linalg.eigh((moment + moment.T) / 2)
    top = vectors[:, ::-1][:, :rank]
    largest = top[np.abs(top).argmax(0), np.arange(rank)]
    return top * np.where(largest < 0, -1.0, 1.0), np.maximum(values[::-1], 0.0)


def subspace_map(moments: PairMoments) -> ResidualMap:
    """Return the plain SVD: the teacher's k-th principal axis becomes the student's k-th, only signs matched.

    The baseline without tiers and without alignment; signs follow `ts`, as eigenvectors have none.
    """
    left, _ = principal_axes(moments.tt, moments.width)
    right, _ = principal_axes(moments.ss)
    signs = np.where(np.einsum("ik,ij,jk->k", left, moments.ts, right, optimize=True) < 0, -1.0, 1.0)
    return _scaled((left * signs) @ right.T, moments, "subspace")


def procrustes_map(moments: PairMoments) -> ResidualMap:
    """Return the orthonormal map of the teacher's top subspace that meets the student best (joint tiers).

    `V = P R Qᵀ`, P the top `D_s` axes of the teacher, Q all of the student, `R = U Wᵀ` of svd(`Pᵀ C_ts Q`).
    """
    left, _ = principal_axes(moments.tt, moments.width)
    return _scaled(_aligned(left, np.eye(moments.width), moments.ts), moments, "procrustes")


def cross_map(moments: PairMoments) -> ResidualMap:
    """Return the orthonormal map that meets the student best, of all subspaces: `U Wᵀ` of svd(`C_ts`)."""
    return _scaled(_polar(moments.ts), moments, "cross")


def tiered_map(moments: PairMoments, trunk: int | None = None, fold: Float64 | None = None) -> ResidualMap:
    """Return trunk and residual aligned apart: `V = P₁ R₁ Q₁ᵀ + P₂ R₂ Q₂ᵀ`, R of svd(`Pᵀ C_ts Q`) each.

    P₁, Q₁ are the top `trunk` axes (default half the student's width), Q₂ the student's others. P₂ are the
    teacher's next axes, so that the tiers span its top `D_s`; a `fold` (`D_t-trunk D_s-trunk`, orthonormal
    columns) puts all its other axes into them instead, several to a slot (`random_fold`, `sparse_fold`).
    Raises BitsmithError for a trunk that is not within the student's width or a fold of another shape.
    """
    width, trunk = moments.width, moments.width // 2 if trunk is None else trunk
    if not 0 < trunk < width:
        raise BitsmithError(f"the trunk has {trunk} dimensions, expected 1 … {width - 1}")
    left, _ = principal_axes(moments.tt)
    right, _ = principal_axes(moments.ss)
    rest = left[:, trunk:width] if fold is None else _folded(left[:, trunk:], fold, width - trunk)
    with one_blas_thread():
        frame = _aligned(left[:, :trunk], right[:, :trunk], moments.ts)
        frame += _aligned(rest, right[:, trunk:], moments.ts)
    return _scaled(frame, moments, "tiered" if fold is None else "tiered fold")


def random_fold(directions: int, slots: int, seed: int = 0) -> Float64:
    """Return a fold (`directions slots`) that shares each slot among directions, drawn at random with signs.

    Columns have disjoint support and length 1: directions in one slot superpose. Raises BitsmithError for
    fewer directions than slots.
    """
    _expect_slots(directions, slots)
    random = np.random.default_rng(seed)
    order = random.permutation(directions)
    slot = np.empty(directions, np.intp)
    slot[order] = np.arange(directions) % slots
    return _fold_of(slot, random.choice([-1.0, 1.0], directions), slots)


@one_blas_thread()
def sparse_fold(samples: NDArray[Any], slots: int) -> Float64:
    """Return a fold (`directions slots`) whose directions rarely act at once where they share a slot.

    `samples` (`N directions`) are activations along the principal axes, strongest first, which second moments
    cannot tell apart: what counts is `E[z_i² z_j²] / (E[z_i²] E[z_j²])`. Directions go in rounds of `slots`,
    each round assigned at the least sum of it over the slots' members. Raises as `random_fold` does.
    """
    count = samples.shape[1]
    _expect_slots(count, slots)
    power = samples.astype(np.float64) ** 2
    mean = power.mean(0)
    power = np.divide(power, mean, out=np.zeros_like(power), where=mean > 0)
    held = np.zeros((len(power), slots))
    slot = np.empty(count, np.intp)
    for start in range(0, count, slots):
        batch = slice(start, min(start + slots, count))
        shared = held.T @ power[:, batch]  # slots, directions
        columns = best_matches(-shared)
        slot[batch] = columns
        held[:, columns] += power[:, batch]
    return _fold_of(slot, np.ones(count), slots)


def along_axes(samples: NDArray[Any], moments: PairMoments, trunk: int) -> Float64:
    """Return teacher activations (`N D_t`) along its axes beyond the trunk (`N D_t-trunk`)."""
    axes, _ = principal_axes(moments.tt)
    with one_blas_thread():
        along: Float64 = samples.astype(np.float64) @ axes[:, trunk:]
    return along


@one_blas_thread()
def whitened_map(moments: PairMoments, ridge: float = RIDGE) -> ResidualMap:
    """Return the map by canonical correlations: whitened, turned, coloured as the student.

    `A = C_tt^-½ U Wᵀ C_ss^½`, `B = C_tt^½ U Wᵀ C_ss^-½`, U, W of svd(`C_tt^-½ C_ts C_ss^-½`); `Aᵀ B = I`.
    `ridge` damps the inverses (a share of the mean variance).
    """
    to_t, from_t = _roots(moments.tt, ridge)
    to_s, from_s = _roots(moments.ss, ridge)
    turn = _polar(from_t @ moments.ts @ from_s)
    return ResidualMap(from_t @ turn @ to_s, to_t @ turn @ from_s, "whitened")


@one_blas_thread()
def ridge_map(moments: PairMoments, ridge: float = RIDGE) -> ResidualMap:
    """Return the least-squares map each way: `A = (C_tt + λ)⁻¹ C_ts`, `B = C_ts (C_ss + λ)⁻¹`.

    `ridge` is λ as a share of the mean variance.
    """
    forward = np.linalg.solve(_damped(moments.tt, ridge), moments.ts)
    backward = np.linalg.solve(_damped(moments.ss, ridge), moments.ts.T).T
    return ResidualMap(np.asarray(forward, np.float64), np.asarray(backward, np.float64), "ridge")


@one_blas_thread()
def solved_reading(moments: PairMoments, ridge: float = SOLVE_RIDGE) -> SolvedReading:
    """Return what solves for a reader of the student's states that gives what the teacher's gives.

    Of rows w_t and w_s the solution is `w_s + (w_t C_ts - w_s C_ss) (C_ss + λ)⁻¹`, λ `ridge` times the mean
    variance: the least-squares reader, held to the student's own where the text says little.
    """
    damped = _damped(moments.ss, ridge)
    theirs = np.linalg.solve(damped, moments.ts.T).T
    own = np.eye(moments.width) - np.linalg.solve(damped, moments.ss).T
    return SolvedReading(np.asarray(theirs, np.float64), np.asarray(own, np.float64))


def norm_gain(mapping: ResidualMap, states: NDArray[Any]) -> float:
    """Return what RMSNorm loses by the width: the mean of `rms(x A) / rms(x)` over states (`N D_t`).

    Readers are multiplied by it. With orthonormal A it is `√(D_t/D_s)` times the mean of `|x V| / |x|`.
    States of zeros do not count; 1 where all are zero.
    """
    with one_blas_thread():
        x = states.astype(np.float64)
        before, after = (np.sqrt((part**2).mean(1)) for part in (x, x @ mapping.forward))
    seen = before > 0
    return float((after[seen] / before[seen]).mean()) if seen.any() else 1.0


@one_blas_thread()
def transition(before: ResidualMap, after: ResidualMap) -> Float64:
    """Return T (`D_s D_s`): what two layers' maps make of a state that a skip connection carries over.

    `x_s → x_s Bᵀ A'`; I where both are the same map of full rank.
    """
    carried: Float64 = before.backward.T @ after.forward
    return carried


def transition_cost(before: ResidualMap, after: ResidualMap) -> tuple[float, float]:
    """Return `|T - I|` (Frobenius) and the same divided by `√D_s`."""
    carried = transition(before, after)
    cost = float(np.linalg.norm(carried - np.eye(len(carried))))
    return cost, cost / float(np.sqrt(len(carried)))


@one_blas_thread()
def variance_kept(mapping: ResidualMap, moment: Float64) -> float:
    """Return the share of a teacher's variance in the span of the map; 0 for a moment of zeros.

    `tr(Vᵀ C V) / tr C` with V an orthonormal basis of the columns of `forward`.
    """
    basis = _span(mapping.forward)
    total = float(np.trace(moment))
    return float(np.vdot(basis, moment @ basis)) / total if total > 0 else 0.0


@one_blas_thread()
def blended_map(maps: Sequence[ResidualMap], weights: Sequence[float]) -> ResidualMap:
    """Return the weighted mean of maps: the orthonormal frame nearest to all of theirs, scales geometrically.

    `U Wᵀ` of svd(`Σ w V`), the mean in the chordal metric; of two frames with equal weights it is the
    middle of `geodesic_map`. Weights are normalised. Raises BitsmithError for weights that
    are negative, all 0 or not one for each map.
    """
    share = np.asarray(weights, np.float64)
    if len(maps) != len(share) or not len(share) or (share < 0).any() or not share.sum() > 0:
        raise BitsmithError(f"{len(maps)} maps, weights {list(weights)}: expected one for each, not all 0")
    share = share / share.sum()
    frame = _polar(np.sum([w * one.frame for w, one in zip(share, maps, strict=True)], axis=0))
    scale = float(np.exp(np.dot(share, np.log([_size(one) for one in maps]))))
    return ResidualMap(scale * frame, frame / scale, "blended")


@one_blas_thread()
def geodesic_map(first: ResidualMap, second: ResidualMap, share: float) -> ResidualMap:
    """Return the map that lies `share` (0 … 1) of the way from one orthonormal map to another.

    `V₁ᵀ V₂ = U cos(Θ) Wᵀ`: the subspaces turn by `share · Θ` in the planes of their principal vectors, the
    coordinates within by that share of the rotation `U Wᵀ`; scales go geometrically. Raises BitsmithError
    for a share outside 0 … 1 and for maps that differ by a reflection or half a turn: no way is the shortest.
    """
    if not 0 <= share <= 1:
        raise BitsmithError(f"share {share}: expected 0 … 1")
    start, end = first.frame, second.frame
    u, cosines, wt = linalg.svd(start.T @ end)
    angles = np.arccos(np.clip(cosines, -1.0, 1.0))
    from_axes = start @ u
    beyond = end @ wt.T - from_axes * cosines
    size = np.linalg.norm(beyond, axis=0)
    side = np.divide(beyond, size, out=np.zeros_like(beyond), where=size > _UNKNOWN)
    axes = from_axes * np.cos(share * angles) + side * np.sin(share * angles)
    frame = _polar(axes @ u.T @ _part_of_turn(u @ wt, share))
    scale = _size(first) ** (1 - share) * _size(second) ** share
    return ResidualMap(scale * frame, frame / scale, "geodesic")


def _part_of_turn(turn: Float64, share: float) -> Float64:
    """Return a rotation to the power `share`."""
    upper, vectors = linalg.schur(turn, output="complex")
    phases = np.angle(np.diagonal(upper))
    if (np.abs(phases) > np.pi - _HALF_TURN).any():
        raise BitsmithError("the maps differ by a reflection or half a turn: there is no way between them")
    part: Float64 = ((vectors * np.exp(1j * share * phases)) @ vectors.conj().T).real
    return part


def _span(frame: Float64) -> Float64:
    """Return an orthonormal basis of the columns; they are one already where only a scale is missing."""
    gram = frame.T @ frame
    scale = float(np.trace(gram)) / len(gram)
    if scale > 0 and np.abs(gram / scale - np.eye(len(gram))).max() < _ORTHONORMAL:
        return np.asarray(frame / np.sqrt(scale), np.float64)
    basis, sizes, _ = linalg.svd(frame, full_matrices=False)
    spanned: Float64 = basis[:, sizes > _UNKNOWN * max(sizes[0], np.finfo(np.float64).tiny)]
    return spanned


def _size(mapping: ResidualMap) -> float:
    return float(np.sqrt((mapping.forward**2).sum() / mapping.forward.shape[1]))


def _scaled(frame: Float64, moments: PairMoments, method: str) -> ResidualMap:
    """Return orthonormal columns with the scale that gives mapped states the student's mean square."""
    with one_blas_thread():
        mapped = float(np.vdot(frame, moments.tt @ frame))
    aim = float(np.trace(moments.ss))
    scale = float(np.sqrt(aim / mapped)) if mapped > 0 and aim > 0 else 1.0
    return ResidualMap(scale * frame, frame / scale, method)


def _aligned(left: Float64, right: Float64, cross: Float64) -> Float64:
    """Return `P R Qᵀ`, R the rotation of P's coordinates to Q's that `cross` calls for."""
    with one_blas_thread():
        turned: Float64 = left @ _polar(left.T @ cross @ right) @ right.T
    return turned


def _polar(matrix: Float64) -> Float64:
    """Return `U Wᵀ` of svd(`matrix`): the matrix with orthonormal columns nearest to it."""
    with one_blas_thread():
        u, _, wt = linalg.svd(matrix, full_matrices=False)
        nearest: Float64 = u @ wt
    return nearest


def _folded(axes: Float64, fold: Float64, slots: int) -> Float64:
    if fold.shape != (axes.shape[1], slots):
        raise BitsmithError(f"the fold has shape {fold.shape}, expected {(axes.shape[1], slots)}")
    with one_blas_thread():
        folded: Float64 = axes @ fold
    return folded


def _fold_of(slot: NDArray[np.intp], signs: Float64, slots: int) -> Float64:
    fold = np.zeros((len(slot), slots))
    fold[np.arange(len(slot)), slot] = signs / np.sqrt(np.bincount(slot, minlength=slots))[slot]
    return fold


def _expect_slots(directions: int, slots: int) -> None:
    if not 0 < slots <= directions:
        raise BitsmithError(f"{directions} directions cannot fill {slots} slots")


def _damped(moment: Float64, ridge: float) -> Float64:
    unit = float(np.trace(moment)) / len(moment)
    damped: Float64 = moment + max(ridge, _LEAST_RIDGE) * (unit if unit > 0 else 1.0) * np.eye(len(moment))
    return damped


def _roots(moment: Float64, ridge: float) -> tuple[Float64, Float64]:
    """Return `C^½` and `C^-½` of a damped moment."""
    values, vectors = linalg.eigh(_damped((moment + moment.T) / 2, ridge))
    sizes = np.sqrt(np.maximum(values, np.finfo(np.float64).tiny))
    return (vectors * sizes) @ vectors.T, (vectors / sizes) @ vectors.T
