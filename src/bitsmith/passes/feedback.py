"""Compiled parts of the rounders: rows lie side by side in lanes, so a row's result depends on itself alone.

A tile is `columns LANES`. Every sum runs down one lane in a fixed order, whatever other rows share the tile,
however rows were cut, and on any number of threads. Arrays may be float32 or float64 throughout. A panel is
columns that are rounded together: blocks of sub-blocks of columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.formats.format import Float32
from bitsmith.numerics.lane_products import LANES, add_four, add_products
from bitsmith.numerics.vectors import larger, load, nearest, smaller, spread, store, where

ZERO = np.float32(0.0)
ONE = np.float32(1.0)
TWO = np.float32(2.0)
HIGHEST = np.float32(1e30)
LEAST_GAIN = np.float32(1e-6)
"""Share of a sub-block's cost; a change that gains less is rounding noise."""

WANTED, LEVEL, STEP, OFFSET, INVERSE, COST, BEST, BETTER, FOUR = range(9)
ROWS = FOUR + 4
"""Rows of the lanes that a sub-block's search works with; its errors and its levels follow.

Four columns are brought up to date together, in the rows from `FOUR` on.
"""

Tile = NDArray[Any]
Int = NDArray[np.int64]


@njit(nogil=True, cache=True, error_model="numpy")
def _set_steps(d: Tile, m: Tile, block: int, scale: Tile, least: Tile, work: Tile) -> None:
    for lane in range(LANES):
        step = d[block, lane] * scale[lane]
        work[STEP, lane] = step
        work[OFFSET, lane] = m[block, lane] * least[lane]
        work[INVERSE, lane] = ONE / step if step != 0 else ZERO


