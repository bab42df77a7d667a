"""Encode 16 blocks of 32 weights at a time, all of a search in the processor's registers and nearest cache.

The searches are those of `symmetric.fit_symmetric` and `affine.fit_affine`, value by value: what those find
for a block is found here. Blocks of unusual size, whose weights those scale first, are left to them.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from bitsmith.formats.affine import SPREAD, fit_affine
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.lanes import (
    HEARD,
    HIGHEST,
    NOISE,
    ONE,
    ORDINARY_HIGH,
    ORDINARY_LOW,
    ZERO,
    weighted,
)  # fmt: skip
from bitsmith.formats.symmetric import EVEN, fit_symmetric
from bitsmith.numerics.half import half_bits, half_vector
from bitsmith.numerics.vectors import (
    converted,
    larger,
    load,
    magnitude,
    mask_bits,
    nearest,
    part,
    smaller,
    spread,
    store,
    total,
    turn,
    where,
)  # fmt: skip

GROUP, SIZE = 16, 32
_CELLS = GROUP * SIZE
_MINUS = np.float32(-1.0)


def turned(weights: Float32 | None) -> Float32 | None:
    """Return `weights` (`blocks 32`) of a row as groups of 16 blocks side by side (`groups 32 16`).

    Where a row is no whole number of groups, of as many rows as make one.
    """
    if weights is None:
        return None
    tiled = np.tile(weights, (GROUP // gcd(len(weights), GROUP), 1))
    return np.ascontiguousarray(tiled.reshape(-1, GROUP, SIZE).transpose(0, 2, 1))


def _of_group(side: Float32 | None, group: int) -> Float32 | None:
    """Return the weights of a group, None without weights."""


@overload(_of_group, inline="always")
def _compiled_of_group(side: Any, group: Any) -> Any:
    def none(side: Any, group: Any) -> Any:
        return None

    def given(side: Any, group: Any) -> Any:
        return side[group % side.shape[0]]

    return none if isinstance(side, types.NoneType) else given


def _heard(w: Float32 | None, at: int, values: Any, otherwise: Any) -> Any:
    """Return `values` where their weight counts, else `otherwise`."""


@overload(_heard, inline="always")
def _compiled_heard(w: Any, at: Any, values: Any, otherwise: Any) -> Any:
    def alike(w: Any, at: Any, values: Any, otherwise: Any) -> Any:
        return values

    def given(w: Any, at: Any, values: Any, otherwise: Any) -> Any:
        return where(load(w, at, 16) > HEARD, values, otherwise)

    return alike if isinstance(w, types.NoneType) else given


@njit(nogil=True, cache=True, error_model="numpy")
def _load(blocks: Float32, block: int, x: Float32) -> bool:
    """Fill `x` (`32 16`) with 16 blocks side by side; tell whether all are of ordinary size."""
    for b in range(0, GROUP, 8):
        for j in range(0, SIZE, 8):
            turn(blocks, (block + b) * SIZE + j, SIZE, x, j * GROUP + b, GROUP)
    largest = spread(ZERO, 16)
    for at in range(0, _CELLS, GROUP):
        largest = larger(largest, magnitude(load(x, at, 16)))
    ordinary = (largest >= ORDINARY_LOW) & (spread(ORDINARY_HIGH, 16) >= largest)
    return bool(total(where(ordinary, spread(np.int32(1), 16), spread(np.int32(0), 16))) == GROUP)


@njit(nogil=True, cache=True, error_model="numpy")
def _search_symmetric(
    x: Float32, w: Float32 | None, low: np.float32, high: np.float32, starts: Float32, rounds: int
) -> Any:
    """Return the scales of 16 blocks."""
    zero, least, most = spread(ZERO, 16), spread(low, 16), spread(high, 16)
    extreme, scale, best = zero, zero, zero
    for at in range(0, _CELLS, 2 * GROUP):
        a, b = _heard(w, at, load(x, at, 16), zero), _heard(w, at + GROUP, load(x, at + GROUP, 16), zero)
        either = where(magnitude(b) > magnitude(a), b, a)
        extreme = where(magnitude(either) > magnitude(extreme), either, extreme)
    for t in range(starts.size + rounds):
        place = extreme if t < starts.size else scale
        target = starts[t] if t < starts.size else ONE
        by, across, along = where(place == ZERO, zero, spread(target, 16) / place), zero, zero
        for at in range(0, _CELLS, 2 * GROUP):
            a, b = load(x, at, 16), load(x, at + GROUP, 16)
            p = nearest(smaller(larger(a * by, least), most))
            q = nearest(smaller(larger(b * by, least), most))
            wp, wq = weighted(w, at, p), weighted(w, at + GROUP, q)
            across, along = across + (wp * a + wq * b), along + (wp * p + wq * q)
        gain = across * across / along
        better = gain > best + best * NOISE
        best, scale = where(better, gain, best), where(better, across / along, scale)
    return scale


@njit(nogil=True, cache=True, error_model="numpy")
def _measure(x: Float32, w: Float32 | None) -> tuple[Any, Any, Any, Any]:
    """Return the least and the largest weights that count, the sums of their weights and of them weighted."""
    high, one = spread(HIGHEST, 16), spread(ONE, 16)
    least, most, sw, sx = high, high * _MINUS, spread(ZERO, 16), spread(ZERO, 16)
    for at in range(0, _CELLS, 2 * GROUP):
        a, b = load(x, at, 16), load(x, at + GROUP, 16)
        least = smaller(least, smaller(_heard(w, at, a, high), _heard(w, at + GROUP, b, high)))
        low = high * _MINUS
        most = larger(most, larger(_heard(w, at, a, low), _heard(w, at + GROUP, b, low)))
        sw = sw + (weighted(w, at, one) + weighted(w, at + GROUP, one))
        sx = sx + (weighted(w, at, a) + weighted(w, at + GROUP, b))
    return least, most, sw, sx


@njit(nogil=True, cache=True, error_model="numpy")
def _search_affine(
    x: Float32, w: Float32 | None, high: np.float32, starts: Float32, rounds: int
) -> tuple[Any, Any, Any]:
    """Return scale and offset of 16 blocks, and the offset where the scale underflows."""
    least, most, sw, sx = _measure(x, w)
    zero, top, mean, span = spread(ZERO, 16), spread(high, 16), sx / sw, most - least
    scale, offset, best = zero, mean * _MINUS, zero
    for t in range(starts.shape[0] + rounds):
        if t < starts.shape[0]:
            moved, step, stretch = (least + span * starts[t, 0]) * _MINUS, span, starts[t, 1]
        else:
            moved, step, stretch = offset, scale, ONE
        by = where(step > ZERO, spread(stretch, 16) / step, zero)
        codes, across, along = zero, zero, zero
        for at in range(0, _CELLS, 2 * GROUP):
            a, b = load(x, at, 16), load(x, at + GROUP, 16)
            p = nearest(smaller(larger((a + moved) * by, zero), top))
            q = nearest(smaller(larger((b + moved) * by, zero), top))
            wp, wq = weighted(w, at, p), weighted(w, at + GROUP, q)
            codes, across, along = codes + (wp + wq), across + (wp * a + wq * b), along + (wp * p + wq * q)
        level = codes / sw
        together, apart = across - level * sx, along - level * codes
        s = where(apart > along * SPREAD, together / apart, zero)
        gain, noise = s * together, (larger(best, zero) + mean * sx) * NOISE
        better = (gain > best + noise) & (s > ZERO)
        best, scale = where(better, gain, best), where(better, s, scale)
        offset = where(better, s * level - mean, offset)
    return scale, offset, mean * _MINUS


@njit(nogil=True, cache=True, error_model="numpy")
def _put_codes(
    blocks: Float32, b: int, d: np.float32, m: np.float32, zero: np.float32, low: np.float32,
    high: np.float32, bits: int, out: Bytes, at: int,
) -> None:  # fmt: skip
    """Round block `b` on its grid and write its codes of `bits` from flat byte `at` on."""
    inverse = ONE / d if d != 0 else ZERO
    place = (load(blocks, SIZE * b, 32) + m) * inverse + (zero * _MINUS)
    codes = converted(
        converted(nearest(smaller(larger(place, spread(low, 32)), spread(high, 32))), "int32"), "uint8"
    )
    if bits == 8:
        store(out, at, codes + np.uint8(128))
        return
    if bits == 5:
        fifth = mask_bits(codes > np.uint8(15))
        for k in range(4):
            out.flat[at + k] = np.uint8(fifth >> np.uint32(8 * k))
        at += 4
    store(out, at, (part(codes, 0, 16) & np.uint8(15)) | (part(codes, 16, 16) << np.uint8(4)))


@njit(nogil=True, cache=True, error_model="numpy")
def encode_legacy(
    blocks: Float32, weights: Float32 | None, side: Float32 | None, first: int, zero: np.float32,
    low: np.float32, high: np.float32, starts: Float32, rounds: int, bits: int, out: Bytes,
) -> None:  # fmt: skip
    """Fit, round and pack blocks (`n 32`); levels begin at `zero`, codes of `bits` lie in `low`…`high`.

    `starts` of two columns mean a format with a min. Block `i` has the weights of row
    `(first + i) % len(weights)`, `side` is `turned(weights)`, `first` a whole number of groups.
    """
    x, with_min = np.empty((SIZE, GROUP), np.float32), starts.ndim == 2
    d, m = np.zeros(GROUP, np.float32), np.zeros(GROUP, np.float32)
    d_bits, m_bits = np.zeros(GROUP, np.int32), np.zeros(GROUP, np.int32)
    for block in range(0, blocks.shape[0], GROUP):
        count = min(GROUP, blocks.shape[0] - block)
        if count == GROUP and _load(blocks, block, x):
            w = _of_group(side, (first + block) // GROUP)
            if starts.ndim == 2:
                scale, offset, alone = _search_affine(x, w, high, starts, rounds)
                value, short = half_vector(scale)
                value_m, _ = half_vector(where(value == ZERO, alone, offset))
                _, short_m = half_vector(value_m * _MINUS)
                store(m, 0, value_m)
                store(m_bits, 0, short_m)
            else:
                value, short = half_vector(_search_symmetric(x, w, zero + low, zero + high, starts, rounds))
            store(d, 0, value)
            store(d_bits, 0, short)
        else:
            y = blocks[block : block + count]
            if starts.ndim == 2:
                fit_affine(y, weights, first + block, high, starts, rounds, d[:count], m[:count])
            else:
                fit_symmetric(
                    y, weights, first + block, zero + low, zero + high, EVEN, starts, rounds, d[:count]
                )
            for b in range(count):
                d_bits[b], m_bits[b] = half_bits(d[b]), half_bits(-m[b])
        for b in range(count):
            row, at = block + b, 2
            out[row, 0], out[row, 1] = np.uint8(d_bits[b] & 255), np.uint8(d_bits[b] >> 8)
            if with_min:
                out[row, 2], out[row, 3] = np.uint8(m_bits[b] & 255), np.uint8(m_bits[b] >> 8)
                at = 4
            _put_codes(blocks, row, d[b], m[b], zero, low, high, bits, out, row * out.shape[1] + at)
