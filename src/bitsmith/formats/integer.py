"""Integer grids: codes of 8, 4, 2 or 1 bits per weight; scales (and zero points) that files keep apart.

A weight is `scale * level`, one scale for a row or for each `group` of its columns. Levels are -128…127,
-8…7, ±0.5 and ±1.5, or ±1; an asymmetric grid's are `code - zero`. The `cellm-*` grids are the encodings
of the cellm converter, bit for bit: the largest (or mean) magnitude gives the scale, and codes are taken
before that is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError, printable
from bitsmith.formats.format import Bytes, Float32
from bitsmith.numerics.half import HALF_MAX, half_round
from bitsmith.numerics.threads import for_ranges
from bitsmith.numerics.vectors import (
    converted,
    downwards,
    larger,
    load,
    smaller,
    spread,
    store,
    total,
)  # fmt: skip

Codes = NDArray[np.uint8]
Float64 = NDArray[np.float64]
Scale = Literal["F16", "BF16"]

GROUPS = (None, 32, 64, 128)
"""Columns that share a scale; None: the whole row."""

_ROUNDS = 4  # least-squares refits of a scale to the codes it gave, at most
_CANDIDATES = 32
_LEAST_FACTOR = {8: 0.3, 4: 0.2, 2: 0.04}  # of the largest scale, where the search ends
_FLOOR = 1e-9  # of the largest weight: what calibration never saw is not free to take any value
_LEAST_WEIGHTS, _MOST_WEIGHTS = 1 << 15, 1 << 20


class Coded(NamedTuple):
    """Rows of weights as codes (`out in`), scales as stored (`out groups`), zero points of asymmetric grids.

    Scales are F16 or BF16 values held as float32; `zeros` (`out groups`) is the code that stands for 0.
    """

    codes: Codes
    scales: Float32
    zeros: Codes | None = None


@dataclass(frozen=True)
class GridFormat:
    """A grid of `2^bits` levels for each row, or for every `group` columns of it; the last may be shorter.

    `seed` grids are encoded as cellm does and ignore `importance` and `search`.
    """

    name: str
    bits: int
    group: int | None = None
    symmetric: bool = True
    seed: bool = False
    scale_type: Scale = "F16"

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @cached_property
    def levels(self) -> Float32:
        """The levels of a symmetric grid by code, in units of the scale; an asymmetric one's at zero 0."""
        low = {2: -1.5, 1: -1.0}.get(self.bits, -float(2 ** (self.bits - 1))) if self.symmetric else 0.0
        step = 2.0 if self.bits == 1 else 1.0
        return (low + step * np.arange(self.top + 1)).astype(np.float32)

    def width(self, columns: int) -> int:
        """Return how many of a row's `columns` share a scale."""
        return max(1, min(self.group or columns, columns))

    def groups(self, columns: int) -> int:
        """Return the number of scales of a row."""
        return -(-columns // self.width(columns))

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row: codes in whole bytes (one bit: in whole groups), scales, zeros."""
        groups = self.groups(columns)
        coded = groups * self.width(columns) if self.bits == 1 else columns
        zeros = 0 if self.symmetric else -(-groups * self.bits // 8)
        return -(-coded * self.bits // 8) + 2 * groups + zeros

    def bpw(self, columns: int) -> float:
        """Return the bits per weight of a row, everything included."""
        return 8 * self.row_bytes(columns) / columns

    def quantize(self, rows: Float32, importance: Float32 | None = None, *, search: bool = True) -> Coded:
        """Return the codes of `rows` (`out in`) and the scales that were chosen.

        The search minimises `sum_j importance_j (w_j - q_j)^2` over scales (`importance` is `in`,
        non-negative; None: all equal) and is never worse than the field's scale, which is taken without
        `search`: the largest magnitude on the last level, for one bit the mean magnitude. Raises
        BitsmithError for rows that are no matrix and for an importance that is not such a vector.
        """
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if rows.ndim != 2:
            raise BitsmithError(f"{self.name} codes matrices, found shape {rows.shape}")
        if self.seed:
            return _seed_coded(self, rows)
        scales, zeros = self.fit(rows, importance if search else None, search=search)
        return Coded(self.nearest(rows, scales, zeros), scales, zeros)

    def fit(
        self, rows: Float32, importance: Float32 | None = None, *, search: bool = True
    ) -> tuple[Float32, Codes | None]:
        """Return the scales and zero points of `quantize` (`out groups`)."""
        columns = rows.shape[1]
        scales = np.zeros((len(rows), self.groups(columns)), np.float32)
        zeros = np.zeros(scales.shape, np.uint8)
        rounds = 1 if self.bits == 1 else _ROUNDS if search else 0
        weights, factors = column_weights(importance, columns), _factors(self, search)
        offsets = np.array([0] if self.symmetric or not search else [0, -1, 1], np.int64)
        grid = self.levels[0], self.levels[1] - self.levels[0], np.float32(self.top)

        def work(first: int, last: int) -> None:
            _fit_rows(
                rows[first:last], weights, self.width(columns), *grid, self.symmetric, factors, offsets,
                rounds, self.scale_type == "BF16", scales[first:last], zeros[first:last],
            )  # fmt: skip

        _for_rows(rows, work)
        return scales, None if self.symmetric else zeros

    def nearest(self, rows: Float32, scales: Float32, zeros: Codes | None = None) -> Codes:
        """Return the codes (`out in`) nearest to `rows` on the grid of given scales and zero points."""
        rows = np.ascontiguousarray(rows, np.float32)
        codes = np.empty(rows.shape, np.uint8)
        width, top = self.width(rows.shape[1]), np.float32(self.top)
        lows = np.full(scales.shape, self.levels[0]) if zeros is None else -zeros.astype(np.float32)
        step = self.levels[1] - self.levels[0]

        def work(first: int, last: int) -> None:
            part = slice(first, last)
            _code_rows(rows[part], width, scales[part], lows[part], step, top, codes[part])

        _for_rows(rows, work)
        return codes

    def stored(self, scales: Float32) -> Float32:
        """Return scales rounded to the type that they are stored in."""
        rounded = np.empty_like(scales)
        _store(scales.reshape(-1), self.scale_type == "BF16", rounded.reshape(-1))
        return rounded

    def dequantize(self, coded: Coded) -> Float32:
        """Return the rows (`out in`) that codes and scales stand for."""
        codes, zeros = np.ascontiguousarray(coded.codes), coded.zeros
        scales = np.ascontiguousarray(coded.scales, np.float32)
        zero = np.zeros(scales.shape, np.float32) if zeros is None else zeros.astype(np.float32)
        rows, width = np.empty(codes.shape, np.float32), self.width(codes.shape[1])
        grid = self.levels[0], self.levels[1] - self.levels[0]

        def work(first: int, last: int) -> None:
            part = slice(first, last)
            _decode_rows(codes[part], width, scales[part], zero[part], *grid, rows[part])

        _for_rows(rows, work)
        return rows


def grid_named(name: str) -> GridFormat:
    """Return the grid called `name`.

    Raises BitsmithError that lists the known names.
    """
    if name not in GRIDS:
        raise BitsmithError(f"unknown grid {printable(name)!r}; known: {' '.join(GRIDS)}")
    return GRIDS[name]


def pack_codes(codes: Codes, bits: int, pad: int = 0) -> Bytes:
    """Return codes (`out in`) as bytes (`out row_bytes`), the first in the lowest bits; `pad` ends a row."""
    out, columns = codes.shape
    packed = np.empty((out, -(-columns * bits // 8)), np.uint8)
    codes = np.ascontiguousarray(codes)
    _for_rows(codes, lambda a, b: _pack_rows(codes[a:b], bits, pad, packed[a:b]))
    return packed


def unpack_codes(packed: Bytes, bits: int, columns: int) -> Codes:
    """Return the codes (`out in`) that `pack_codes` packed."""
    codes, packed = np.empty((len(packed), columns), np.uint8), np.ascontiguousarray(packed)
    _for_rows(codes, lambda a, b: _unpack_rows(packed[a:b], bits, codes[a:b]))
    return codes


def _registry() -> dict[str, GridFormat]:
    grids = []
    for group in GROUPS:
        suffix = "" if group is None else f"_g{group}"
        grids += [GridFormat(f"int{bits}{suffix}", bits, group) for bits in (8, 4, 2, 1)]
        grids.append(GridFormat(f"int4a{suffix}", 4, group, symmetric=False))
        grids.append(GridFormat(f"cellm-i4{suffix}", 4, group, seed=True))
    grids += [GridFormat("cellm-i8", 8, seed=True), GridFormat("cellm-i2", 2, seed=True)]
    grids.append(GridFormat("cellm-q1_0_g128", 1, 128, seed=True))
    return {grid.name: grid for grid in sorted(grids, key=lambda grid: (grid.seed, -grid.bits, grid.name))}


GRIDS = _registry()
"""Every grid by its name: `int4_g128`; `a` is asymmetric, `cellm-` as the cellm converter encodes."""


def _for_rows(rows: Float32 | Codes, work: Callable[[int, int], None]) -> None:
    columns = max(1, rows.shape[1])
    for_ranges(len(rows), max(1, _LEAST_WEIGHTS // columns), max(1, _MOST_WEIGHTS // columns), work)


def column_weights(importance: Float32 | None, columns: int) -> Float64:
    """Return an importance (`in`) over its largest, with a floor; ones without it.

    Raises BitsmithError for one that is not such a vector.
    """
    if importance is None:
        return np.ones(columns)
    exact = np.asarray(importance, dtype=np.float64)
    if exact.shape != (columns,) or not (np.isfinite(exact) & (exact >= 0)).all():
        raise BitsmithError(
            f"importance is {exact.shape}, expected {(columns,)} values, finite and not negative"
        )
    largest = exact.max(initial=0.0)
    weights: Float64 = np.maximum(exact / largest, _FLOOR) if largest > 0 else np.ones(columns)
    return weights


def _factors(grid: GridFormat, search: bool) -> Float32:
    """Return the scales to try, as shares of the one that puts the largest magnitude on the last level."""
    if not search or grid.bits == 1:
        return np.ones(1, np.float32)
    factors = np.geomspace(1.0, _LEAST_FACTOR[grid.bits], _CANDIDATES)
    factors[0] = 1.0  # exactly, so that the search is never worse than the field's scale
    return factors.astype(np.float32)


def _seed_coded(grid: GridFormat, rows: Float32) -> Coded:
    """Encode as cellm does: a group of zeros has scale 1 (one bit: 0), halves round away from zero."""
    out, columns = rows.shape
    width, groups = grid.width(columns), grid.groups(columns)
    padded = np.pad(rows, ((0, 0), (0, groups * width - columns))).reshape(out, groups, width)
    if grid.bits == 1:
        counts = np.minimum(width, columns - width * np.arange(groups)).astype(np.float32)
        sums = np.cumsum(np.abs(padded), axis=2, dtype=np.float32)[:, :, -1]  # one after the other, as cellm
        scales, codes = sums / counts, (padded > 0).astype(np.uint8)
    else:
        last = np.float32(1.5 if grid.bits == 2 else grid.top // 2)
        largest = np.abs(padded).max(axis=2, initial=0.0)
        scales = np.where(largest > 0, largest / last, np.float32(1.0))
        codes = _seed_codes(grid, padded, scales[:, :, None])
    stored = np.minimum(scales, HALF_MAX).astype(np.float16).astype(np.float32)
    return Coded(np.ascontiguousarray(codes.reshape(out, -1)[:, :columns]), stored)


def _seed_codes(grid: GridFormat, padded: Float32, scales: Float32) -> Codes:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a scale may underflow to 0
        steps = (padded / scales).astype(np.float64)
    if grid.bits == 2:
        cuts = (steps >= -1).astype(np.float64) + (steps >= 0) + (steps >= 1)
        return np.where(scales > 0, cuts, 1.0).astype(np.uint8)
    last = grid.top // 2
    away = np.clip(np.trunc(steps + np.copysign(0.5, steps)), -last, last)
    codes: Codes = (np.nan_to_num(away) + (last + 1)).astype(np.uint8)
    return codes


@njit(nogil=True, cache=True, error_model="numpy")
def _stored(value: np.float32, bfloat: bool) -> np.float32:
    """Round a scale to F16 or BF16, within its finite range."""
    if not bfloat:
        return half_round(np.float32(value))
    bits = np.float32(value).view(np.int32)
    odd = (bits >> np.int32(16)) & np.int32(1)
    rounded = np.int32((bits + np.int32(0x7FFF) + odd) & np.int32(-65536))
    return np.int32(min(rounded, np.int32(0x7F7F0000))).view(np.float32)


@njit(nogil=True, cache=True, error_model="numpy")
def _store(scales: Float32, bfloat: bool, rounded: Float32) -> None:
    for i in range(scales.size):
        rounded[i] = _stored(scales[i], bfloat)


@njit(nogil=True, cache=True, error_model="numpy")
def _code(
    x: np.float32, inverse: np.float32, low: np.float32, step: np.float32, top: np.float32
) -> np.float32:
    """Return the code nearest to `x`."""
    place = np.floor((x * inverse - low) / step + np.float32(0.5))
    return min(max(place, np.float32(0.0)), top)


@njit(nogil=True, cache=True, error_model="numpy")
def _nearest(x: Any, inverse: Any, low: Any, step: np.float32, top: np.float32) -> Any:
    """Return the codes nearest to 16 weights, `_code`'s: the inverse of `step` (1 or 2) is exact."""
    place = downwards((x * inverse - low) * (np.float32(1.0) / step) + np.float32(0.5))
    return smaller(larger(place, spread(np.float32(0.0), 16)), spread(top, 16))


@njit(nogil=True, cache=True, error_model="numpy")
def _code_rows(
    rows: Float32, width: int, scales: Float32, lows: Float32, step: np.float32, top: np.float32, codes: Codes
) -> None:
    for r in range(rows.shape[0]):
        for g in range(scales.shape[1]):
            scale, low = scales[r, g], lows[r, g]
            inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
            x, c = rows[r, g * width : (g + 1) * width], codes[r, g * width : (g + 1) * width]
            whole = x.size // 16 * 16
            for j in range(0, whole, 16):
                found = _nearest(load(x, j, 16), inverse, spread(low, 16), step, top)
                store(c, j, converted(converted(found, "int32"), "uint8"))
            for j in range(whole, x.size):
                c[j] = np.uint8(_code(x[j], inverse, low, step, top))


@njit(nogil=True, cache=True, error_model="numpy")
def _decode_rows(
    codes: Codes,
    width: int,
    scales: Float32,
    zeros: Float32,
    low: np.float32,
    step: np.float32,
    rows: Float32,
) -> None:
    for r in range(codes.shape[0]):
        for g in range(scales.shape[1]):
            scale, zero = scales[r, g], zeros[r, g]
            c, y = codes[r, g * width : (g + 1) * width], rows[r, g * width : (g + 1) * width]
            whole = c.size // 16 * 16
            for j in range(0, whole, 16):
                store(y, j, (converted(load(c, j, 16), "float32") * step + low - zero) * scale)
            for j in range(whole, c.size):
                y[j] = (np.float32(c[j]) * step + low - zero) * scale


@njit(nogil=True, cache=True)
def _pack_rows(codes: Codes, bits: int, pad: int, packed: Bytes) -> None:
    each, columns = 8 // bits, codes.shape[1]
    for r in range(codes.shape[0]):
        for k in range(columns // each):
            byte = np.uint8(0)
            for j in range(each):
                byte |= np.uint8(codes[r, each * k + j] << np.uint8(bits * j))
            packed[r, k] = byte
        for k in range(columns // each, packed.shape[1]):
            byte = np.uint8(0)
            for j in range(each):
                code = codes[r, each * k + j] if each * k + j < columns else np.uint8(pad)
                byte |= np.uint8(code << np.uint8(bits * j))
            packed[r, k] = byte


@njit(nogil=True, cache=True)
def _unpack_rows(packed: Bytes, bits: int, codes: Codes) -> None:
    each, mask = 8 // bits, np.uint8((1 << bits) - 1)
    for r in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            codes[r, j] = (packed[r, j // each] >> np.uint8(j % each * bits)) & mask


@njit(nogil=True, cache=True, error_model="numpy")
def _try(
    x: Float32, h: Float64, scales: Float32, lows: Float32, inverses: Float32, step: np.float32,
    top: np.float32, errors: Float64,
) -> None:  # fmt: skip
    """Set `errors` to the weighted squared error under each candidate; the candidates lie 16 side by side."""
    for c in range(scales.size):
        inverses[c] = np.float32(1.0) / scales[c] if scales[c] != 0 else np.float32(0.0)
    for c in range(0, scales.size, 16):
        scale, low, inverse = load(scales, c, 16), load(lows, c, 16), load(inverses, c, 16)
        found = spread(np.float64(0.0), 16)
        for j in range(x.size):
            value = spread(x[j], 16)
            code = _nearest(value, inverse, low, step, top)
            left = converted(value - scale * (low + code * step), "float64")
            found = found + spread(h[j], 16) * left * left
        store(errors, c, found)


@njit(nogil=True, cache=True, error_model="numpy")
def _error(
    x: Float32, h: Float64, scale: np.float32, low: np.float32, step: np.float32, top: np.float32
) -> float:
    """Return the weighted squared error under one scale."""
    inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
    whole, found, lows = x.size // 16 * 16, spread(np.float64(0.0), 16), spread(low, 16)
    for j in range(0, whole, 16):
        value = load(x, j, 16)
        left = converted(value - (lows + _nearest(value, inverse, lows, step, top) * step) * scale, "float64")
        found = found + load(h, j, 16) * left * left
    error = total(found)
    for j in range(whole, x.size):
        rest = np.float64(x[j] - scale * (low + step * _code(x[j], inverse, low, step, top)))
        error += h[j] * rest * rest
    return float(error)


@njit(nogil=True, cache=True, error_model="numpy")
def _refit(
    x: Float32, h: Float64, scale: np.float32, low: np.float32, step: np.float32, top: np.float32
) -> np.float32:
    """Return the least-squares scale for the codes that `scale` gives, `scale` itself where there is none."""
    inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
    whole, lows = x.size // 16 * 16, spread(low, 16)
    products, squares = spread(np.float64(0.0), 16), spread(np.float64(0.0), 16)
    for j in range(0, whole, 16):
        value = load(x, j, 16)
        level = converted(lows + _nearest(value, inverse, lows, step, top) * step, "float64")
        heavy = load(h, j, 16) * level
        products, squares = products + heavy * converted(value, "float64"), squares + heavy * level
    across, along = total(products), total(squares)
    for j in range(whole, x.size):
        last = np.float64(low + step * _code(x[j], inverse, low, step, top))
        across += h[j] * last * np.float64(x[j])
        along += h[j] * last * last
    return np.float32(across / along) if along > 0 and across > 0 else scale


@njit(nogil=True, cache=True, error_model="numpy")
def _extremes(x: Float32) -> tuple[np.float32, np.float32]:
    """Return the least and the largest of the weights and 0."""
    least, most, whole = np.float32(0.0), np.float32(0.0), x.size // 16 * 16
    lows, highs = spread(least, 16), spread(least, 16)
    for j in range(0, whole, 16):
        lows, highs = smaller(lows, load(x, j, 16)), larger(highs, load(x, j, 16))
    ends = np.empty((2, 16), np.float32)
    store(ends, 0, lows)
    store(ends, 16, highs)
    for lane in range(16):
        least, most = min(least, ends[0, lane]), max(most, ends[1, lane])
    for j in range(whole, x.size):
        least, most = min(least, x[j]), max(most, x[j])
    return least, most


@njit(nogil=True, cache=True, error_model="numpy")
def _candidates(
    x: Float32, low: np.float32, step: np.float32, top: np.float32, symmetric: bool, factors: Float32,
    offsets: NDArray[np.int64], bfloat: bool, scales: Float32, lows: Float32,
) -> None:  # fmt: skip
    least, most = _extremes(x)
    span = max(-least, most) / (low + step * top) if symmetric else (most - least) / top
    zero = np.rint(-least / span) if span > 0 else np.float32(0.0)
    for o in range(offsets.size):
        for f in range(factors.size):
            scales[o * factors.size + f] = _stored(np.float32(span * factors[f]), bfloat)
            moved = min(max(zero + np.float32(offsets[o]), np.float32(0.0)), top)
            lows[o * factors.size + f] = low if symmetric else -moved


@njit(nogil=True, cache=True, error_model="numpy")
def _fit_rows(
    rows: Float32, weights: Float64, width: int, low: np.float32, step: np.float32, top: np.float32,
    symmetric: bool, factors: Float32, offsets: NDArray[np.int64], rounds: int, bfloat: bool, found: Float32,
    zeros: Codes,
) -> None:  # fmt: skip
    """Fill `found` and `zeros` (`out groups`) with the best of the candidates, refitted while that helps."""
    count = factors.size * offsets.size
    room = -(-count // 16) * 16
    scales, lows = np.zeros(room, np.float32), np.zeros(room, np.float32)
    inverses, errors = np.zeros(room, np.float32), np.zeros(room, np.float64)
    for r in range(rows.shape[0]):
        for g in range(found.shape[1]):
            at, end = g * width, min((g + 1) * width, rows.shape[1])
            x, h = rows[r, at:end], weights[at:end]
            _candidates(x, low, step, top, symmetric, factors, offsets, bfloat, scales, lows)
            best, least = 0, 0.0
            if count > 1:
                _try(x, h, scales, lows, inverses, step, top, errors)
                best = int(np.argmin(errors[:count]))
                least = errors[best]
            elif rounds > 0:
                least = _error(x, h, scales[0], lows[0], step, top)
            scale, base = scales[best], lows[best]
            found[r, g], zeros[r, g] = scale, np.uint8(max(-base, np.float32(0.0)))
            for _ in range(rounds):
                scale = _stored(_refit(x, h, found[r, g], base, step, top), bfloat)
                if scale == found[r, g]:
                    break
                error = _error(x, h, scale, base, step, top)
                if not error < least:
                    break
                least, found[r, g] = error, scale
