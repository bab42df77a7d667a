"""Block formats in one shape: `weight = d * scale[sub] * level[code] - m * min[sub]`.

Encoding is `fit` (the block's fields) then `round` (the codes on that grid) then `pack` (the bytes);
a rounder that feeds errors back replaces only `round`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.formats.format import Bytes, Float32, Format
from bitsmith.formats.lanes import REFITS
from bitsmith.numerics.threads import for_ranges

Codes = NDArray[np.uint8]
Int16 = NDArray[np.int16]
Scales = NDArray[Any]  # int16, or float32 where a format has `scale_values`

_LEAST_WEIGHTS = 1 << 15  # worth a thread


class Fields(NamedTuple):
    """What a block stores beside its codes, for `n` blocks of `s` sub-blocks.

    `d` and `m` (`n`) are float16 values held as float32, `scales` and `mins` (`n s`) whole numbers.
    Where a format has `scale_values`, `d` is 1 and `scales` are float32, each a stored value.
    """

    d: Float32
    m: Float32
    scales: Scales
    mins: Int16

    @classmethod
    def empty(cls, blocks: int, subs: int) -> Fields:
        """Return fields of `blocks` blocks of `subs` sub-blocks whose scales are 1 and mins 0."""
        return cls(
            np.zeros(blocks, np.float32),
            np.zeros(blocks, np.float32),
            np.ones((blocks, subs), np.int16),
            np.zeros((blocks, subs), np.int16),
        )

    def part(self, first: int, last: int) -> Fields:
        """Return the fields of blocks `first` to `last` (views)."""
        return Fields(self.d[first:last], self.m[first:last], self.scales[first:last], self.mins[first:last])

    def steps(self) -> Float32:
        """Return the factor of the levels per sub-block (`n s`): `d * scale`."""
        return np.multiply(self.d[:, None], self.scales, dtype=np.float32)

    def offsets(self) -> Float32:
        """Return what is subtracted per sub-block (`n s`): `m * min`."""
        return np.multiply(self.m[:, None], self.mins, dtype=np.float32)


class BlockFormat(Format):
    """A format whose blocks hold codes on a grid of levels, scaled per sub-block.

    `levels` are the grid in units of the scale by code; the first and last code that may be written are
    `first_code` and the last level's. Where levels are no whole numbers in a row, `level_table` has the level
    nearest to a place `p` at `floor(2 p) + len / 2`. `scale_limits` and `min_limits` are the least and the
    largest whole number that a sub-block's scale and min may be; equal limits mean that it is fixed. Where
    scales are floats of their own, without a float16 `d`, `scale_values` are those that may be written, in
    ascending order, and `scale_limits` the first and the last index. A scale search begins at `starts`,
    without importance at the first `plain_starts`, and looks as far as `reach` around whole scales and mins,
    which are chosen `refits` times.
    `decoder` is a loop of `decoders`.
    """

    decoder: ClassVar[staticmethod[[Bytes, Float32], None]]
    sub_size: ClassVar[int]
    levels: ClassVar[Float32]
    first_code: ClassVar[int] = 0
    level_table: ClassVar[Float32] = np.zeros(1, np.float32)
    scale_limits: ClassVar[tuple[int, int]] = (1, 1)
    scale_values: ClassVar[Float32] = np.empty(0, np.float32)
    min_limits: ClassVar[tuple[int, int]] = (0, 0)
    starts: ClassVar[Float32] = np.empty(0, np.float32)
    plain_starts: ClassVar[int | None] = None
    reach: ClassVar[tuple[int, int]] = (0, 0)
    refits: ClassVar[int] = REFITS
    piece_weights: ClassVar[int] = 1 << 18  # encoded at a time by one thread

    @property
    def subs(self) -> int:
        """Sub-blocks per block."""
        return self.block_size // self.sub_size

    def fit(self, rows: Float32, importance: Float32 | None = None) -> Fields:
        """Choose the fields for `rows` (`out in`) that minimise the importance-weighted squared error."""
        blocks = self._blocks(rows)
        weights = self.weights(importance)
        fields = self._empty(len(blocks))
        self._for_ranges(
            len(blocks),
            lambda a, b: self._fit(blocks[a:b], weights, a, fields.part(a, b)),
        )
        return fields

    def fit_alone(self, blocks: Float32, importance: Float32 | None = None) -> Fields:
        """As `fit` for `blocks` (`n block_size`), in the calling thread.

        `importance` is of a row of as many columns as it has; rows follow one another.
        """
        fields = self._empty(len(blocks))
        self._fit(blocks, self.weights(importance), 0, fields)
        return fields

    def quick(self) -> BlockFormat:
        """Return the format with a shorter search of fields, for rounders that search whole numbers again."""
        return self

    def round(self, rows: Float32, fields: Fields) -> Codes:
        """Return the codes (`n block_size`) of the levels nearest to `rows` under `fields`."""
        blocks = self._blocks(rows)
        codes = np.empty(blocks.shape, np.uint8)
        self._for_ranges(len(blocks), lambda a, b: self._round(blocks[a:b], fields.part(a, b), codes[a:b]))
        return codes

    def pack(self, fields: Fields, codes: Codes) -> Bytes:
        """Return the blocks' bytes (`n block_bytes`)."""
        out = np.empty((len(codes), self.block_bytes), np.uint8)
        self._pack(fields, codes, out)
        return out

    def unpack(self, blocks: Bytes) -> tuple[Fields, Codes]:
        """Return the fields and codes that bytes (`out row_bytes`) hold."""
        flat = blocks.reshape(-1, self.block_bytes)
        fields = self._empty(len(flat))
        codes = np.empty((len(flat), self.block_size), np.uint8)
        self._unpack(flat, fields, codes)
        return fields, codes

    def _encode(self, rows: Float32, importance: Float32 | None) -> Bytes:
        blocks = self._blocks(rows)
        weights = self.weights(importance)
        out = np.empty((len(blocks), self.block_bytes), np.uint8)
        self._for_ranges(
            len(blocks),
            lambda a, b: self._encode_blocks(blocks[a:b], weights, a, out[a:b]),
        )
        return out.reshape(*rows.shape[:-1], self.row_bytes(rows.shape[-1]))

    def _encode_blocks(self, blocks: Float32, weights: Float32 | None, first: int, out: Bytes) -> None:
        fields = self._empty(len(blocks))
        codes = np.empty(blocks.shape, np.uint8)
        self._fit(blocks, weights, first, fields)
        self._round(blocks, fields, codes)
        self._pack(fields, codes, out)

    def _decode(self, blocks: Bytes, out: Float32) -> None:
        self.decoder(blocks, out)

    def effort(self, *, weighted: bool) -> tuple[Float32, int]:
        """Return the starts of the scale search, and how many rounds of refinement follow them."""
        return (self.starts if weighted else self.starts[: self.plain_starts]), 1

    def _for_ranges(self, blocks: int, work: Callable[[int, int], None]) -> None:
        for_ranges(blocks, _LEAST_WEIGHTS // self.block_size, self.piece_weights // self.block_size, work)

    def _empty(self, blocks: int) -> Fields:
        fields = Fields.empty(blocks, self.subs)
        if not len(self.scale_values):
            return fields
        return fields._replace(d=np.ones_like(fields.d), scales=np.ones(fields.scales.shape, np.float32))

    def _blocks(self, rows: Float32) -> Float32:
        return np.ascontiguousarray(rows, dtype=np.float32).reshape(-1, self.block_size)

    def weights(self, importance: Float32 | None) -> Float32 | None:
        """Return the weights per block of a row (`blocks block_size`), the largest of each block 1.

        The floor keeps a column that calibration never saw from being free to take any value.
        """
        if importance is None:
            return None
        blocks = np.ascontiguousarray(importance, dtype=np.float64).reshape(-1, self.block_size)
        largest = blocks.max(axis=1, keepdims=True)
        scaled = np.divide(blocks, largest, out=np.ones_like(blocks), where=largest > 0)
        weights: Float32 = np.maximum(scaled, 1e-9).astype(np.float32)
        return weights

    def _round(self, blocks: Float32, fields: Fields, codes: Codes) -> None:
        zero, low, high = -self.levels[0], np.float32(self.first_code), np.float32(len(self.levels) - 1)
        nearest_codes(blocks, *fields, zero, low, high, codes)

    @abstractmethod
    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        """Fill `fields` for `blocks`; block `i` has `weights[(first + i) % len(weights)]`, if any."""

    @abstractmethod
    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None: ...

    @abstractmethod
    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None: ...


def halves(blocks: Bytes, at: int) -> Float32:
    """Return the little-endian float16 at byte `at` of every block, widened to float32."""
    words: NDArray[np.float16] = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")
    widened: Float32 = words[:, 0].astype(np.float32)
    return widened


@njit(nogil=True, cache=True, error_model="numpy")
def _grid(d: np.float32, scale: int, m: np.float32, least: int) -> tuple[np.float32, np.float32]:
    """Return the inverse step (0 for a step of 0) and the offset of a sub-block."""
    step = d * np.float32(scale)
    return (np.float32(1.0) / step if step != 0 else np.float32(0.0)), m * np.float32(least)


@njit(nogil=True, cache=True, error_model="numpy")
def nearest_codes(
    blocks: Float32, d: Float32, m: Float32, scales: Int16, mins: Int16,
    zero: np.float32, low: np.float32, high: np.float32, codes: Codes,
) -> None:  # fmt: skip
    """Round to evenly spaced levels, 32 weights at a time: they lie in one sub-block or in two of 16."""
    subs, runs = scales.shape[1], codes.shape[1] // 32
    x, c = blocks.reshape(-1, 32), codes.reshape(-1, 32)
    if subs <= runs:
        each = runs // subs
        for b in range(codes.shape[0]):
            for s in range(subs):
                inverse, offset = _grid(d[b], scales[b, s], m[b], mins[b, s])
                for k in range((b * subs + s) * each, (b * subs + s + 1) * each):
                    for j in range(32):
                        place = (x[k, j] + offset) * inverse + zero
                        c[k, j] = np.uint8(np.int32(np.rint(min(max(place, low), high))))
        return
    for b in range(codes.shape[0]):
        for r in range(runs):
            k, s = b * runs + r, 2 * r
            inverse, offset = _grid(d[b], scales[b, s], m[b], mins[b, s])
            inverse2, offset2 = _grid(d[b], scales[b, s + 1], m[b], mins[b, s + 1])
            for j in range(32):
                place = (x[k, j] + (offset if j < 16 else offset2)) * (inverse if j < 16 else inverse2)
                c[k, j] = np.uint8(np.int32(np.rint(min(max(place + zero, low), high))))


@njit(nogil=True, cache=True, error_model="numpy")
def nearest_in_table(blocks: Float32, d: Float32, scales: Int16, table: Codes, codes: Codes) -> None:
    """Round to the codes of a table by `floor(2 x / step) + len / 2`, 32 weights per sub-block."""
    x, c, flat = blocks.reshape(-1, 32), codes.reshape(-1, 32), scales.reshape(-1)
    places = np.empty(32, np.uint16)
    middle = np.float32(table.size // 2)
    top = middle + middle - np.float32(1.0)
    for k in range(x.shape[0]):
        inverse, _ = _grid(d[k // scales.shape[1]], flat[k], np.float32(0.0), 0)
        for j in range(32):
            place = x[k, j] * inverse * np.float32(2.0) + middle
            places[j] = np.int32(min(max(place, np.float32(0.0)), top))
        for j in range(32):
            c[k, j] = table[places[j]]
