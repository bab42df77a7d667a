"""Refit the float16 factors of blocks in the metric of their inputs, codes as they are."""

from __future__ import annotations

import numpy as np
from numba import njit

from bitsmith.numerics.half import half_round
from bitsmith.numerics.lane_products import LANES, add_products
from bitsmith.passes.feedback import LEAST_GAIN, ONE, TWO, ZERO, Tile


@njit(nogil=True, cache=True, error_model="numpy")
def refit_panel(
    base: Tile, target: Tile, turned: Tile, d: Tile, m: Tile, scales: Tile, mins: Tile, levels: Tile,
    errors: Tile,
) -> bool:  # fmt: skip
    """Refit a panel's float16 `d` and `m` (`blocks LANES`), block by block; tell whether any changed.

    With `a = scale * level` and `c = min` per column the error is `w - d a + m c`, its cost the square of the
    residual `r = V_jj (target_j - decoded_j)`, which changes by `a V` and `c V`: two unknowns, solved by
    least squares, then `d` is rounded, `m` solved given that and rounded. Kept only where the cost falls.
    `turned` is Vᵀ; `target` and `errors` are kept up to date.
    """
    subs, blocks = scales.shape[0], d.shape[0]
    size, each, kind = base.shape[0] // subs, base.shape[0] // d.shape[0], base.dtype
    a, c = np.empty((each, LANES), kind), np.empty((each, LANES), kind)
    av, cv = np.empty(base.shape, kind), np.empty(base.shape, kind)
    sums, new = np.empty((5, LANES), kind), np.empty((2, LANES), kind)
    changed = False
    for block in range(blocks):
        at, has_min = block * each, False
        for j in range(each):
            for lane in range(LANES):
                a[j, lane] = scales[(at + j) // size, lane] * levels[at + j, lane]
                c[j, lane] = mins[(at + j) // size, lane]
                has_min |= c[j, lane] != 0
        _sum_up(base, target, errors, turned, at, a, c, has_min, av, cv, sums)
        for lane in range(LANES):
            changed |= _refit_lane(lane, sums, d[block], m[block], new)
        for j in range(at, base.shape[0]):
            own = ONE / turned[j, j]
            for lane in range(LANES):
                target[j, lane] += own * (new[1, lane] * cv[j, lane] - new[0, lane] * av[j, lane])
        for j in range(at, at + each):
            for lane in range(LANES):
                step, offset = (
                    d[block, lane] * scales[j // size, lane],
                    m[block, lane] * mins[j // size, lane],
                )
                now = base[j, lane] - (step * levels[j, lane] - offset)
                target[j, lane] += errors[j, lane] - now
                errors[j, lane] = now
    return changed


@njit(nogil=True, cache=True, error_model="numpy")
def _sum_up(
    base: Tile, target: Tile, errors: Tile, turned: Tile, at: int, a: Tile, c: Tile, has_min: bool, av: Tile,
    cv: Tile, sums: Tile,
) -> None:  # fmt: skip
    """Fill `av`, `cv` with the residual's change by `d` and `m`, and `sums` with what solves for both."""
    each, left = a.shape[0], np.empty((1, LANES), base.dtype)
    sums[:] = ZERO
    av[at:] = ZERO
    cv[at:] = ZERO
    for j in range(at, base.shape[0], 8):
        last = min(each, j - at + 8)
        add_products(turned, j, at, a, 0, last, av[j : j + 8])
        if has_min:
            add_products(turned, j, at, c, 0, last, cv[j : j + 8])
    for j in range(at, base.shape[0]):
        own = turned[j, j]
        for lane in range(LANES):
            left[0, lane] = own * (target[j, lane] - (base[j, lane] - errors[j, lane]))
        for lane in range(LANES):
            sums[0, lane] += av[j, lane] * av[j, lane]
            sums[3, lane] += av[j, lane] * left[0, lane]
        for lane in range(LANES if has_min else 0):
            sums[1, lane] += av[j, lane] * cv[j, lane]
            sums[2, lane] += cv[j, lane] * cv[j, lane]
            sums[4, lane] += cv[j, lane] * left[0, lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _refit_lane(lane: int, sums: Tile, d: Tile, m: Tile, by_both: Tile) -> bool:
    """Move a lane's `d` and `m` to what costs least, and fill `by_both` with how far."""
    aa, ac, cc, ag, cg = sums[0, lane], sums[1, lane], sums[2, lane], sums[3, lane], sums[4, lane]
    by_both[0, lane] = ZERO
    by_both[1, lane] = ZERO
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
    by_both[0, lane] = by
    by_both[1, lane] = by_m
    return True
