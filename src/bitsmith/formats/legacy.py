"""The 32-weight formats: Q8_0 Q4_0 Q4_1 Q5_0 Q5_1: float16 d [, float16 m] [, high bits], codes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numba import njit

from bitsmith.formats import decoders
from bitsmith.formats.affine import fit_affine
from bitsmith.formats.blocks import BlockFormat, Codes, Fields, halves
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.sixteen import encode_legacy, turned
from bitsmith.formats.starts import AFFINE_4, AFFINE_5, floats
from bitsmith.formats.symmetric import EVEN, fit_symmetric
from bitsmith.numerics.half import half_bits

# eight codes in a word: their fifth bits, one per byte, times _GATHER lie side by side in the top byte
_FIFTH_BITS = np.uint64(0x1010101010101010)
_GATHER = np.uint64(0x0102040810204080)
_FOUR, _TOP_BYTE = np.uint64(4), np.uint64(56)


class _Legacy(BlockFormat):
    """One scale per block; fewer starts are tried where every weight counts the same."""

    block_size = 32
    sub_size = 32
    piece_weights = 1 << 20
    high_bits: ClassVar[bool] = False
    rounds: ClassVar[int] = 1

    def effort(self, *, weighted: bool) -> tuple[Float32, int]:
        """Return the starts of the scale search, and how many rounds of refinement follow them."""
        return super().effort(weighted=weighted)[0], self.rounds if weighted else 0

    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        low, high = self.levels[self.first_code], self.levels[-1]
        effort = self.effort(weighted=weights is not None)
        fit_symmetric(blocks, weights, first, low, high, EVEN, *effort, fields.d)

    def _encode_blocks(self, blocks: Float32, weights: Float32 | None, first: int, out: Bytes) -> None:
        starts, rounds = self.effort(weighted=weights is not None)
        encode_legacy(
            blocks, weights, turned(weights), first, self.levels[0], np.float32(self.first_code),
            np.float32(len(self.levels) - 1), starts, rounds, len(self.levels).bit_length() - 1, out,
        )  # fmt: skip

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        _pack_nibbles(fields.d, fields.m, False, self.high_bits, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 0)
        _unpack_nibbles(blocks, 2, self.high_bits, codes)


class _LegacyAffine(_Legacy):
    min_limits = (1, 1)

    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        effort = self.effort(weighted=weights is not None)
        fit_affine(blocks, weights, first, self.levels[-1], *effort, fields.d, fields.m)
        fields.mins[:] = 1

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        _pack_nibbles(fields.d, fields.m, True, self.high_bits, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 0)
        fields.m[:] = -halves(blocks, 2)
        fields.mins[:] = 1
        _unpack_nibbles(blocks, 4, self.high_bits, codes)


class Q8_0(_Legacy):
    """8 bits: `d * (code - 128)`, codes within ±127."""

    name = "Q8_0"
    decoder = staticmethod(decoders.q8_0)
    ggml_type = 8
    block_bytes = 34
    levels = np.arange(-128, 128, dtype=np.float32)
    first_code = 1
    starts = floats(-127, -125, -126)
    plain_starts = 3
    rounds = 0

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        _pack_bytes(fields.d, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 0)
        codes[:] = blocks[:, 2:] ^ 0x80


class Q4_0(_Legacy):
    """4 bits: `d * (code - 8)`."""

    name = "Q4_0"
    decoder = staticmethod(decoders.q4_0)
    ggml_type = 2
    block_bytes = 18
    levels = np.arange(-8, 8, dtype=np.float32)
    starts = floats(
        -8.24, -7.76, -9.52, -7.12, -8.72, -10.88, -8.08, -6.16, 8.8, -12.0, 9.84, -8.48, -10.16, -9.04, -6.8,
        8.08, 11.2, -7.36, -7.92, -5.84, -8.32, 9.2, -7.6, -11.36,
    )  # fmt: skip
    plain_starts = 2


class Q4_1(_LegacyAffine):
    """4 bits: `d * code + min`."""

    name = "Q4_1"
    decoder = staticmethod(decoders.q4_1)
    ggml_type = 3
    block_bytes = 20
    levels = np.arange(16, dtype=np.float32)
    starts = AFFINE_4
    plain_starts = 1


class Q5_0(_Legacy):
    """5 bits: `d * (code - 16)`."""

    name = "Q5_0"
    decoder = staticmethod(decoders.q5_0)
    ggml_type = 6
    block_bytes = 22
    high_bits = True
    levels = np.arange(-16, 16, dtype=np.float32)
    starts = floats(
        -16.16, -15.2, -16.8, -14.08, -15.84, -18.56, -13.12, -16.48, -17.6, -14.88, -20.48, -12.16, -15.68,
        -19.36, -16.0, -14.4, -13.76, -17.12, 16.64, -11.2, -21.92, -16.32, 17.92, -15.36,
    )  # fmt: skip
    plain_starts = 4


class Q5_1(_LegacyAffine):
    """5 bits: `d * code + min`."""

    name = "Q5_1"
    decoder = staticmethod(decoders.q5_1)
    ggml_type = 7
    block_bytes = 24
    high_bits = True
    levels = np.arange(32, dtype=np.float32)
    starts = AFFINE_5
    plain_starts = 2


@njit(nogil=True, cache=True)
def _pack_bytes(d: Float32, codes: Codes, out: Bytes) -> None:
    for b in range(codes.shape[0]):
        bits = half_bits(d[b])
        out[b, 0] = np.uint8(bits & 255)
        out[b, 1] = np.uint8(bits >> 8)
        for j in range(32):
            out[b, 2 + j] = codes[b, j] ^ np.uint8(0x80)


@njit(nogil=True, cache=True)
def _pack_nibbles(d: Float32, m: Float32, with_min: bool, high_bits: bool, codes: Codes, out: Bytes) -> None:
    eights = codes.view(np.uint64)
    for b in range(codes.shape[0]):
        bits = half_bits(d[b])
        out[b, 0] = np.uint8(bits & 255)
        out[b, 1] = np.uint8(bits >> 8)
        at = 2
        if with_min:
            bits = half_bits(-m[b])
            out[b, 2] = np.uint8(bits & 255)
            out[b, 3] = np.uint8(bits >> 8)
            at = 4
        if high_bits:
            for k in range(4):
                out[b, at + k] = np.uint8(((eights[b, k] & _FIFTH_BITS) >> _FOUR) * _GATHER >> _TOP_BYTE)
            at += 4
        for j in range(16):
            out[b, at + j] = (codes[b, j] & np.uint8(15)) | np.uint8(codes[b, 16 + j] << 4)


@njit(nogil=True, cache=True)
def _unpack_nibbles(blocks: Bytes, at: int, high_bits: bool, codes: Codes) -> None:
    first = at + 4 if high_bits else at
    for b in range(codes.shape[0]):
        for j in range(16):
            byte = blocks[b, first + j]
            codes[b, j] = byte & np.uint8(15)
            codes[b, 16 + j] = byte >> 4
        if high_bits:
            for j in range(32):
                bit = (blocks[b, at + j // 8] >> np.uint8(j % 8)) & np.uint8(1)
                codes[b, j] |= np.uint8(bit << 4)
