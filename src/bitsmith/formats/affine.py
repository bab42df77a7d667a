"""Search scales and offsets: `x ≈ d * code - m` and `x ≈ d * scale[sub] * code - m * min[sub]`.

The way is that of `symmetric.py` with two unknowns: the line of least squares through `(q, x)`, then whole
numbers for scale and min together, then the block's two float16 factors.
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

SPREAD = np.float32(1e-5)  # of codes, relative; with less there is no telling scale from offset
Int16 = NDArray[np.int16]


@njit(nogil=True, cache=True, error_model="numpy")
def _affine_sums(
    x: Float32, w: Float32 | None, inverse: Float32, offset: Float32, high: np.float32,
    sq: Float32, sqx: Float32, sqq: Float32,
) -> None:  # fmt: skip
    """Sum `w q`, `w q x` and `w q q` per lane for the codes `q` nearest to `(x + offset) * inverse`."""
    zero, most = spread(ZERO, 16), spread(high, 16)
    for at in range(0, LANES, WIDE):
        by, moved = load(inverse, at, 16), load(offset, at, 16)
        codes, across, along = zero, zero, zero
        for first in range(at, x.size, 2 * LANES):
            a, b = load(x, first, 16), load(x, first + LANES, 16)
            p = nearest(smaller(larger((a + moved) * by, zero), most))
            q = nearest(smaller(larger((b + moved) * by, zero), most))
            wp, wq = weighted(w, first, p), weighted(w, first + LANES, q)
            codes, across, along = codes + (wp + wq), across + (wp * a + wq * b), along + (wp * p + wq * q)
        store(sq, at, codes)
        store(sqx, at, across)
        store(sqq, at, along)


@njit(nogil=True, cache=True, error_model="numpy")
def _measure_lanes(
    x: Float32, w: Float32 | None, negative: bool, least: Float32, most: Float32, sw: Float32, sx: Float32
) -> None:
    for lane in range(LANES):
        least[lane] = HIGHEST if negative else ZERO
        most[lane] = -HIGHEST
        sw[lane] = ZERO
        sx[lane] = ZERO
    for j in range(0, x.shape[0], 2):
        for lane in range(LANES):
            a, b, wa, wb = x[j, lane], x[j + 1, lane], weight_at(w, j, lane), weight_at(w, j + 1, lane)
            low = min(a if wa > HEARD else HIGHEST, b if wb > HEARD else HIGHEST)
            high = max(a if wa > HEARD else -HIGHEST, b if wb > HEARD else -HIGHEST)
            least[lane] = min(least[lane], low)
            most[lane] = max(most[lane], high)
            sw[lane] += wa + wb
            sx[lane] += wa * a + wb * b


@njit(nogil=True, cache=True, error_model="numpy")
def _search_affine(
    x: Float32, w: Float32 | None, high: np.float32, starts: Float32, rounds: int, negative: bool,
    scratch: Float32, line: Float32,
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
        offset[lane] = -mean if flat else ZERO
        best[lane] = ZERO if flat else -mean * sx[lane]
        scale[lane] = ZERO
        codes[lane] = ZERO
    for t in range(starts.shape[0] + rounds):
        for lane in range(LANES):
            span = most[lane] - least[lane]
            begin = t < starts.shape[0]
            trial[lane] = -(least[lane] + starts[t, 0] * span) if begin else offset[lane]
            step = span if begin else scale[lane]
            inverse[lane] = (starts[t, 1] if begin else ONE) / step if step > 0 else ZERO
        _affine_sums(x, w, inverse, trial, high, sq, sqx, sqq)
        for lane in range(LANES):
            mean, level = sx[lane] / sw[lane], sq[lane] / sw[lane]
            together = sqx[lane] - level * sx[lane]
            spread = sqq[lane] - level * sq[lane]
            known = spread > SPREAD * sqq[lane]
            s = together / spread if known else ZERO
            o = s * level - mean
            gain = s * together
            alone = (not negative) and not (known and o > 0)
            gain = sqx[lane] * sqx[lane] / sqq[lane] - mean * sx[lane] if alone else gain
            s = sqx[lane] / sqq[lane] if alone else s
            o = ZERO if alone else o
            noise = NOISE * (max(best[lane], ZERO) + mean * sx[lane])
            better = gain > best[lane] + noise and s > 0
            best[lane] = gain if better else best[lane]
            scale[lane] = s if better else scale[lane]
            offset[lane] = o if better else offset[lane]
            codes[lane] = sq[lane] if better else codes[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def fit_affine(
    blocks: Float32, weights: Float32 | None, first: int, high: np.float32, starts: Float32, rounds: int,
    d: Float32, m: Float32,
) -> None:  # fmt: skip
    """Fill `d` and `m` (`n`) for `x ≈ d * code - m` (as `fit_symmetric`)."""
    size = blocks.shape[1]
    x, w = np.empty((size, LANES), np.float32), weight_lanes(weights, size)
    unit, line = np.empty(LANES, np.float32), np.empty((3, LANES), np.float32)
    scratch = np.empty((10, LANES), np.float32)
    for block in range(0, blocks.shape[0], LANES):
        load_lanes(blocks, block, 1, x, unit, scratch)
        load_weights(weights, first, block, 1, w)
        _search_affine(x, w, high, starts, rounds, True, scratch, line)
        for lane in range(min(LANES, blocks.shape[0] - block)):
            d[block + lane] = half_round(line[0, lane] * unit[lane])
            # where the scale underflows, the best the block can hold is one value: the mean
            offset = line[1, lane] if d[block + lane] != 0 else -scratch[3, lane] / scratch[2, lane]
            m[block + lane] = half_round(offset * unit[lane])


@njit(nogil=True, cache=True, error_model="numpy")
def _affine_errors(
    x: Float32, w: Float32 | None, scale: Float32, inverse: Float32, offset: Float32, high: np.float32,
    error: Float32,
) -> None:  # fmt: skip
    """Sum `w (x + offset - scale q)^2` per lane, `q` as in `_affine_sums`."""
    zero, most = spread(ZERO, 16), spread(high, 16)
    for at in range(0, LANES, WIDE):
        by, moved, step, total = load(inverse, at, 16), load(offset, at, 16), load(scale, at, 16), zero
        for place in range(at, x.size, LANES):
            value = load(x, place, 16) + moved
            left = value - step * nearest(smaller(larger(value * by, zero), most))
            total = total + weighted(w, place, left) * left
        store(error, at, total)


@njit(nogil=True, cache=True, error_model="numpy")
def _choose_scales_and_mins(
    x: Float32, w: Float32 | None, factor: Float32, factor_m: Float32, high: np.float32, top: np.float32,
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
        start = line[0, lane] / factor[lane] if factor[lane] > 0 else ZERO
        centre[lane] = np.rint(start) if turn == 0 else found[1, lane]
        centre_m[lane] = found[2, lane]
        found[0, lane] = HIGHEST
    width = 2 * reach_m + 1
    for step in range((2 * reach + 1) * width):
        for lane in range(LANES):
            whole[lane] = min(max(centre[lane] + np.float32(outwards(step // width)), ZERO), top)
            scale[lane] = whole[lane] * factor[lane]
            inverse[lane] = ONE / scale[lane] if scale[lane] > 0 else ZERO
            wanted = (scale[lane] * line[2, lane] - sx[lane]) / sw[lane]
            wanted = max(wanted if line[0, lane] > 0 else line[1, lane], ZERO)
            near = np.rint(wanted / factor_m[lane]) if factor_m[lane] > 0 else ZERO
            near = near if turn == 0 else centre_m[lane]
            whole_m[lane] = min(max(near + np.float32(outwards(step % width)), ZERO), top)
            offset[lane] = whole_m[lane] * factor_m[lane]
        _affine_errors(x, w, scale, inverse, offset, high, error)
        for lane in range(LANES):
            better = error[lane] < found[0, lane]
            found[0, lane] = error[lane] if better else found[0, lane]
            found[1, lane] = whole[lane] if better else found[1, lane]
            found[2, lane] = whole_m[lane] if better else found[2, lane]
    for lane in range(LANES):
        best = found[1, lane] * factor[lane]
        inverse[lane] = ONE / best if best > 0 else ZERO
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
    blocks: Float32, weights: Float32 | None, first: int, high: np.float32, starts: Float32, reach: int,
    reach_m: int, refits: int, top: np.float32, d: Float32, m: Float32, scales: Int16, mins: Int16,
) -> None:  # fmt: skip
    """Fill `d`, `m` (`n`), `scales`, `mins` (`n s`) for `x ≈ d * scale[sub] * code - m * min[sub]`.

    Whole numbers are chosen `refits` times.
    """
    subs = scales.shape[1]
    size, group = blocks.shape[1] // subs, LANES // subs
    x, w = np.empty((size, LANES), np.float32), weight_lanes(weights, size)
    unit, line = np.empty(LANES, np.float32), np.empty((3, LANES), np.float32)
    factor, factor_m = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    scratch, found = np.empty((10, LANES), np.float32), np.zeros((6, LANES), np.float32)
    best = np.empty(group, np.float32)
    for block in range(0, blocks.shape[0], group):
        load_lanes(blocks, block, subs, x, unit, scratch)
        load_weights(weights, first, block, subs, w)
        _search_affine(x, w, high, starts, 1, False, scratch, line)
        best[:] = HIGHEST
        for turn in range(refits):
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
                factor[lanes] = half_in_unit(max(value, ZERO), unit[b * subs])
                factor_m[lanes] = half_in_unit(max(value_m, ZERO), unit[b * subs])
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
