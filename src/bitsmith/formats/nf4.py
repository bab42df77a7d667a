"""NF4 and FP4 as bitsandbytes stores them: 4-bit codes under one scale per block, scales quantized again.

A weight is `scale * level[code]`. Blocks of `block_size` weights lie over the flattened matrix, whatever its
rows; bytes hold two codes, the first in the high half. Double quantization keeps a scale as a code of 8 bits:
`map[code] * absmax + offset`, one absmax for 256 blocks, one offset (the mean of the scales) for the tensor.
Dettmers et al. 2023 (QLoRA) for NF4, Dettmers et al. 2022 (8-bit optimizers) for the dynamic map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.integer import column_weights
from bitsmith.numerics.threads import for_ranges

Codes = NDArray[np.uint8]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that may share a scale."""

NESTED_BLOCK = 256
"""Scales that share an absmax in double quantization."""

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)  # over 12; sign in the highest bit

_LEAST_SCALE = np.float32(1e-38)  # below it bitsandbytes divides by this instead
_FACTORS = np.append(np.float32(1), np.linspace(1.4, 0.6, 9, dtype=np.float32))  # `FourBit.factors`
_ROUNDS = 3  # least-squares refits of the best of them to its codes
_REACH = 2  # neighbours of a stored scale that are compared by their errors
_FINE = 512  # half the entries of a search's table of levels
_LOOKUP = 65536  # entries of the table by which bitsandbytes finds 8-bit codes
_LEAST_WEIGHTS, _MOST_WEIGHTS = 1 << 15, 1 << 20


