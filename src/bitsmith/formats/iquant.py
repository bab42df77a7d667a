"""The formats on 16 uneven levels: IQ4_NL (a scale per 32) and IQ4_XS (6-bit sub-scales per 256)."""

from __future__ import annotations

import numpy as np
from numba import njit

from bitsmith.formats import decoders
from bitsmith.formats.blocks import BlockFormat, Codes, Fields, Int16, halves, nearest_in_table
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.klayout import put_half
from bitsmith.formats.starts import floats
from bitsmith.formats.symmetric import fit_super_symmetric, fit_symmetric

_LEVELS = decoders.UNEVEN


def nearest_table(levels: Float32) -> tuple[Codes, Float32]:
    """Return the nearest code and level to a place `p` at `floor(2 p) + 256` (bin edges are halves)."""
    places = (np.arange(512) - 256 + 0.5) / 2
    codes = np.abs(places[:, None] - levels).argmin(axis=1)
    return codes.astype(np.uint8), levels[codes]


_CODE_TABLE, _LEVEL_TABLE = nearest_table(_LEVELS)

_STARTS = floats(
    -130, 118, -142, -122, -108, 136, 110, -160, 126, -190, -136, 152, -102, 92, -126, 178, -86, -114, -150,
    114, -176, 104, 144, -200,
)  # fmt: skip


class _Uneven(BlockFormat):
    sub_size = 32
    levels = _LEVELS
    level_table = _LEVEL_TABLE
    starts = _STARTS
    reach = (2, 0)

    def _round(self, blocks: Float32, fields: Fields, codes: Codes) -> None:
        nearest_in_table(blocks, fields.d, fields.scales, _CODE_TABLE, codes)


class IQ4_NL(_Uneven):
    """4 bits on uneven levels, one float16 scale per 32."""

    name = "IQ4_NL"
    decoder = staticmethod(decoders.iq4_nl)
    ggml_type = 20
    block_size = 32
    block_bytes = 18

    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        effort = self.effort(weighted=weights is not None)
        fit_symmetric(blocks, weights, first, _LEVELS[0], _LEVELS[-1], _LEVEL_TABLE, *effort, fields.d)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        _pack_halves(fields.d, codes, 2, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 0)
        _unpack_halves(blocks[:, 2:], codes)


class IQ4_XS(_Uneven):
    """4 bits on uneven levels: 8 sub-blocks of 32 with signed 6-bit scales."""

    name = "IQ4_XS"
    decoder = staticmethod(decoders.iq4_xs)
    ggml_type = 23
    block_size = 256
    block_bytes = 136
    scale_limits = (-32, 31)

    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        fit_super_symmetric(
            blocks, weights, first, _LEVELS[0], _LEVELS[-1], _LEVEL_TABLE, self.starts, self.reach[0],
            self.refits, np.float32(-32), np.float32(31), fields.d, fields.scales,
        )  # fmt: skip

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        _pack_scales(fields.scales, out)
        _pack_halves(fields.d, codes, 8, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.d[:] = halves(blocks, 0)
        high = (blocks[:, 2:4, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
        low = (blocks[:, 4:8, None] >> np.array([0, 4], np.uint8)) & 15
        fields.scales[:] = (low.reshape(-1, 8) | (high.reshape(-1, 8) << 4)).astype(np.int16) - 32
        _unpack_halves(blocks[:, 8:], codes)


@njit(nogil=True, cache=True)
def _pack_halves(d: Float32, codes: Codes, at: int, out: Bytes) -> None:
    for b in range(codes.shape[0]):
        put_half(d[b], out, b, 0)
        for p in range(codes.shape[1] // 32):
            for j in range(16):
                i = 32 * p + j
                out[b, at + 16 * p + j] = np.uint8(codes[b, i] | (codes[b, i + 16] << 4))


@njit(nogil=True, cache=True)
def _pack_scales(scales: Int16, out: Bytes) -> None:
    for b in range(scales.shape[0]):
        out[b, 2] = 0
        out[b, 3] = 0
        for k in range(8):
            value = scales[b, k] + 32
            out[b, 2 + k // 4] |= np.uint8((value >> 4) << (2 * (k % 4)))
            if k % 2 == 0:
                out[b, 4 + k // 2] = np.uint8(value & 15)
            else:
                out[b, 4 + k // 2] |= np.uint8((value & 15) << 4)


def _unpack_halves(part: Bytes, codes: Codes) -> None:
    grouped = part.reshape(len(part), -1, 1, 16) >> np.array([0, 4], np.uint8).reshape(2, 1)
    codes[:] = (grouped & 15).reshape(codes.shape)
