"""Weights as compressed-tensors keeps them: integer or FP8 codes, scales and zero points beside them.

`pack-quantized` packs codes of 2, 4 or 8 bits into 32-bit words along the input axis, first code lowest,
offset so that 0 is the lowest level; zero points lie the same way along the output axis. `int-quantized` and
`float-quantized` keep one code per byte. A weight is `scale * (code - zero)`, here in float32: transformers
rounds the product to the dtype that the model is loaded in. Activations are not quantized: what a config says
about them, and about the KV cache, is left out.
Source: compressed_tensors 0.20.0, `compressors/pack_quantized`, `quantization/lifecycle`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import regex
from numpy.typing import NDArray

from bitsmith.errors import DamagedFileError, UnsupportedError, printable
from bitsmith.formats.format import Bytes, Float32
from bitsmith.formats.integer import Codes, pack_codes, unpack_codes
from bitsmith.formats.minifloat import E4M3
from bitsmith.store.checkpoint import Checkpoint, Rows, TensorRef
from bitsmith.store.packed import PackedTensor
from bitsmith.store.stored import StoredTensor

METHOD = "compressed-tensors"
PACK_FORMAT = "pack-quantized"
PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
"""Suffixes of a module's stored tensors: I32 `out words`, float `out groups`, I32 `words groups`, I64 `2`."""

_WEIGHT, _COLUMN_GROUPS = "weight", "weight_g_idx"
_BESIDE = (PACKED, SCALE, ZERO, SHAPE, _COLUMN_GROUPS, "weight_global_scale")
_ACTIVATIONS = re.compile(r"\.(input|output|q|k|v)_(scale|zero_point|global_scale)$")
_WORD_BITS, _PACKED_BITS = 32, (2, 4, 8)
_BYTE_FORMATS = {"int-quantized": "int", "float-quantized": "float"}
_BYTE_TYPES = {"int": "I8", "float": "F8_E4M3"}
_SCALE_TYPES = ("BF16", "F16", "F32")
_STRATEGIES = ("tensor", "channel", "group", "block")
_LINEAR, _PATTERN = "Linear", "re:"
_LONGEST_TEXT = 1000
_LARGEST_BLOCK = 1 << 40
_TIMES = re.compile(r"[{,](?=0*[1-9])(\d+)(?=[,}])")
_MOST_REPEATS = 10_000  # compiling takes time in their number
_MATCH_SECONDS = 0.5  # of processor time for a config's patterns: an expression can take for ever
_SLOW_SECONDS = 1e-3


def words(codes: int, bits: int) -> int:
    """Return the 32-bit words that hold a row of `codes`."""
    return -(-codes * bits // _WORD_BITS)


def pack_words(codes: Codes, bits: int) -> Bytes:
    """Return codes (`out in`), lowest level 0, as the bytes of `weight_packed` (`out 4·words`)."""
    packed = pack_codes(codes, bits)
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))


def pack_zeros(zeros: Codes, bits: int) -> Bytes:
    """Return zero points (`out groups`) as the bytes of `weight_zero_point` (`words groups`)."""
    lying = pack_words(np.ascontiguousarray(zeros.T), bits).view("<u4")
    return np.ascontiguousarray(lying.T).view(np.uint8)


def read_compressed(stored: Checkpoint, settings: Mapping[str, Any]) -> dict[str, TensorRef]:
    """Return all tensors, packed weights decoded row by row and under their plain names.

    `settings` is the `quantization_config`. Raises UnsupportedError for a format, a scheme or a transform
    that cannot be read; DamagedFileError for parts that are missing or do not fit.
    """
    for key in ("transform_config", "sparsity_config"):
        if _says_something(settings.get(key)):
            raise UnsupportedError(f"config.json: has a {key}, which cannot be read", path=stored.path)
    schemes = _Schemes(stored, settings)
    tensors: dict[str, TensorRef] = {}
    taken: set[str] = set()
    for name in stored:
        module, _, last = name.rpartition(".")
        if last == PACKED or (last == SCALE and f"{module}.{PACKED}" not in stored):
            weight = _Weight(stored, module, schemes.of(module))
            taken.update(part.name for part in weight.parts)
            tensors[f"{module}.{_WEIGHT}"] = weight.tensor()
    for name, ref in stored.items():
        if name not in taken and not _ACTIVATIONS.search(name):
            _refuse_stray(stored, ref, name in tensors)
            tensors[name] = ref
    return tensors


