"""The plain types: float32, float16 and bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitsmith.formats.format import Bytes, Float32, Format
from bitsmith.numerics.half import half_bits, half_value
from bitsmith.numerics.threads import for_ranges

_LEAST, _MOST = 1 << 16, 1 << 20  # words that a thread converts at a time

_BFLOAT_MAX_BITS = np.uint32(0x7F7F0000)


class F32(Format):
    """IEEE float32: the bytes as they are (shared with the input, not copied)."""

    name = "F32"
    ggml_type = 0
    block_size = 1
    block_bytes = 4

    def _encode(self, rows: Float32, importance: Float32 | None) -> Bytes:
        return rows.view(np.uint8)

    def decode(self, blocks: Bytes, out: Float32 | None = None) -> Float32:
        """Return the bytes as float32, shared with the input where no `out` is given."""
        return np.ascontiguousarray(blocks).view(np.float32) if out is None else super().decode(blocks, out)

    def _decode(self, blocks: Bytes, out: Float32) -> None:
        out[:] = blocks.view(np.float32)


class F16(Format):
    """IEEE float16, rounded to nearest even; beyond ±65504 the largest finite value, never infinity."""

    name = "F16"
    ggml_type = 1
    block_size = 1
    block_bytes = 2

    def _encode(self, rows: Float32, importance: Float32 | None) -> Bytes:
        return _map_words(_to_half, rows.reshape(-1), np.uint16).reshape(rows.shape).view(np.uint8)

    def _decode(self, blocks: Bytes, out: Float32) -> None:
        _from_half(blocks.reshape(-1).view(np.uint16), out.reshape(-1))


class BF16(Format):
    """bfloat16 (float32's upper half), rounded to nearest even; never rounds a finite value to infinity."""

    name = "BF16"
    ggml_type = 30
    block_size = 1
    block_bytes = 2

    def _encode(self, rows: Float32, importance: Float32 | None) -> Bytes:
        words = rows.reshape(-1).view(np.uint32)
        return _map_words(_to_bfloat, words, np.uint16).reshape(rows.shape).view(np.uint8)

    def _decode(self, blocks: Bytes, out: Float32) -> None:
        _from_bfloat(blocks.reshape(-1).view(np.uint16), out.reshape(-1).view(np.uint32))


def _map_words(kernel: Any, source: NDArray[Any], dtype: type) -> NDArray[Any]:
    target: NDArray[Any] = np.empty(source.size, dtype)
    for_ranges(source.size, _LEAST, _MOST, lambda first, last: kernel(source[first:last], target[first:last]))
    return target


@njit(nogil=True, cache=True)
def _to_half(source: Float32, target: NDArray[np.uint16]) -> None:
    for i in range(source.size):
        target[i] = half_bits(source[i])


@njit(nogil=True, cache=True)
def _to_bfloat(source: NDArray[np.uint32], target: NDArray[np.uint16]) -> None:
    for i in range(source.size):
        bits = source[i]
        magnitude = min(np.uint32(bits & np.uint32(0x7FFFFFFF)), _BFLOAT_MAX_BITS)
        odd = (magnitude >> np.uint32(16)) & np.uint32(1)
        rounded = (magnitude + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        target[i] = np.uint16(rounded | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@njit(nogil=True, cache=True)
def _from_bfloat(source: NDArray[np.uint16], target: NDArray[np.uint32]) -> None:
    for i in range(source.size):
        target[i] = np.uint32(source[i]) << np.uint32(16)


@njit(nogil=True, cache=True)
def _from_half(source: NDArray[np.uint16], target: Float32) -> None:
    for i in range(source.size):
        target[i] = half_value(source[i])