@njit(nogil=True, cache=True, error_model="numpy")
def _look_up(table: Float32, places: NDArray[np.uint16], work: Tile) -> None:
    """Set `LEVEL` to those of the table nearest to `WANTED` per lane."""
    middle = np.float32(table.size // 2)
    top = middle + middle - ONE
    for lane in range(LANES):
        place = work[WANTED, lane] * work[INVERSE, lane] * TWO + middle
        places[lane] = np.int32(min(max(place, ZERO), top))
    for lane in range(LANES):
        work[LEVEL, lane] = table[places[lane]]


@njit(nogil=True, cache=True, error_model="numpy")
def _bring_four(
    start: Tile,
    at: int,
    matrix: Tile,
    row: int,
    column: int,
    values: Tile,
    first: int,
    count: int,
    work: Tile,
) -> None:
    """Set the rows from `FOUR` on to those of `start` from `at` on, plus products of the matrix."""
    for place in range(0, 4 * LANES, 16):
        store(work, FOUR * LANES + place, load(start, at * LANES + place, 16))
    add_four(matrix, row, column - first, values, first, first + count, work, FOUR)


@njit(nogil=True, cache=True, error_model="numpy")
def _feed(
    base: Tile, target: Tile, at: int, feedback: Tile, weights: Tile, low: np.float32, high: np.float32,
    table: Float32, places: NDArray[np.uint16], work: Tile,
) -> None:  # fmt: skip
    """Round `target` column by column, moving the later columns' targets by the errors against `base`.

    The sub-block begins at row `at` of both. `COST` becomes `sum_j weights_j (target_j - decoded_j)²` per
    lane; the errors follow from row `ROWS` of `work` on, and the levels after them.
    """
    size, kind = feedback.shape[0], work.dtype.type
    least, most = spread(kind(low), 16), spread(kind(high), 16)
    for lane in range(LANES):
        work[COST, lane] = ZERO
    for first in range(0, size, 4):
        _bring_four(target, at + first, feedback, first, 0, work, ROWS, first, work)
        for j in range(first, first + 4):
            weight, error_at, level_at = weights[j], (ROWS + j) * LANES, (ROWS + size + j) * LANES
            if table.size > 1:
                for lane in range(0, LANES, 16):
                    wanted = load(work, (FOUR + j - first) * LANES + lane, 16)
                    for k in range(first, j):
                        wanted = wanted + load(work, (ROWS + k) * LANES + lane, 16) * feedback[j, k]
                    store(work, WANTED * LANES + lane, wanted)
                _look_up(table, places, work)
            for lane in range(0, LANES, 16):
                step, offset = load(work, STEP * LANES + lane, 16), load(work, OFFSET * LANES + lane, 16)
                if table.size > 1:
                    wanted, level = (
                        load(work, WANTED * LANES + lane, 16),
                        load(work, LEVEL * LANES + lane, 16),
                    )
                else:
                    wanted = load(work, (FOUR + j - first) * LANES + lane, 16)
                    for k in range(first, j):
                        wanted = wanted + load(work, (ROWS + k) * LANES + lane, 16) * feedback[j, k]
                    place = (wanted + offset) * load(work, INVERSE * LANES + lane, 16)
                    level = nearest(smaller(larger(place, least), most))
                decoded = step * level - offset
                left = wanted - decoded
                store(work, level_at + lane, level)
                store(work, error_at + lane, load(base, (at + j) * LANES + lane, 16) - decoded)
                store(work, COST * LANES + lane, load(work, COST * LANES + lane, 16) + left * weight * left)


@njit(nogil=True, cache=True, error_model="numpy")
def _cost_of(
    aim: Tile, feedback: Tile, weights: Tile, levels: Tile, at: int, work: Tile, errors: Tile
) -> None:
    """As `_feed` for levels that are given (from row `at`); `aim` is both base and target."""
    for j in range(aim.shape[0]):
        for lane in range(0, LANES, 16):
            step, offset = load(work, STEP * LANES + lane, 16), load(work, OFFSET * LANES + lane, 16)
            decoded = step * load(levels, (at + j) * LANES + lane, 16) - offset
            store(errors, j * LANES + lane, load(aim, j * LANES + lane, 16) - decoded)
    for lane in range(LANES):
        work[COST, lane] = ZERO
    for first in range(0, aim.shape[0], 4):
        _bring_four(errors, first, feedback, first, 0, errors, 0, first, work)
        for j in range(first, first + 4):
            for lane in range(0, LANES, 16):
                left = load(work, (FOUR + j - first) * LANES + lane, 16)
                for k in range(first, j):
                    left = left + load(errors, k * LANES + lane, 16) * feedback[j, k]
                store(
                    work, COST * LANES + lane, load(work, COST * LANES + lane, 16) + left * weights[j] * left
                )


@njit(nogil=True, cache=True, error_model="numpy")
def _search_sub(
    base: Tile, target: Tile, at: int, feedback: Tile, weights: Tile, d: Tile, m: Tile, block: int,
    scales: Tile, mins: Tile, moves: Int, limits: Int, ladder: Float32, low: np.float32, high: np.float32,
    table: Float32, levels: Tile, work: Tile,
) -> None:  # fmt: skip
    """Choose a sub-block's whole scale and min (`LANES`) and its `levels` (`size LANES`) by error feedback.

    It begins at row `at` of `base` and `target`. `moves` (`n 2`) are added to the scale and min and clipped
    to `limits` (scale low, high, min low, high); with a `ladder` of scales, these are places on it.
    Lanes keep what they had unless the cost falls below `BEST`, which then says the new cost.
    """
    size = levels.shape[0]
    places = np.empty(LANES, np.uint16)
    centre, scale = np.empty((2, LANES), base.dtype), np.empty((2, LANES), base.dtype)
    for lane in range(LANES):
        centre[0, lane] = np.searchsorted(ladder, scales[lane]) if ladder.size else scales[lane]
        centre[1, lane] = mins[lane]
    for move in range(moves.shape[0]):
        for part in range(2):
            by = np.float32(moves[move, part])
            least, most = np.float32(limits[2 * part]), np.float32(limits[2 * part + 1])
            for lane in range(LANES):
                scale[part, lane] = min(max(centre[part, lane] + by, least), most)
        if ladder.size:
            for lane in range(LANES):
                scale[0, lane] = ladder[int(scale[0, lane])]
        _set_steps(d, m, block, scale[0], scale[1], work)
        _feed(base, target, at, feedback, weights, low, high, table, places, work)
        found = False
        for lane in range(LANES):
            better = work[COST, lane] < work[BEST, lane] - LEAST_GAIN * abs(work[BEST, lane])
            found |= better
            work[BETTER, lane] = ONE if better else ZERO
            work[BEST, lane] = work[COST, lane] if better else work[BEST, lane]
        if not found:
            continue
        for lane in range(LANES):
            scales[lane] = scale[0, lane] if work[BETTER, lane] else scales[lane]
            mins[lane] = scale[1, lane] if work[BETTER, lane] else mins[lane]
        for lane in range(0, LANES, 16):
            better = load(work, BETTER * LANES + lane, 16) > ZERO
            for j in range(lane, size * LANES, LANES):
                new = load(work, (ROWS + size) * LANES + j, 16)
                store(levels, j, where(better, new, load(levels, j, 16)))


@njit(nogil=True, cache=True, error_model="numpy")
def _take_errors(base: Tile, levels: Tile, at: int, end: int, work: Tile, errors: Tile) -> None:
    """Set the `errors` of columns `at` to `end` to those of their `levels` under `STEP` and `OFFSET`."""
    for j in range(at, end):
        for lane in range(LANES):
            errors[j, lane] = base[j, lane] - (work[STEP, lane] * levels[j, lane] - work[OFFSET, lane])


@njit(nogil=True, cache=True, error_model="numpy")
def load_rows(rows: Float32, base: Tile) -> None:
    """Fill `base` (`columns LANES`) with `rows` (`rows columns`) side by side; other lanes are zero."""
    for first in range(0, rows.shape[1], 8):
        for lane in range(rows.shape[0]):
            for j in range(first, min(first + 8, rows.shape[1])):
                base[j, lane] = rows[lane, j]
        for j in range(first, min(first + 8, rows.shape[1])):
            for lane in range(rows.shape[0], LANES):
                base[j, lane] = ZERO


@njit(nogil=True, cache=True, error_model="numpy")
def aim_panel(base: Tile, by: Tile, solved: Tile, target: Tile, moved: Float32) -> None:
    """Move a panel's `target` (`size LANES`) from `base` by what the errors before it call for.

    Fills `moved` (`rows size`) with the weights to fit its fields to: there every column of the panel takes
    its own target as it is, the panel's optimum unquantized.
    """
    size = target.shape[0]
    best = base.copy()
    for j in range(size):
        for lane in range(LANES):
            target[j, lane] = base[j, lane] + by[j, lane]
    for first in range(0, size, 8):
        last = min(first + 8, size)
        add_products(solved, first, 0, by, 0, last, best[first:last])
    for first in range(0, size, 8):
        for lane in range(moved.shape[0]):
            for j in range(first, min(first + 8, size)):
                moved[lane, j] = best[j, lane]


@njit(nogil=True, cache=True, error_model="numpy")
def feed_panel(
    base: Tile, target: Tile, feedback: Tile, weights: Tile, d: Tile, m: Tile, scales: Tile, mins: Tile,
    moves: Int, limits: Int, ladder: Float32, low: np.float32, high: np.float32, table: Float32,
    levels: Tile, errors: Tile,
) -> None:  # fmt: skip
    """Error feedback through one panel.

    `base` (`size LANES`) are its weights, `target` what the errors before it made of them (and, at the end,
    those within), `feedback` (`size size`) and `weights` (`size`) the factor's diagonal block;
    `d`, `m` (`blocks LANES`), `scales`, `mins` (`subs LANES`) its fields, whose whole numbers are searched by
    `moves`. Fills `levels`, `errors`.
    """
    subs = scales.shape[0]
    size = base.shape[0] // subs
    each = subs // d.shape[0]
    work, inner = np.empty((ROWS + 2 * size, LANES), base.dtype), np.empty((size, size), base.dtype)
    for s in range(subs):
        at, end = s * size, (s + 1) * size
        block = s // each
        add_products(feedback, at, 0, errors, 0, at, target[at:end])
        inner[:] = feedback[at:end, at:end]
        for lane in range(LANES):
            work[BEST, lane] = HIGHEST
        _search_sub(
            base, target, at, inner, weights[at:end], d, m, block, scales[s], mins[s], moves, limits, ladder,
            low, high, table, levels[at:end], work,
        )  # fmt: skip
        _set_steps(d, m, block, scales[s], mins[s], work)
        _take_errors(base, levels, at, end, work, errors)
        for first in range(at, end, 4):
            if first > at:
                add_four(feedback, first, 0, errors, at, first, target, first)
            for j in range(first, first + 4):
                for k in range(first, j):
                    for lane in range(0, LANES, 16):
                        moved = load(errors, k * LANES + lane, 16) * feedback[j, k]
                        store(target, j * LANES + lane, load(target, j * LANES + lane, 16) + moved)


@njit(nogil=True, cache=True, error_model="numpy")
def gradient_of(target: Tile, base: Tile, errors: Tile, factor: Tile, residual: Tile, out: Tile) -> None:
    """Fill `out` with half the gradient of a panel's cost in its own errors (`size LANES`).

    The residual is `V_jj (target_j - decoded_j)`, the gradient V times it.
    """
    size = base.shape[0]
    for j in range(size):
        own = factor[j, j]
        for lane in range(LANES):
            residual[j, lane] = own * (target[j, lane] - (base[j, lane] - errors[j, lane]))
            out[j, lane] = ZERO
    for j in range(0, size, 8):
        add_products(factor, j, j, residual[j:], 0, size - j, out[j : j + 8])


@njit(nogil=True, cache=True, error_model="numpy")
def improve_panel(
    base: Tile, gradient: Tile, hessian: Tile, sub_feedback: Tile, sub_weights: Tile, sub_inverse: Tile,
    d: Tile, m: Tile, scales: Tile, mins: Tile, moves: Int, limits: Int, ladder: Float32, low: np.float32,
    high: np.float32, table: Float32, levels: Tile, errors: Tile, research: bool, descent: bool,
) -> bool:  # fmt: skip
    """Improve each sub-block, everything else in the row as it stands; tell whether anything changed.

    `gradient` (`size LANES`) is `(E H)` at the panel, `hessian` (`size size`) H's diagonal block. With
    `research` whole numbers and levels are chosen anew: the optimum of a sub-block's error given the rest is
    `e - H_ss⁻¹ g`, and `sub_*` are the factors of each `H_ss`. With `descent` coordinate descent on the
    levels follows. A lane changes only where the cost in H falls. `errors` are kept up to date.
    """
    subs = scales.shape[0]
    size, kind = base.shape[0] // subs, base.dtype
    moved, work = np.empty(base.shape, kind), np.empty((ROWS + 2 * size, LANES), kind)
    changed = False
    for s in range(subs):
        at, end = s * size, (s + 1) * size
        block = s // (subs // d.shape[0])
        add_products(hessian, at, 0, moved, 0, at, gradient[at:end])
        for j in range(at, end):
            for lane in range(LANES):
                moved[j, lane] = errors[j, lane]
        if research:
            _research(
                base, gradient, hessian, at, sub_feedback[s], sub_weights[s], sub_inverse[s], d, m, block,
                scales[s], mins[s], moves, limits, ladder, low, high, table, levels, errors, work,
            )  # fmt: skip
        if descent:
            _set_steps(d, m, block, scales[s], mins[s], work)
            _descend(base, gradient, hessian, at, end, low, high, table, levels, errors, work)
        for j in range(at, end):
            for lane in range(LANES):
                moved[j, lane] = errors[j, lane] - moved[j, lane]
                changed |= moved[j, lane] != 0
    return changed


@njit(nogil=True, cache=True, error_model="numpy")
def _research(
    base: Tile, gradient: Tile, hessian: Tile, at: int, feedback: Tile, weights: Tile, inverse: Tile,
    d: Tile, m: Tile, block: int, scales: Tile, mins: Tile, moves: Int, limits: Int, ladder: Float32,
    low: np.float32, high: np.float32, table: Float32, levels: Tile, errors: Tile, work: Tile,
) -> None:  # fmt: skip
    """Choose one sub-block's whole numbers and levels anew; keep its `errors`, `gradient` up to date."""
    size, kind = feedback.shape[0], base.dtype
    aim, change = np.empty((size, LANES), kind), np.empty((size, LANES), kind)
    for j in range(size):
        for lane in range(LANES):
            aim[j, lane] = base[at + j, lane] - errors[at + j, lane]
    add_products(inverse, 0, 0, gradient[at : at + size], 0, size, aim)
    _set_steps(d, m, block, scales, mins, work)
    _cost_of(aim, feedback, weights, levels, at, work, change)
    for lane in range(LANES):
        work[BEST, lane] = work[COST, lane]
    _search_sub(
        aim, aim, 0, feedback, weights, d, m, block, scales, mins, moves, limits, ladder, low, high, table,
        levels[at : at + size], work,
    )  # fmt: skip
    _set_steps(d, m, block, scales, mins, work)
    change[:] = errors[at : at + size]
    _take_errors(base, levels, at, at + size, work, errors)
    for j in range(size):
        for lane in range(LANES):
            change[j, lane] = errors[at + j, lane] - change[j, lane]
    add_products(hessian, at, at, change, 0, size, gradient[at : at + size])


@njit(nogil=True, cache=True, error_model="numpy")
def _descend(
    base: Tile, gradient: Tile, hessian: Tile, at: int, end: int, low: np.float32, high: np.float32,
    table: Float32, levels: Tile, errors: Tile, work: Tile,
) -> None:  # fmt: skip
    """Coordinate descent on the levels of one sub-block, column by column, under `STEP` and `OFFSET`."""
    size, kind = end - at, base.dtype.type
    moved, places = np.empty((size, LANES), base.dtype), np.empty(LANES, np.uint16)
    none = spread(kind(ZERO), 16)
    least, most = spread(kind(low), 16), spread(kind(high), 16)
    for first in range(0, size, 4):
        _bring_four(gradient, at + first, hessian, at + first, at, moved, 0, first, work)
        for j in range(first, first + 4):
            own, here = hessian[at + j, at + j], (at + j) * LANES
            inverse, slope_at = ONE / own, (FOUR + j - first) * LANES
            for lane in range(0, LANES, 16):
                slope = load(work, slope_at + lane, 16)
                for k in range(first, j):
                    slope = slope + load(moved, k * LANES + lane, 16) * hessian[at + j, at + k]
                store(work, slope_at + lane, slope)
                wanted = load(base, here + lane, 16) - load(errors, here + lane, 16) + slope * inverse
                store(work, WANTED * LANES + lane, wanted)
            if table.size > 1:
                _look_up(table, places, work)
            for lane in range(0, LANES, 16):
                step, offset = load(work, STEP * LANES + lane, 16), load(work, OFFSET * LANES + lane, 16)
                level = load(work, LEVEL * LANES + lane, 16)
                if table.size == 1:
                    wanted = load(work, WANTED * LANES + lane, 16)
                    place = (wanted + offset) * load(work, INVERSE * LANES + lane, 16)
                    level = nearest(smaller(larger(place, least), most))
                slope = load(work, slope_at + lane, 16)
                before, held = load(errors, here + lane, 16), load(levels, here + lane, 16)
                now = load(base, here + lane, 16) - (step * level - offset)
                change = now - before
                gain = (none - change) * (slope + slope + change * own)
                # a level that stays as it is changes nothing: its gain is exactly 0
                keep = gain > step * step * (own * LEAST_GAIN)
                store(moved, j * LANES + lane, where(keep, change, none))
                store(errors, here + lane, where(keep, now, before))
                store(levels, here + lane, where(keep, level, held))


@njit(nogil=True, cache=True, error_model="numpy")
def codes_of(levels: Tile, book: Float32, codes: NDArray[np.uint8]) -> None:
    """Fill `codes` (`rows columns`) with the places of `levels` (`columns LANES`) among those of `book`."""
    found, even = np.empty(LANES, np.uint8), True
    for code in range(book.size):
        even &= book[code] - book[0] == code
    for j in range(levels.shape[0]):
        for lane in range(LANES):
            found[lane] = np.uint8(np.int32(levels[j, lane] - book[0])) if even else 0
        for level in book[: 0 if even else book.size - 1]:
            for lane in range(LANES):
                found[lane] += np.uint8(levels[j, lane] > level)
        for lane in range(codes.shape[0]):
            codes[lane, j] = found[lane]
