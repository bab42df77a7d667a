"""Reads .cellm files: `CELLM`, u8 version 1, u32 header length, JSON header, tensors at 64 bytes.

Quantized tensors (`i8`, `i4`, `i2`) have their float16 scales in a tensor `NAME.qscale`, one for each row or
`rows groups`; blocks of `q1_0_g128` hold theirs. Layout as cellm's converter writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError, printable
from bitsmith.formats.format import Float32
from bitsmith.formats.integer import Coded, GridFormat, unpack_codes
from bitsmith.formats.minifloat import E4M3
from bitsmith.store.checkpoint import Bytes, Rows, TensorRef
from bitsmith.store.safetensors import MAX_ELEMENTS, is_unicode, load_json
from bitsmith.store.stored import Decoder, SourceFile, StoredCheckpoint, StoredTensor, plain_decoder

CELLM_MAGIC = b"CELLM"
VERSION = 1
ALIGNMENT = 64
SCALE_SUFFIX = ".qscale"
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 8
MAX_BYTES = (1 << 63) - 1
BITS = {"i8": 8, "i4": 4, "i2": 2}
"""Bits of a code of each type that has its scales in a tensor beside it."""
Q1 = "q1_0_g128"
DTYPES = ("f16", *BITS, Q1, "f8e4m3")
FIELDS = (
    "model_type", "source_model_type", "source_safetensors_format", "text_tensor_prefix",
    "vision_tensor_prefix", "projector_tensor_prefix", "vocab_size", "hidden_dim", "intermediate_size",
    "num_layers", "num_heads", "num_kv_heads", "head_dim", "rms_norm_eps", "rope_theta", "bos_token_id",
    "eos_token_id", "max_position_embeddings", "tie_word_embeddings", "source_torch_dtype",
    "source_architectures", "source_quantization", "source_quantization_config", "source_text_config",
    "source_vision_config", "source_projector_config",
)  # fmt: skip
"""The header's fields besides `tensors`, in the order of the file."""

PREAMBLE_BYTES = 10
Q1_BYTES, Q1_WEIGHTS = 18, 128
ENTRY_KEYS = ("name", "offset_bytes", "nbytes", "shape", "dtype")

_GROUPS = tuple(1 << power for power in range(3, 15))
_TRUST_KEYS = {"auto_map", "trust_remote_code"}


class CellmInfo(NamedTuple):
    """A tensor of a .cellm file: `shape` is `out in`, `dtype` one of `DTYPES`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes as stored, without scales that are kept apart and without padding."""
        return cellm_bytes(self.name, self.shape, self.dtype)


class CellmCheckpoint(StoredCheckpoint):
    """A .cellm file; `metadata` is its header without the tensors, `config` what of the model's it kept."""