class Nested(NamedTuple):
    """Scales quantized again: `codes` (`blocks`), `absmax` of every 256 of them, and the `offset` of all."""

    codes: Codes
    absmax: Float32
    offset: np.float32

    def scales(self, start: int = 0, stop: int | None = None) -> Float32:
        """Return the scales of blocks `[start, stop)`."""
        codes = self.codes[start:stop]
        scales: Float32 = DYNAMIC_MAP[codes] * self.steps(start, start + len(codes)) + self.offset
        return scales

    def steps(self, start: int, stop: int) -> Float32:
        """Return the absmax of each of the blocks `[start, stop)`."""
        return self.absmax[np.arange(start, stop) // NESTED_BLOCK]


def nest(scales: Float32, offset: np.float32 | None = None) -> Nested:
    """Return `scales` (`blocks`) quantized to 8 bits as bitsandbytes does on a CPU, bit for bit.

    Its offset is a float32 mean whose order of summation depends on the processor; here the mean is exact,
    then rounded. With an `offset` given all else is equal. Scales too far apart for float32 give an infinite
    absmax.
    """
    mean = np.float32(np.mean(scales, dtype=np.float64)) if len(scales) else np.float32(0)
    offset = mean if offset is None else np.float32(offset)
    with np.errstate(over="ignore"):
        moved = scales.astype(np.float32) - offset
    starts = np.arange(0, len(moved), NESTED_BLOCK)
    absmax = np.maximum.reduceat(np.abs(moved), starts) if len(moved) else np.empty(0, np.float32)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        share = moved * np.repeat(np.float32(1) / absmax, NESTED_BLOCK)[: len(moved)]
    share = np.clip(np.where(np.isnan(share), np.float32(-1), share), -1, 1)  # 0 / 0 becomes the first code
    half = np.float32((_LOOKUP - 1) / 2)
    place = ((share + np.float32(1)) * half + np.float32(0.5)).astype(np.int32)
    return Nested(_NEAREST_IN_MAP[place], absmax, offset)


@dataclass(frozen=True)
class FourBit:
    """A code book of 16 levels, `book` in order of the codes, and the weights that share a scale."""

    name: str
    book: tuple[float, ...]
    block_size: int = 64

    def __post_init__(self) -> None:
        """Raise BitsmithError for a block size that bitsandbytes does not know."""
        if self.block_size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise BitsmithError(f"{self.name} has blocks of {known} weights, not of {self.block_size}")

    @cached_property
    def levels(self) -> Float32:
        """The levels by code."""
        return np.array(self.book, np.float32)

    @cached_property
    def order(self) -> Codes:
        """The codes in order of their levels."""
        return np.argsort(self.levels, kind="stable").astype(np.uint8)

    @cached_property
    def cuts(self) -> Float32:
        """Middles between levels next to each other (`15`), ascending; a weight on one falls below it."""
        ordered = self.levels[self.order]
        cuts: Float32 = (ordered[:-1] + ordered[1:]) / np.float32(2)
        return cuts

    @cached_property
    def table(self) -> Float32:
        """The level nearest to each of `2 _FINE` places, evenly spaced in -1…1: for searches."""
        places = (np.arange(-_FINE, _FINE) + 0.5) / _FINE
        return self.levels[self.order][np.searchsorted(self.cuts, places)]

    @cached_property
    def factors(self) -> Float32:
        """Scales to start a search from, in units of a block's largest magnitude.

        A negative scale turns a book that is not symmetric around, which suits half of the blocks better.
        """
        ordered = self.levels[self.order]
        return _FACTORS if (ordered == -ordered[::-1]).all() else np.append(_FACTORS, -_FACTORS)

    def blocks(self, weights: int) -> int:
        """Return the number of scales of so many weights."""
        return -(-weights // self.block_size)

    def takes_feedback(self, columns: int) -> bool:
        """Tell whether blocks lie within rows of `columns` weights, as error feedback needs."""
        return columns > 0 and columns % self.block_size == 0

    def absmax(self, weights: Float32) -> Float32:
        """Return the largest magnitude of each block of flat `weights`: bitsandbytes' scales."""
        if not weights.size:
            return np.empty(0, np.float32)
        starts = np.arange(0, weights.size, self.block_size)
        largest: Float32 = np.maximum.reduceat(np.abs(weights), starts)
        if weights.size % self.block_size:
            largest[-1] = max(largest[-1], _LEAST_SCALE)  # as bitsandbytes does there and nowhere else
        return largest

    def fit(self, weights: Float32, importance: Float32 | None = None, first: int = 0) -> Float32:
        """Return the scales of flat `weights` that minimise the importance-weighted squared error.

        `importance` (`in`) weighs a row's columns; the first weight lies at `first` in the flattened matrix.
        Never worse than `absmax`. Raises BitsmithError for an importance that is not such a vector.
        """
        columns = column_weights(importance, 1 if importance is None else len(importance))
        scales, ordered = np.empty(self.blocks(weights.size), np.float32), self.levels[self.order]

        def work(x: Float32, at: int, part: slice) -> None:
            _fit_blocks(x, columns, first + at, self.cuts, ordered, self.table, self.factors, scales[part])

        self._for_blocks(weights, work)
        return scales

    def searched(self, weights: Float32, importance: Float32 | None = None) -> Nested:
        """Return the scales of a whole matrix's flat `weights`, quantized again: `fit`, then `choose`."""
        nested = nest(self.fit(weights, importance))
        self.choose(weights, nested, 0, importance)
        return nested

    def choose(
        self, weights: Float32, nested: Nested, start: int, importance: Float32 | None = None, first: int = 0
    ) -> None:
        """Move the codes of the scales of flat `weights`, from block `start` on, to better ones nearby.

        Better by the importance-weighted squared error of the weights under the scale as it is stored; see
        `fit`.
        """
        columns = column_weights(importance, 1 if importance is None else len(importance))
        stop = start + self.blocks(weights.size)
        steps, codes = nested.steps(start, stop), nested.codes[start:stop]

        def work(x: Float32, at: int, part: slice) -> None:
            _choose_blocks(
                x, columns, first + at, self.table, DYNAMIC_MAP, steps[part], nested.offset, codes[part]
            )

        self._for_blocks(weights, work)

    def nearest(self, weights: Float32, scales: Float32) -> Codes:
        """Return the codes (flat) of the levels nearest to flat `weights`.

        Under `absmax` they are bitsandbytes' own, bit for bit.
        """
        codes = np.empty(weights.size, np.uint8)

        def work(x: Float32, at: int, part: slice) -> None:
            _code_blocks(x, scales[part], self.cuts, self.order, codes[at : at + x.size].reshape(x.shape))

        self._for_blocks(weights, work)
        rest = weights.size % self.block_size
        if rest:  # bitsandbytes divides a block that is not whole, where it else multiplies by the inverse
            scale = np.float32(scales[-1])
            with np.errstate(over="ignore"):
                share = weights[-rest:] / (scale if scale < 0 else max(scale, _LEAST_SCALE))
            codes[-rest:] = self.order[np.searchsorted(self.cuts, share, side="left")]
        return codes

    def dequantize(self, codes: Codes, scales: Float32) -> Float32:
        """Return the flat weights that codes and scales stand for."""
        weights: Float32 = self.levels[codes] * np.repeat(scales, self.block_size)[: codes.size]
        return weights

    def pack(self, codes: Codes) -> Bytes:
        """Return flat codes as bytes, the first in the high half; an odd one is followed by zero's."""
        zero = self.order[np.searchsorted(self.cuts, np.float32(0), side="left")]
        even = np.append(codes, zero) if codes.size % 2 else codes
        packed: Bytes = even[::2] << np.uint8(4) | even[1::2]
        return packed

    def _for_blocks(self, weights: Float32, work: Callable[[Float32, int, slice], None]) -> None:
        """Call `work(blocks, at, part)` for whole blocks (`n block_size`) of flat `weights`, then the rest.

        They begin at weight `at`, and their scales are `part`.
        """
        size = self.block_size
        whole = weights.size // size
        blocks = np.ascontiguousarray(weights[: whole * size], np.float32).reshape(-1, size)
        for_ranges(
            whole,
            max(1, _LEAST_WEIGHTS // size),
            max(1, _MOST_WEIGHTS // size),
            lambda a, b: work(blocks[a:b], a * size, slice(a, b)),
        )
        if weights.size % size:
            rest = np.ascontiguousarray(weights[whole * size :], np.float32)
            work(rest[None], whole * size, slice(whole, whole + 1))


def unpack_nibbles(packed: Bytes) -> Codes:
    """Return the codes (flat) of bytes, two each."""
    codes = np.empty(2 * packed.size, np.uint8)
    codes[::2] = packed.reshape(-1) >> np.uint8(4)
    codes[1::2] = packed.reshape(-1) & np.uint8(15)
    return codes


NF4 = FourBit("NF4", _NF4)
"""Levels at the quantiles of a normal distribution, from -1 to 1."""

FP4 = FourBit("FP4", (*(level / 12 for level in _FP4), *(-(level / 12) for level in _FP4)))
"""Floats of 1 sign bit, 2 bits of exponent and 1 of mantissa, the largest 1; a zero of each sign."""


def _dynamic_map() -> Float32:
    """Return bitsandbytes' signed 8-bit map: decades down to 1e-7, the larger the finer; 0 and 1 beside.

    Its bounds are those of torch.linspace: counted from the nearer end, products not rounded by themselves.
    """
    values = [0.0, 1.0]
    low = np.float64(np.float32(0.1))
    for decade in range(7):
        rise = np.arange(2**decade + 1)
        step = np.float64(np.float32(0.9) / np.float32(2**decade))
        bounds = np.where(rise < len(rise) // 2, low + step * rise, 1 - step * rise[::-1]).astype(np.float32)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        shifted = np.float32(10.0 ** (decade - 6)) * means
        values += [*shifted.tolist(), *(-shifted).tolist()]
    return np.sort(np.array(values, np.float32))


def _nearest_in_map(values: Float32) -> Codes:
    """Return the code nearest to each entry of bitsandbytes' table, evenly spaced in -1…1."""
    at = (np.float32(-1) + np.arange(_LOOKUP).astype(np.float32) * np.float32(2 / (_LOOKUP - 1))).astype(
        np.float32
    )
    cuts = (values[:-1] + values[1:]) / np.float32(2)
    return np.searchsorted(cuts, at, side="left").astype(np.uint8)


DYNAMIC_MAP = _dynamic_map()
"""What the 8-bit codes of scales stand for, in units of their absmax (`256`)."""

_NEAREST_IN_MAP = _nearest_in_map(DYNAMIC_MAP)


@njit(nogil=True, cache=True, error_model="numpy")
def _inverse(scale: np.float32) -> np.float32:
    one = np.float32(1.0)
    return one / scale if scale < 0 else one / max(scale, _LEAST_SCALE)


@njit(nogil=True, cache=True, error_model="numpy")
def _places(x: Float32, scale: np.float32, cuts: Float32, shares: Float32, places: Int32) -> None:
    """Fill `places` with the place of the nearest level in their order."""
    inverse = _inverse(scale)
    for j in range(x.size):
        shares[j] = x[j] * inverse
        places[j] = 0
    for k in range(cuts.size):
        cut = cuts[k]
        for j in range(x.size):
            places[j] += shares[j] > cut


@njit(nogil=True, cache=True, error_model="numpy")
def _code_blocks(blocks: Float32, scales: Float32, cuts: Float32, order: Codes, codes: Codes) -> None:
    shares, places = np.empty(blocks.shape[1], np.float32), np.empty(blocks.shape[1], np.int32)
    for b in range(blocks.shape[0]):
        _places(blocks[b], scales[b], cuts, shares, places)
        for j in range(places.size):
            codes[b, j] = order[places[j]]


@njit(nogil=True, cache=True, error_model="numpy")
def _load(columns: Float64, first: int, weights: Float64) -> None:
    at = first % columns.size
    for j in range(weights.size):
        weights[j] = columns[at]
        at = at + 1 if at + 1 < columns.size else 0


@njit(nogil=True, cache=True, error_model="numpy")
def _levels(x: Float32, scale: np.float32, table: Float32, places: Int32, levels: Float32) -> None:
    """Fill `levels` with those of the table's nearest places."""
    half, top = np.float32(table.size // 2), np.float32(table.size - 1)
    inverse = _inverse(scale)
    for j in range(
        x.size
    ):  # the product with the inverse first: the inverse of a tiny scale times half overflows
        places[j] = np.int32(min(max(x[j] * inverse * half + half, np.float32(0.0)), top))
    for j in range(x.size):
        levels[j] = table[places[j]]


@njit(nogil=True, cache=True, error_model="numpy")
def _fit_blocks(
    blocks: Float32, columns: Float64, first: int, cuts: Float32, ordered: Float32, table: Float32,
    factors: Float32, scales: Float32,
) -> None:  # fmt: skip
    """Fill `scales` (`n`): the least-squares scale of the codes under the best of the candidates.

    Codes `q` allow the scale `sum(wqx) / sum(wqq)`, which lowers the error from `sum(wxx)` by
    `sum(wqx)² / sum(wqq)`. The first candidate's codes are exact, the others' as near as the table has them.
    """
    size = blocks.shape[1]
    shares, places = np.empty(size, np.float32), np.empty(size, np.int32)
    levels, weights = np.empty(size, np.float32), np.empty(size, np.float64)
    for b in range(blocks.shape[0]):
        x = blocks[b]
        _load(columns, first + b * size, weights)
        largest, best = np.float32(0.0), 0.0
        for j in range(size):
            largest = max(largest, abs(x[j]))
        scales[b] = largest
        for t in range(factors.size + _ROUNDS if largest >= _LEAST_SCALE else 0):
            if t == 0:
                _places(x, largest, cuts, shares, places)
                for j in range(size):
                    levels[j] = ordered[places[j]]
            else:
                scale = largest * factors[t] if t < factors.size else scales[b]
                _levels(x, scale, table, places, levels)
            along, across = 0.0, 0.0
            for j in range(size):
                level = np.float64(levels[j])
                across += weights[j] * level * np.float64(x[j])
                along += weights[j] * level * level
            if along > 0 and across * across > best * along:
                best = across * across / along
                scales[b] = np.float32(across / along)


@njit(nogil=True, cache=True, error_model="numpy")
def _choose_blocks(
    blocks: Float32, columns: Float64, first: int, table: Float32, values: Float32, steps: Float32,
    offset: np.float32, codes: Codes,
) -> None:  # fmt: skip
    """Move `codes` (`n`) to the best of the codes within `_REACH` by the weighted squared error."""
    size = blocks.shape[1]
    places, levels = np.empty(size, np.int32), np.empty(size, np.float32)
    weights = np.empty(size, np.float64)
    for b in range(blocks.shape[0]):
        x = blocks[b]
        _load(columns, first + b * size, weights)
        least, centre = np.inf, np.int64(codes[b])
        for t in range(2 * _REACH + 1):
            code = centre + (t + 1) // 2 * (1 - 2 * (t & 1))
            if code < 0 or code >= values.size:
                continue
            scale = np.float32(np.float32(values[code] * steps[b]) + offset)
            _levels(x, scale, table, places, levels)
            error = 0.0
            for j in range(size):
                left = np.float64(x[j]) - np.float64(np.float32(scale * levels[j]))
                error += weights[j] * left * left
            if error < least:
                least, codes[b] = error, np.uint8(code)
