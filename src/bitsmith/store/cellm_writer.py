"""Writes .cellm files as a stream, byte for byte as cellm's converter lays them out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bitsmith.errors import BitsmithError
from bitsmith.formats.integer import Coded, pack_codes
from bitsmith.store.atomic import Chunk, Finish, atomic_file, write_chunk
from bitsmith.store.cellm import (
    ALIGNMENT,
    BITS,
    CELLM_MAGIC,
    ENTRY_KEYS,
    FIELDS,
    MAX_HEADER_BYTES,
    PREAMBLE_BYTES,
    Q1,
    Q1_BYTES,
    Q1_WEIGHTS,
    VERSION,
    CellmInfo,
)
from bitsmith.store.checkpoint import Bytes
from bitsmith.store.safetensors import is_unicode

_SINGLES = ("rms_norm_eps", "rope_theta")  # float32 in the file
_PADS = {4: 8, 2: 1}  # the code that fills up a row's last byte
_LARGEST_JSON_INT = (1 << 64) - 1


def write_cellm_file(
    target: Path,
    metadata: Mapping[str, Any],
    tensors: Iterable[CellmInfo],
    encode: Callable[[CellmInfo], Iterable[Chunk]],
    *,
    overwrite: bool = False,
    sources: Iterable[Path] = (),
    finish: Finish | None = None,
) -> int:
    """Write a .cellm file, atomically, and return its size in bytes.

    Tensors are written sorted by name, so scales come after their codes; `encode(info)` yields a tensor's
    bytes in order, in chunks of any size. `metadata` has the header's `FIELDS`, those it lacks become null.
    `finish` is told of the whole file before it appears. Raises OutputError as `atomic_file` does,
    BitsmithError for names given twice and for an encoding of the wrong length.
    """
    infos = sorted(tensors)
    for before, after in pairwise(infos):
        if before.name == after.name:
            raise BitsmithError("appears twice", path=target, tensor=after.name)
    header, offsets = _header(metadata, infos)
    total = offsets[-1] + infos[-1].nbytes if infos else PREAMBLE_BYTES + len(header)
    with atomic_file(
        target, overwrite=overwrite, expect_bytes=total, sources=sources, finish=finish
    ) as stream:
        preamble = CELLM_MAGIC + bytes([VERSION]) + len(header).to_bytes(4, "little")
        position = stream.write(preamble + header)
        for info, offset in zip(infos, offsets, strict=True):
            stream.write(bytes(offset - position))
            done = 0
            for chunk in encode(info):
                done += write_chunk(stream, chunk)
                if done > info.nbytes:
                    break
            if done != info.nbytes:
                found = "more" if done > info.nbytes else f"{done}"
                raise BitsmithError(
                    f"was encoded to {found} bytes, expected {info.nbytes}", path=target, tensor=info.name
                )
            position = offset + done
    return total


def cellm_size_bytes(metadata: Mapping[str, Any], tensors: Iterable[CellmInfo]) -> int:
    """Return the exact size of the file that `write_cellm_file` would write."""
    infos = sorted(tensors)
    header, offsets = _header(metadata, infos)
    return offsets[-1] + infos[-1].nbytes if infos else PREAMBLE_BYTES + len(header)


def cellm_rows(coded: Coded, dtype: str) -> Bytes:
    """Return the bytes of coded rows (`rows row_bytes`) as a .cellm file has them; q1 has its scales too."""
    if dtype != Q1:
        bits = BITS[dtype]
        return coded.codes ^ np.uint8(128) if bits == 8 else pack_codes(coded.codes, bits, _PADS[bits])
    rows, blocks = coded.scales.shape
    out = np.empty((rows, blocks, Q1_BYTES), np.uint8)
    out[:, :, :2] = coded.scales.astype("<f2")[:, :, None].view(np.uint8)
    padded = np.pad(coded.codes, ((0, 0), (0, -coded.codes.shape[1] % Q1_WEIGHTS)))
    out[:, :, 2:] = pack_codes(padded, 1).reshape(rows, blocks, Q1_BYTES - 2)
    return out.reshape(rows, -1)


def _header(metadata: Mapping[str, Any], infos: Sequence[CellmInfo]) -> tuple[bytes, list[int]]:
    """Return the header and where each tensor starts; the offsets decide how long the header is."""
    fields = {key: metadata.get(key) for key in FIELDS}
    said = ",".join(f'"{key}":{_json(value, single=key in _SINGLES)}' for key, value in fields.items())
    offsets, header = [0] * len(infos), b""
    while True:
        entries = [_entry(info, offset) for info, offset in zip(infos, offsets, strict=True)]
        longer = f'{{{said},"tensors":[{",".join(entries)}]}}'.encode()
        if len(longer) == len(header):
            break
        header, position = longer, PREAMBLE_BYTES + len(longer)
        for at, info in enumerate(infos):
            offsets[at] = -(-position // ALIGNMENT) * ALIGNMENT
            position = offsets[at] + info.nbytes
    if len(longer) > MAX_HEADER_BYTES:
        raise BitsmithError(f"the header has {len(longer)} bytes, at most {MAX_HEADER_BYTES} are read again")
    return longer, offsets


def _entry(info: CellmInfo, offset: int) -> str:
    if not is_unicode(info.name):
        raise BitsmithError("has a name that cannot be written", tensor=info.name)
    values = (info.name, offset, info.nbytes, list(info.shape), info.dtype)
    parts = (f'"{key}":{_json(value)}' for key, value in zip(ENTRY_KEYS, values, strict=True))
    return "{" + ",".join(parts) + "}"


def _json(value: Any, *, single: bool = False) -> str:
    """Return JSON as cellm's serializer writes it: no spaces, nested keys sorted, shortest floats."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json(str(key))}:{_json(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_json, value)) + "]"
    if isinstance(value, float) or (single and type(value) is int):
        return _number(float(value), single=single)
    if type(value) is int and abs(value) > _LARGEST_JSON_INT:
        raise BitsmithError(f"the header cannot hold {value}")
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _number(value: float, *, single: bool) -> str:
    """Return the shortest digits that read back the same, plain between 1e-5 and 1e16 (float32: 1e13)."""
    if not np.isfinite(value):
        return "null"
    shortest = np.format_float_scientific(np.float32(value), unique=True) if single else repr(value)
    sign, digits, exponent = Decimal(shortest).normalize().as_tuple()
    if not any(digits):
        return "-0.0" if sign else "0.0"
    place = len(digits) + int(exponent)
    text = "".join(map(str, digits))
    if 0 < place <= (13 if single else 16):
        plain = f"{text[:place]:0<{place}}.{text[place:] or '0'}"
    elif -5 < place <= 0:
        plain = "0." + "0" * -place + text
    else:
        plain = text[0] + ("." + text[1:] if text[1:] else "") + f"e{place - 1}"
    return "-" * sign + plain
