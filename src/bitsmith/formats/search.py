"""Search block scales that minimise `sum_j w_j (x_j - q_j)^2`.

Sub-blocks are laid side by side, `LANES` at a time, so that every sum runs down one lane in a fixed order:
the loops vectorise without reassociation and the result does not depend on the processor's vector width, on
the number of threads or on how the rows were cut. Values are scaled by a power of two per block (`unit`),
which is exact and keeps every sum in range.

A candidate scale is judged by the best error its codes allow: with codes `q`, the scale `sum(wqx) / sum(wqq)`
leaves the error `sum(wxx) - sum(wqx)^2 / sum(wqq)`, so the largest gain `sum(wqx)^2 / sum(wqq)` wins.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.formats.format import Float32
from bitsmith.numerics.half import HALF_TINY, half_round

LANES = 64

_SMALLEST = np.float32(2.0**-100)  # blocks whose largest weight is below it are stored as zeros
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)

Int16 = NDArray[np.int16]


@njit(nogil=True, cache=True, error_model="numpy")
def _load_weights(weights: Float32, block: int, blocks: int, subs: int, w: Float32) -> None:
    size = w.shape[0]
    for lane in range(LANES):
        row = (block + lane // subs) % weights.shape[0]
        at = (lane % subs) * size
        for j in range(size):
            w[j, lane] = weights[row, at + j]


@njit(nogil=True, cache=True, error_model="numpy")
def _load_lanes(blocks: Float32, block: int, subs: int, x: Float32, unit: Float32) -> None:
    size = x.shape[0]
    for k in range(LANES // subs):
        scale = _ZERO
        inverse = _ZERO
        if block + k < blocks.shape[0]:
            bits = np.int32(0)
            for j in range(subs * size):
                bits = max(
                    bits, np.int32(np.float32(blocks[block + k, j]).view(np.int32) & np.int32(0x7FFFFFFF))
                )
            largest = np.int32(bits).view(np.float32)
            if largest >= _SMALLEST:
                exponent = min(np.int32(bits & np.int32(0x7F800000)), np.int32(0x7E000000))
                scale = np.int32(exponent).view(np.float32)
                inverse = _ONE / scale
        for s in range(subs):
            lane = k * subs + s
            unit[lane] = scale
            if scale > 0:
                for j in range(size):
                    x[j, lane] = blocks[block + k, s * size + j] * inverse
            else:
                for j in range(size):
                    x[j, lane] = _ZERO


@njit(nogil=True, cache=True, error_model="numpy")
def _symmetric_sums(
    x: Float32, w: Float32, inverse: Float32, low: np.float32, high: np.float32, table: Float32,
    sqx: Float32, sqq: Float32,
) -> None:  # fmt: skip
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
    else:
        middle = np.float32(table.size // 2)
        top = middle + middle - _ONE
        for j in range(x.shape[0]):
            for lane in range(LANES):
                value = x[j, lane]
                q = table[np.int32(min(max(value * inverse[lane] * _TWO + middle, _ZERO), top))]
                wq = w[j, lane] * q
                sqx[lane] += wq * value
                sqq[lane] += wq * q


@njit(nogil=True, cache=True, error_model="numpy")
def _search_symmetric(
    x: Float32, w: Float32, low: np.float32, high: np.float32, table: Float32, targets: Float32, rounds: int,
    scratch: Float32, scale: Float32,
) -> None:  # fmt: skip
    extreme, inverse, sqx, sqq, best = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    for lane in range(LANES):
        extreme[lane] = _ZERO
        best[lane] = _ZERO
        scale[lane] = _ZERO
    for j in range(x.shape[0]):
        for lane in range(LANES):
            value = x[j, lane]
            extreme[lane] = value if abs(value) > abs(extreme[lane]) else extreme[lane]
    for t in range(targets.size + rounds):
        for lane in range(LANES):
            at = extreme[lane] if t < targets.size else scale[lane]
            target = targets[t] if t < targets.size else _ONE
            inverse[lane] = target / at if at != 0 else _ZERO
        _symmetric_sums(x, w, inverse, low, high, table, sqx, sqq)
        for lane in range(LANES):
            gain = sqx[lane] * sqx[lane] / sqq[lane]
            better = gain > best[lane]
            best[lane] = gain if better else best[lane]
            scale[lane] = sqx[lane] / sqq[lane] if better else scale[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def fit_symmetric(
    blocks: Float32, weights: Float32, first: int, low: np.float32, high: np.float32, table: Float32,
    targets: Float32, rounds: int, d: Float32,
) -> None:  # fmt: skip
    """Fill `d` (`n`) for `x ≈ d * level`, levels whole numbers in `low`…`high` or those of `table`."""
    size = blocks.shape[1]
    x = np.empty((size, LANES), np.float32)
    w = np.empty((size, LANES), np.float32)
    unit = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    scratch = np.empty((5, LANES), np.float32)
    for block in range(0, blocks.shape[0], LANES):
        _load_lanes(blocks, block, 1, x, unit)
        if block == 0 or weights.shape[0] > 1:
            _load_weights(weights, first + block, blocks.shape[0], 1, w)
        _search_symmetric(x, w, low, high, table, targets, rounds, scratch, scale)
        for lane in range(min(LANES, blocks.shape[0] - block)):
            d[block + lane] = half_round(scale[lane] * unit[lane])


@njit(nogil=True, cache=True, error_model="numpy")
def _super_gains(
    x: Float32, w: Float32, unit_d: Float32, subs: int, low: np.float32, high: np.float32, table: Float32,
    scale_low: int, scale_high: int, scale: Float32, scratch: Float32,
    trial: Int16, gain: Float32, num: Float32, den: Float32,
) -> None:  # fmt: skip
    """Choose whole sub-scales near `scale / unit_d` by their exact error; sum gain and the refit of d."""
    inverse, sqx, sqq = scratch[1], scratch[2], scratch[3]
    for lane in range(LANES):
        gain[lane] = np.float32(-np.inf)
    for step in range(3):
        for lane in range(LANES):
            du = unit_d[lane]
            near = np.rint(scale[lane] / du) if du != 0 else _ZERO
            whole = min(max(near + np.float32(step - 1), np.float32(scale_low)), np.float32(scale_high))
            s = whole * du
            scratch[4, lane] = whole
            inverse[lane] = _ONE / s if s != 0 else _ZERO
        _symmetric_sums(x, w, inverse, low, high, table, sqx, sqq)
        for lane in range(LANES):
            whole = scratch[4, lane]
            s = whole * unit_d[lane]
            this = s * (_TWO * sqx[lane] - s * sqq[lane])
            better = this > gain[lane]
            gain[lane] = this if better else gain[lane]
            trial[lane] = np.int16(whole) if better else trial[lane]
            num[lane] = whole * sqx[lane] if better else num[lane]
            den[lane] = whole * whole * sqq[lane] if better else den[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _half_in_unit(value: np.float32, unit: np.float32) -> np.float32:
    """Round `value * unit` to float16, never to zero, and give it back in the block's unit."""
    if unit == 0:
        return _ZERO
    true = half_round(value * unit)
    if true == 0:
        true = -HALF_TINY if value < 0 else HALF_TINY
    return true / unit