def _refuse_stray(stored: Checkpoint, ref: TensorRef, is_packed: bool) -> None:
    said = None
    if is_packed:
        said = f"is stored as {ref.dtype} and packed as well"
    elif ref.name.rpartition(".")[2] in _BESIDE or ref.dtype.startswith("F8"):
        said = f"is {ref.dtype} without the others of its weight"
    if said is not None:
        raise DamagedFileError(said, path=_file(ref, stored), tensor=ref.name)


@dataclass(frozen=True)
class _Scheme:
    """How the weights of a config group are coded."""

    kind: str
    bits: int
    strategy: str
    group: int
    block: tuple[int, int]
    symmetric: bool
    packed: bool

    @property
    def name(self) -> str:
        """What the codes are: `int4_g128`, `F8_E4M3`; `a` is asymmetric."""
        if self.kind == "float":
            return _BYTE_TYPES["float"]
        suffix = f"_g{self.group}" if self.strategy == "group" else ""
        return f"int{self.bits}{'' if self.symmetric else 'a'}{suffix}"

    def scale_shapes(self, out: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes that the scales of a weight (`out in`) may have."""
        if self.strategy == "tensor":
            return (1,), ()
        if self.strategy == "channel":
            return (out, 1), (out,)
        high, wide = self.block if self.strategy == "block" else (1, self.group)
        return ((-(-out // high), -(-columns // wide)),)


class _Schemes:
    """The config groups, and which of them a module is in."""

    def __init__(self, stored: Checkpoint, settings: Mapping[str, Any]) -> None:
        self._path, self._slow_seconds = stored.path, 0.0
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            self._refuse("config_groups holds no schemes")
        self._ignored = self._names(settings.get("ignore") or [])
        targets: dict[str, _Scheme] = {}
        for group in groups.values():
            if not isinstance(group, Mapping):
                self._refuse("config_groups names a preset; expected its scheme")
            if group.get("weights") is not None:
                scheme = self._scheme(group["weights"], group.get("format") or settings.get("format"))
                targets |= dict.fromkeys(self._names(group.get("targets")), scheme)
        self._targets = sorted(targets.items(), key=lambda item: (_rank(item[0]), item[0]))

    def of(self, module: str) -> _Scheme:
        """Return a packed module's scheme: its name goes before patterns, patterns before `Linear`."""
        if any(self._matches(module, entry) for entry in self._ignored):
            self._refuse(f"ignores {printable(module)}, which is stored packed")
        for target, scheme in self._targets:
            if target == _LINEAR or self._matches(module, target):
                return scheme
        self._refuse(f"no config group targets {printable(module)}, which is stored packed")

    def _names(self, entries: Any) -> list[str]:
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            self._refuse("targets and ignore are no lists of names")
        for entry in entries:
            repeats = prod(int(times) for times in _TIMES.findall(entry[:_LONGEST_TEXT]))
            if len(entry) > _LONGEST_TEXT or repeats > _MOST_REPEATS:
                self._refuse(f"{printable(entry, 80)!r} is too long, or repeats too often")
            try:
                regex.compile(entry.removeprefix(_PATTERN))
            except regex.error as error:
                self._refuse(f"{printable(entry)!r} is no regular expression: {error}")
        return entries

    def _matches(self, module: str, target: str) -> bool:
        if not target.startswith(_PATTERN):
            return target == module
        started = time.thread_time()
        try:
            found = regex.match(target.removeprefix(_PATTERN), module, timeout=_MATCH_SECONDS)
        except TimeoutError:
            self._slow_seconds = _MATCH_SECONDS
        spent = time.thread_time() - started
        self._slow_seconds += spent if spent > _SLOW_SECONDS else 0.0
        if self._slow_seconds >= _MATCH_SECONDS:
            self._refuse(f"{printable(target)!r} takes too long to match {printable(module)}")
        return found is not None

    def _scheme(self, weights: Any, stored_as: Any) -> _Scheme:
        if not isinstance(weights, Mapping):
            self._refuse("weights of a scheme are no map")
        kind, bits = str(weights.get("type", "int")), weights.get("num_bits", 8)
        packed = stored_as == PACK_FORMAT and kind == "int" and type(bits) is int and bits in _PACKED_BITS
        bytewise = stored_as == "naive-quantized" or _BYTE_FORMATS.get(str(stored_as)) == kind
        if not packed and not (bytewise and kind in _BYTE_TYPES and bits == 8):
            said = printable(f"{stored_as} of {kind} with {bits} bits", 80)
            raise UnsupportedError(
                f"config.json: {said} cannot be read; known: {PACK_FORMAT} of int with 2, 4 or 8 bits, "
                f"{' and '.join(_BYTE_FORMATS)} with 8",
                path=self._path,
            )
        strategy, group, block = self._sizes(weights)
        return _Scheme(kind, int(bits), strategy, group, block, weights.get("symmetric") is not False, packed)

    def _sizes(self, weights: Mapping[str, Any]) -> tuple[str, int, tuple[int, int]]:
        """Return the strategy and what shares a scale: columns, or a block of rows and columns."""
        group = weights.get("group_size") or 0
        inferred = "group" if type(group) is not int else {0: "tensor", -1: "channel"}.get(group, "group")
        strategy = weights.get("strategy") or inferred
        if strategy not in _STRATEGIES or (strategy == "group" and (type(group) is not int or group < 1)):
            self._refuse(f"strategy {printable(str(strategy))} in groups of {printable(str(group))}")
        block = self._block(weights.get("block_structure")) if strategy == "block" else (0, 0)
        return strategy, group if strategy == "group" else 0, block

    def _block(self, said: Any) -> tuple[int, int]:
        sides = said
        if isinstance(said, str) and len(said) < _LONGEST_TEXT:
            sides = [int(side) for side in said.split("x") if side.isdecimal()]
        if isinstance(sides, list) and [type(side) for side in sides] == [int, int] and min(sides) > 0:
            return min(sides[0], _LARGEST_BLOCK), min(sides[1], _LARGEST_BLOCK)
        self._refuse(f"block_structure is {printable(str(said))}, expected two sizes")

    def _refuse(self, said: str) -> NoReturn:
        raise DamagedFileError(f"config.json: quantization_config: {said}", path=self._path)


class _Weight:
    """One packed weight: its stored tensors, checked against its scheme."""

    def __init__(self, stored: Checkpoint, module: str, scheme: _Scheme) -> None:
        self._stored, self._module, self._scheme = stored, module, scheme
        self._codes = self._part(PACKED if scheme.packed else _WEIGHT)
        self.parts = [self._codes]
        self.shape = self._checked_shape()
        out, columns = self.shape
        if scheme.strategy == "group" and columns % scheme.group:
            self._fail(self._codes, f"has {columns} columns, no whole groups of {scheme.group}")
        shapes = scheme.scale_shapes(out, columns)
        self._scales = self._checked(SCALE, _SCALE_TYPES, *shapes)
        self._zeros = self._zero_points(shapes)
        self._columns = self._column_groups()

    def tensor(self) -> PackedTensor:
        """Return the weight as a tensor, decoded when it is read."""
        name = f"{self._module}.{_WEIGHT}"
        return PackedTensor(name, self.shape, self._scheme.name, self.parts, self._decode)

    def _decode(self, start: int, stop: int) -> Rows:
        if start == stop:
            return np.empty((0, self.shape[1]), np.float32)
        rows = self._levels(start, stop)
        if self._zeros is not None:
            rows -= self._spread(self._zero_rows(self._zeros, start, stop), start, stop)
        rows *= self._spread(self._rows_of(self._scales, start, stop), start, stop)
        return rows

    def _levels(self, start: int, stop: int) -> Float32:
        raw, bits = self._codes.raw(start, stop).reshape(stop - start, -1), self._scheme.bits
        if self._scheme.packed:
            return unpack_codes(raw, bits, self.shape[1]).astype(np.float32) - np.float32(1 << (bits - 1))
        return E4M3[raw] if self._scheme.kind == "float" else raw.view(np.int8).astype(np.float32)

    def _zero_rows(self, zeros: TensorRef, start: int, stop: int) -> Float32:
        """Return zero points of the rows' scales; packed ones lie along the output axis."""
        bits = self._scheme.bits
        if zeros.dtype != "I32":
            return self._rows_of(zeros, start, stop)
        each = _WORD_BITS // bits
        first, last = start // each, -(-stop // each)
        lying = zeros.raw(first, last).view("<u4").reshape(last - first, -1)
        packed = np.ascontiguousarray(lying.T).view(np.uint8)
        codes = unpack_codes(packed, bits, stop - first * each)[:, start - first * each :]
        return codes.T.astype(np.float32) - np.float32(1 << (bits - 1))

    def _rows_of(self, ref: TensorRef, start: int, stop: int) -> Float32:
        """Return what belongs to the weight's rows `[start, stop)`, as `rows groups`."""
        if self._scheme.strategy == "tensor":
            return ref.read().astype(np.float32).reshape(1, 1)
        if self._scheme.strategy == "block":
            start, stop = start // self._scheme.block[0], -(-stop // self._scheme.block[0])
        return ref.read(start, stop).astype(np.float32).reshape(stop - start, -1)

    def _spread(self, values: Float32, start: int, stop: int) -> Float32:
        """Return a value for each weight of the rows `[start, stop)`, or what broadcasts to that."""
        scheme, columns = self._scheme, self.shape[1]
        if self._columns is not None:
            return values[:, self._columns]
        if scheme.strategy == "group":
            return np.repeat(values, scheme.group, axis=1)
        if scheme.strategy == "block":
            high, wide = scheme.block
            return values[np.arange(start, stop) // high - start // high][:, np.arange(columns) // wide]
        return values

    def _part(self, suffix: str) -> TensorRef:
        name = f"{self._module}.{suffix}"
        if name not in self._stored:
            raise DamagedFileError(
                f"is missing, {self._scheme.name} needs it", path=self._stored.path, tensor=name
            )
        return self._stored[name]

    def _checked(self, suffix: str, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> TensorRef:
        ref = self._part(suffix)
        if ref.dtype not in dtypes or ref.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            self._fail(ref, f"is {ref.dtype} {list(ref.shape)}, expected {' or '.join(dtypes)} {expected}")
        self.parts.append(ref)
        return ref

    def _checked_shape(self) -> tuple[int, int]:
        """Return the weight's shape, which packing alone does not tell."""
        codes, scheme = self._codes, self._scheme
        dtype = "I32" if scheme.packed else _BYTE_TYPES[scheme.kind]
        if codes.dtype != dtype or len(codes.shape) != 2:
            self._fail(codes, f"is {codes.dtype} {list(codes.shape)}, expected {dtype} with two axes")
        if 0 in codes.shape:
            self._fail(codes, f"is empty: {list(codes.shape)}")
        if not scheme.packed:
            return codes.shape[0], codes.shape[1]
        said = self._checked(SHAPE, ("I64", "I32"), (2,)).read().tolist()
        if said[0] != codes.shape[0] or words(said[1], scheme.bits) != codes.shape[1]:
            self._fail(codes, f"is {list(codes.shape)} words of {scheme.bits} bits, its {SHAPE} is {said}")
        return said[0], said[1]

    def _zero_points(self, shapes: Sequence[tuple[int, ...]]) -> TensorRef | None:
        scheme = self._scheme
        if scheme.symmetric and f"{self._module}.{ZERO}" not in self._stored:
            return None
        if scheme.packed and scheme.strategy in ("group", "channel") and self._part(ZERO).dtype == "I32":
            out, groups = self.shape[0], shapes[0][1]
            return self._checked(ZERO, ("I32",), (words(out, scheme.bits), groups))
        return self._checked(ZERO, (_BYTE_TYPES[scheme.kind],), *shapes)

    def _column_groups(self) -> NDArray[np.int64] | None:
        """Return each column's group where columns were grouped out of order (`actorder`)."""
        name = f"{self._module}.{_COLUMN_GROUPS}"
        if name not in self._stored:
            return None
        found = self._checked(_COLUMN_GROUPS, ("I32", "I64"), (self.shape[1],))
        index = found.read().astype(np.int64)
        if (index == -1).all():
            return None
        even = np.arange(self.shape[1]) // max(1, self._scheme.group)
        if self._scheme.strategy != "group" or not np.array_equal(np.sort(index), even):
            self._fail(found, f"does not put {self._scheme.group} columns into each group")
        return index

    def _fail(self, ref: TensorRef, said: str) -> NoReturn:
        raise DamagedFileError(said, path=_file(ref, self._stored), tensor=ref.name)


def _rank(target: str) -> int:
    return 2 if target == _LINEAR else int(target.startswith(_PATTERN))


def _says_something(settings: Any) -> bool:
    """Tell whether a config's section is there and not the empty one that some writers leave."""
    if isinstance(settings, Mapping):
        return settings.get("format") != "dense" and any(settings.values())
    return bool(settings)


def _file(ref: TensorRef, stored: Checkpoint) -> Path:
    return ref.file.path if isinstance(ref, StoredTensor) else stored.path
