"""How alike two models' heads are once turned into each other: one rotation in all, or one per KV group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from bitsmith.errors import BitsmithError
from bitsmith.lab.merge_ranges import ranged
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.merge_axes import by_channel, diagonal_of
from bitsmith.passes.merge_heads import HeadMap
from bitsmith.run.merge_plan import MergePlan
from bitsmith.store.paired import CrossMoments, Paired

Float64 = NDArray[np.float64]
Span = Literal["all heads", "KV group", "value channels"]

RANGE = "range over the parts of the text"


@one_blas_thread()
def alike_when_turned(plan: MergePlan, fits: Sequence[Paired], held: Paired, span: Span) -> dict[str, Any]:
    """Return figures of rotations of the teacher's chosen heads' outputs into the student's.

    R is the orthogonal Procrustes solution of each part of `fits`, of all heads together, of each KV group's
    heads, or of a KV group's value channels (all its heads alike, what weights can carry). `explained` is the
    student's variance that the turned heads explain on `held`, `tr(Rᵀ C)² / (E|o_t|² E|o_s|²)`, on tokens no
    R was found on; `unturned` is that of R = I; `spread` is `|R - R'|_F / √(2 D)` between parts, `turn` is
    `|R - I|_F / √D`; means over attention layers. Raises BitsmithError where no layer has such heads.
    """
    layers = [(n, one.heads) for n, one in plan.layers.items() if isinstance(one.heads, HeadMap)]
    if not layers:
        raise BitsmithError("there is no layer of attention whose heads could be turned")
    rows = [_layer(n, heads, fits, held, span) for n, heads in layers]
    values = np.mean([row for row, _ in rows], axis=0)  # parts, figures
    return {
        "span": span,
        "explained": ranged(values[:, 0], "of the student's variance", RANGE),
        "unturned": float(np.mean([one for _, one in rows])),
        "spread": ranged(values[:, 1], "of what unrelated rotations have", RANGE),
        "turn": ranged(values[:, 2], "|R - I| / √D", RANGE),
    }


def _layer(
    number: int, heads: HeadMap, fits: Sequence[Paired], held: Paired, span: Span
) -> tuple[Float64, float]:
    seen = held.mixer(number)
    judged = _cross(seen, heads)
    power = float(diagonal_of(seen.tt)[_channels(heads)].sum() * diagonal_of(seen.ss).sum())
    turns = [_turn(_cross(one.mixer(number), heads), heads, span) for one in fits]
    width = len(judged)
    found = []
    for at, turn in enumerate(turns):
        others = [np.linalg.norm(turn - other) for n, other in enumerate(turns) if n != at]
        spread = float(np.mean(others)) / np.sqrt(2 * width) if others else 0.0
        away = float(np.linalg.norm(turn - np.eye(width))) / np.sqrt(width)
        found.append((_explained(turn, judged, power), spread, away))
    return np.asarray(found), _explained(np.eye(width), judged, power)


def _explained(turn: Float64, cross: Float64, power: float) -> float:
    return float(np.vdot(turn, cross)) ** 2 / power if power > 0 else 0.0


def _channels(heads: HeadMap) -> NDArray[np.intp]:
    """Return the teacher's channels of the heads chosen for the student's."""
    if heads.query.ndim != 1:
        raise BitsmithError("heads are mixed, not chosen: there is nothing to turn")
    found: NDArray[np.intp] = by_channel(heads.query, heads.head_dim)
    return found


def _cross(moments: CrossMoments, heads: HeadMap) -> Float64:
    return moments.ts[_channels(heads)]


def _turn(cross: Float64, heads: HeadMap, span: Span) -> Float64:
    """Return the rotation R (`D D`) for which `o_t R` meets `o_s` best."""
    if span == "all heads":
        return _polar(cross)
    groups, each, dim = heads.student.groups, heads.student.each, heads.head_dim
    wide = each * dim
    blocks = [cross[g * wide : (g + 1) * wide, g * wide : (g + 1) * wide] for g in range(groups)]
    if span == "KV group":
        return np.asarray(linalg.block_diag(*map(_polar, blocks)), np.float64)
    turned = []
    for block in blocks:
        shared = sum(block[h * dim : (h + 1) * dim, h * dim : (h + 1) * dim] for h in range(each))
        turned += [_polar(np.asarray(shared))] * each
    return np.asarray(linalg.block_diag(*turned), np.float64)


def _polar(matrix: Float64) -> Float64:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    turned: Float64 = left @ right
    return turned
