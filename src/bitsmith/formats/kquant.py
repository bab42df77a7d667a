"""The 256-weight K formats: Q2_K Q3_K Q4_K Q5_K Q6_K. Sub-blocks share a float16 d (and m) per block."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from bitsmith.formats import klayout
from bitsmith.formats.blocks import NO_TABLE, BlockFormat, Codes, Fields, halves
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.search import fit_super_affine, fit_super_symmetric


class _Symmetric(BlockFormat):
    block_size = 256
    scale_range: ClassVar[tuple[int, int]]
    targets: ClassVar[Float32]
    spreads: ClassVar[Float32]

    def _fit(self, blocks: Float32, weights: Float32, first: int, fields: Fields) -> None:
        low, high = self.levels[self.first_code], self.levels[-1]
        fit_super_symmetric(
            blocks, weights, first, low, high, NO_TABLE, self.targets, *self.scale_range, self.spreads,
            fields.d, fields.scales,
        )  # fmt: skip


class _Affine(BlockFormat):
    block_size = 256
    scale_max: ClassVar[int]
    targets: ClassVar[Float32]
    spreads: ClassVar[Float32]

    def _fit(self, blocks: Float32, weights: Float32, first: int, fields: Fields) -> None:
        fit_super_affine(
            blocks, weights, first, self.levels[-1], self.targets, self.scale_max, self.spreads, *fields
        )


class Q2_K(_Affine):
    """2 bits: 16 sub-blocks of 16, 4-bit scales and mins."""

    name = "Q2_K"
    ggml_type = 10
    block_bytes = 84
    sub_size = 16
    levels = np.arange(4, dtype=np.float32)
    scale_max = 15
    targets = np.arange(2, 4.4, 0.1, dtype=np.float32)
    spreads = np.array([0], np.float32)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        klayout.pack_q2(*fields, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 80)
        fields.m[:] = halves(blocks, 82)
        fields.scales[:] = blocks[:, :16] & 15
        fields.mins[:] = blocks[:, :16] >> 4
        klayout.unpack_pairs(blocks[:, 16:80], codes)


class Q3_K(_Symmetric):
    """3 bits: 16 sub-blocks of 16, signed 6-bit scales."""

    name = "Q3_K"
    ggml_type = 11
    block_bytes = 110
    sub_size = 16
    levels = np.arange(-4, 4, dtype=np.float32)
    scale_range = (-32, 31)
    targets = np.arange(-5.2, -2.8, 0.15, dtype=np.float32)
    spreads = np.array([0], np.float32)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        klayout.pack_q3(fields.d, fields.scales, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 108)
        fields.scales[:] = klayout.unpack_signed_six(blocks[:, 96:108])
        klayout.unpack_q3(blocks, codes)


class Q4_K(_Affine):
    """4 bits: 8 sub-blocks of 32, 6-bit scales and mins."""

    name = "Q4_K"
    ggml_type = 12
    block_bytes = 144
    sub_size = 32
    levels = np.arange(16, dtype=np.float32)
    scale_max = 63
    targets = np.arange(14, 17.6, 0.2, dtype=np.float32)
    spreads = np.array([0], np.float32)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        klayout.pack_q45(*fields, False, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        klayout.unpack_affine_fields(blocks, fields)
        klayout.unpack_q45(blocks, False, codes)


class Q5_K(_Affine):
    """5 bits: 8 sub-blocks of 32, 6-bit scales and mins."""

    name = "Q5_K"
    ggml_type = 13
    block_bytes = 176
    sub_size = 32
    levels = np.arange(32, dtype=np.float32)
    scale_max = 63
    targets = np.arange(30, 33.6, 0.2, dtype=np.float32)
    spreads = np.array([0], np.float32)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        klayout.pack_q45(*fields, True, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        klayout.unpack_affine_fields(blocks, fields)
        klayout.unpack_q45(blocks, True, codes)


class Q6_K(_Symmetric):
    """6 bits: 16 sub-blocks of 16, signed 8-bit scales."""

    name = "Q6_K"
    ggml_type = 14
    block_bytes = 210
    sub_size = 16
    levels = np.arange(-32, 32, dtype=np.float32)
    scale_range = (-128, 127)
    targets = np.arange(-33, -29.9, 0.2, dtype=np.float32)
    spreads = np.array([0], np.float32)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        klayout.pack_q6(fields.d, fields.scales, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 208)
        fields.scales[:] = blocks[:, 192:208].view(np.int8)
        klayout.unpack_q6(blocks, codes)
