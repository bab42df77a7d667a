"""Decode blocks straight from bytes: one loop per format, `raw` (`n block_bytes`) to `out` (`n block_size`).

Products and differences are those of ggml, in its order, so that every bit is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from bitsmith.formats.format import Bytes, Float32
from bitsmith.numerics.half import half_value
from bitsmith.numerics.vectors import converted, joined, load, part, spread, store, where

_U = np.uint8
_ONE, _THREE, _FOUR, _FIFTEEN = _U(1), _U(3), _U(4), _U(15)

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
def _floats(codes: Any, zero: int) -> Any:
    """Return codes less `zero` as floats."""
    return converted(converted(codes, "int8") - np.int8(zero), "float32")


@njit(nogil=True, cache=True, error_model="numpy")
def _nibbles(raw: Bytes, at: int) -> Any:
    """Return the low halves of 16 bytes, then the high halves."""
    q = load(raw, at, 16)
    return joined(q & _FIFTEEN, q >> _FOUR)


@njit(nogil=True, cache=True, error_model="numpy")
def q8_0(raw: Bytes, out: Float32) -> None:
    """Decode Q8_0: d, 32 signed bytes."""
    for b in range(raw.shape[0]):
        store(out, 32 * b, _floats(load(raw, 34 * b + 2, 32), 0) * half_at(raw, b, 0))


@njit(nogil=True, cache=True, error_model="numpy")
def q4_0(raw: Bytes, out: Float32) -> None:
    """Decode Q4_0: d, nibbles less 8."""
    for b in range(raw.shape[0]):
        store(out, 32 * b, _floats(_nibbles(raw, 18 * b + 2), 8) * half_at(raw, b, 0))


@njit(nogil=True, cache=True, error_model="numpy")
def q4_1(raw: Bytes, out: Float32) -> None:
    """Decode Q4_1: d, m, nibbles."""
    for b in range(raw.shape[0]):
        levels = _floats(_nibbles(raw, 20 * b + 4), 0)
        store(out, 32 * b, levels * half_at(raw, b, 0) + half_at(raw, b, 2))


@njit(nogil=True, cache=True, error_model="numpy")
def _fifth_bits(raw: Bytes, at: int) -> Any:
    """Return 16 for each of 32 bits from byte `at` on that is set."""
    first = joined(spread(raw.flat[at], 8), spread(raw.flat[at + 1], 8))
    second = joined(spread(raw.flat[at + 2], 8), spread(raw.flat[at + 3], 8))
    return where((joined(first, second) & load(_BITS, 0, 32)) > _U(0), spread(_U(16), 32), spread(_U(0), 32))


_BITS = np.tile(np.left_shift(1, np.arange(8)).astype(np.uint8), 4)


@njit(nogil=True, cache=True, error_model="numpy")
def q5_0(raw: Bytes, out: Float32) -> None:
    """Decode Q5_0: d, 32 high bits, nibbles; less 16."""
    for b in range(raw.shape[0]):
        codes = _nibbles(raw, 22 * b + 6) | _fifth_bits(raw, 22 * b + 2)
        store(out, 32 * b, _floats(codes, 16) * half_at(raw, b, 0))


@njit(nogil=True, cache=True, error_model="numpy")
def q5_1(raw: Bytes, out: Float32) -> None:
    """Decode Q5_1: d, m, 32 high bits, nibbles."""
    for b in range(raw.shape[0]):
        codes = _nibbles(raw, 24 * b + 8) | _fifth_bits(raw, 24 * b + 4)
        store(out, 32 * b, _floats(codes, 0) * half_at(raw, b, 0) + half_at(raw, b, 2))


@njit(nogil=True, cache=True, error_model="numpy")
def _put_affine(raw: Bytes, b: int, s: int, d: np.float32, m: np.float32, q: Any, out: Float32) -> None:
    """Write sub-blocks `s` and `s + 1` of Q2_K."""
    levels, at = _floats(q, 0), 256 * b + 16 * s
    for k in range(2):
        field = raw[b, s + k]
        step, offset = d * np.float32(field & _FIFTEEN), m * np.float32(field >> _FOUR)
        half = part(levels, 0, 16) if k == 0 else part(levels, 16, 16)
        store(out, at + 16 * k, half * step - offset)


@njit(nogil=True, cache=True, error_model="numpy")
def q2_k(raw: Bytes, out: Float32) -> None:
    """Decode Q2_K: 16 bytes scale | min << 4, 64 bytes codes, d, m."""
    for b in range(raw.shape[0]):
        d, m = half_at(raw, b, 80), half_at(raw, b, 82)
        for h in range(2):
            q = load(raw, 84 * b + 16 + 32 * h, 32)
            for k in range(4):
                _put_affine(raw, b, 8 * h + 2 * k, d, m, (q >> _U(2 * k)) & _THREE, out)


@njit(nogil=True, cache=True, error_model="numpy")
def _six_bits(raw: Bytes, b: int, s: int) -> np.float32:
    """Return scale `s` of Q3_K."""
    pair = np.int32(raw[b, 104 + s % 4] >> _U(2 * (s // 4))) & np.int32(3)
    nibble = np.int32(raw[b, 96 + s % 8] >> _U(4 * (s // 8))) & np.int32(15)
    return np.float32((nibble | (pair << np.int32(4))) - np.int32(32))


@njit(nogil=True, cache=True, error_model="numpy")
def q3_k(raw: Bytes, out: Float32) -> None:
    """Decode Q3_K: 32 bytes high bits, 64 bytes low pairs, 12 bytes scales + 32, d; less 4."""
    for b in range(raw.shape[0]):
        d, high = half_at(raw, b, 108), load(raw, 110 * b, 32)
        for k in range(8):
            low = load(raw, 110 * b + 32 + 32 * (k // 4), 32) >> _U(2 * (k % 4))
            levels = _floats((low & _THREE) | (((high >> _U(k)) & _ONE) << _U(2)), 4)
            at = 256 * b + 32 * k
            store(out, at, part(levels, 0, 16) * (d * _six_bits(raw, b, 2 * k)))
            store(out, at + 16, part(levels, 16, 16) * (d * _six_bits(raw, b, 2 * k + 1)))


@njit(nogil=True, cache=True, error_model="numpy")
def _affine_step(raw: Bytes, b: int, s: int, d: np.float32, m: np.float32) -> tuple[np.float32, np.float32]:
    """Return step and offset of sub-block `s` of Q4_K or Q5_K from their 12 bytes of scales and mins."""
    if s < 4:
        return d * np.float32(raw[b, 4 + s] & _U(63)), m * np.float32(raw[b, 8 + s] & _U(63))
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
            q, at = load(raw, 144 * b + 16 + 32 * p, 32), 256 * b + 64 * p
            store(out, at, _floats(q & _FIFTEEN, 0) * step - offset)
            store(out, at + 32, _floats(q >> _FOUR, 0) * step2 - offset2)


@njit(nogil=True, cache=True, error_model="numpy")
def q5_k(raw: Bytes, out: Float32) -> None:
    """Decode Q5_K: d, m, 12 bytes of six-bit scales and mins, 32 bytes high bits, nibbles."""
    for b in range(raw.shape[0]):
        d, m, planes = half_at(raw, b, 0), half_at(raw, b, 2), load(raw, 176 * b + 16, 32)
        for p in range(4):
            step, offset = _affine_step(raw, b, 2 * p, d, m)
            step2, offset2 = _affine_step(raw, b, 2 * p + 1, d, m)
            q, at, bits = load(raw, 176 * b + 48 + 32 * p, 32), 256 * b + 64 * p, planes >> _U(2 * p)
            store(out, at, _floats((q & _FIFTEEN) | ((bits & _ONE) << _FOUR), 0) * step - offset)
            store(out, at + 32, _floats((q >> _FOUR) | ((bits & _U(2)) << _THREE), 0) * step2 - offset2)


@njit(nogil=True, cache=True, error_model="numpy")
def _put_symmetric(raw: Bytes, b: int, s: int, d: np.float32, q: Any, out: Float32) -> None:
    """Write sub-blocks `s` and `s + 1` of Q6_K."""
    levels, at = _floats(q, 32), 256 * b + 16 * s
    store(out, at, part(levels, 0, 16) * (d * np.float32(np.int8(raw[b, 192 + s]))))
    store(out, at + 16, part(levels, 16, 16) * (d * np.float32(np.int8(raw[b, 193 + s]))))


@njit(nogil=True, cache=True, error_model="numpy")
def q6_k(raw: Bytes, out: Float32) -> None:
    """Decode Q6_K: 128 bytes low nibbles, 64 bytes high pairs, 16 signed scales, d; less 32."""
    for b in range(raw.shape[0]):
        d = half_at(raw, b, 208)
        for h in range(2):
            at = 210 * b + 64 * h
            first, second, top = load(raw, at, 32), load(raw, at + 32, 32), load(raw, at - 32 * h + 128, 32)
            _put_symmetric(raw, b, 8 * h, d, (first & _FIFTEEN) | ((top & _THREE) << _FOUR), out)
            _put_symmetric(raw, b, 8 * h + 2, d, (second & _FIFTEEN) | ((top & _U(12)) << _U(2)), out)
            _put_symmetric(raw, b, 8 * h + 4, d, (first >> _FOUR) | (top & _U(48)), out)
            _put_symmetric(raw, b, 8 * h + 6, d, (second >> _FOUR) | ((top & _U(192)) >> _U(2)), out)


@njit(nogil=True, cache=True, error_model="numpy")
def _either(mask: Any, first: int, second: int) -> Any:
    return where(mask, spread(np.int8(first), 32), spread(np.int8(second), 32))


@njit(nogil=True, cache=True, error_model="numpy")
def _uneven(codes: Any) -> Any:
    """Return `UNEVEN[codes]`, chosen bit by bit: no processor-independent vector looks tables up."""
    bit0, bit1, bit2 = (codes & _ONE) > _U(0), (codes & _U(2)) > _U(0), (codes & _FOUR) > _U(0)
    low = where(bit1, _either(bit0, -65, -83), _either(bit0, -104, -127))
    low = where(bit2, where(bit1, _either(bit0, -10, -22), _either(bit0, -35, -49)), low)
    high = where(bit1, _either(bit0, 38, 25), _either(bit0, 13, 1))
    high = where(bit2, where(bit1, _either(bit0, 113, 89), _either(bit0, 69, 53)), high)
    return converted(where(codes > _U(7), high, low), "float32")


@njit(nogil=True, cache=True, error_model="numpy")
def iq4_nl(raw: Bytes, out: Float32) -> None:
    """Decode IQ4_NL: d, nibbles on uneven levels."""
    for b in range(raw.shape[0]):
        store(out, 32 * b, _uneven(_nibbles(raw, 18 * b + 2)) * half_at(raw, b, 0))


@njit(nogil=True, cache=True, error_model="numpy")
def iq4_xs(raw: Bytes, out: Float32) -> None:
    """Decode IQ4_XS: d, 2 bytes high and 4 bytes low bits of scales + 32, nibbles on uneven levels."""
    for b in range(raw.shape[0]):
        d = half_at(raw, b, 0)
        for s in range(8):
            pair = np.int32(raw[b, 2 + s // 4] >> _U(2 * (s % 4))) & np.int32(3)
            nibble = np.int32(raw[b, 4 + s // 2] >> _U(4 * (s % 2))) & np.int32(15)
            step = d * np.float32((nibble | (pair << np.int32(4))) - np.int32(32))
            store(out, 256 * b + 32 * s, _uneven(_nibbles(raw, 136 * b + 8 + 16 * s)) * step)


@njit(nogil=True, cache=True, error_model="numpy")
def _e2m1(codes: Any) -> Any:
    """Return twice the value of 4-bit floats: 0 1 2 3 4 6 8 12, negative with the top bit."""
    code = converted(codes & _U(7), "int8")
    more = (code > np.int8(4), code > np.int8(5), code > np.int8(6))
    code = code + _either(more[0], 1, 0) + _either(more[1], 1, 0) + _either(more[2], 3, 0)
    return converted(where(codes > _U(7), spread(np.int8(0), 32) - code, code), "float32")


@njit(nogil=True, cache=True, error_model="numpy")
def mxfp4(raw: Bytes, out: Float32) -> None:
    """Decode MXFP4: an E8M0 scale, nibbles of E2M1."""
    for b in range(raw.shape[0]):
        store(out, 32 * b, _e2m1(_nibbles(raw, 17 * b + 1)) * E8M0_HALVES[raw[b, 0]])


@njit(nogil=True, cache=True, error_model="numpy")
def nvfp4(raw: Bytes, out: Float32) -> None:
    """Decode NVFP4: 4 UE4M3 scales, nibbles of E2M1 in eight bytes for each."""
    for b in range(raw.shape[0]):
        for k in range(2):
            levels, at = _e2m1(_nibbles(raw, 36 * b + 4 + 16 * k)), 64 * b + 32 * k
            for s in range(2):
                d = UE4M3_HALVES[raw[b, 2 * k + s]]
                low = part(levels, 0, 8) if s == 0 else part(levels, 8, 8)
                high = part(levels, 16, 8) if s == 0 else part(levels, 24, 8)
                store(out, at + 16 * s, joined(low, high) * d)


@njit(nogil=True, cache=True, error_model="numpy")
def q1_0(raw: Bytes, out: Float32) -> None:
    """Decode Q1_0: d, 128 bits, a set one `d`, else `-d`."""
    for b in range(raw.shape[0]):
        d = half_at(raw, b, 0)
        for k in range(4):
            set_bits = _fifth_bits(raw, 18 * b + 2 + 4 * k) >> _U(3)
            store(out, 128 * b + 32 * k, _floats(set_bits, 1) * d)


@njit(nogil=True, cache=True, error_model="numpy")
def q2_0(raw: Bytes, out: Float32) -> None:
    """Decode Q2_0: d, 64 codes of 2 bits; less 1."""
    for b in range(raw.shape[0]):
        d = half_at(raw, b, 0)
        for k in range(4):
            word = spread(np.int32(0), 16)
            for j in range(4):
                word = word | (np.int32(raw[b, 2 + 4 * k + j]) << np.int32(8 * j))
            codes = (word >> load(_SHIFTS, 0, 16)) & np.int32(3)
            store(out, 64 * b + 16 * k, converted(codes - np.int32(1), "float32") * d)


_SHIFTS = np.arange(0, 32, 2, dtype=np.int32)
