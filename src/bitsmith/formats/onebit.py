"""The formats of one and two bits a weight: Q1_0 (signs) and Q2_0 (-1, 0, 1, 2), a float16 scale each."""

from __future__ import annotations

import numpy as np
from numba import njit

from bitsmith.formats import decoders
from bitsmith.formats.blocks import BlockFormat, Codes, Fields, halves
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.klayout import put_half
from bitsmith.formats.starts import floats
from bitsmith.formats.symmetric import EVEN, fit_symmetric
from bitsmith.numerics.half import half_round

_SIGNS = floats(-1, 1)
_SUMS = 16  # partial sums side by side, so that they vectorise in a fixed order

_STARTS = floats(
    3.0, -5.01, -2.59, 8.38, 2.24, 4.33, -14.0, -3.47, 2.59, 14.0, 3.47, -2.08, -7.78, 5.8, 1.93, -3.0, 1.34,
    -4.02, 2.79, 2.41, 3.74, -6.24, -2.41, 5.01,
)  # fmt: skip
"""Where Q2_0's search begins, picked as those in `formats.starts`."""
_PLAIN_STARTS = floats(2.79, -2.41, 3.74, 2.24, -3.0, 3.23, 4.66, 2.59)
"""The same where every weight counts the same."""


class Q1_0(BlockFormat):
    """1 bit: `d` where it is set, `-d` where it is not; a float16 scale per 128.

    The error falls apart into the signs' and the scale's: a weight's own sign is best under any `d > 0`, and
    then `d = sum(w |x|) / sum(w)`.
    """

    name = "Q1_0"
    decoder = staticmethod(decoders.q1_0)
    ggml_type = 41
    block_size = 128
    block_bytes = 18
    sub_size = 32
    levels = _SIGNS
    level_table = _SIGNS

    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        alike = np.ones((1, self.block_size), np.float32)
        _fit_signs(blocks, alike if weights is None else weights, first, fields.d)

    def _round(self, blocks: Float32, fields: Fields, codes: Codes) -> None:
        _round_signs(blocks, fields.d, codes)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        _pack_bits(fields.d, codes, 1, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 0)
        _unpack_bits(blocks, 1, codes)


class Q2_0(BlockFormat):
    """2 bits: `d * (code - 1)`, a float16 scale of either sign per 64."""

    name = "Q2_0"
    decoder = staticmethod(decoders.q2_0)
    ggml_type = 42
    block_size = 64
    block_bytes = 18
    sub_size = 32
    levels = np.arange(-1, 3, dtype=np.float32)

    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        starts = _STARTS if weights is not None else _PLAIN_STARTS
        fit_symmetric(blocks, weights, first, self.levels[0], self.levels[-1], EVEN, starts, 1, fields.d)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        _pack_bits(fields.d, codes, 2, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 0)
        _unpack_bits(blocks, 2, codes)


@njit(nogil=True, cache=True, error_model="numpy")
def _fit_signs(blocks: Float32, weights: Float32, first: int, d: Float32) -> None:
    wx, ws = np.empty(_SUMS, np.float64), np.empty(_SUMS, np.float64)
    for b in range(blocks.shape[0]):
        row = (first + b) % weights.shape[0]
        wx[:] = 0.0
        ws[:] = 0.0
        for at in range(0, blocks.shape[1], _SUMS):
            for k in range(_SUMS):
                weight = np.float64(weights[row, at + k])
                wx[k] += weight * abs(np.float64(blocks[b, at + k]))
                ws[k] += weight
        d[b] = half_round(np.float32(wx.sum() / ws.sum()))


@njit(nogil=True, cache=True, error_model="numpy")
def _round_signs(blocks: Float32, d: Float32, codes: Codes) -> None:
    for b in range(blocks.shape[0]):
        set_where = d[b] >= 0
        for j in range(blocks.shape[1]):
            codes[b, j] = np.uint8((blocks[b, j] >= 0) == set_where)


@njit(nogil=True, cache=True)
def _pack_bits(d: Float32, codes: Codes, bits: int, out: Bytes) -> None:
    """Write a float16 and codes of `bits` each, the first in a byte's lowest bits."""
    each = 8 // bits
    for b in range(codes.shape[0]):
        put_half(d[b], out, b, 0)
        for k in range(codes.shape[1] // each):
            byte = np.uint8(0)
            for j in range(each):
                byte |= np.uint8(codes[b, each * k + j] << np.uint8(bits * j))
            out[b, 2 + k] = byte


@njit(nogil=True, cache=True)
def _unpack_bits(blocks: Bytes, bits: int, codes: Codes) -> None:
    each, mask = 8 // bits, np.uint8((1 << bits) - 1)
    for b in range(codes.shape[0]):
        for k in range(codes.shape[1] // each):
            for j in range(each):
                codes[b, each * k + j] = (blocks[b, 2 + k] >> np.uint8(bits * j)) & mask
