"""Builders of files that break the rules of their format, and the means to break sound ones at random."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

U32, STRING, ARRAY, U64 = 4, 8, 9, 10
F32, Q8_0 = 0, 8


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: bytes | str, dims: list[int], kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def whole(
    pairs: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = bytes(1024),
    *,
    magic: bytes = b"GGUF",
    version: bytes = struct.pack("<I", 3),
    n_pairs: int | None = None,
    n_tensors: int | None = None,
    align: int = 32,
) -> bytes:
    """Return a file from its parts, sound or not."""
    pairs, infos = pairs or [], infos or []
    counts = struct.pack(
        "<QQ",
        len(infos) if n_tensors is None else n_tensors,
        len(pairs) if n_pairs is None else n_pairs,
    )
    head = magic + version + counts + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % align) + data


def packed(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a file with any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any, shape: Any, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@st.composite
def mutations(draw: st.DrawFn, sound: bytes, tokens: Sequence[bytes]) -> bytes:
    """Draw a copy of `sound` with one to four changes, among them any of `tokens` put in."""
    changed = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        match draw(st.sampled_from(["flip", "insert", "cut", "token", "repeat"])):
            case "flip":
                changed[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "insert":
                changed[at:at] = draw(st.binary(max_size=6))
            case "cut":
                del changed[at : at + draw(st.integers(1, 8))]
            case "token":
                token = draw(st.sampled_from(tokens))
                changed[at : at + draw(st.sampled_from([1, len(token)]))] = token
            case "repeat":
                start = draw(st.integers(0, len(sound)))
                changed[at:at] = sound[start : start + 20]
    return bytes(changed)
