"""Where the bits of the K formats' blocks lie (ggml's block_q2_K … block_q6_K)."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.formats.blocks import Codes, Fields, Int16, halves
from bitsmith.formats.format import Bytes, Float32
from bitsmith.numerics.half import half_bits


@njit(nogil=True, cache=True)
def put_half(value: np.float32, out: Bytes, b: int, at: int) -> None:
    """Write `value` as a little-endian float16 at byte `at` of block `b`."""
    bits = half_bits(value)
    out[b, at] = np.uint8(bits & 255)
    out[b, at + 1] = np.uint8(bits >> 8)


@njit(nogil=True, cache=True)
def put_pairs(codes: Codes, b: int, out: Bytes, at: int) -> None:
    """Write the low 2 bits of 256 codes: byte `32 h + l` holds weights `128 h + l + {0, 32, 64, 96}`."""
    three = np.uint8(3)
    for h in range(2):
        for j in range(32):
            i = 128 * h + j
            out[b, at + 32 * h + j] = np.uint8(
                (codes[b, i] & three)
                | ((codes[b, i + 32] & three) << 2)
                | ((codes[b, i + 64] & three) << 4)
                | ((codes[b, i + 96] & three) << 6)
            )


@njit(nogil=True, cache=True)
def put_nibbles(codes: Codes, b: int, out: Bytes, at: int) -> None:
    """Write the low 4 bits of 256 codes: byte `32 p + l` holds weights `64 p + l` and, above it, `+ 32`."""
    fifteen = np.uint8(15)
    for p in range(4):
        for j in range(32):
            i = 64 * p + j
            out[b, at + 32 * p + j] = np.uint8((codes[b, i] & fifteen) | (codes[b, i + 32] << 4))


@njit(nogil=True, cache=True)
def put_bit_planes(codes: Codes, b: int, shift: int, out: Bytes, at: int) -> None:
    """Write bit `shift` of 256 codes: bit `i` of byte `l` belongs to weight `32 i + l`."""
    for j in range(32):
        out[b, at + j] = 0
    for i in range(8):
        for j in range(32):
            out[b, at + j] |= np.uint8(((codes[b, 32 * i + j] >> shift) & 1) << i)


@njit(nogil=True, cache=True)
def pack_q2(d: Float32, m: Float32, scales: Int16, mins: Int16, codes: Codes, out: Bytes) -> None:
    """Write Q2_K blocks: 16 bytes scale | min << 4, 64 bytes codes, d, m."""
    for b in range(codes.shape[0]):
        for s in range(16):
            out[b, s] = np.uint8(scales[b, s] | (mins[b, s] << 4))
        put_pairs(codes, b, out, 16)
        put_half(d[b], out, b, 80)
        put_half(m[b], out, b, 82)


@njit(nogil=True, cache=True)
def pack_q3(d: Float32, scales: Int16, codes: Codes, out: Bytes) -> None:
    """Write Q3_K blocks: 32 bytes high bits, 64 bytes low pairs, 12 bytes scales + 32, d."""
    for b in range(codes.shape[0]):
        put_bit_planes(codes, b, 2, out, 0)
        put_pairs(codes, b, out, 32)
        for k in range(4):
            out[b, 104 + k] = 0
        for k in range(8):
            low = scales[b, k] + 32
            high = scales[b, k + 8] + 32
            out[b, 96 + k] = np.uint8((low & 15) | ((high & 15) << 4))
            out[b, 104 + k % 4] |= np.uint8(((low >> 4) | ((high >> 4) << 4)) << (2 * (k // 4)))
        put_half(d[b], out, b, 108)


@njit(nogil=True, cache=True)
def pack_q45(
    d: Float32, m: Float32, scales: Int16, mins: Int16, five: bool, codes: Codes, out: Bytes
) -> None:
    """Write Q4_K or Q5_K blocks: d, m, 12 bytes of six-bit scales and mins, [high bits,] nibbles."""
    for b in range(codes.shape[0]):
        put_half(d[b], out, b, 0)
        put_half(m[b], out, b, 2)
        for k in range(4):
            scale, least = scales[b, k + 4], mins[b, k + 4]
            out[b, 4 + k] = np.uint8(scales[b, k] | ((scale >> 4) << 6))
            out[b, 8 + k] = np.uint8(mins[b, k] | ((least >> 4) << 6))
            out[b, 12 + k] = np.uint8((scale & 15) | ((least & 15) << 4))
        if five:
            put_bit_planes(codes, b, 4, out, 16)
        put_nibbles(codes, b, out, 48 if five else 16)


@njit(nogil=True, cache=True)
def pack_q6(d: Float32, scales: Int16, codes: Codes, out: Bytes) -> None:
    """Write Q6_K blocks: 128 bytes low nibbles, 64 bytes high pairs, 16 signed scales, d."""
    fifteen = np.uint8(15)
    for b in range(codes.shape[0]):
        for h in range(2):
            for j in range(64):
                i = 128 * h + j
                out[b, 64 * h + j] = np.uint8((codes[b, i] & fifteen) | (codes[b, i + 64] << 4))
            for j in range(32):
                i = 128 * h + j
                out[b, 128 + 32 * h + j] = np.uint8(
                    (codes[b, i] >> 4)
                    | ((codes[b, i + 32] >> 4) << 2)
                    | ((codes[b, i + 64] >> 4) << 4)
                    | ((codes[b, i + 96] >> 4) << 6)
                )
        for s in range(16):
            out[b, 192 + s] = np.uint8(scales[b, s] & 255)
        put_half(d[b], out, b, 208)


def unpack_pairs(part: Bytes, codes: Codes) -> None:
    """Read the 2-bit codes that `put_pairs` wrote (`n 64`)."""
    grouped = part.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    codes[:] = (grouped & 3).reshape(-1, 256)


def unpack_planes(part: Bytes) -> Codes:
    """Read the bits that `put_bit_planes` wrote (`n 32`) as `n 256` zeros and ones."""
    grouped = part.reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(8, 1)
    return (grouped & np.uint8(1)).reshape(-1, 256)


def unpack_nibbles(part: Bytes, codes: Codes) -> None:
    """Read the 4-bit codes that `put_nibbles` wrote (`n 128`)."""
    grouped = part.reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8).reshape(2, 1)
    codes[:] = (grouped & 15).reshape(-1, 256)


def unpack_q3(blocks: Bytes, codes: Codes) -> None:
    """Read Q3_K's codes (level + 4)."""
    unpack_pairs(blocks[:, 32:96], codes)
    codes |= unpack_planes(blocks[:, :32]) << 2


