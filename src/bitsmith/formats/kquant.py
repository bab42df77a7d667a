"""The 256-weight K formats: Q2_K Q3_K Q4_K Q5_K Q6_K. Sub-blocks share a float16 d (and m) per block."""

from __future__ import annotations

from copy import copy
from typing import ClassVar

import numpy as np

from bitsmith.formats import decoders, klayout
from bitsmith.formats.affine import fit_super_affine
from bitsmith.formats.blocks import BlockFormat, Codes, Fields, halves
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.starts import AFFINE_2, AFFINE_4, AFFINE_5, floats
from bitsmith.formats.symmetric import EVEN, fit_super_symmetric


class _Symmetric(BlockFormat):
    block_size = 256
    scale_range: ClassVar[Float32]

    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        low, high = self.levels[self.first_code], self.levels[-1]
        starts, _ = self.effort(weighted=weights is not None)
        fit_super_symmetric(
            blocks, weights, first, low, high, EVEN, starts, self.reach[0], self.refits,
            self.scale_range[0], self.scale_range[1], fields.d, fields.scales,
        )  # fmt: skip


class _Affine(BlockFormat):
    block_size = 256
    scale_max: ClassVar[np.float32]
    reach = (3, 1)

    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        fit_super_affine(
            blocks, weights, first, self.levels[-1], self.starts, *self.reach, self.refits, self.scale_max,
             fields.d, fields.m, fields.scales, fields.mins,
        )  # fmt: skip


class Q2_K(_Affine):
    """2 bits: 16 sub-blocks of 16, 4-bit scales and mins."""

    name = "Q2_K"
    decoder = staticmethod(decoders.q2_k)
    ggml_type = 10
    block_bytes = 84
    sub_size = 16
    levels = np.arange(4, dtype=np.float32)
    scale_max = np.float32(15)
    scale_limits = min_limits = (0, 15)
    starts = AFFINE_2

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
    decoder = staticmethod(decoders.q3_k)
    ggml_type = 11
    block_bytes = 110
    sub_size = 16
    levels = np.arange(-4, 4, dtype=np.float32)
    scale_range = floats(-32, 31)
    scale_limits = (-32, 31)
    starts = floats(
        -4.16, -3.24, -4.6, -3.84, -2.96, -4.36, -5.28, 4.8, -6.0, -3.64, 5.96, 4.08, -4.0,
    )  # fmt: skip
    plain_starts = 6
    reach = (2, 0)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        klayout.pack_q3(fields.d, fields.scales, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 108)
        fields.scales[:] = klayout.unpack_signed_six(blocks[:, 96:108])
        klayout.unpack_q3(blocks, codes)


class Q4_K(_Affine):
    """4 bits: 8 sub-blocks of 32, 6-bit scales and mins."""

    name = "Q4_K"
    decoder = staticmethod(decoders.q4_k)
    ggml_type = 12
    block_bytes = 144
    sub_size = 32
    levels = np.arange(16, dtype=np.float32)
    scale_max = np.float32(63)
    scale_limits = min_limits = (0, 63)
    starts = AFFINE_4

    def quick(self) -> BlockFormat:
        """Return the format with whole numbers chosen once, mins next to what scales call for."""
        found = copy(self)
        found.reach, found.refits = (1, 0), 1  # type: ignore[misc]
        return found

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        klayout.pack_q45(*fields, False, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        klayout.unpack_affine_fields(blocks, fields)
        klayout.unpack_q45(blocks, False, codes)


class Q5_K(_Affine):
    """5 bits: 8 sub-blocks of 32, 6-bit scales and mins."""

    name = "Q5_K"
    decoder = staticmethod(decoders.q5_k)
    ggml_type = 13
    block_bytes = 176
    sub_size = 32
    levels = np.arange(32, dtype=np.float32)
    scale_max = np.float32(63)
    scale_limits = min_limits = (0, 63)
    starts = AFFINE_5
    reach = (3, 2)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        klayout.pack_q45(*fields, True, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        klayout.unpack_affine_fields(blocks, fields)
        klayout.unpack_q45(blocks, True, codes)


class Q6_K(_Symmetric):
    """6 bits: 16 sub-blocks of 16, signed 8-bit scales."""

    name = "Q6_K"
    decoder = staticmethod(decoders.q6_k)
    ggml_type = 14
    block_bytes = 210
    sub_size = 16
    levels = np.arange(-32, 32, dtype=np.float32)
    scale_range = floats(-128, 127)
    scale_limits = (-128, 127)
    starts = floats(
        -32.0, -31.04, -30.08, -29.12, -27.84, -26.88, -32.64, -25.92, -24.96, -24.0, -33.6, -23.04, -28.48,
        -31.68, -21.12, -29.76, -30.72, -22.08, -35.2, -28.8, -27.2, -32.32, -31.36, -34.24,
    )  # fmt: skip
    plain_starts = 16
    reach = (3, 0)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        klayout.pack_q6(fields.d, fields.scales, codes, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 208)
        fields.scales[:] = blocks[:, 192:208].view(np.int8)
        klayout.unpack_q6(blocks, codes)
