"""Sub-blocks side by side, `LANES` at a time: what the scale searches run on.

Every sum runs down one lane in a fixed order, so the loops vectorise without reassociation and the result
does not depend on the processor's vector width, on the number of threads or on how the rows were cut. Values
of unusual size are scaled by a power of two per block (`unit`), which is exact and keeps sums in range.

numba's cache on disk notices a change to a function's own file only: after editing this one, delete
`__pycache__`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from bitsmith.formats.format import Float32
from bitsmith.numerics.half import HALF_TINY, half_round
from bitsmith.numerics.vectors import load, turn

LANES = 64
WIDE = 16  # lanes whose sums stay in the processor's registers
ZERO = np.float32(0.0)
ONE = np.float32(1.0)
TWO = np.float32(2.0)
REFITS = 3  # times a block's whole numbers are chosen; in between its float16 factors are refitted
HIGHEST = np.float32(np.inf)
NOISE = np.float32(2.0**-20)  # of a gain; within it equals fall to the same start in every sub-block
HEARD = np.float32(1e-6)  # weights up to it (the largest of a block is 1) do not stretch the starts' span
EXPONENT = np.int32(0x7F800000)
EXPONENT_LIMIT = np.int32(0x7E000000)  # whose reciprocal is still a normal number
ORDINARY_LOW, ORDINARY_HIGH = np.float32(2.0**-20), np.float32(2.0**20)
SMALLEST = np.float32(2.0**-100)  # blocks whose largest weight is below it are stored as zeros


def weight_at(w: Float32 | None, j: int, lane: int) -> np.float32:
    """Return the weight, 1 without weights: compiled for None, the products fall away."""
    return ONE if w is None else np.float32(w[j, lane])


@overload(weight_at, inline="always")
def _compiled_weight_at(w: Any, j: Any, lane: Any) -> Any:
    def one(w: Any, j: Any, lane: Any) -> Any:
        return ONE

    def given(w: Any, j: Any, lane: Any) -> Any:
        return w[j, lane]

    return one if isinstance(w, types.NoneType) else given


def weighted(w: Float32 | None, at: int, values: Any) -> Any:
    """Return `values` (16 of them) times the weights from flat place `at` on, as they are without weights."""


@overload(weighted, inline="always")
def _compiled_weighted(w: Any, at: Any, values: Any) -> Any:
    def alike(w: Any, at: Any, values: Any) -> Any:
        return values

    def given(w: Any, at: Any, values: Any) -> Any:
        return load(w, at, 16) * values

    return alike if isinstance(w, types.NoneType) else given


def weight_lanes(weights: Float32 | None, size: int) -> Float32 | None:
    """Return room for the weights of sub-blocks of `size`, None without weights."""
    return None if weights is None else np.empty((size, LANES), np.float32)


@overload(weight_lanes)
def _compiled_weight_lanes(weights: Any, size: Any) -> Any:
    def none(weights: Any, size: Any) -> Any:
        return None

    def room(weights: Any, size: Any) -> Any:
        return np.empty((size, LANES), np.float32)

    return none if isinstance(weights, types.NoneType) else room


@njit(nogil=True, cache=True, error_model="numpy")
def load_weights(weights: Float32 | None, first: int, block: int, subs: int, w: Float32 | None) -> None:
    """Fill `w` with the weights of the sub-blocks from `first + block` on, where there are any.

    Past block 0 it holds those of the blocks before already: the same where whole rows fill the lanes.
    """
    if weights is None:
        return
    if w is None:
        return
    if block > 0 and LANES // subs % weights.shape[0] == 0:
        return
    size = w.shape[0]
    for lane in range(LANES):
        row = (first + block + lane // subs) % weights.shape[0]
        at = (lane % subs) * size
        for j in range(size):
            w[j, lane] = weights[row, at + j]


@njit(nogil=True, cache=True, error_model="numpy")
def load_lanes(blocks: Float32, block: int, subs: int, x: Float32, unit: Float32, scratch: Float32) -> None:
    """Fill `x` with sub-blocks side by side, over their block's `unit`; lanes past the end are zero."""
    rows = blocks.reshape(-1, x.shape[0])
    filled = min(LANES, rows.shape[0] - block * subs)
    inverse = scratch[0]
    whole = filled // 8 * 8
    for lane in range(0, whole, 8):
        for j in range(0, x.shape[0], 8):
            turn(rows, (block * subs + lane) * x.shape[0] + j, x.shape[0], x, j * LANES + lane, LANES)
    for lane in range(whole, filled):
        for j in range(x.shape[0]):
            x[j, lane] = rows[block * subs + lane, j]
    for lane in range(filled, LANES):
        for j in range(x.shape[0]):
            x[j, lane] = ZERO
    _largest(x, subs, unit)
    if _find_units(unit, inverse):
        for j in range(x.shape[0]):
            for lane in range(LANES):
                x[j, lane] *= inverse[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _largest(x: Float32, subs: int, largest: Float32) -> None:
    """Set `largest` to the largest magnitude in each lane's block."""
    for lane in range(LANES):
        largest[lane] = ZERO
    for j in range(0, x.shape[0], 4):
        for lane in range(LANES):
            a = max(abs(x[j, lane]), abs(x[j + 1, lane]))
            b = max(abs(x[j + 2, lane]), abs(x[j + 3, lane]))
            largest[lane] = max(largest[lane], a, b)
    for start in range(0, LANES if subs > 1 else 0, subs):
        most = ZERO
        for s in range(subs):
            most = max(most, largest[start + s])
        for s in range(subs):
            largest[start + s] = most


@njit(nogil=True, cache=True, error_model="numpy")
def _find_units(unit: Float32, inverse: Float32) -> bool:
    """Turn each block's largest magnitude into its unit; tell whether any is not 1.

    A block of ordinary size keeps 1, others get the power of two at or below their largest, and 0 means that
    the block is stored as zeros.
    """
    ordinary = 0
    for lane in range(LANES):
        ordinary += (unit[lane] >= ORDINARY_LOW) & (unit[lane] <= ORDINARY_HIGH)
        inverse[lane] = ONE
    if ordinary == LANES:
        for lane in range(LANES):
            unit[lane] = ONE
        return False
    for lane in range(LANES):
        if unit[lane] < ORDINARY_LOW or unit[lane] > ORDINARY_HIGH:
            exponent = min(np.int32(np.float32(unit[lane]).view(np.int32) & EXPONENT), EXPONENT_LIMIT)
            stored = unit[lane] >= SMALLEST
            unit[lane] = np.int32(exponent).view(np.float32) if stored else ZERO
            inverse[lane] = ONE / unit[lane] if stored else ZERO
        else:
            unit[lane] = ONE
    return True


@njit(nogil=True, cache=True, error_model="numpy")
def half_in_unit(value: np.float32, unit: np.float32) -> np.float32:
    """Round `value * unit` to float16, never to zero, and give it back in the block's unit."""
    if unit == 0:
        return ZERO
    rounded = half_round(value * unit)
    if rounded == 0:
        rounded = -HALF_TINY if value < 0 else HALF_TINY
    return rounded / unit


@njit(nogil=True, cache=True)
def outwards(step: int) -> int:
    """Return 0, -1, 1, -2, 2, … for steps 0, 1, 2, …: the first of equals is the nearest."""
    return (step + 1) // 2 * (1 - 2 * (step & 1))
