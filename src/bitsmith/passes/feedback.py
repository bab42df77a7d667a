"""Compiled parts of the rounders: rows lie side by side in lanes, so a row's result depends on itself alone.

A tile is `columns LANES`. Every sum runs down one lane in a fixed order, whatever other rows share the tile,
however rows were cut, and on any number of threads. Arrays may be float32 or float64 throughout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.formats.format import Float32
from bitsmith.numerics.half import half_round

LANES = 64
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
TWO = np.float32(2.0)
HIGHEST = np.float32(1e30)
LEAST_GAIN = np.float32(1e-6)
"""Share of a sub-block's cost; a change that gains less is rounding noise."""

Tile = NDArray[Any]
Int = NDArray[np.int64]


@njit(nogil=True, cache=True, error_model="numpy")
def add_products(packed: Tile, column: int, row: int, values: Tile, first: int, last: int, out: Tile) -> None:
    """Add `sum_k M[row + k, column + c] * values[k, lane]` over `k` in `first`…`last` to `out[c, lane]`.

    `packed` is M with 16 columns side by side; all bounds are multiples of 16.
    """
    for panel in range(out.shape[0] // 16):
        matrix, part = packed[column // 16 + panel], out[panel * 16 : panel * 16 + 16]
        for k in range(first, last, 8):
            m, v = matrix[row + k : row + k + 8], values[k : k + 8]
            for c in range(16):
                a, b, d, e, f, g, h, i = (
                    m[0, c], m[1, c], m[2, c], m[3, c], m[4, c], m[5, c], m[6, c], m[7, c],
                )  # fmt: skip
                for lane in range(LANES):
                    part[c, lane] += (
                        (a * v[0, lane] + b * v[1, lane]) + (d * v[2, lane] + e * v[3, lane])
                    ) + ((f * v[4, lane] + g * v[5, lane]) + (h * v[6, lane] + i * v[7, lane]))


@njit(nogil=True, cache=True, error_model="numpy")
def _set_steps(d: Tile, m: Tile, scales: Tile, mins: Tile, step: Tile, offset: Tile, inverse: Tile) -> None:
    for lane in range(LANES):
        step[lane] = d[lane] * scales[lane]
        offset[lane] = m[lane] * mins[lane]
        inverse[lane] = ONE / step[lane] if step[lane] != 0 else ZERO


@njit(nogil=True, cache=True, error_model="numpy")
def _nearest(
    values: Tile, step: Tile, offset: Tile, inverse: Tile, low: np.float32, high: np.float32, table: Float32,
    places: NDArray[np.uint16], levels: Tile, decoded: Tile,
) -> None:  # fmt: skip
    """Fill `levels` with those nearest to `values` per lane, and what they decode to."""
    if table.size == 1:
        for lane in range(LANES):
            place = (values[lane] + offset[lane]) * inverse[lane]
            levels[lane] = np.rint(min(max(place, low), high))
            decoded[lane] = step[lane] * levels[lane] - offset[lane]
        return
    middle = np.float32(table.size // 2)
    top = middle + middle - ONE
    for lane in range(LANES):
        place = values[lane] * inverse[lane] * TWO + middle
        places[lane] = np.int32(min(max(place, ZERO), top))
    for lane in range(LANES):
        levels[lane] = table[places[lane]]
        decoded[lane] = step[lane] * levels[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _feed(
    base: Tile, target: Tile, feedback: Tile, weights: Tile, step: Tile, offset: Tile, inverse: Tile,
    low: np.float32, high: np.float32, table: Float32, places: NDArray[np.uint16], levels: Tile, errors: Tile,
    cost: Tile,
) -> None:  # fmt: skip
    """Round `target` column by column, moving the later columns' targets by the errors against `base`.

    `cost` becomes `sum_j weights_j (target_j - decoded_j)²` per lane.
    """
    size = base.shape[0]
    for lane in range(LANES):
        cost[lane] = ZERO
    decoded = errors[size]
    for j in range(size):
        _nearest(target[j], step, offset, inverse, low, high, table, places, levels[j], decoded)
        weight = weights[j]
        for lane in range(LANES):
            left = target[j, lane] - decoded[lane]
            cost[lane] += weight * left * left
            errors[j, lane] = base[j, lane] - decoded[lane]
        for k in range(j + 1, size):
            factor = feedback[j, k]
            for lane in range(LANES):
                target[k, lane] += factor * errors[j, lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _cost_of(
    base: Tile, target: Tile, feedback: Tile, weights: Tile, step: Tile, offset: Tile, levels: Tile,
    cost: Tile, error: Tile,
) -> None:  # fmt: skip
    """As `_feed` for levels that are given."""
    size = base.shape[0]
    for lane in range(LANES):
        cost[lane] = ZERO
    for j in range(size):
        weight = weights[j]
        for lane in range(LANES):
            decoded = step[lane] * levels[j, lane] - offset[lane]
            left = target[j, lane] - decoded
            cost[lane] += weight * left * left
            error[lane] = base[j, lane] - decoded
        for k in range(j + 1, size):
            factor = feedback[j, k]
            for lane in range(LANES):
                target[k, lane] += factor * error[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _copy(source: Tile, target: Tile) -> None:
    for j in range(source.shape[0]):
        for lane in range(LANES):
            target[j, lane] = source[j, lane]


@njit(nogil=True, cache=True, error_model="numpy")
def search_sub(
    base: Tile, target: Tile, feedback: Tile, weights: Tile, d: Tile, m: Tile, scales: Tile, mins: Tile,
    moves: Int, limits: Int, ladder: Float32, low: np.float32, high: np.float32, table: Float32,
    levels: Tile, best: Tile,
) -> None:  # fmt: skip
    """Choose a sub-block's whole scale and min (`LANES`) and its levels (`size LANES`) by error feedback.

    `moves` (`n 2`) are added to the scale and min and clipped to `limits` (scale low, high, min low, high);
    with a `ladder` of scales, moves and limits are places on it. Lanes keep what they had unless the cost
    falls below `best`, which then says the new cost.
    """
    size, kind = base.shape[0], base.dtype
    work, trial = np.empty((size, LANES), kind), np.empty((size, LANES), kind)
    errors, places = np.empty((size + 1, LANES), kind), np.empty(LANES, np.uint16)
    rows = np.empty((8, LANES), kind)
    step, offset, inverse, cost = rows[0], rows[1], rows[2], rows[3]
    centre, centre_m, scale, least = rows[4], rows[5], rows[6], rows[7]
    for lane in range(LANES):
        centre[lane] = np.searchsorted(ladder, scales[lane]) if ladder.size else scales[lane]
        centre_m[lane] = mins[lane]
    for move in range(moves.shape[0]):
        for lane in range(LANES):
            scale[lane] = min(
                max(centre[lane] + np.float32(moves[move, 0]), np.float32(limits[0])), np.float32(limits[1])
            )
            if ladder.size:
                scale[lane] = ladder[int(scale[lane])]
            least[lane] = min(
                max(centre_m[lane] + np.float32(moves[move, 1]), np.float32(limits[2])), np.float32(limits[3])
            )
        _set_steps(d, m, scale, least, step, offset, inverse)
        _copy(target, work)
        _feed(
            base,
            work,
            feedback,
            weights,
            step,
            offset,
            inverse,
            low,
            high,
            table,
            places,
            trial,
            errors,
            cost,
        )
        for lane in range(LANES):
            if cost[lane] < best[lane] - LEAST_GAIN * abs(best[lane]):
                best[lane] = cost[lane]
                scales[lane] = scale[lane]
                mins[lane] = least[lane]
                for j in range(size):
                    levels[j, lane] = trial[j, lane]


@njit(nogil=True, cache=True, error_model="numpy")
def compensate_block(base: Tile, target: Tile, feedback: Tile) -> None:
    """Turn each column's target from what the columns before the block made of it into the weights to fit.

    There every earlier column of the block takes its own target as it is: the block's optimum unquantized.
    """
    for j in range(base.shape[0]):
        for k in range(j + 1, base.shape[0]):
            factor = feedback[j, k]
            for lane in range(LANES):
                target[k, lane] += factor * (base[j, lane] - target[j, lane])


@njit(nogil=True, cache=True, error_model="numpy")
def feed_block(
    base: Tile, target: Tile, feedback: Tile, weights: Tile, d: Tile, m: Tile, scales: Tile, mins: Tile,
    moves: Int, limits: Int, ladder: Float32, low: np.float32, high: np.float32, table: Float32,
    levels: Tile, errors: Tile,
) -> None:  # fmt: skip
    """Error feedback through one block.

    `base` (`size LANES`) are its weights, `target` what the errors before it made of them (overwritten),
    `feedback` (`size size`) and `weights` (`size`) the factor's diagonal block; `d`, `m` (`LANES`), `scales`,
    `mins` (`subs LANES`) its fields, whose whole numbers are searched by `moves`. Fills `levels`, `errors`.
    """
    subs = scales.shape[0]
    size = base.shape[0] // subs
    best, inner = np.empty(LANES, base.dtype), np.empty((size, size), base.dtype)
    for s in range(subs):
        at, end = s * size, (s + 1) * size
        inner[:] = feedback[at:end, at:end]
        for lane in range(LANES):
            best[lane] = HIGHEST
        search_sub(
            base[at:end], target[at:end], inner, weights[at:end], d, m, scales[s], mins[s], moves, limits,
            ladder, low, high, table, levels[at:end], best,
        )  # fmt: skip
        for j in range(at, end):
            for lane in range(LANES):
                step, offset = d[lane] * scales[s, lane], m[lane] * mins[s, lane]
                errors[j, lane] = base[j, lane] - (step * levels[j, lane] - offset)
        for k in range(end, base.shape[0]):
            for j in range(at, end):
                factor = feedback[j, k]
                for lane in range(LANES):
                    target[k, lane] += factor * errors[j, lane]


@njit(nogil=True, cache=True, error_model="numpy")
def research_block(
    base: Tile, gradient: Tile, hessian: Tile, sub_feedback: Tile, sub_weights: Tile, sub_inverse: Tile,
    d: Tile, m: Tile, scales: Tile, mins: Tile, moves: Int, limits: Int, ladder: Float32, low: np.float32,
    high: np.float32, table: Float32, levels: Tile, errors: Tile,
) -> None:  # fmt: skip
    """Choose each sub-block's whole numbers and levels anew, everything else in the row as it stands.

    `gradient` (`size LANES`) is `(E H)` at the block, `hessian` (`size size`) H's diagonal block; the optimum
    of a sub-block's error given the rest is `e - H_ss⁻¹ g`, and `sub_*` are the factors of each `H_ss`.
    A lane changes only where the cost in H falls. `gradient` and `errors` are kept up to date.
    """
    subs = scales.shape[0]
    size, kind = base.shape[0] // subs, base.dtype
    aim, work, moved = (
        np.empty((size, LANES), kind),
        np.empty((size, LANES), kind),
        np.empty((size, LANES), kind),
    )
    best, step, offset = np.empty(LANES, kind), np.empty(LANES, kind), np.empty(LANES, kind)
    error = np.empty(LANES, kind)
    for s in range(subs):
        at, end = s * size, (s + 1) * size
        for j in range(size):
            for lane in range(LANES):
                aim[j, lane] = base[at + j, lane] - errors[at + j, lane]
            for k in range(size):
                factor = sub_inverse[s, j, k]
                for lane in range(LANES):
                    aim[j, lane] += factor * gradient[at + k, lane]
        for lane in range(LANES):
            step[lane] = d[lane] * scales[s, lane]
            offset[lane] = m[lane] * mins[s, lane]
        _copy(aim, work)
        _cost_of(aim, work, sub_feedback[s], sub_weights[s], step, offset, levels[at:end], best, error)
        search_sub(
            aim, aim, sub_feedback[s], sub_weights[s], d, m, scales[s], mins[s], moves, limits, ladder, low,
            high, table, levels[at:end], best,
        )  # fmt: skip
        _move(base, hessian, d, m, scales, mins, levels, s, size, moved, errors, gradient)


@njit(nogil=True, cache=True, error_model="numpy")
def _move(
    base: Tile, hessian: Tile, d: Tile, m: Tile, scales: Tile, mins: Tile, levels: Tile, s: int, size: int,
    moved: Tile, errors: Tile, gradient: Tile,
) -> None:  # fmt: skip
    """Bring sub-block `s`'s `errors` and the block's `gradient` up to date with its fields and levels."""
    at, end = s * size, (s + 1) * size
    any_moved = False
    for j in range(at, end):
        for lane in range(LANES):
            step, offset = d[lane] * scales[s, lane], m[lane] * mins[s, lane]
            now = base[j, lane] - (step * levels[j, lane] - offset)
            moved[j - at, lane] = now - errors[j, lane]
            any_moved |= moved[j - at, lane] != 0
            errors[j, lane] = now
    if not any_moved:
        return
    for k in range(base.shape[0]):
        for j in range(at, end):
            factor = hessian[j, k]
            for lane in range(LANES):
                gradient[k, lane] += factor * moved[j - at, lane]


@njit(nogil=True, cache=True, error_model="numpy")
def descend_block(
    base: Tile, gradient: Tile, hessian: Tile, d: Tile, m: Tile, scales: Tile, mins: Tile, low: np.float32,
    high: np.float32, table: Float32, levels: Tile, errors: Tile,
) -> bool:  # fmt: skip
    """Coordinate descent on the levels of a block, column by column; tell whether any changed."""
    subs = scales.shape[0]
    size, kind = base.shape[0] // subs, base.dtype
    rows, places = np.empty((7, LANES), kind), np.empty(LANES, np.uint16)
    step, offset, inverse, wanted = rows[0], rows[1], rows[2], rows[3]
    level, decoded, moved = rows[4], rows[5], rows[6]
    changed = False
    for j in range(base.shape[0]):
        if j % size == 0:
            _set_steps(d, m, scales[j // size], mins[j // size], step, offset, inverse)
        own = hessian[j, j]
        for lane in range(LANES):
            wanted[lane] = base[j, lane] - errors[j, lane] + gradient[j, lane] / own
        _nearest(wanted, step, offset, inverse, low, high, table, places, level, decoded)
        moving = False
        for lane in range(LANES):
            now = base[j, lane] - decoded[lane]
            change = now - errors[j, lane]
            gain = -change * (gradient[j, lane] + gradient[j, lane] + own * change)
            keep = gain > LEAST_GAIN * own * step[lane] * step[lane] and level[lane] != levels[j, lane]
            moved[lane] = change if keep else ZERO
            levels[j, lane] = level[lane] if keep else levels[j, lane]
            errors[j, lane] = now if keep else errors[j, lane]
            moving |= keep
        changed |= moving
        if moving:
            for k in range(base.shape[0]):
                factor = hessian[j, k]
                for lane in range(LANES):
                    gradient[k, lane] += factor * moved[lane]
    return changed


@njit(nogil=True, cache=True, error_model="numpy")
def refit_block(
    base: Tile, gradient: Tile, hessian: Tile, d: Tile, m: Tile, scales: Tile, mins: Tile, levels: Tile,
    errors: Tile,
) -> bool:  # fmt: skip
    """Refit a block's float16 `d` and `m` in H, the rest of the row as it stands; tell whether any changed.

    With `a = scale * level` and `c = min` per column the error is `w - d a + m c`: two unknowns, solved by
    least squares, then `d` is rounded, `m` solved given that and rounded. Kept only where the cost falls.
    """
    subs = scales.shape[0]
    size, kind = base.shape[0] // subs, base.dtype
    total = base.shape[0]
    a, c = np.empty((total, LANES), kind), np.empty((total, LANES), kind)
    ha, hc = np.zeros((total, LANES), kind), np.zeros((total, LANES), kind)
    sums = np.zeros((5, LANES), kind)
    for j in range(total):
        for lane in range(LANES):
            a[j, lane] = scales[j // size, lane] * levels[j, lane]
            c[j, lane] = mins[j // size, lane]
    for k in range(total):
        for j in range(total):
            factor = hessian[j, k]
            for lane in range(LANES):
                ha[k, lane] += factor * a[j, lane]
                hc[k, lane] += factor * c[j, lane]
    for j in range(total):
        for lane in range(LANES):
            sums[0, lane] += a[j, lane] * ha[j, lane]
            sums[1, lane] += a[j, lane] * hc[j, lane]
            sums[2, lane] += c[j, lane] * hc[j, lane]
            sums[3, lane] += a[j, lane] * gradient[j, lane]
            sums[4, lane] += c[j, lane] * gradient[j, lane]
    changed = False
    for lane in range(LANES):
        changed |= _refit_lane(lane, sums, d, m, a, c, ha, hc, base, errors, gradient)
    return changed


@njit(nogil=True, cache=True, error_model="numpy")
def _refit_lane(
    lane: int, sums: Tile, d: Tile, m: Tile, a: Tile, c: Tile, ha: Tile, hc: Tile, base: Tile, errors: Tile,
    gradient: Tile,
) -> bool:  # fmt: skip
    aa, ac, cc, ag, cg = sums[0, lane], sums[1, lane], sums[2, lane], sums[3, lane], sums[4, lane]
    if not aa > 0:
        return False
    det = aa * cc - ac * ac
    solvable = det > np.float32(1e-5) * aa * cc
    wanted = (cc * ag - ac * cg) / det if solvable else ag / aa
    new_d = half_round(np.float32(d[lane] + wanted))
    by = new_d - d[lane]
    new_m = half_round(np.float32(m[lane] + (by * ac - cg) / cc)) if cc > 0 else np.float32(m[lane])
    by_m = new_m - m[lane]
    cost = by * (by * aa - TWO * ag) + by_m * (TWO * cg + by_m * cc) - TWO * by * by_m * ac
    scale = abs(by * ag) + abs(by_m * cg)
    if new_d == 0 or not cost < -LEAST_GAIN * scale:
        return False
    d[lane] = new_d
    m[lane] = new_m
    for j in range(base.shape[0]):
        errors[j, lane] = base[j, lane] - (new_d * a[j, lane] - new_m * c[j, lane])
        gradient[j, lane] += by_m * hc[j, lane] - by * ha[j, lane]
    return True
