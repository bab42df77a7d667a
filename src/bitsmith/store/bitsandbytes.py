"""Reads weights that bitsandbytes packed: NF4 and FP4, scales double-quantized or not, and LLM.int8().

A 4-bit weight is stored as its codes, `absmax`, both maps and a JSON `quant_state` beside; what it decodes to
is rounded to the type that the state names, as `bitsandbytes.functional.dequantize_4bit` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from bitsmith.errors import DamagedFileError, UnsupportedError, printable
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.nf4 import BLOCK_SIZES, FP4, NF4, FourBit, unpack_nibbles
from bitsmith.store.checkpoint import Checkpoint, Rows, TensorRef
from bitsmith.store.packed import PackedTensor
from bitsmith.store.safetensors import MAX_DIMS, load_json

METHOD = "bitsandbytes"
STATE = "quant_state.bitsandbytes__"
PLAIN_PARTS = ("absmax", "quant_map")
NESTED_PARTS = ("nested_absmax", "nested_quant_map")

_BOOKS = {"nf4": NF4, "fp4": FP4}
_DTYPES = ("float16", "bfloat16", "float32")
_NESTED_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")
_KEYS = {"quant_type", "blocksize", "dtype", "shape", *_NESTED_KEYS}
_LARGEST = float(np.finfo(np.float32).max)
_MAX_STATE_BYTES = 1 << 16
_MAX_WEIGHTS = 1 << 60
_SAME_BOOK = 1e-3  # levels of a stored book may differ by that much
_INT8_UNIT = np.float32(7.874015718698502e-3)  # 1 / 127
_PART = re.compile(rf"(?P<owner>.+)\.(?P<part>{'|'.join((*PLAIN_PARTS, *NESTED_PARTS))}|quant_state\..+)")


def read_bitsandbytes(stored: Checkpoint, settings: Mapping[str, Any]) -> dict[str, TensorRef]:
    """Return the tensors of a checkpoint that bitsandbytes packed, packed ones as `PackedTensor`.

    What is packed is told by what is stored: modules that were skipped are plain tensors. Raises
    DamagedFileError for parts that are missing, left over or do not fit each other, UnsupportedError for a
    code book that is not bitsandbytes'.
    """
    parts: dict[str, dict[str, TensorRef]] = {}
    plain: dict[str, TensorRef] = {}
    for name, ref in stored.items():
        match = _PART.fullmatch(name)
        if match is None:
            plain[name] = ref
        else:
            parts.setdefault(match["owner"], {})[match["part"]] = ref
    found: dict[str, TensorRef] = {}
    for name, ref in plain.items():
        if name in parts:
            found[name] = _FourBitWeight(stored, ref, parts.pop(name)).tensor()
        elif ref.dtype == "I8":
            found[name] = _eight_bit(stored, plain, ref)
        elif not _goes_with_int8(plain, name):
            found[name] = _unpacked(stored, ref)
    for name, left in parts.items():
        raise _damaged(stored, name, f"is missing, but {', '.join(sorted(left))} of it are stored")
    return found


@dataclass(frozen=True)
class _State:
    """What the JSON beside a weight says."""

    book: FourBit
    dtype: str
    shape: tuple[int, ...]
    nested_block: int | None
    offset: np.float32

    @property
    def weights(self) -> int:
        return prod(self.shape)


class _FourBitWeight:
    """A weight's parts, checked against each other."""

    def __init__(self, stored: Checkpoint, ref: TensorRef, parts: Mapping[str, TensorRef]) -> None:
        self._stored, self._ref, self._parts = stored, ref, parts
        self.state = _state(stored, ref.name, parts)
        nested = NESTED_PARTS if self.state.nested_block else ()
        expected = {*PLAIN_PARTS, *nested, STATE + self.state.book.name.lower()}
        self._refuse(set(parts) - expected, "has parts that belong to nothing")
        self._refuse(expected - set(parts), "lacks")
        self._check_codes()
        self._check_scales()
        self._nested_map = self._values("nested_quant_map", 256) if nested else None
        self._check_book()

    def tensor(self) -> PackedTensor:
        """Return the weight, decoded on read."""
        state = self.state
        parts = [self._ref, *self._parts.values()]
        return PackedTensor(self._ref.name, state.shape, state.book.name, parts, self._decode)

    def _decode(self, start: int, stop: int) -> Rows:
        state, size = self.state, self.state.book.block_size
        columns = prod(state.shape[1:])
        first, last = start * columns, max(start, stop) * columns
        block = first // size
        codes = unpack_nibbles(self._bytes(first // 2, -(-last // 2)))[first % 2 :][: last - first]
        scales = self._scales(block, -(-last // size))
        steps = np.repeat(scales, size)[first - block * size :][: last - first]
        with np.errstate(over="ignore", invalid="ignore"):
            values = rounded(state.book.levels[codes] * steps, state.dtype)
        return values.reshape(max(start, stop) - start, *state.shape[1:])

    def _bytes(self, first: int, last: int) -> Bytes:
        """Return bytes of the codes, however many an element of the storage type holds."""
        item = max(1, self._ref.nbytes // max(1, self._ref.n_rows))
        raw = self._ref.raw(first // item, -(-last // item))
        return raw[first % item :][: last - first]

    def _scales(self, first: int, last: int) -> Float32:
        absmax, block = self._parts["absmax"].read(first, last), self.state.nested_block
        if block is None or self._nested_map is None:
            return np.asarray(absmax, np.float32)
        group = first // block
        steps = self._parts["nested_absmax"].read(group, -(-last // block))
        place = np.arange(first, last) // block - group
        scales: Float32 = self._nested_map[absmax] * steps[place] + self.state.offset
        return scales

    def _check_codes(self) -> None:
        shape, nbytes = self._ref.shape, self._ref.nbytes
        if len(shape) != 2 or shape[1] != 1:
            raise self._damaged(f"is stored with shape {list(shape)}, expected codes in one column")
        item, needed = max(1, nbytes // max(1, shape[0])), -(-self.state.weights // 2)
        if nbytes != -(-needed // item) * item:
            whole = list(self.state.shape)
            raise self._damaged(f"has {nbytes} bytes of codes, {needed} are expected for shape {whole}")

    def _check_scales(self) -> None:
        blocks, nested = self.state.book.blocks(self.state.weights), self.state.nested_block
        self._check("absmax", "U8" if nested else "F32", blocks)
        self._check("quant_map", "F32", len(self.state.book.book))
        if nested:
            self._check("nested_absmax", "F32", -(-blocks // nested))
            self._check("nested_quant_map", "F32", 256)

    def _check(self, part: str, dtype: str, count: int) -> None:
        ref = self._parts[part]
        if ref.dtype != dtype or ref.shape != (count,):
            raise self._damaged(
                f"has the part {part} as {ref.dtype} {list(ref.shape)}, expected {dtype} [{count}]"
            )

    def _check_book(self) -> None:
        """Refuse levels that are not the type's: bitsandbytes itself never looks at what is stored."""
        book = self.state.book
        if not np.allclose(self._values("quant_map", len(book.book)), book.levels, rtol=0, atol=_SAME_BOOK):
            raise UnsupportedError(
                f"has a quant_map that is not {book.name}'s", path=self._stored.path, tensor=self._ref.name
            )

    def _values(self, part: str, count: int) -> Float32:
        values = np.asarray(self._parts[part].read(0, count), np.float32)
        if not np.isfinite(values).all():
            raise self._damaged(f"has a {part} that is not finite")
        return values

    def _refuse(self, parts: Iterable[str], what: str) -> None:
        if parts:
            raise self._damaged(f"{what}: {', '.join(sorted(printable(part) for part in parts))}")

    def _damaged(self, message: str) -> DamagedFileError:
        return _damaged(self._stored, self._ref.name, message)


def _state(stored: Checkpoint, name: str, parts: Mapping[str, TensorRef]) -> _State:
    """Return the quant state of a weight, every field checked."""
    states = [part for part in parts if part.startswith("quant_state.")]
    kinds = [part.removeprefix(STATE) for part in states]
    if len(kinds) != 1 or kinds[0] not in _BOOKS:
        said = ", ".join(sorted(map(printable, states))) or "none"
        raise _damaged(stored, name, f"needs one quant state, {STATE}nf4 or {STATE}fp4; found {said}")
    [part], [kind] = states, kinds
    ref = parts[part]
    if ref.dtype != "U8" or len(ref.shape) != 1 or ref.nbytes > _MAX_STATE_BYTES:
        raise _damaged(stored, name, f"has a quant state of {ref.dtype} {list(ref.shape)}, expected bytes")
    found = load_json(ref.raw().tobytes(), stored.path, f"quant state of {printable(name)!r}")

    def refuse(key: str, expected: str) -> DamagedFileError:
        value = printable(repr(found.get(key)), 80)
        return _damaged(stored, name, f"has {key} {value} in its quant state, expected {expected}")

    if not found.keys() <= _KEYS:
        unknown = ", ".join(sorted(printable(key) for key in found.keys() - _KEYS))
        raise _damaged(stored, name, f"has unknown fields in its quant state: {unknown}")
    if found.get("quant_type") != kind:
        raise refuse("quant_type", kind)
    if not _is_one_of(found.get("blocksize"), BLOCK_SIZES):
        raise refuse("blocksize", f"one of {', '.join(map(str, BLOCK_SIZES))}")
    if found.get("dtype") not in _DTYPES:
        raise refuse("dtype", f"one of {', '.join(_DTYPES)}")
    if not _is_shape(found.get("shape")):
        raise refuse("shape", "sizes of a tensor")
    return _with_nested(found, kind, refuse)


def _with_nested(found: Mapping[str, Any], kind: str, refuse: Any) -> _State:
    book = replace(_BOOKS[kind], block_size=found["blocksize"])
    state = _State(book, found["dtype"], tuple(found["shape"]), None, np.float32(0))
    if not any(key in found for key in _NESTED_KEYS):
        return state
    if not _is_one_of(found.get("nested_blocksize"), _NESTED_BLOCKS):
        raise refuse("nested_blocksize", f"one of {', '.join(map(str, _NESTED_BLOCKS))}")
    if found.get("nested_dtype") != "float32":
        raise refuse("nested_dtype", "float32")
    offset = found.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) <= _LARGEST:
        raise refuse("nested_offset", "a finite float32")
    return replace(state, nested_block=found["nested_blocksize"], offset=np.float32(offset))


def _is_one_of(value: Any, known: Sequence[int]) -> bool:
    return type(value) is int and value in known


def _is_shape(value: Any) -> bool:
    sizes = isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_WEIGHTS for size in value)
    return sizes and 0 < len(value) <= MAX_DIMS and prod(size or 1 for size in value) <= _MAX_WEIGHTS


def rounded(values: Float32, dtype: str) -> Float32:
    """Return values rounded to a type (nearest even) and widened back."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        raised = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        rounded: Float32 = (raised & np.uint32(0xFFFF0000)).view(np.float32)
        return np.where(np.isfinite(values), rounded, values)
    return values


def _eight_bit(stored: Checkpoint, plain: Mapping[str, TensorRef], ref: TensorRef) -> PackedTensor:
    """Return a weight of LLM.int8(): `code * SCB / 127` by row, in bitsandbytes' order of products."""
    scales = plain.get(f"{ref.name.removesuffix('weight')}SCB")
    layout = plain.get(f"{ref.name.removesuffix('weight')}weight_format")
    if not ref.name.endswith(".weight") or scales is None:
        raise _damaged(stored, ref.name, "is I8 without SCB, the scales of LLM.int8()")
    if len(ref.shape) != 2 or scales.dtype != "F32" or scales.shape not in ((ref.n_rows,), (1, ref.n_rows)):
        raise _damaged(
            stored,
            ref.name,
            f"is I8 {list(ref.shape)} with SCB {scales.dtype} {list(scales.shape)}, expected a scale per row",
        )
    if layout is not None and layout.raw().any():
        raise UnsupportedError(
            "is LLM.int8() in a tiled layout, expected rows", path=stored.path, tensor=ref.name
        )

    def decode(start: int, stop: int) -> Rows:
        steps = np.asarray(scales.read(), np.float32).reshape(-1, 1)[start:stop]
        values: Float32 = ref.read(start, stop).astype(np.float32) * steps * _INT8_UNIT
        return values

    parts = [ref, scales, *([] if layout is None else [layout])]
    return PackedTensor(ref.name, ref.shape, "LLM.int8", parts, decode)


def _goes_with_int8(plain: Mapping[str, TensorRef], name: str) -> bool:
    """Tell whether a tensor is a part of a weight of LLM.int8()."""
    module, _, part = name.rpartition(".")
    weight = plain.get(f"{module}.weight")
    return part in ("SCB", "weight_format") and weight is not None and weight.dtype == "I8"


def _unpacked(stored: Checkpoint, ref: TensorRef) -> TensorRef:
    if ref.dtype == "U8" and ref.name.endswith(".weight"):
        raise _damaged(stored, ref.name, "is U8 without a quant state")
    return ref


def _damaged(stored: Checkpoint, name: str, message: str) -> DamagedFileError:
    return DamagedFileError(message, path=stored.path, tensor=name)