@njit(nogil=True, cache=True, error_model="numpy")
def fit_super_symmetric(
    blocks: Float32, weights: Float32, first: int, low: np.float32, high: np.float32, table: Float32,
    targets: Float32, scale_low: int, scale_high: int, spreads: Float32, d: Float32, scales: Int16,
) -> None:  # fmt: skip
    """Fill `d` (`n`) and `scales` (`n s`) for `x ≈ d * scale[sub] * level`."""
    subs = scales.shape[1]
    size = blocks.shape[1] // subs
    group = LANES // subs
    x = np.empty((size, LANES), np.float32)
    w = np.empty((size, LANES), np.float32)
    unit = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    scratch = np.empty((5, LANES), np.float32)
    unit_d = np.empty(LANES, np.float32)
    trial = np.empty(LANES, np.int16)
    gain = np.empty(LANES, np.float32)
    num = np.empty(LANES, np.float32)
    den = np.empty(LANES, np.float32)
    best = np.empty(group, np.float32)
    for block in range(0, blocks.shape[0], group):
        _load_lanes(blocks, block, subs, x, unit)
        if block == 0 or weights.shape[0] > 1:
            _load_weights(weights, first + block, blocks.shape[0], subs, w)
        _search_symmetric(x, w, low, high, table, targets, 2, scratch, scale)
        best[:] = np.float32(-np.inf)
        for k in range(spreads.size * 3):
            for b in range(group):
                lanes = slice(b * subs, (b + 1) * subs)
                if k % 3 == 0:
                    extreme = _ZERO
                    for s in scale[lanes]:
                        extreme = s if abs(s) > abs(extreme) else extreme
                    value = extreme / (np.float32(scale_low) + spreads[k // 3])
                else:
                    total = den[lanes].sum()
                    value = num[lanes].sum() / total if total > 0 else unit_d[b * subs]
                unit_d[lanes] = _half_in_unit(value, unit[b * subs])
            _super_gains(
                x, w, unit_d, subs, low, high, table, scale_low, scale_high, scale, scratch,
                trial, gain, num, den,
            )  # fmt: skip
            for b in range(min(group, blocks.shape[0] - block)):
                total = gain[b * subs : (b + 1) * subs].sum()
                if total > best[b]:
                    best[b] = total
                    d[block + b] = unit_d[b * subs] * unit[b * subs]
                    scales[block + b] = trial[b * subs : (b + 1) * subs]


@njit(nogil=True, cache=True, error_model="numpy")
def _affine_sums(
    x: Float32, w: Float32, inverse: Float32, offset: Float32, high: np.float32,
    sq: Float32, sqx: Float32, sqq: Float32,
) -> None:  # fmt: skip
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
def _search_affine(
    x: Float32, w: Float32, high: np.float32, targets: Float32, rounds: int, negative: bool, scratch: Float32,
    scale: Float32, offset: Float32,
) -> None:  # fmt: skip
    """Find `x ≈ scale * q - offset` per lane; with `negative` false the offset stays at or above 0."""
    least, most, sw, sx = scratch[0], scratch[1], scratch[2], scratch[3]
    inverse, trial, sq, sqx, sqq, best = (
        scratch[4], scratch[5], scratch[6], scratch[7], scratch[8], scratch[9],
    )  # fmt: skip
    for lane in range(LANES):
        least[lane] = x[0, lane] if negative else min(x[0, lane], _ZERO)
        most[lane] = x[0, lane]
        sw[lane] = _ZERO
        sx[lane] = _ZERO
    for j in range(x.shape[0]):
        for lane in range(LANES):
            value = x[j, lane]
            least[lane] = min(least[lane], value)
            most[lane] = max(most[lane], value)
            sw[lane] += w[j, lane]
            sx[lane] += w[j, lane] * value
    for lane in range(LANES):
        # all weights one value: the offset alone, or the scale alone where the offset may not be negative
        mean = sx[lane] / sw[lane]
        offset[lane] = -mean if negative or mean < 0 else _ZERO
        scale[lane] = _ZERO
        best[lane] = mean * sx[lane] if negative or mean < 0 else _ZERO
    for t in range(targets.size + rounds):
        for lane in range(LANES):
            span = most[lane] - least[lane]
            first = t < targets.size
            trial[lane] = -least[lane] if first else offset[lane]
            step = span if first else scale[lane]
            target = targets[t] if first else _ONE
            inverse[lane] = target / step if step > 0 else _ZERO
        _affine_sums(x, w, inverse, trial, high, sq, sqx, sqq)
        for lane in range(LANES):
            det = sw[lane] * sqq[lane] - sq[lane] * sq[lane]
            s = (sw[lane] * sqx[lane] - sx[lane] * sq[lane]) / det
            o = (sq[lane] * sqx[lane] - sqq[lane] * sx[lane]) / det
            alone = (not negative) and not o > 0
            s = sqx[lane] / sqq[lane] if alone else s
            o = _ZERO if alone else o
            gain = s * sqx[lane] - o * sx[lane]
            better = gain > best[lane] and s > 0
            best[lane] = gain if better else best[lane]
            scale[lane] = s if better else scale[lane]
            offset[lane] = o if better else offset[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def fit_affine(
    blocks: Float32, weights: Float32, first: int, high: np.float32, targets: Float32, rounds: int,
    d: Float32, m: Float32,
) -> None:  # fmt: skip
    """Fill `d` and `m` (`n`) for `x ≈ d * code - m`."""
    size = blocks.shape[1]
    x = np.empty((size, LANES), np.float32)
    w = np.empty((size, LANES), np.float32)
    unit = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    offset = np.empty(LANES, np.float32)
    scratch = np.empty((10, LANES), np.float32)
    for block in range(0, blocks.shape[0], LANES):
        _load_lanes(blocks, block, 1, x, unit)
        if block == 0 or weights.shape[0] > 1:
            _load_weights(weights, first + block, blocks.shape[0], 1, w)
        _search_affine(x, w, high, targets, rounds, True, scratch, scale, offset)
        for lane in range(min(LANES, blocks.shape[0] - block)):
            d[block + lane] = half_round(scale[lane] * unit[lane])
            m[block + lane] = half_round(offset[lane] * unit[lane])


@njit(nogil=True, cache=True, error_model="numpy")
def _super_affine_gains(
    x: Float32, w: Float32, unit_d: Float32, unit_m: Float32, high: np.float32, scale_max: int,
    scale: Float32, offset: Float32, scratch: Float32,
    whole_scale: Int16, whole_min: Int16, gain: Float32, normal: Float32,
) -> None:  # fmt: skip
    """Choose whole sub-scales and sub-mins by exact error; keep the sums that refit d and m."""
    sw, sx, inverse, trial, sq, sqx, sqq = (
        scratch[2], scratch[3], scratch[4], scratch[5], scratch[6], scratch[7], scratch[8],
    )  # fmt: skip
    top = np.float32(scale_max)
    for lane in range(LANES):
        gain[lane] = np.float32(-np.inf)
    for step in range(9):
        for lane in range(LANES):
            du, mu = unit_d[lane], unit_m[lane]
            ws = np.rint(scale[lane] / du) if du > 0 else _ZERO
            wm = np.rint(offset[lane] / mu) if mu > 0 else _ZERO
            ws = min(max(ws + np.float32(step % 3 - 1), _ZERO), top)
            wm = min(max(wm + np.float32(step // 3 - 1), _ZERO), top)
            scratch[0, lane] = ws
            scratch[1, lane] = wm
            trial[lane] = wm * mu
            inverse[lane] = _ONE / (ws * du) if ws * du > 0 else _ZERO
        _affine_sums(x, w, inverse, trial, high, sq, sqx, sqq)
        for lane in range(LANES):
            ws, wm = scratch[0, lane], scratch[1, lane]
            s = ws * unit_d[lane]
            o = wm * unit_m[lane]
            this = s * (_TWO * (sqx[lane] + o * sq[lane]) - s * sqq[lane]) - o * (
                _TWO * sx[lane] + o * sw[lane]
            )
            better = this > gain[lane]
            gain[lane] = this if better else gain[lane]
            whole_scale[lane] = np.int16(ws) if better else whole_scale[lane]
            whole_min[lane] = np.int16(wm) if better else whole_min[lane]
            normal[0, lane] = ws * ws * sqq[lane] if better else normal[0, lane]
            normal[1, lane] = ws * wm * sq[lane] if better else normal[1, lane]
            normal[2, lane] = wm * wm * sw[lane] if better else normal[2, lane]
            normal[3, lane] = ws * sqx[lane] if better else normal[3, lane]
            normal[4, lane] = wm * sx[lane] if better else normal[4, lane]


@njit(nogil=True, cache=True, error_model="numpy")
def fit_super_affine(
    blocks: Float32, weights: Float32, first: int, high: np.float32, targets: Float32, scale_max: int,
    spreads: Float32, d: Float32, m: Float32, scales: Int16, mins: Int16,
) -> None:  # fmt: skip
    """Fill `d`, `m` (`n`), `scales` and `mins` (`n s`) for `x ≈ d * scale[sub] * code - m * min[sub]`."""
    subs = scales.shape[1]
    size = blocks.shape[1] // subs
    group = LANES // subs
    x = np.empty((size, LANES), np.float32)
    w = np.empty((size, LANES), np.float32)
    unit = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    offset = np.empty(LANES, np.float32)
    scratch = np.empty((10, LANES), np.float32)
    unit_d = np.empty(LANES, np.float32)
    unit_m = np.empty(LANES, np.float32)
    whole_scale = np.empty(LANES, np.int16)
    whole_min = np.empty(LANES, np.int16)
    gain = np.empty(LANES, np.float32)
    normal = np.empty((5, LANES), np.float32)
    best = np.empty(group, np.float32)
    for block in range(0, blocks.shape[0], group):
        _load_lanes(blocks, block, subs, x, unit)
        if block == 0 or weights.shape[0] > 1:
            _load_weights(weights, first + block, blocks.shape[0], subs, w)
        _search_affine(x, w, high, targets, 2, False, scratch, scale, offset)
        best[:] = np.float32(-np.inf)
        for k in range(spreads.size * 3):
            for b in range(group):
                lanes = slice(b * subs, (b + 1) * subs)
                if k % 3 == 0:
                    dv = scale[lanes].max() / (np.float32(scale_max) + spreads[k // 3])
                    mv = offset[lanes].max() / (np.float32(scale_max) + spreads[k // 3])
                else:
                    aa, ab, bb = normal[0, lanes].sum(), normal[1, lanes].sum(), normal[2, lanes].sum()
                    ax, bx = normal[3, lanes].sum(), normal[4, lanes].sum()
                    det = aa * bb - ab * ab
                    dv, mv = unit_d[b * subs], unit_m[b * subs]
                    if det > np.float32(1e-6) * aa * bb:
                        dv = (ax * bb - bx * ab) / det
                        mv = (ax * ab - bx * aa) / det
                    elif aa > 0:
                        dv = ax / aa
                unit_d[lanes] = _half_in_unit(max(dv, _ZERO), unit[b * subs])
                unit_m[lanes] = _half_in_unit(max(mv, _ZERO), unit[b * subs])
            _super_affine_gains(
                x, w, unit_d, unit_m, high, scale_max, scale, offset, scratch,
                whole_scale, whole_min, gain, normal,
            )  # fmt: skip
            for b in range(min(group, blocks.shape[0] - block)):
                total = gain[b * subs : (b + 1) * subs].sum()
                if total > best[b]:
                    best[b] = total
                    d[block + b] = unit_d[b * subs] * unit[b * subs]
                    m[block + b] = unit_m[b * subs] * unit[b * subs]
                    scales[block + b] = whole_scale[b * subs : (b + 1) * subs]
                    mins[block + b] = whole_min[b * subs : (b + 1) * subs]
