"""Search block scales that minimise `sum_j w_j (x_j - q_j)^2`.

Sub-blocks are laid side by side, `LANES` at a time, so that every sum runs down one lane in a fixed order:
the loops vectorise without reassociation and the result does not depend on the processor's vector width, on
the number of threads or on how the rows were cut. Values are scaled by a power of two per block (`unit`),
which is exact and keeps every sum in range.

First every sub-block tries a list of starts. Its codes `q` under a start allow the least-squares scale
`sum(wqx) / sum(wqq)`, which lowers the error from `sum(wxx)` by the gain `sum(wqx)^2 / sum(wqq)` (with an
offset: the two-variable form); the largest gain wins. Then, where sub-scales are whole numbers, the
neighbours of the rounded ones are tried by their exact error, and the block's float16 factors are refitted by
least squares to the codes and whole numbers found, in turn; the best block seen is kept.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.formats.format import Float32
from bitsmith.numerics.half import HALF_TINY, half_round

LANES = 64

EVEN = np.zeros(1, np.float32)
"""Stands for whole-number levels where a kernel takes a table of levels."""

_REFITS = 3  # times the whole numbers of a block are chosen; between two, its float16 factors are refitted
_SMALLEST = np.float32(2.0**-100)  # blocks whose largest weight is below it are stored as zeros
_EXPONENT = np.int32(0x7F800000)
_EXPONENT_LIMIT = np.int32(0x7E000000)  # whose reciprocal is still a normal number
_NOISE = np.float32(2.0**-20)  # of a gain; within it equals fall to the same start in every sub-block
_SPREAD = np.float32(1e-5)  # of codes, relative; with less there is no telling scale from offset
_HEARD = np.float32(1e-6)  # weights up to it (the largest of a block is 1) do not stretch the starts' span
_HIGHEST = np.float32(np.inf)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)

Int16 = NDArray[np.int16]


@njit(nogil=True, cache=True, error_model="numpy")
def _load_weights(weights: Float32, block: int, subs: int, w: Float32) -> None:
    size = w.shape[0]
    for lane in range(LANES):
        row = (block + lane // subs) % weights.shape[0]
        at = (lane % subs) * size
        for j in range(size):
            w[j, lane] = weights[row, at + j]


@njit(nogil=True, cache=True, error_model="numpy")
def _load_lanes(blocks: Float32, block: int, subs: int, x: Float32, unit: Float32, scratch: Float32) -> None:
    """Fill `x` with sub-blocks side by side, over their block's `unit`; lanes past the end are zero."""
    rows = blocks.reshape(-1, x.shape[0])
    filled = min(LANES, rows.shape[0] - block * subs)
    inverse = scratch[0]
    for lane in range(filled):
        for j in range(x.shape[0]):
            x[j, lane] = rows[block * subs + lane, j]
    for lane in range(filled, LANES):
        for j in range(x.shape[0]):
            x[j, lane] = _ZERO
    _find_units(x, subs, unit, inverse)
    for j in range(x.shape[0]):
        for lane in range(LANES):
            x[j, lane] *= inverse[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _find_units(x: Float32, subs: int, unit: Float32, inverse: Float32) -> None:
    """Set `unit` to the power of two at or below each block's largest value, 0 to store it as zeros."""
    largest = unit
    for lane in range(LANES):
        largest[lane] = _ZERO
    for j in range(x.shape[0]):
        for lane in range(LANES):
            largest[lane] = max(largest[lane], abs(x[j, lane]))
    for start in range(0, LANES if subs > 1 else 0, subs):
        most = _ZERO
        for s in range(subs):
            most = max(most, largest[start + s])
        for s in range(subs):
            largest[start + s] = most
    for lane in range(LANES):
        exponent = np.int32(min(np.float32(largest[lane]).view(np.int32) & _EXPONENT, _EXPONENT_LIMIT))
        stored = largest[lane] >= _SMALLEST
        power = exponent.view(np.float32)
        inverse[lane] = _ONE / power if stored else _ZERO
        unit[lane] = power if stored else _ZERO


@njit(nogil=True, cache=True, error_model="numpy")
def _symmetric_sums(
    x: Float32, w: Float32, inverse: Float32, low: np.float32, high: np.float32, table: Float32,
    places: NDArray[np.uint16], sqx: Float32, sqq: Float32,
) -> None:  # fmt: skip
    """Sum `w q x` and `w q q` per lane for the levels `q` nearest to `x * inverse`.

    With a table, a place `p` has its level at index `floor(2 p) + len / 2`; the index is stored first so that
    both halves vectorise.
    """
    for lane in range(LANES):
        sqx[lane] = _ZERO
        sqq[lane] = _ZERO
    if table.size == 1:
        for j in range(x.shape[0]):
            for lane in range(LANES):
                value = x[j, lane]
                q = np.rint(min(max(value * inverse[lane], low), high))
                wq = w[j, lane] * q
                sqx[lane] += wq * value
                sqq[lane] += wq * q
        return
    middle = np.float32(table.size // 2)
    top = middle + middle - _ONE
    for j in range(x.shape[0]):
        for lane in range(LANES):
            place = x[j, lane] * inverse[lane] * _TWO + middle
            places[lane] = np.int32(min(max(place, _ZERO), top))
        for lane in range(LANES):
            q = table[places[lane]]
            wq = w[j, lane] * q
            sqx[lane] += wq * x[j, lane]
            sqq[lane] += wq * q


@njit(nogil=True, cache=True, error_model="numpy")
def _search_symmetric(
    x: Float32, w: Float32, low: np.float32, high: np.float32, table: Float32, starts: Float32, rounds: int,
    places: NDArray[np.uint16], scratch: Float32, scale: Float32,
) -> None:  # fmt: skip
    """Find `x ≈ scale * q` per lane. A start is the place that the lane's extreme value is put at."""
    extreme, inverse, sqx, sqq, best = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    for lane in range(LANES):
        extreme[lane] = _ZERO
        best[lane] = _ZERO
        scale[lane] = _ZERO
    for j in range(x.shape[0]):
        for lane in range(LANES):
            value = x[j, lane]
            larger = abs(value) > abs(extreme[lane]) and w[j, lane] > _HEARD
            extreme[lane] = value if larger else extreme[lane]
    for t in range(starts.size + rounds):
        for lane in range(LANES):
            at = extreme[lane] if t < starts.size else scale[lane]
            target = starts[t] if t < starts.size else _ONE
            inverse[lane] = target / at if at != 0 else _ZERO
        _symmetric_sums(x, w, inverse, low, high, table, places, sqx, sqq)
        for lane in range(LANES):
            gain = sqx[lane] * sqx[lane] / sqq[lane]
            better = gain > best[lane] + _NOISE * best[lane]
            best[lane] = gain if better else best[lane]
            scale[lane] = sqx[lane] / sqq[lane] if better else scale[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def fit_symmetric(
    blocks: Float32, weights: Float32, first: int, low: np.float32, high: np.float32, table: Float32,
    starts: Float32, rounds: int, d: Float32,
) -> None:  # fmt: skip
    """Fill `d` (`n`) for `x ≈ d * level`, levels whole numbers in `low`…`high` or those of `table`.

    Block `i` has the weights of row `(first + i) % len(weights)`. `rounds` refinements follow the `starts`.
    """
    size = blocks.shape[1]
    x, w = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    unit, scale = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    scratch, places = np.empty((5, LANES), np.float32), np.empty(LANES, np.uint16)
    for block in range(0, blocks.shape[0], LANES):
        _load_lanes(blocks, block, 1, x, unit, scratch)
        if block == 0 or weights.shape[0] > 1:
            _load_weights(weights, first + block, 1, w)
        _search_symmetric(x, w, low, high, table, starts, rounds, places, scratch, scale)
        for lane in range(min(LANES, blocks.shape[0] - block)):
            d[block + lane] = half_round(scale[lane] * unit[lane])


@njit(nogil=True, cache=True)
def _outwards(step: int) -> int:
    """Return 0, -1, 1, -2, 2, … for steps 0, 1, 2, …: the first of equals is the nearest."""
    return (step + 1) // 2 * (1 - 2 * (step & 1))


@njit(nogil=True, cache=True, error_model="numpy")
def _symmetric_errors(
    x: Float32, w: Float32, scale: Float32, inverse: Float32, low: np.float32, high: np.float32,
    table: Float32, places: NDArray[np.uint16], error: Float32,
) -> None:  # fmt: skip
    """Sum `w (x - scale q)^2` per lane, `q` as in `_symmetric_sums`."""
    for lane in range(LANES):
        error[lane] = _ZERO
    if table.size == 1:
        for j in range(x.shape[0]):
            for lane in range(LANES):
                value = x[j, lane]
                left = value - scale[lane] * np.rint(min(max(value * inverse[lane], low), high))
                error[lane] += w[j, lane] * left * left
        return
    middle = np.float32(table.size // 2)
    top = middle + middle - _ONE
    for j in range(x.shape[0]):
        for lane in range(LANES):
            place = x[j, lane] * inverse[lane] * _TWO + middle
            places[lane] = np.int32(min(max(place, _ZERO), top))
        for lane in range(LANES):
            left = x[j, lane] - scale[lane] * table[places[lane]]
            error[lane] += w[j, lane] * left * left


@njit(nogil=True, cache=True, error_model="numpy")
def _choose_scales(
    x: Float32, w: Float32, factor: Float32, low: np.float32, high: np.float32, table: Float32,
    centre: Float32, reach: int, scale_low: np.float32, scale_high: np.float32,
    places: NDArray[np.uint16], scratch: Float32, found: Float32,
) -> None:  # fmt: skip
    """Fill `found`: per lane the least error, its whole scale, and the sums that refit the factor.

    Whole scales within `reach` of `centre` are tried, and the one opposite to it: the grid is not symmetric.
    """
    whole, scale, inverse, error = scratch[0], scratch[1], scratch[2], scratch[3]
    for lane in range(LANES):
        found[0, lane] = _HIGHEST
    tries = 2 * reach + 1
    for step in range(tries + 1):
        for lane in range(LANES):
            near = np.rint(centre[lane])
            near = near + np.float32(_outwards(step)) if step < tries else -near
            whole[lane] = min(max(near, scale_low), scale_high)
            scale[lane] = whole[lane] * factor[lane]
            inverse[lane] = _ONE / scale[lane] if scale[lane] != 0 else _ZERO
        _symmetric_errors(x, w, scale, inverse, low, high, table, places, error)
        for lane in range(LANES):
            better = error[lane] < found[0, lane]
            found[0, lane] = error[lane] if better else found[0, lane]
            found[1, lane] = whole[lane] if better else found[1, lane]
    for lane in range(LANES):
        best = found[1, lane] * factor[lane]
        inverse[lane] = _ONE / best if best != 0 else _ZERO
    _symmetric_sums(x, w, inverse, low, high, table, places, found[2], found[3])


@njit(nogil=True, cache=True, error_model="numpy")
def _half_in_unit(value: np.float32, unit: np.float32) -> np.float32:
    """Round `value * unit` to float16, never to zero, and give it back in the block's unit."""
    if unit == 0:
        return _ZERO
    rounded = half_round(value * unit)
    if rounded == 0:
        rounded = -HALF_TINY if value < 0 else HALF_TINY
    return rounded / unit


@njit(nogil=True, cache=True, error_model="numpy")
def fit_super_symmetric(
    blocks: Float32, weights: Float32, first: int, low: np.float32, high: np.float32, table: Float32,
    starts: Float32, reach: int, scale_low: np.float32, scale_high: np.float32, d: Float32, scales: Int16,
) -> None:  # fmt: skip
    """Fill `d` (`n`) and `scales` (`n s`) for `x ≈ d * scale[sub] * level` (as `fit_symmetric`)."""
    subs = scales.shape[1]
    size, group = blocks.shape[1] // subs, LANES // subs
    x, w = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    unit, scale = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    factor, centre = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    scratch, places = np.empty((5, LANES), np.float32), np.empty(LANES, np.uint16)
    found, best = np.empty((4, LANES), np.float32), np.empty(group, np.float32)
    for block in range(0, blocks.shape[0], group):
        _load_lanes(blocks, block, subs, x, unit, scratch)
        if block == 0 or weights.shape[0] > 1:
            _load_weights(weights, first + block, subs, w)
        _search_symmetric(x, w, low, high, table, starts, 1, places, scratch, scale)
        best[:] = _HIGHEST
        for turn in range(_REFITS):
            for b in range(group):
                lanes = slice(b * subs, (b + 1) * subs)
                if turn == 0:
                    value = scale[lanes][np.argmax(np.abs(scale[lanes]))] / scale_low
                else:
                    whole = found[1, lanes]
                    total = (whole * whole * found[3, lanes]).sum()
                    value = (whole * found[2, lanes]).sum() / total if total > 0 else factor[b * subs]
                factor[lanes] = _half_in_unit(value, unit[b * subs])
            for lane in range(LANES):
                start = scale[lane] / factor[lane] if factor[lane] != 0 else _ZERO
                centre[lane] = start if turn == 0 else found[1, lane]
            _choose_scales(
                x, w, factor, low, high, table, centre, reach if turn == 0 else 1, scale_low, scale_high,
                places, scratch, found,
            )  # fmt: skip
            for b in range(min(group, blocks.shape[0] - block)):
                lanes = slice(b * subs, (b + 1) * subs)
                total = found[0, lanes].sum()
                if total < best[b]:
                    best[b] = total
                    d[block + b] = factor[b * subs] * unit[b * subs]
                    for s in range(subs):
                        scales[block + b, s] = np.int16(found[1, b * subs + s])


@njit(nogil=True, cache=True, error_model="numpy")
def _affine_sums(
    x: Float32, w: Float32, inverse: Float32, offset: Float32, high: np.float32,
    sq: Float32, sqx: Float32, sqq: Float32,
) -> None:  # fmt: skip
    """Sum `w q`, `w q x` and `w q q` per lane for the codes `q` nearest to `(x + offset) * inverse`."""
    for lane in range(LANES):
        sq[lane] = _ZERO
        sqx[lane] = _ZERO
        sqq[lane] = _ZERO
    for j in range(x.shape[0]):
        for lane in range(LANES):
            value = x[j, lane]
            q = np.rint(min(max((value + offset[lane]) * inverse[lane], _ZERO), high))
            wq = w[j, lane] * q
            sq[lane] += wq
            sqx[lane] += wq * value
            sqq[lane] += wq * q


@njit(nogil=True, cache=True, error_model="numpy")
def _measure_lanes(
    x: Float32, w: Float32, negative: bool, least: Float32, most: Float32, sw: Float32, sx: Float32
) -> None:
    for lane in range(LANES):
        least[lane] = _HIGHEST if negative else _ZERO
        most[lane] = -_HIGHEST
        sw[lane] = _ZERO
        sx[lane] = _ZERO
    for j in range(x.shape[0]):
        for lane in range(LANES):
            value = x[j, lane]
            heard = w[j, lane] > _HEARD
            least[lane] = min(least[lane], value) if heard else least[lane]
            most[lane] = max(most[lane], value) if heard else most[lane]
            sw[lane] += w[j, lane]
            sx[lane] += w[j, lane] * value


@njit(nogil=True, cache=True, error_model="numpy")
def _search_affine(
    x: Float32, w: Float32, high: np.float32, starts: Float32, rounds: int, negative: bool, scratch: Float32,
    line: Float32,
) -> None:  # fmt: skip
    """Find `x ≈ scale * q - offset` per lane; unless `negative`, the offset stays at or above 0.

    A start (share, stretch) puts code 0 at `least + share * span` and spreads `stretch` steps over the span.
    Fills `line` with scale, offset and the codes' weighted sum.
    """
    least, most, sw, sx = scratch[0], scratch[1], scratch[2], scratch[3]
    inverse, trial, sq, sqx = scratch[4], scratch[5], scratch[6], scratch[7]
    sqq, best = scratch[8], scratch[9]
    scale, offset, codes = line[0], line[1], line[2]
    _measure_lanes(x, w, negative, least, most, sw, sx)
    for lane in range(LANES):
        mean = sx[lane] / sw[lane]
        flat = negative or mean < 0
        offset[lane] = -mean if flat else _ZERO
        best[lane] = _ZERO if flat else -mean * sx[lane]
        scale[lane] = _ZERO
        codes[lane] = _ZERO
    for t in range(starts.shape[0] + rounds):
        for lane in range(LANES):
            span = most[lane] - least[lane]
            begin = t < starts.shape[0]
            trial[lane] = -(least[lane] + starts[t, 0] * span) if begin else offset[lane]
            step = span if begin else scale[lane]
            inverse[lane] = (starts[t, 1] if begin else _ONE) / step if step > 0 else _ZERO
        _affine_sums(x, w, inverse, trial, high, sq, sqx, sqq)
        for lane in range(LANES):
            mean, level = sx[lane] / sw[lane], sq[lane] / sw[lane]
            together = sqx[lane] - level * sx[lane]
            spread = sqq[lane] - level * sq[lane]
            known = spread > _SPREAD * sqq[lane]
            s = together / spread if known else _ZERO
            o = s * level - mean
            gain = s * together
            alone = (not negative) and not (known and o > 0)
            gain = sqx[lane] * sqx[lane] / sqq[lane] - mean * sx[lane] if alone else gain
            s = sqx[lane] / sqq[lane] if alone else s
            o = _ZERO if alone else o
            noise = _NOISE * (max(best[lane], _ZERO) + mean * sx[lane])
            better = gain > best[lane] + noise and s > 0
            best[lane] = gain if better else best[lane]
            scale[lane] = s if better else scale[lane]
            offset[lane] = o if better else offset[lane]
            codes[lane] = sq[lane] if better else codes[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def fit_affine(
    blocks: Float32, weights: Float32, first: int, high: np.float32, starts: Float32, rounds: int,
    d: Float32, m: Float32,
) -> None:  # fmt: skip
    """Fill `d` and `m` (`n`) for `x ≈ d * code - m` (as `fit_symmetric`)."""
    size = blocks.shape[1]
    x, w = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    unit, line = np.empty(LANES, np.float32), np.empty((3, LANES), np.float32)
    scratch = np.empty((10, LANES), np.float32)
    for block in range(0, blocks.shape[0], LANES):
        _load_lanes(blocks, block, 1, x, unit, scratch)
        if block == 0 or weights.shape[0] > 1:
            _load_weights(weights, first + block, 1, w)
        _search_affine(x, w, high, starts, rounds, True, scratch, line)
        for lane in range(min(LANES, blocks.shape[0] - block)):
            d[block + lane] = half_round(line[0, lane] * unit[lane])
            # where the scale underflows, the best the block can hold is one value: the mean
            offset = line[1, lane] if d[block + lane] != 0 else -scratch[3, lane] / scratch[2, lane]
            m[block + lane] = half_round(offset * unit[lane])


@njit(nogil=True, cache=True, error_model="numpy")
def _affine_errors(
    x: Float32,
    w: Float32,
    scale: Float32,
    inverse: Float32,
    offset: Float32,
    high: np.float32,
    error: Float32,
) -> None:
    """Sum `w (x + offset - scale q)^2` per lane, `q` as in `_affine_sums`."""
    for lane in range(LANES):
        error[lane] = _ZERO
    for j in range(x.shape[0]):
        for lane in range(LANES):
            value = x[j, lane] + offset[lane]
            left = value - scale[lane] * np.rint(min(max(value * inverse[lane], _ZERO), high))
            error[lane] += w[j, lane] * left * left


@njit(nogil=True, cache=True, error_model="numpy")
def _choose_scales_and_mins(
    x: Float32, w: Float32, factor: Float32, factor_m: Float32, high: np.float32, top: np.float32,
    line: Float32, turn: int, reach: int, reach_m: int, scratch: Float32, found: Float32,
) -> None:  # fmt: skip
    """Fill `found`: per lane the least error, its whole scale and min, and the sums that refit the factors.

    The first turn looks around the lane's line: for each scale, the mins near the one its codes call for.
    Later turns look around what was found before.
    """
    whole, whole_m, sw, sx = scratch[0], scratch[1], scratch[2], scratch[3]
    inverse, offset, scale, error = scratch[4], scratch[5], scratch[6], scratch[7]
    centre, centre_m = scratch[8], scratch[9]
    for lane in range(LANES):
        start = line[0, lane] / factor[lane] if factor[lane] > 0 else _ZERO
        centre[lane] = np.rint(start) if turn == 0 else found[1, lane]
        centre_m[lane] = found[2, lane]
        found[0, lane] = _HIGHEST
    width = 2 * reach_m + 1
    for step in range((2 * reach + 1) * width):
        for lane in range(LANES):
            whole[lane] = min(max(centre[lane] + np.float32(_outwards(step // width)), _ZERO), top)
            scale[lane] = whole[lane] * factor[lane]
            inverse[lane] = _ONE / scale[lane] if scale[lane] > 0 else _ZERO
            wanted = (scale[lane] * line[2, lane] - sx[lane]) / sw[lane]
            wanted = max(wanted if line[0, lane] > 0 else line[1, lane], _ZERO)
            near = np.rint(wanted / factor_m[lane]) if factor_m[lane] > 0 else _ZERO
            near = near if turn == 0 else centre_m[lane]
            whole_m[lane] = min(max(near + np.float32(_outwards(step % width)), _ZERO), top)
            offset[lane] = whole_m[lane] * factor_m[lane]
        _affine_errors(x, w, scale, inverse, offset, high, error)
        for lane in range(LANES):
            better = error[lane] < found[0, lane]
            found[0, lane] = error[lane] if better else found[0, lane]
            found[1, lane] = whole[lane] if better else found[1, lane]
            found[2, lane] = whole_m[lane] if better else found[2, lane]
    for lane in range(LANES):
        best = found[1, lane] * factor[lane]
        inverse[lane] = _ONE / best if best > 0 else _ZERO
        offset[lane] = found[2, lane] * factor_m[lane]
    _affine_sums(x, w, inverse, offset, high, found[3], found[4], found[5])


@njit(nogil=True, cache=True, error_model="numpy")
def _refit_factors(
    found: Float32, sw: Float32, sx: Float32, d: np.float32, m: np.float32
) -> tuple[np.float32, np.float32]:
    """Solve least squares for the block's two factors; where it is singular keep `m` and fit `d` alone."""
    aa = ab = bb = ax = bx = 0.0
    for s in range(sw.size):
        a, b = float(found[1, s]), float(found[2, s])
        aa += a * a * found[5, s]
        ab += a * b * found[3, s]
        bb += b * b * sw[s]
        ax += a * found[4, s]
        bx += b * sx[s]
    det = aa * bb - ab * ab
    if det > 1e-6 * aa * bb:
        return np.float32((ax * bb - bx * ab) / det), np.float32((ax * ab - bx * aa) / det)
    return (np.float32((ax + m * ab) / aa) if aa > 0 else d), m


@njit(nogil=True, cache=True, error_model="numpy")
def fit_super_affine(
    blocks: Float32, weights: Float32, first: int, high: np.float32, starts: Float32, reach: int,
    reach_m: int, top: np.float32, d: Float32, m: Float32, scales: Int16, mins: Int16,
) -> None:  # fmt: skip
    """Fill `d`, `m` (`n`), `scales`, `mins` (`n s`) for `x ≈ d * scale[sub] * code - m * min[sub]`."""
    subs = scales.shape[1]
    size, group = blocks.shape[1] // subs, LANES // subs
    x, w = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    unit, line = np.empty(LANES, np.float32), np.empty((3, LANES), np.float32)
    factor, factor_m = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    scratch, found = np.empty((10, LANES), np.float32), np.zeros((6, LANES), np.float32)
    best = np.empty(group, np.float32)
    for block in range(0, blocks.shape[0], group):
        _load_lanes(blocks, block, subs, x, unit, scratch)
        if block == 0 or weights.shape[0] > 1:
            _load_weights(weights, first + block, subs, w)
        _search_affine(x, w, high, starts, 1, False, scratch, line)
        best[:] = _HIGHEST
        for turn in range(_REFITS):
            for b in range(group):
                lanes = slice(b * subs, (b + 1) * subs)
                value, value_m = line[0, lanes].max() / top, line[1, lanes].max() / top
                if turn > 0:
                    value, value_m = _refit_factors(
                        found[:, lanes],
                        scratch[2, lanes],
                        scratch[3, lanes],
                        factor[b * subs],
                        factor_m[b * subs],
                    )
                factor[lanes] = _half_in_unit(max(value, _ZERO), unit[b * subs])
                factor_m[lanes] = _half_in_unit(max(value_m, _ZERO), unit[b * subs])
            near, near_m = (reach, reach_m) if turn == 0 else (1, 1)
            _choose_scales_and_mins(
                x, w, factor, factor_m, high, top, line, turn, near, near_m, scratch, found
            )
            for b in range(min(group, blocks.shape[0] - block)):
                lanes = slice(b * subs, (b + 1) * subs)
                total = found[0, lanes].sum()
                if total < best[b]:
                    best[b] = total
                    d[block + b] = factor[b * subs] * unit[b * subs]
                    m[block + b] = factor_m[b * subs] * unit[b * subs]
                    for s in range(subs):
                        scales[block + b, s] = np.int16(found[1, b * subs + s])
                        mins[block + b, s] = np.int16(found[2, b * subs + s])
