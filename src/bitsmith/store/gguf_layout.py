"""What both sides of GGUF agree on: block sizes, value types, limits, and how much padding goes where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from gguf.constants import GGML_QUANT_SIZES

from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.formats import FORMATS, Format, decoder_named

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4
MAX_NAME_BYTES = 63  # GGML_MAX_NAME counts the closing NUL
MAX_KEY_BYTES = 65535
MAX_TENSOR_BYTES = (1 << 63) - 1

VALUE_TYPES = {
    "UINT8": 0,
    "INT8": 1,
    "UINT16": 2,
    "INT16": 3,
    "UINT32": 4,
    "INT32": 5,
    "FLOAT32": 6,
    "BOOL": 7,
    "STRING": 8,
    "ARRAY": 9,
    "UINT64": 10,
    "INT64": 11,
    "FLOAT64": 12,
}
NUMBERS = {
    "UINT8": "<u1",
    "INT8": "<i1",
    "UINT16": "<u2",
    "INT16": "<i2",
    "UINT32": "<u4",
    "INT32": "<i4",
    "FLOAT32": "<f4",
    "BOOL": "<u1",
    "UINT64": "<u8",
    "INT64": "<i8",
    "FLOAT64": "<f8",
}
"""numpy's name of every GGUF value type of a fixed size."""


class Typed(NamedTuple):
    """A metadata value with its GGUF type said, for when Python's own type does not say it.

    `Typed("UINT64", 7)` is one value, `Typed("UINT8", [1, 2])` an array of them.
    """

    type: str
    value: Any


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF file: `shape` in numpy order (`out in`), `type` a ggml type name."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded tensor, without padding.

        Raises BitsmithError if rows are not whole blocks, UnsupportedError for an unknown type.
        """
        return tensor_bytes(self.name, self.shape, self.type)


def ggml_format(type_name: str, tensor: str | None = None) -> Format:
    """Return what is known of a ggml type, whether bitsmith writes it or only reads it.

    Raises UnsupportedError for others.
    """
    try:
        return decoder_named(type_name)
    except BitsmithError as error:
        raise UnsupportedError(
            f"has the unknown ggml type {printable(type_name)!r}", tensor=tensor
        ) from error


def type_names() -> dict[int, str]:
    """Return the name of every known ggml type by its number."""
    names = {int(kind): kind.name for kind in GGML_QUANT_SIZES}
    return names | {known.ggml_type: name for name, known in FORMATS.items()}


def tensor_bytes(name: str, shape: Sequence[int], type_name: str) -> int:
    """Return the bytes of a tensor of `shape` (`out in`).

    Raises BitsmithError if its shape does not suit GGUF or the type, UnsupportedError for an unknown type.
    """
    size = ggml_format(type_name, name)
    if len(shape) > MAX_DIMS or any(not 0 < length <= MAX_TENSOR_BYTES for length in shape):
        raise BitsmithError(
            f"has shape {shape}, expected at most {MAX_DIMS} positive dimensions", tensor=name
        )
    row = shape[-1] if shape else 1
    if row % size.block_size:
        raise BitsmithError(
            f"has rows of {row}, {type_name} needs them divisible by {size.block_size}", tensor=name
        )
    nbytes = prod(shape) // size.block_size * size.block_bytes
    if nbytes > MAX_TENSOR_BYTES:
        raise BitsmithError(f"has shape {shape}: its size overflows", tensor=name)
    return nbytes


def check_name(name: str, limit: int, what: str) -> bytes:
    """Return the UTF-8 bytes of a tensor name or a metadata key.

    Raises BitsmithError unless they are 1 to `limit` bytes without NUL.
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise BitsmithError(f"{what} {printable(name, 80)!r} is not Unicode") from error
    if not 0 < len(encoded) <= limit or b"\0" in encoded:
        raise BitsmithError(
            f"{what} {printable(name, 80)!r} has {len(encoded)} bytes, expected 1 to {limit} without NUL"
        )
    return encoded


def check_alignment(kind: str, value: Any) -> int:
    """Return the alignment that `general.alignment` says.

    Raises BitsmithError unless it is a UINT32 and a power of two up to a megabyte.
    """
    if (
        kind != "UINT32"
        or not isinstance(value, int)
        or not 0 < value <= MAX_ALIGNMENT
        or value & (value - 1)
    ):
        found = f"{kind} {printable(str(value), 40)}"
        raise BitsmithError(
            f"{ALIGNMENT_KEY} is {found}, expected UINT32 and a power of two up to {MAX_ALIGNMENT}"
        )
    return int(value)


def padded(nbytes: int, alignment: int) -> int:
    """Round up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment
