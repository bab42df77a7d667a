"""Reads MLX's packed weights: `W.weight` U32 with `W.scales` and `W.biases` for groups of a row's columns.

A row is a stream of codes of 2, 3, 4, 5, 6 or 8 bits, least significant first; a weight is
`scale * code + bias` (mode `affine`), or a 4-bit float times a power of two (`mxfp4`, no biases). It is
computed here in float32, where MLX rounds to the scales' type. Layout from MLX's
backend/cpu/quantized.cpp and ops.cpp, settings from mlx-lm's quantize_model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitsmith.errors import DamagedFileError, UnsupportedError, printable
from bitsmith.formats.format import Bytes
from bitsmith.formats.integer import unpack_codes
from bitsmith.formats.minifloat import E2M1, E8M0
from bitsmith.store.checkpoint import Checkpoint, Rows, TensorRef
from bitsmith.store.packed import PackedTensor

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
AFFINE, MXFP4 = "affine", "mxfp4"

_SCALE_TYPES = ("F16", "BF16", "F32")
_PARTS = {AFFINE: ("scales", "biases"), MXFP4: ("scales",)}


@dataclass(frozen=True)
class _Grid:
    bits: int
    group: int
    mode: str

    @property
    def name(self) -> str:
        return "MLX_mxfp4" if self.mode == MXFP4 else f"MLX_{self.bits}bit_g{self.group}"


def read_mlx(stored: Checkpoint, settings: Mapping[str, Any]) -> dict[str, TensorRef]:
    """Return all tensors, packed ones as float32; `settings` has group_size, bits, mode, also per module.

    Raises UnsupportedError for settings that are not known, DamagedFileError for parts that are missing, left
    over or do not fit.
    """
    tensors: dict[str, TensorRef] = {}
    parts: set[str] = set()
    for name, ref in stored.items():
        if not name.endswith(".weight") or ref.dtype != "U32":
            tensors[name] = ref
            continue
        packed = _weight(stored, ref, _grid(stored, settings, name.removesuffix(".weight")))
        tensors[name] = packed
        parts.update(part.name for part in packed.parts[1:])
    for name in tensors.keys() - parts:
        if name.rpartition(".")[2] in ("scales", "biases"):
            raise DamagedFileError("belongs to no packed weight", path=stored.path, tensor=name)
    return {name: ref for name, ref in tensors.items() if name not in parts}


def _grid(stored: Checkpoint, settings: Mapping[str, Any], module: str) -> _Grid:
    """Return how a module is packed; one with its own settings takes MLX's defaults, not the model's."""
    own = settings.get(module, True)
    if own is False:
        raise DamagedFileError(
            "is U32, but the config says that it is not packed", path=stored.path, tensor=module
        )
    said = own if isinstance(own, Mapping) else settings
    mode = said.get("mode", AFFINE)
    bits, group = (said.get(key, default) for key, default in (("bits", 4), ("group_size", 64)))
    known = {AFFINE: (BITS, GROUPS), MXFP4: ((4,), (32,))}.get(
        mode if isinstance(mode, str) else "", ((), ())
    )
    if any(type(n) is not int or n not in among for n, among in zip((bits, group), known, strict=True)):
        given = printable(f"mode {mode!r}, {bits!r} bits, groups of {group!r}", 100)
        raise UnsupportedError(
            f"is packed by MLX in {given}; known: affine of {', '.join(map(str, BITS))} bits in groups of "
            f"{', '.join(map(str, GROUPS))}, mxfp4 of 4 in groups of 32",
            path=stored.path,
            tensor=module,
        )
    return _Grid(bits, group, mode)


def _weight(stored: Checkpoint, codes: TensorRef, grid: _Grid) -> PackedTensor:
    name = codes.name
    words = codes.shape[-1] if len(codes.shape) > 1 else 0
    if not words or words * 32 % (grid.bits * grid.group):
        raise DamagedFileError(
            f"has shape {list(codes.shape)}, expected rows of whole groups of {grid.group} codes of "
            f"{grid.bits} bits",
            path=stored.path,
            tensor=name,
        )
    shape = (*codes.shape[:-1], words * 32 // grid.bits)
    grouped = (*shape[1:-1], shape[-1] // grid.group, grid.group)
    beside = [_part(stored, name, part, shape, grid) for part in _PARTS[grid.mode]]
    if len({part.dtype for part in beside}) > 1:
        raise DamagedFileError("has scales and biases of two types", path=stored.path, tensor=name)

    def decode(start: int, stop: int) -> Rows:
        raw = codes.raw(start, stop).reshape(-1, 4 * words)
        found = _codes(raw, grid.bits, shape[-1]).reshape(stop - start, *grouped)
        scales = beside[0].read(start, stop)[..., None]
        if grid.mode == MXFP4:
            rows = E2M1[found] * E8M0[scales]
        else:
            rows = found.astype(np.float32)
            rows *= scales
            rows += beside[1].read(start, stop)[..., None]
        return rows.reshape(stop - start, *shape[1:])

    return PackedTensor(name, shape, grid.name, (codes, *beside), decode)


def _part(stored: Checkpoint, name: str, part: str, shape: tuple[int, ...], grid: _Grid) -> TensorRef:
    named = f"{name.removesuffix('.weight')}.{part}"
    ref = stored.get(named)
    if ref is None:
        raise DamagedFileError(
            f"has no {part}: {printable(named)!r} is missing", path=stored.path, tensor=name
        )
    expected = (*shape[:-1], shape[-1] // grid.group)
    types = ("U8",) if grid.mode == MXFP4 else _SCALE_TYPES
    if ref.dtype not in types or ref.shape != expected:
        raise DamagedFileError(
            f"are {ref.dtype} {list(ref.shape)}, expected {' or '.join(types)} {list(expected)}",
            path=stored.path,
            tensor=named,
        )
    return ref


def _codes(packed: Bytes, bits: int, columns: int) -> Bytes:
    """Return the codes of rows of packed bytes, least significant bits first (`rows columns`)."""
    if 8 % bits == 0:
        return unpack_codes(packed, bits, columns)
    stream = np.unpackbits(packed, axis=1, bitorder="little").reshape(-1, columns, bits)
    codes: Bytes = np.packbits(stream, axis=2, bitorder="little")[:, :, 0]
    return codes