def unpack_q45(blocks: Bytes, five: bool, codes: Codes) -> None:
    """Read the codes of Q4_K or Q5_K."""
    unpack_nibbles(blocks[:, -128:], codes)
    if five:
        codes |= unpack_planes(blocks[:, 16:48]) << 4


def unpack_q6(blocks: Bytes, codes: Codes) -> None:
    """Read Q6_K's codes (level + 32)."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(2, 1)
    unpack_pairs(blocks[:, 128:192], codes)
    codes <<= 4
    codes |= (low & 15).reshape(-1, 256)


def unpack_signed_six(part: Bytes) -> NDArray[np.int16]:
    """Read Q3_K's 16 scales from 12 bytes: low nibbles in the first 8, high pairs in the last 4."""
    low = (part[:, None, :8] >> np.array([0, 4], np.uint8).reshape(2, 1)) & 15
    high = (part[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)) & 3
    return (low.reshape(-1, 16) | (high.reshape(-1, 16) << 4)).astype(np.int16) - 32


def unpack_affine_fields(blocks: Bytes, fields: Fields) -> None:
    """Read d, m and the 8 six-bit scales and mins of Q4_K and Q5_K."""
    fields.d[:] = halves(blocks, 0)
    fields.m[:] = halves(blocks, 2)
    scale, least, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    fields.scales[:, :4] = scale & 63
    fields.scales[:, 4:] = (mixed & 15) | ((scale >> 6) << 4)
    fields.mins[:, :4] = least & 63
    fields.mins[:, 4:] = (mixed >> 4) | ((least >> 6) << 4)
