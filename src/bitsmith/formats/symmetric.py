"""Search scales for grids through zero: `x ≈ d * level` and `x ≈ d * scale[sub] * level`.

First every sub-block tries a list of starts. Its codes `q` under a start allow the least-squares scale
`sum(wqx) / sum(wqq)`, which lowers the error from `sum(wxx)` by the gain `sum(wqx)^2 / sum(wqq)`; the largest
gain wins. Then, where sub-scales are whole numbers, the neighbours of the rounded ones are tried by their
exact error, and the block's float16 factor is refitted by least squares to the codes and whole numbers found,
in turn; the best block seen is kept.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.formats.format import Float32
from bitsmith.formats.lanes import (
    HEARD,
    HIGHEST,
    LANES,
    NOISE,
    ONE,
    TWO,
    WIDE,
    ZERO,
    half_in_unit,
    load_lanes,
    load_weights,
    outwards,
    weight_at,
    weight_lanes,
    weighted,
)  # fmt: skip
from bitsmith.numerics.half import half_round
from bitsmith.numerics.vectors import larger, load, nearest, smaller, spread, store

EVEN = np.zeros(1, np.float32)
"""Stands for whole-number levels where a kernel takes a table of levels."""
Int16 = NDArray[np.int16]


@njit(nogil=True, cache=True, error_model="numpy")
def _symmetric_sums(
    x: Float32, w: Float32 | None, inverse: Float32, low: np.float32, high: np.float32, table: Float32,
    places: NDArray[np.uint16], sqx: Float32, sqq: Float32,
) -> None:  # fmt: skip
    """Sum `w q x` and `w q q` per lane for the levels `q` nearest to `x * inverse`.

    With a table, a place `p` has its level at index `floor(2 p) + len / 2`; the index is stored first so that
    both halves vectorise.
    """
    if table.size == 1:
        least, most = spread(low, 16), spread(high, 16)
        for at in range(0, LANES, WIDE):
            by, across, along = load(inverse, at, 16), spread(ZERO, 16), spread(ZERO, 16)
            for first in range(at, x.size, 2 * LANES):
                a, b = load(x, first, 16), load(x, first + LANES, 16)
                p = nearest(smaller(larger(a * by, least), most))
                q = nearest(smaller(larger(b * by, least), most))
                wp, wq = weighted(w, first, p), weighted(w, first + LANES, q)
                across, along = across + (wp * a + wq * b), along + (wp * p + wq * q)
            store(sqx, at, across)
            store(sqq, at, along)
        return
    for lane in range(LANES):
        sqx[lane] = ZERO
        sqq[lane] = ZERO
    middle = np.float32(table.size // 2)
    top = middle + middle - ONE
    for j in range(x.shape[0]):
        for lane in range(LANES):
            place = x[j, lane] * inverse[lane] * TWO + middle
            places[lane] = np.int32(min(max(place, ZERO), top))
        for lane in range(LANES):
            q = table[places[lane]]
            wq = weight_at(w, j, lane) * q
            sqx[lane] += wq * x[j, lane]
            sqq[lane] += wq * q


@njit(nogil=True, cache=True, error_model="numpy")
def _search_symmetric(
    x: Float32, w: Float32 | None, low: np.float32, high: np.float32, table: Float32, starts: Float32,
    rounds: int, places: NDArray[np.uint16], scratch: Float32, scale: Float32,
) -> None:  # fmt: skip
    """Find `x ≈ scale * q` per lane. A start is the place that the lane's extreme value is put at."""
    extreme, inverse, sqx, sqq, best = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    for lane in range(LANES):
        extreme[lane] = ZERO
        best[lane] = ZERO
        scale[lane] = ZERO
    for j in range(0, x.shape[0], 2):
        for lane in range(LANES):
            a = x[j, lane] if weight_at(w, j, lane) > HEARD else ZERO
            b = x[j + 1, lane] if weight_at(w, j + 1, lane) > HEARD else ZERO
            larger = b if abs(b) > abs(a) else a
            extreme[lane] = larger if abs(larger) > abs(extreme[lane]) else extreme[lane]
    for t in range(starts.size + rounds):
        for lane in range(LANES):
            at = extreme[lane] if t < starts.size else scale[lane]
            target = starts[t] if t < starts.size else ONE
            inverse[lane] = target / at if at != 0 else ZERO
        _symmetric_sums(x, w, inverse, low, high, table, places, sqx, sqq)
        for lane in range(LANES):
            gain = sqx[lane] * sqx[lane] / sqq[lane]
            better = gain > best[lane] + NOISE * best[lane]
            best[lane] = gain if better else best[lane]
            scale[lane] = sqx[lane] / sqq[lane] if better else scale[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def fit_symmetric(
    blocks: Float32, weights: Float32 | None, first: int, low: np.float32, high: np.float32, table: Float32,
    starts: Float32, rounds: int, d: Float32,
) -> None:  # fmt: skip
    """Fill `d` (`n`) for `x ≈ d * level`, levels whole numbers in `low`…`high` or those of `table`.

    Block `i` has the weights of row `(first + i) % len(weights)`, or all the same without.
    `rounds` refinements follow the `starts`.
    """
    size = blocks.shape[1]
    x, w = np.empty((size, LANES), np.float32), weight_lanes(weights, size)
    unit, scale = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    scratch, places = np.empty((5, LANES), np.float32), np.empty(LANES, np.uint16)
    for block in range(0, blocks.shape[0], LANES):
        load_lanes(blocks, block, 1, x, unit, scratch)
        load_weights(weights, first, block, 1, w)
        _search_symmetric(x, w, low, high, table, starts, rounds, places, scratch, scale)
        for lane in range(min(LANES, blocks.shape[0] - block)):
            d[block + lane] = half_round(scale[lane] * unit[lane])


@njit(nogil=True, cache=True, error_model="numpy")
def _symmetric_errors(
    x: Float32, w: Float32 | None, scale: Float32, inverse: Float32, low: np.float32, high: np.float32,
    table: Float32, places: NDArray[np.uint16], error: Float32,
) -> None:  # fmt: skip
    """Sum `w (x - scale q)^2` per lane, `q` as in `_symmetric_sums`."""
    if table.size == 1:
        least, most = spread(low, 16), spread(high, 16)
        for at in range(0, LANES, WIDE):
            by, step, total = load(inverse, at, 16), load(scale, at, 16), spread(ZERO, 16)
            for place in range(at, x.size, LANES):
                value = load(x, place, 16)
                left = value - step * nearest(smaller(larger(value * by, least), most))
                total = total + weighted(w, place, left) * left
            store(error, at, total)
        return
    for lane in range(LANES):
        error[lane] = ZERO
    middle = np.float32(table.size // 2)
    top = middle + middle - ONE
    for j in range(x.shape[0]):
        for lane in range(LANES):
            place = x[j, lane] * inverse[lane] * TWO + middle
            places[lane] = np.int32(min(max(place, ZERO), top))
        for lane in range(LANES):
            left = x[j, lane] - scale[lane] * table[places[lane]]
            error[lane] += weight_at(w, j, lane) * left * left


@njit(nogil=True, cache=True, error_model="numpy")
def _choose_scales(
    x: Float32, w: Float32 | None, factor: Float32, low: np.float32, high: np.float32, table: Float32,
    centre: Float32, reach: int, opposite: bool, scale_low: np.float32, scale_high: np.float32,
    places: NDArray[np.uint16], scratch: Float32, found: Float32,
) -> None:  # fmt: skip
    """Fill `found`: per lane the least error, its whole scale, and the sums that refit the factor.

    Whole scales within `reach` of `centre` are tried, and, as the grid is not symmetric, its `opposite`.
    """
    whole, scale, inverse, error = scratch[0], scratch[1], scratch[2], scratch[3]
    for lane in range(LANES):
        found[0, lane] = HIGHEST
    tries = 2 * reach + 1
    for step in range(tries + 1 if opposite else tries):
        for lane in range(LANES):
            near = np.rint(centre[lane])
            near = near + np.float32(outwards(step)) if step < tries else -near
            whole[lane] = min(max(near, scale_low), scale_high)
            scale[lane] = whole[lane] * factor[lane]
            inverse[lane] = ONE / scale[lane] if scale[lane] != 0 else ZERO
        _symmetric_errors(x, w, scale, inverse, low, high, table, places, error)
        for lane in range(LANES):
            better = error[lane] < found[0, lane]
            found[0, lane] = error[lane] if better else found[0, lane]
            found[1, lane] = whole[lane] if better else found[1, lane]
    for lane in range(LANES):
        best = found[1, lane] * factor[lane]
        inverse[lane] = ONE / best if best != 0 else ZERO
    _symmetric_sums(x, w, inverse, low, high, table, places, found[2], found[3])


@njit(nogil=True, cache=True, error_model="numpy")
def fit_super_symmetric(
    blocks: Float32, weights: Float32 | None, first: int, low: np.float32, high: np.float32, table: Float32,
    starts: Float32, reach: int, refits: int, scale_low: np.float32, scale_high: np.float32, d: Float32,
    scales: Int16,
) -> None:  # fmt: skip
    """Fill `d` (`n`) and `scales` (`n s`) for `x ≈ d * scale[sub] * level` (as `fit_symmetric`).

    Whole numbers are chosen `refits` times.
    """
    subs = scales.shape[1]
    size, group = blocks.shape[1] // subs, LANES // subs
    x, w = np.empty((size, LANES), np.float32), weight_lanes(weights, size)
    unit, scale = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    factor, centre = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    scratch, places = np.empty((5, LANES), np.float32), np.empty(LANES, np.uint16)
    found, best = np.empty((4, LANES), np.float32), np.empty(group, np.float32)
    for block in range(0, blocks.shape[0], group):
        load_lanes(blocks, block, subs, x, unit, scratch)
        load_weights(weights, first, block, subs, w)
        _search_symmetric(x, w, low, high, table, starts, 1, places, scratch, scale)
        best[:] = HIGHEST
        for turn in range(refits):
            for b in range(group):
                lanes = slice(b * subs, (b + 1) * subs)
                if turn == 0:
                    value = scale[lanes][np.argmax(np.abs(scale[lanes]))] / scale_low
                else:
                    whole = found[1, lanes]
                    total = (whole * whole * found[3, lanes]).sum()
                    value = (whole * found[2, lanes]).sum() / total if total > 0 else factor[b * subs]
                factor[lanes] = half_in_unit(value, unit[b * subs])
            for lane in range(LANES):
                start = scale[lane] / factor[lane] if factor[lane] != 0 else ZERO
                centre[lane] = start if turn == 0 else found[1, lane]
            _choose_scales(
                x, w, factor, low, high, table, centre, reach if turn == 0 else 1, turn == 0, scale_low,
                scale_high, places, scratch, found,
            )  # fmt: skip
            for b in range(min(group, blocks.shape[0] - block)):
                lanes = slice(b * subs, (b + 1) * subs)
                total = found[0, lanes].sum()
                if total < best[b]:
                    best[b] = total
                    d[block + b] = factor[b * subs] * unit[b * subs]
                    for s in range(subs):
                        scales[block + b, s] = np.int16(found[1, b * subs + s])
