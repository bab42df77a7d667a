"""The 32-weight formats: Q8_0 Q4_0 Q4_1 Q5_0 Q5_1. A block is a float16 d [, a float16 m] [, high bits], codes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numba import njit

from bitsmith.formats.blocks import NO_TABLE, BlockFormat, Codes, Fields, halves
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.search import fit_affine, fit_symmetric
from bitsmith.numerics.half import half_bits


class _Legacy(BlockFormat):
    block_size = 32
    sub_size = 32
    quick_targets: ClassVar[Float32]
    targets: ClassVar[Float32]
    high_bits: ClassVar[bool] = False

    def _fit(self, blocks: Float32, weights: Float32, first: int, fields: Fields) -> None:
        targets, rounds = (self.quick_targets, 1) if len(weights) == 1 else (self.targets, 2)
        low, high = self.levels[self.first_code], self.levels[-1]
        fit_symmetric(blocks, weights, first, low, high, NO_TABLE, targets, rounds, fields.d)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        _pack_nibbles(fields.d, fields.m, False, self.high_bits, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 0)
        _unpack_nibbles(blocks, 2, self.high_bits, codes)


class _LegacyAffine(_Legacy):
    def _fit(self, blocks: Float32, weights: Float32, first: int, fields: Fields) -> None:
        targets, rounds = (self.quick_targets, 1) if len(weights) == 1 else (self.targets, 2)
        fit_affine(blocks, weights, first, self.levels[-1], targets, rounds, fields.d, fields.m)
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
    ggml_type = 8
    block_bytes = 34
    levels = np.arange(-128, 128, dtype=np.float32)
    first_code = 1
    quick_targets = np.array([-127], np.float32)
    targets = np.array([-127], np.float32)

    def _fit(self, blocks: Float32, weights: Float32, first: int, fields: Fields) -> None:
        super()._fit(blocks, weights, first, fields)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        _pack_bytes(fields.d, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 0)
        codes[:] = blocks[:, 2:] ^ 0x80


class Q4_0(_Legacy):
    """4 bits: `d * (code - 8)`."""

    name = "Q4_0"
    ggml_type = 2
    block_bytes = 18
    levels = np.arange(-8, 8, dtype=np.float32)
    quick_targets = np.array([-8, -7.4], np.float32)
    targets = np.arange(-9.2, -6, 0.2, dtype=np.float32)


class Q4_1(_LegacyAffine):
    """4 bits: `d * code + min`."""

    name = "Q4_1"
    ggml_type = 3
    block_bytes = 20
    levels = np.arange(16, dtype=np.float32)
    quick_targets = np.array([15], np.float32)
    targets = np.arange(14, 18, 0.25, dtype=np.float32)


class Q5_0(_Legacy):
    """5 bits: `d * (code - 16)`."""

    name = "Q5_0"
    ggml_type = 6
    block_bytes = 22
    high_bits = True
    levels = np.arange(-16, 16, dtype=np.float32)
    quick_targets = np.array([-16], np.float32)
    targets = np.arange(-17.2, -14, 0.2, dtype=np.float32)


class Q5_1(_LegacyAffine):
    """5 bits: `d * code + min`."""

    name = "Q5_1"
    ggml_type = 7
    block_bytes = 24
    high_bits = True
    levels = np.arange(32, dtype=np.float32)
    quick_targets = np.array([31], np.float32)
    targets = np.arange(30, 34, 0.25, dtype=np.float32)


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
            word = np.uint32(0)
            for j in range(32):
                word |= np.uint32(codes[b, j] >> 4) << np.uint32(j)
            for k in range(4):
                out[b, at + k] = np.uint8((word >> np.uint32(8 * k)) & np.uint32(255))
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
