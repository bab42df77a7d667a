"""Decode blocks straight from bytes: one loop per format, `raw` (`n block_bytes`) to `out` (`n block_size`).

Products and differences are those of ggml, in its order, so that every bit is the same. Loops run over views
of one block's bytes, as only then the compiler sees that they can be vectorised.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from bitsmith.formats.format import Bytes, Float32
from bitsmith.numerics.half import half_value

_THREE, _FOUR, _FIFTEEN = np.uint8(3), np.uint8(4), np.uint8(15)

UNEVEN = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
"""The levels of IQ4_NL and IQ4_XS by code."""

E8M0_HALVES = np.ldexp(1.0, np.arange(256) - 128).astype(np.float32)
"""Half the power of two that each byte stands for in MXFP4."""


def _ue4m3_halves() -> Float32:
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent > 0, normal, np.ldexp(mantissa, -9)) / 2
    values[0x7F] = 0
    halved: Float32 = values.astype(np.float32)
    return halved


UE4M3_HALVES = _ue4m3_halves()
"""Half the value of every byte as ggml reads it in NVFP4: 0x7F is 0 and the top bit is not looked at."""


@njit(nogil=True, cache=True, error_model="numpy")
def half_at(raw: Bytes, b: int, at: int) -> np.float32:
    """Return the little-endian float16 at byte `at` of block `b`."""
    return half_value(np.uint16(np.uint16(raw[b, at]) | (np.uint16(raw[b, at + 1]) << np.uint16(8))))


@njit(nogil=True, cache=True, error_model="numpy")
def _word(raw: Bytes, b: int, at: int) -> np.uint32:
    word = np.uint32(0)
    for k in range(4):
        word |= np.uint32(raw[b, at + k]) << np.uint32(8 * k)
    return word


@njit(nogil=True, cache=True, error_model="numpy")
def q8_0(raw: Bytes, out: Float32) -> None:
    """Decode Q8_0: d, 32 signed bytes."""
    for b in range(raw.shape[0]):
        d, y = half_at(raw, b, 0), out[b]
        q = raw[b, 2:].view(np.int8)
        for j in range(32):
            y[j] = d * np.float32(q[j])


@njit(nogil=True, cache=True, error_model="numpy")
def q4_0(raw: Bytes, out: Float32) -> None:
    """Decode Q4_0: d, nibbles less 8."""
    for b in range(raw.shape[0]):
        d, q = half_at(raw, b, 0), raw[b, 2:]
        low, high = out[b, :16], out[b, 16:]
        for j in range(16):
            low[j] = d * np.float32(np.int32(q[j] & _FIFTEEN) - np.int32(8))
            high[j] = d * np.float32(np.int32(q[j] >> _FOUR) - np.int32(8))


@njit(nogil=True, cache=True, error_model="numpy")
def q4_1(raw: Bytes, out: Float32) -> None:
    """Decode Q4_1: d, m, nibbles."""
    for b in range(raw.shape[0]):
        d, m, q = half_at(raw, b, 0), half_at(raw, b, 2), raw[b, 4:]
        low, high = out[b, :16], out[b, 16:]
        for j in range(16):
            low[j] = d * np.float32(q[j] & _FIFTEEN) + m
            high[j] = d * np.float32(q[j] >> _FOUR) + m


@njit(nogil=True, cache=True, error_model="numpy")
def _five(nibble: np.uint8, word: np.uint32, j: int) -> np.int32:
    """Return a nibble with bit `j` of `word` above it."""
    return np.int32(nibble) | np.int32(((word >> np.uint32(j)) & np.uint32(1)) << np.uint32(4))


@njit(nogil=True, cache=True, error_model="numpy")
def q5_0(raw: Bytes, out: Float32) -> None:
    """Decode Q5_0: d, 32 high bits, nibbles; less 16."""
    for b in range(raw.shape[0]):
        d, bits, q = half_at(raw, b, 0), _word(raw, b, 2), raw[b, 6:]
        low, high = out[b, :16], out[b, 16:]
        for j in range(16):
            low[j] = d * np.float32(_five(q[j] & _FIFTEEN, bits, j) - np.int32(16))
            high[j] = d * np.float32(_five(q[j] >> _FOUR, bits, j + 16) - np.int32(16))


@njit(nogil=True, cache=True, error_model="numpy")
def q5_1(raw: Bytes, out: Float32) -> None:
    """Decode Q5_1: d, m, 32 high bits, nibbles."""
    for b in range(raw.shape[0]):
        d, m, bits, q = half_at(raw, b, 0), half_at(raw, b, 2), _word(raw, b, 4), raw[b, 8:]
        low, high = out[b, :16], out[b, 16:]
        for j in range(16):
            low[j] = d * np.float32(_five(q[j] & _FIFTEEN, bits, j)) + m
            high[j] = d * np.float32(_five(q[j] >> _FOUR, bits, j + 16)) + m


@njit(nogil=True, cache=True, error_model="numpy")
def q2_k(raw: Bytes, out: Float32) -> None:
    """Decode Q2_K: 16 bytes scale | min << 4, 64 bytes codes, d, m."""
    for b in range(raw.shape[0]):
        d, m = half_at(raw, b, 80), half_at(raw, b, 82)
        for s in range(16):
            step = d * np.float32(raw[b, s] & _FIFTEEN)
            offset = m * np.float32(raw[b, s] >> _FOUR)
            at, shift = 16 + 32 * (s // 8) + 16 * (s % 2), np.uint8(2 * (s % 8 // 2))
            q, y = raw[b, at : at + 16], out[b, 16 * s : 16 * s + 16]
            for j in range(16):
                y[j] = step * np.float32((q[j] >> shift) & _THREE) - offset


@njit(nogil=True, cache=True, error_model="numpy")
def q3_k(raw: Bytes, out: Float32) -> None:
    """Decode Q3_K: 32 bytes high bits, 64 bytes low pairs, 12 bytes scales + 32, d; less 4."""
    for b in range(raw.shape[0]):
        d = half_at(raw, b, 108)
        for s in range(16):
            pair = np.int32(raw[b, 104 + s % 4] >> np.uint8(2 * (s // 4))) & np.int32(3)
            nibble = np.int32(raw[b, 96 + s % 8] >> np.uint8(4 * (s // 8))) & np.int32(15)
            step = d * np.float32((nibble | (pair << np.int32(4))) - np.int32(32))
            at, shift = 32 + 32 * (s // 8) + 16 * (s % 2), np.uint8(2 * (s % 8 // 2))
            q, plane = raw[b, at : at + 16], np.uint8(s // 2)
            high, y = raw[b, 16 * (s % 2) : 16 * (s % 2) + 16], out[b, 16 * s : 16 * s + 16]
            for j in range(16):
                low = np.int32((q[j] >> shift) & _THREE)
                bit = np.int32((high[j] >> plane) & np.uint8(1))
                y[j] = step * np.float32(low + np.int32(4) * bit - np.int32(4))


@njit(nogil=True, cache=True, error_model="numpy")
def _affine_step(raw: Bytes, b: int, s: int, d: np.float32, m: np.float32) -> tuple[np.float32, np.float32]:
    """Return step and offset of sub-block `s` of Q4_K or Q5_K from their 12 bytes of scales and mins."""
    if s < 4:
        scale, least = raw[b, 4 + s] & np.uint8(63), raw[b, 8 + s] & np.uint8(63)
        return d * np.float32(scale), m * np.float32(least)
    mixed, top, top_m = np.int32(raw[b, 8 + s]), np.int32(raw[b, s]), np.int32(raw[b, 4 + s])
    scale = (mixed & np.int32(15)) | ((top >> np.int32(6)) << np.int32(4))
    least = (mixed >> np.int32(4)) | ((top_m >> np.int32(6)) << np.int32(4))
    return d * np.float32(scale), m * np.float32(least)


@njit(nogil=True, cache=True, error_model="numpy")
def q4_k(raw: Bytes, out: Float32) -> None:
    """Decode Q4_K: d, m, 12 bytes of six-bit scales and mins, nibbles."""
    for b in range(raw.shape[0]):
        d, m = half_at(raw, b, 0), half_at(raw, b, 2)
        for p in range(4):
            step, offset = _affine_step(raw, b, 2 * p, d, m)
            step2, offset2 = _affine_step(raw, b, 2 * p + 1, d, m)
            q = raw[b, 16 + 32 * p : 48 + 32 * p]
            low, high = out[b, 64 * p : 64 * p + 32], out[b, 64 * p + 32 : 64 * p + 64]
            for j in range(32):
                low[j] = step * np.float32(q[j] & _FIFTEEN) - offset
                high[j] = step2 * np.float32(q[j] >> _FOUR) - offset2


@njit(nogil=True, cache=True, error_model="numpy")
def q5_k(raw: Bytes, out: Float32) -> None:
    """Decode Q5_K: d, m, 12 bytes of six-bit scales and mins, 32 bytes high bits, nibbles."""
    for b in range(raw.shape[0]):
        d, m, planes = half_at(raw, b, 0), half_at(raw, b, 2), raw[b, 16:48]
        for p in range(4):
            step, offset = _affine_step(raw, b, 2 * p, d, m)
            step2, offset2 = _affine_step(raw, b, 2 * p + 1, d, m)
            q, plane = raw[b, 48 + 32 * p : 80 + 32 * p], np.uint8(2 * p)
            low, high = out[b, 64 * p : 64 * p + 32], out[b, 64 * p + 32 : 64 * p + 64]
            for j in range(32):
                bits = planes[j] >> plane
                first = (q[j] & _FIFTEEN) | ((bits & np.uint8(1)) << _FOUR)
                second = (q[j] >> _FOUR) | ((bits & np.uint8(2)) << _THREE)
                low[j] = step * np.float32(first) - offset
                high[j] = step2 * np.float32(second) - offset2


@njit(nogil=True, cache=True, error_model="numpy")
def q6_k(raw: Bytes, out: Float32) -> None:
    """Decode Q6_K: 128 bytes low nibbles, 64 bytes high pairs, 16 signed scales, d; less 32."""
    for b in range(raw.shape[0]):
        d, scales = half_at(raw, b, 208), raw[b, 192:208].view(np.int8)
        for k in range(4):  # 16 of every 32 weights of half a block
            h, at = k // 2, 16 * (k % 2)
            first, second = (
                raw[b, 64 * h + at : 64 * h + at + 16],
                raw[b, 64 * h + 32 + at : 64 * h + at + 48],
            )
            top, s, y = raw[b, 128 + 32 * h + at : 144 + 32 * h + at], 8 * h + k % 2, out[b, 128 * h + at :]
            steps = (
                d * np.float32(scales[s]), d * np.float32(scales[s + 2]),
                d * np.float32(scales[s + 4]), d * np.float32(scales[s + 6]),
            )  # fmt: skip
            y0, y1, y2, y3 = y[:16], y[32:48], y[64:80], y[96:112]
            for j in range(16):
                t, u, v = np.int32(top[j]), np.int32(first[j]), np.int32(second[j])
                y0[j] = steps[0] * _six(u & np.int32(15), t)
                y1[j] = steps[1] * _six(v & np.int32(15), t >> np.int32(2))
                y2[j] = steps[2] * _six(u >> np.int32(4), t >> np.int32(4))
                y3[j] = steps[3] * _six(v >> np.int32(4), t >> np.int32(6))


@njit(nogil=True, cache=True, error_model="numpy")
def _six(nibble: np.int32, pair: np.int32) -> np.float32:
    """Return the level of a nibble under a pair of bits, less 32."""
    return np.float32(np.int32(nibble | ((pair & np.int32(3)) << np.int32(4))) - np.int32(32))


@njit(nogil=True, cache=True, error_model="numpy")
def _uneven(q: Bytes, step: np.float32, low: Float32, high: Float32) -> None:
    for j in range(16):
        low[j] = step * UNEVEN[q[j] & _FIFTEEN]
        high[j] = step * UNEVEN[q[j] >> _FOUR]


@njit(nogil=True, cache=True, error_model="numpy")
def iq4_nl(raw: Bytes, out: Float32) -> None:
    """Decode IQ4_NL: d, nibbles on uneven levels."""
    for b in range(raw.shape[0]):
        _uneven(raw[b, 2:], half_at(raw, b, 0), out[b, :16], out[b, 16:])


@njit(nogil=True, cache=True, error_model="numpy")
def iq4_xs(raw: Bytes, out: Float32) -> None:
    """Decode IQ4_XS: d, 2 bytes high and 4 bytes low bits of scales + 32, nibbles on uneven levels."""
    for b in range(raw.shape[0]):
        d = half_at(raw, b, 0)
        for s in range(8):
            pair = np.int32(raw[b, 2 + s // 4] >> np.uint8(2 * (s % 4))) & np.int32(3)
            nibble = np.int32(raw[b, 4 + s // 2] >> np.uint8(4 * (s % 2))) & np.int32(15)
            step = d * np.float32((nibble | (pair << np.int32(4))) - np.int32(32))
            y = out[b, 32 * s : 32 * s + 32]
            _uneven(raw[b, 8 + 16 * s : 24 + 16 * s], step, y[:16], y[16:])


@njit(nogil=True, cache=True, error_model="numpy")
def _e2m1(nibble: np.int32) -> np.float32:
    """Return twice the value of a 4-bit float: 0 1 2 3 4 6 8 12, negative with the top bit."""
    code = nibble & np.int32(7)
    level = (np.int32(2) | (code & np.int32(1))) << np.int32(
        max(np.int32((code >> np.int32(1)) - 1), np.int32(0))
    )
    level = code if code < np.int32(2) else level
    return np.float32(np.int32(-level if nibble & np.int32(8) else level))


@njit(nogil=True, cache=True, error_model="numpy")
def mxfp4(raw: Bytes, out: Float32) -> None:
    """Decode MXFP4: an E8M0 scale, nibbles of E2M1."""
    for b in range(raw.shape[0]):
        d, q = E8M0_HALVES[raw[b, 0]], raw[b, 1:]
        low, high = out[b, :16], out[b, 16:]
        for j in range(16):
            low[j] = d * _e2m1(np.int32(q[j]) & np.int32(15))
            high[j] = d * _e2m1(np.int32(q[j]) >> np.int32(4))


@njit(nogil=True, cache=True, error_model="numpy")
def nvfp4(raw: Bytes, out: Float32) -> None:
    """Decode NVFP4: 4 UE4M3 scales, nibbles of E2M1 in eight bytes for each."""
    for b in range(raw.shape[0]):
        for s in range(4):
            d, q = UE4M3_HALVES[raw[b, s]], raw[b, 4 + 8 * s : 12 + 8 * s]
            low, high = out[b, 16 * s : 16 * s + 8], out[b, 16 * s + 8 : 16 * s + 16]
            for j in range(8):
                low[j] = d * _e2m1(np.int32(q[j]) & np.int32(15))
                high[j] = d * _e2m1(np.int32(q[j]) >> np.int32(4))


@njit(nogil=True, cache=True, error_model="numpy")
def q1_0(raw: Bytes, out: Float32) -> None:
    """Decode Q1_0: d, 128 bits, a set one `d`, else `-d`."""
    for b in range(raw.shape[0]):
        d = half_at(raw, b, 0)
        for k in range(4):
            word, y = _word(raw, b, 2 + 4 * k), out[b, 32 * k : 32 * k + 32]
            for j in range(32):
                bit = np.int32((word >> np.uint32(j)) & np.uint32(1))
                y[j] = d * np.float32(np.int32(2) * bit - np.int32(1))


@njit(nogil=True, cache=True, error_model="numpy")
def q2_0(raw: Bytes, out: Float32) -> None:
    """Decode Q2_0: d, 64 codes of 2 bits; less 1."""
    for b in range(raw.shape[0]):
        d = half_at(raw, b, 0)
        for k in range(4):
            word, y = _word(raw, b, 2 + 4 * k), out[b, 16 * k : 16 * k + 16]
            for j in range(16):
                code = np.int32((word >> np.uint32(2 * j)) & np.uint32(3))
                y[j] = d * np.float32(code - np.int32(1))
