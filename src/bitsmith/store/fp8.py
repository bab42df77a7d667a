"""Reads 8-bit float checkpoints: F8_E4M3 weights with a scale for each block of rows and columns.

`W.weight` is F8_E4M3 (`out in`), `W.weight_scale_inv` (`out/B in/B`, rounded up) multiplies it, as
DeepSeek's and Qwen's FP8 releases store it (transformers, `quant_method` `fp8` with `weight_block_size`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitsmith.errors import DamagedFileError, UnsupportedError, printable
from bitsmith.formats.minifloat import E4M3
from bitsmith.store.checkpoint import Checkpoint, Rows, TensorRef
from bitsmith.store.packed import PackedTensor

_SCALE_SUFFIX = "_scale_inv"
_SCALE_TYPES = ("F32", "BF16", "F16")


def read_fp8(stored: Checkpoint, settings: Mapping[str, Any]) -> dict[str, TensorRef]:
    """Return all tensors, 8-bit ones times their scales in float32.

    Raises UnsupportedError for scales of another kind, DamagedFileError for those that are missing or do not
    fit.
    """
    block = settings.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        said = printable(repr(block), 40)
        raise UnsupportedError(
            f"is quantized by fp8 with weight_block_size {said}, expected two sizes: only scales of blocks "
            "can be read. Give the original in BF16 or F16",
            path=stored.path,
        )
    packed = {name for name, ref in stored.items() if ref.dtype.startswith("F8")}
    scales = {name + _SCALE_SUFFIX for name in packed}
    for name in stored:
        if name.endswith(_SCALE_SUFFIX) and name not in scales:
            raise DamagedFileError("holds scales of no F8_E4M3 weight", path=stored.path, tensor=name)
    return {
        name: _weight(stored, ref, (block[0], block[1])) if name in packed else ref
        for name, ref in stored.items()
        if name not in scales
    }


def _weight(stored: Checkpoint, codes: TensorRef, block: tuple[int, int]) -> PackedTensor:
    name, path = codes.name, stored.path
    if codes.dtype != "F8_E4M3" or len(codes.shape) != 2:
        said = f"{codes.dtype} {list(codes.shape)}"
        raise UnsupportedError(f"is {said}, expected an F8_E4M3 matrix", path=path, tensor=name)
    scales = stored.get(name + _SCALE_SUFFIX)
    if scales is None:
        raise DamagedFileError(f"has no scales: {name + _SCALE_SUFFIX!r} is missing", path=path, tensor=name)
    # A block is no larger than the matrix, whatever the config says: scales are repeated that often.
    high, wide = (min(size, max(1, length)) for length, size in zip(codes.shape, block, strict=True))
    expected = -(-codes.shape[0] // high), -(-codes.shape[1] // wide)
    if scales.dtype not in _SCALE_TYPES or scales.shape != expected:
        raise DamagedFileError(
            f"are {scales.dtype} {list(scales.shape)}, expected {' or '.join(_SCALE_TYPES)} {list(expected)}",
            path=path,
            tensor=scales.name,
        )
    columns = codes.shape[1]

    def decode(start: int, stop: int) -> Rows:
        first = start // high
        near = scales.read(first, -(-stop // high))
        spread = np.repeat(near, wide, axis=1)[:, :columns]
        rows = E4M3[codes.raw(start, stop)].reshape(stop - start, columns)
        rows *= spread[np.arange(start, stop) // high - first]
        return rows

    return PackedTensor(name, codes.shape, f"FP8_{block[0]}x{block[1]}", (codes, scales), decode)