class CodedTensor(TensorRef):
    """A tensor of codes with scales in a tensor beside it, decoded on read; stored bytes count both."""

    def __init__(self, codes: StoredTensor, scales: StoredTensor, group: int | None) -> None:
        self.name, self.shape, self.dtype = codes.name, codes.shape, codes.dtype
        self.group = group
        self._codes, self._scales = codes, scales
        self._bits = BITS[codes.dtype]
        self._groups = scales.shape[1:] or (1,)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the scales."""
        return self._codes.nbytes + self._scales.nbytes

    def raw(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the bytes of the codes of rows `[start, stop)`, then those of their scales."""
        return np.concatenate([self._codes.raw(start, stop), self._scales.raw(start, stop)])

    def coded(self, start: int = 0, stop: int | None = None) -> Coded:
        """Return the codes and scales of rows `[start, stop)`."""
        raw = self._codes.raw(start, stop)
        scales = self._scales.read(start, stop)
        packed = raw.reshape(len(scales), _row_bytes(self.dtype, self.shape[1]))
        return Coded(_unpacked(packed, self._bits, self.shape[1]), scales.reshape(len(scales), *self._groups))

    def read(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return rows `[start, stop)`: scale times level."""
        return GridFormat(self.dtype, self._bits, self.group).dequantize(self.coded(start, stop))


def cellm_bytes(name: str, shape: Sequence[int], dtype: str) -> int:
    """Return the bytes of a tensor (`out in`).

    Raises UnsupportedError for an unknown dtype, BitsmithError for a shape that does not suit it.
    """
    if dtype not in DTYPES:
        raise UnsupportedError(f"has dtype {printable(dtype)!r}, known: {' '.join(DTYPES)}", tensor=name)
    sides = prod(length or 1 for length in shape)
    if len(shape) > MAX_DIMS or 2 * sides > MAX_BYTES or (0 in shape and sides > MAX_ELEMENTS):
        raise BitsmithError(f"has shape {list(shape)}: its size overflows", tensor=name)
    if dtype in ("f16", "f8e4m3"):
        return (2 if dtype == "f16" else 1) * prod(shape)
    if len(shape) != 2:
        raise BitsmithError(f"has shape {list(shape)}, {dtype} needs a matrix", tensor=name)
    return shape[0] * _row_bytes(dtype, shape[1])


def open_cellm(path: Path) -> CellmCheckpoint:
    """Open a .cellm file after checking all of its header.

    Tensors of scales are not listed: the tensors that they belong to are decoded with them. Raises
    DamagedFileError, or UnsupportedError for another version and for a dtype that is not known.
    """
    source = SourceFile(path)
    try:
        return _opened(source)
    except BitsmithError as error:
        source.close()
        if error.path is not None:
            raise
        kind = UnsupportedError if isinstance(error, UnsupportedError) else DamagedFileError
        raise kind(error.message, path=path, tensor=error.tensor) from error


def _unpacked(packed: Bytes, bits: int, columns: int) -> Bytes:
    return packed ^ np.uint8(128) if bits == 8 else unpack_codes(packed, bits, columns)


def _row_bytes(dtype: str, columns: int) -> int:
    return -(-columns // Q1_WEIGHTS) * Q1_BYTES if dtype == Q1 else -(-columns * BITS[dtype] // 8)


def _opened(source: SourceFile) -> CellmCheckpoint:
    header, data_start = _read_header(source)
    listed = header.pop("tensors", None)
    if not isinstance(listed, list):
        raise DamagedFileError("header has no list of tensors")
    stored: dict[str, StoredTensor] = {}
    for value in listed:
        tensor = _stored(source, value, data_start)
        if tensor.name in stored:
            raise DamagedFileError("appears twice", tensor=tensor.name)
        stored[tensor.name] = tensor
    _refuse_overlaps(stored.values())
    opened = CellmCheckpoint(source.path, _with_scales(stored), [source])
    opened.metadata = header
    opened.config = _config(header)
    opened._identity = header
    return opened


def _read_header(source: SourceFile) -> tuple[dict[str, Any], int]:
    if source.size_bytes < PREAMBLE_BYTES:
        raise DamagedFileError(f"has {source.size_bytes} bytes, no header: it is truncated")
    preamble = source.read(0, PREAMBLE_BYTES).tobytes()
    if not preamble.startswith(CELLM_MAGIC):
        raise DamagedFileError(f"starts with {preamble[:5]!r}, expected {CELLM_MAGIC!r}")
    if preamble[5] != VERSION:
        raise UnsupportedError(f"is .cellm version {preamble[5]}, expected {VERSION}")
    length = int.from_bytes(preamble[6:], "little")
    left = source.size_bytes - PREAMBLE_BYTES
    if length > min(MAX_HEADER_BYTES, left):
        raise DamagedFileError(
            f"says its header has {length} bytes, expected at most {MAX_HEADER_BYTES} and {left} that follow"
        )
    data = source.read(PREAMBLE_BYTES, length).tobytes()
    return load_json(data, source.path, "header", ignore=_TRUST_KEYS), PREAMBLE_BYTES + length


def _stored(source: SourceFile, value: Any, data_start: int) -> StoredTensor:
    """Return a listed tensor after checking its entry by itself."""
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name or not is_unicode(name):
        raise DamagedFileError(f"lists a tensor without a name: {printable(repr(value), 80)}")
    if missing := [key for key in ENTRY_KEYS if key not in value]:
        raise DamagedFileError(f"has no {missing[0]}", tensor=name)
    offset, nbytes, shape, dtype = (value[key] for key in ENTRY_KEYS[1:])
    if not _are_sizes([offset, nbytes]) or not isinstance(shape, list) or not _are_sizes(shape):
        said = f"offset {offset}, {nbytes} bytes, shape {shape}"
        raise DamagedFileError(f"has {printable(said, 120)}, expected whole numbers", tensor=name)
    if not isinstance(dtype, str):
        raise DamagedFileError(f"has dtype {printable(repr(dtype), 40)}", tensor=name)
    if (expected := cellm_bytes(name, shape, dtype)) != nbytes:
        raise DamagedFileError(f"has {nbytes} bytes, {dtype} {shape} needs {expected}", tensor=name)
    if offset < data_start or offset + nbytes > source.size_bytes:
        raise DamagedFileError(
            f"needs bytes {offset} to {offset + nbytes}, data lie in {data_start} to {source.size_bytes}: "
            "the file is truncated or damaged",
            tensor=name,
        )
    kind = "F16" if dtype == "f16" else dtype
    return StoredTensor(name, tuple(shape), kind, source, offset, nbytes, _decoder(dtype, shape))


def _decoder(dtype: str, shape: list[int]) -> Decoder:
    if dtype == Q1:
        return _q1_decoder(shape[1])
    if dtype == "f8e4m3":
        return lambda raw: _F8[raw]
    return plain_decoder("F16" if dtype == "f16" else "U8")


def _are_sizes(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value <= MAX_BYTES for value in values)


def _refuse_overlaps(tensors: Iterable[StoredTensor]) -> None:
    spans = sorted((one.offset, one.offset + one.nbytes, one.name) for one in tensors if one.nbytes)
    for (_, end, before), (start, _, name) in pairwise(spans):
        if start < end:
            raise DamagedFileError(
                f"needs bytes up to {end}, but {printable(name)!r} starts at {start}: they overlap",
                tensor=before,
            )


def _with_scales(stored: Mapping[str, StoredTensor]) -> dict[str, TensorRef]:
    """Return the tensors without those of scales, which are put behind the codes that they belong to."""
    tensors: dict[str, TensorRef] = {}
    for name, tensor in stored.items():
        base = name.removesuffix(SCALE_SUFFIX)
        if base != name and base in stored and stored[base].dtype in BITS:
            continue
        if base != name:
            raise DamagedFileError("holds scales of a tensor that has none or is not there", tensor=name)
        if tensor.dtype not in BITS:
            tensors[name] = tensor
            continue
        scales = stored.get(name + SCALE_SUFFIX)
        if scales is None:
            raise DamagedFileError(
                f"has no scales: {printable(name + SCALE_SUFFIX)!r} is missing", tensor=name
            )
        tensors[name] = CodedTensor(tensor, scales, _group(tensor, scales))
    return tensors


def _group(tensor: StoredTensor, scales: StoredTensor) -> int | None:
    """Return how many columns share a scale; None: whole rows. Powers of two go before even shares."""
    rows, columns = tensor.shape
    shape = scales.shape
    if scales.dtype != "F16" or len(shape) not in (1, 2) or shape[0] != rows:
        raise DamagedFileError(
            f"are {scales.dtype} {list(shape)}, expected f16 of {rows} rows", tensor=scales.name
        )
    groups = 1 if len(shape) == 1 else shape[1]
    if groups == 1:
        return None
    even = [columns // groups] if groups and columns and columns % groups == 0 else []
    for group in [*_GROUPS, *even]:
        if -(-columns // group) == groups:
            return group
    raise DamagedFileError(f"has {groups} scales for each row of {columns}", tensor=scales.name)


def _q1_decoder(columns: int) -> Decoder:
    def decode(raw: Bytes) -> Rows:
        if not raw.size:
            return np.empty(0, np.float32)
        blocks = raw.reshape(-1, -(-columns // Q1_WEIGHTS), Q1_BYTES)
        scales: Float32 = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0].astype(np.float32)
        bits = np.ascontiguousarray(blocks[:, :, 2:]).reshape(len(blocks), -1)
        coded = Coded(unpack_codes(bits, 1, columns), scales)
        return GridFormat(Q1, 1, Q1_WEIGHTS).dequantize(coded).reshape(-1)

    return decode


def _f8_values() -> Float32:
    """Return the 256 values of cellm's f8e4m3: as OCP's, but 240 for all of the largest exponent."""
    codes = np.arange(256)
    values: Float32 = np.where(codes >> 3 & 15 == 15, np.where(codes & 128, -240, 240), E4M3)
    return values.astype(np.float32)


_F8 = _f8_values()


def _config(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Hugging Face config as far as the header kept it; empty where it kept none."""
    text = header.get("source_text_config")
    if not isinstance(text, dict):
        return {}
    whole = header.get("source_model_type")
    if not isinstance(whole, str) or whole == text.get("model_type"):
        return dict(text)
    nested = {"text_config": text, "vision_config": header.get("source_vision_config")}
    named = {
        "architectures": "source_architectures",
        "tie_word_embeddings": "tie_word_embeddings",
        "quantization_config": "source_quantization_config",
    }
    top = {key: header.get(field) for key, field in named.items()}
    kept = {key: value for key, value in {**top, **nested}.items() if value is not None}
    return {"model_type": whole, **kept}
