"""4-bit floats (E2M1) under small scales: MXFP4 (a power of two per 32) and NVFP4 (UE4M3 per 16).

A code is a sign and a magnitude of 0 ½ 1 1½ 2 3 4 6; as ggml does, levels here are twice that and scales
half of what is stored. OCP Microscaling Formats (MX) 1.0; ggml's `block_mxfp4` and `block_nvfp4`.

The scales that can be stored are few, so that their exact errors are compared: from the smallest scale that
clips nothing, `offsets` of the ladder of scales are tried.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.formats import decoders
from bitsmith.formats.blocks import BlockFormat, Codes, Fields
from bitsmith.formats.decoders import E8M0_HALVES, UE4M3_HALVES
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.iquant import nearest_table
from bitsmith.formats.lanes import (
    HEARD,
    HIGHEST,
    LANES,
    ONE,
    ZERO,
    load_lanes,
    load_weights,
    weight_at,
    weight_lanes,
)
from bitsmith.formats.starts import floats

_LEVELS = floats(-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12)
_NIBBLES = np.array([15, 14, 13, 12, 11, 10, 9, 0, 8, 1, 2, 3, 4, 5, 6, 7], np.uint8)
"""What is stored for each level; the second zero is ggml's negative one, which is read but not written."""
_CODE_TABLE, _LEVEL_TABLE = nearest_table(_LEVELS)
_MIDDLE = np.float32(len(_CODE_TABLE) // 2)
_TOP = np.float32(len(_CODE_TABLE) - 1)


class _Microscale(BlockFormat):
    levels = _LEVELS
    level_table = _LEVEL_TABLE
    scales_of_bytes: ClassVar[Float32]
    rising: ClassVar[int]  # up to that byte a larger one is a larger scale
    offsets: ClassVar[NDArray[np.int64]]

    def _fit(self, blocks: Float32, weights: Float32 | None, first: int, fields: Fields) -> None:
        _fit_scales(blocks, weights, first, self.scale_values, self.offsets, _LEVELS[-1], fields.scales)

    def _round(self, blocks: Float32, fields: Fields, codes: Codes) -> None:
        _round_in_table(blocks, fields.scales, codes)

    def _pack(self, fields: Fields, codes: Codes, out: Bytes) -> None:
        out[:, : self.subs] = np.searchsorted(self.scales_of_bytes[: self.rising], fields.scales)
        _pack_nibbles(codes, self.subs, out)

    def _unpack(self, blocks: Bytes, fields: Fields, codes: Codes) -> None:
        fields.scales[:] = self.scales_of_bytes[blocks[:, : self.subs]]
        _unpack_nibbles(blocks, self.subs, codes)


class MXFP4(_Microscale):
    """4-bit floats under a power of two (E8M0) per 32.

    Written are those scales whose reciprocal and largest weight are ordinary float32 numbers.
    """

    name = "MXFP4"
    decoder = staticmethod(decoders.mxfp4)
    ggml_type = 39
    block_size = 32
    block_bytes = 17
    sub_size = 32
    scales_of_bytes = E8M0_HALVES
    rising = 256
    scale_values = E8M0_HALVES[2:253]
    scale_limits = (0, 250)
    offsets = np.array([0, -1, -2, -3])  # twice a scale has half of its levels


class NVFP4(_Microscale):
    """4-bit floats under UE4M3 scales per 16, four to a block; without the tensor-wide scale of a file.

    The smallest scale is 2⁻¹⁰ and steps are even up to 2⁻⁷: weights below about 0.01 lose accuracy.
    """

    name = "NVFP4"
    decoder = staticmethod(decoders.nvfp4)
    ggml_type = 40
    block_size = 64
    block_bytes = 36
    sub_size = 16
    scales_of_bytes = UE4M3_HALVES
    rising = 127
    scale_values = UE4M3_HALVES[:127]
    scale_limits = (0, 126)
    offsets = np.array(sorted(range(-8, 13), key=abs))


@njit(nogil=True, cache=True, error_model="numpy")
def _errors(x: Float32, w: Float32 | None, scale: Float32, inverse: Float32, error: Float32) -> None:
    """Sum `w (x - scale q)^2` per lane for the levels `q` nearest to `x * inverse`."""
    for lane in range(LANES):
        error[lane] = ZERO
    top, four, eight = np.float32(12.0), np.float32(4.0), np.float32(8.0)
    half, quarter = np.float32(0.5), np.float32(0.25)
    for j in range(x.shape[0]):
        for lane in range(LANES):
            size = abs(x[j, lane])
            place = min(size * inverse[lane], top)
            fine = ONE if place < four else (half if place < eight else quarter)
            coarse = ONE if place < four else (np.float32(2.0) if place < eight else four)
            left = size - scale[lane] * (coarse * np.rint(place * fine))
            error[lane] += weight_at(w, j, lane) * left * left


@njit(nogil=True, cache=True, error_model="numpy")
def _fit_scales(
    blocks: Float32, weights: Float32 | None, first: int, ladder: Float32, offsets: NDArray[np.int64],
    top: np.float32, scales: Float32,
) -> None:  # fmt: skip
    """Fill `scales` (`n s`) with those of the `ladder` that leave the least error."""
    subs = scales.shape[1]
    size, group = blocks.shape[1] // subs, LANES // subs
    x, w = np.empty((size, LANES), np.float32), weight_lanes(weights, size)
    unit, largest, best = (
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
    )
    scratch, base, found = (
        np.empty((5, LANES), np.float32),
        np.empty(LANES, np.int64),
        np.empty(LANES, np.int64),
    )
    scale, inverse, error = scratch[0], scratch[1], scratch[2]
    for block in range(0, blocks.shape[0], group):
        load_lanes(blocks, block, subs, x, unit, scratch)
        load_weights(weights, first, block, subs, w)
        for lane in range(LANES):
            largest[lane] = ZERO
            best[lane] = HIGHEST
        for j in range(size):
            for lane in range(LANES):
                heard = abs(x[j, lane]) if weight_at(w, j, lane) > HEARD else ZERO
                largest[lane] = max(largest[lane], heard)
        for lane in range(LANES):
            base[lane] = np.searchsorted(ladder, largest[lane] / top * unit[lane])
            found[lane] = 0
        for offset in offsets:
            for lane in range(LANES):
                at = min(max(base[lane] + offset, 0), ladder.size - 1)
                scale[lane] = ladder[at] / unit[lane] if unit[lane] != 0 else ZERO
                inverse[lane] = ONE / scale[lane] if scale[lane] != 0 else ZERO
            _errors(x, w, scale, inverse, error)
            for lane in range(LANES):
                better = error[lane] < best[lane]
                best[lane] = error[lane] if better else best[lane]
                found[lane] = base[lane] + offset if better else found[lane]
        for lane in range(min(LANES, (blocks.shape[0] - block) * subs)):
            scales[block + lane // subs, lane % subs] = ladder[min(max(found[lane], 0), ladder.size - 1)]


@njit(nogil=True, cache=True, error_model="numpy")
def _round_in_table(blocks: Float32, scales: Float32, codes: Codes) -> None:
    subs = scales.shape[1]
    size = blocks.shape[1] // subs
    places = np.empty(size, np.uint16)
    for b in range(blocks.shape[0]):
        for s in range(subs):
            inverse = ONE / scales[b, s] if scales[b, s] != 0 else ZERO
            for j in range(size):
                place = blocks[b, s * size + j] * inverse * np.float32(2.0) + _MIDDLE
                places[j] = np.int32(min(max(place, ZERO), _TOP))
            for j in range(size):
                codes[b, s * size + j] = _CODE_TABLE[places[j]]


@njit(nogil=True, cache=True)
def _pack_nibbles(codes: Codes, subs: int, out: Bytes) -> None:
    """Write each sub-block's codes after the scales: its first half low, its second half high."""
    half = codes.shape[1] // subs // 2
    for b in range(codes.shape[0]):
        for s in range(subs):
            for j in range(half):
                at = 2 * half * s + j
                low, high = _NIBBLES[codes[b, at]], _NIBBLES[codes[b, at + half]]
                out[b, subs + half * s + j] = np.uint8(low | (high << np.uint8(4)))


def _unpack_nibbles(blocks: Bytes, subs: int, codes: Codes) -> None:
    pairs = blocks[:, subs:].reshape(len(blocks), subs, 1, -1) >> np.array([[0], [4]], np.uint8)
    codes[:] = np.argsort(_NIBBLES).astype(np.uint8)[pairs & 15].reshape(codes.shape)
