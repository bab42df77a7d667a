"""Changes of inputs that know their layout: half of the bytes of these formats are lengths of the others.

`changed` breaks a field, a JSON value or a few bytes and then, most of the time, puts lengths, offsets and
sizes right again, so that what was broken is reached behind the checks of the header. The other inputs are
changed as libFuzzer does.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from math import prod
from random import Random
from typing import Any

from bitsmith.errors import BitsmithError
from bitsmith.formats import FORMATS
from bitsmith.store.cellm import DTYPES, cellm_bytes
from bitsmith.store.gguf_layout import NUMBERS, VALUE_TYPES, ggml_format, tensor_bytes, type_names
from bitsmith.store.safetensors import ITEM_BYTES
from readers import Reader, pack, split

Bytewise = Callable[[bytes, int], bytes]
"""libFuzzer's own change of some bytes to at most so many."""

SIZES = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 257, 511, 512, 4095, 4096),
    *(65535, 65536, 1 << 20, 1 << 24, 1 << 26, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 32, 1 << 40),
    *((1 << 53) + 1, 1 << 60, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "\0", "\ud800", "../x", "/x"),
    *([], {}, [[]], [None], {"a": {}}, "a" * 300, "weight", 10**30, -(10**30), "re:(a+)+$", "Linear"),
)
MAX_DATA_BYTES = 1 << 14
_NAMES = {name: number for number, name in type_names().items()}
_KINDS = tuple(VALUE_TYPES)


def changed(reader: Reader, data: bytes, limit: int, seed: int, bytewise: Bytewise) -> bytes:
    """Return a changed input of at most `limit` bytes."""
    random = Random(seed)
    if random.random() < 0.25:
        return bytewise(data, limit)
    change = Change(random, bytewise)
    new = change.folder(data, reader.parts) if reader.parts else change.file(data, reader.file)
    return new if len(new) <= limit else bytewise(data, limit)


class Change:
    """Changes that one seed makes."""

    def __init__(self, random: Random, bytewise: Bytewise) -> None:
        self.random, self._bytewise = random, bytewise

    def folder(self, data: bytes, parts: tuple[str, ...]) -> bytes:
        """Change one file of an input of several, or which there are."""
        files = split(data, parts)
        if not files or self.random.random() < 0.05:
            return self._bytes(data)
        name = self.random.choice(sorted(files))
        if self.random.random() < 0.03:
            files[self.random.choice(parts)] = files.pop(name)
        else:
            files[name] = self.file(files[name], name)
        if self.random.random() < 0.7:
            put_digests_right(files)
        return pack(files, parts)

    def file(self, data: bytes, name: str) -> bytes:
        """Change a file in the way of its kind; as bytes where it is none of the kind."""
        kind = name.rpartition(".")[2]
        known = {
            "safetensors": self._safetensors,
            "gguf": self._gguf,
            "cellm": self._cellm,
            "json": self._json,
            "yaml": self._lines,
            "dat": self._numbers,
        }
        with suppress(Exception):  # a file broken before may be none of its kind any more
            for _ in range(self.random.choice((1, 1, 1, 2, 4))):
                data = known[kind](data)
            return data
        return self._bytes(data)

    def _bytes(self, data: bytes) -> bytes:
        if self.random.random() < 0.3:
            return self._numbers(data)
        return self._bytewise(data, len(data) + 32)

    def _numbers(self, data: bytes) -> bytes:
        """Put a whole number of unusual size somewhere."""
        if self.random.random() < 0.5 or len(data) < 4:
            return self._bytewise(data, len(data) + 32)
        width = self.random.choice((1, 2, 4, 4, 8))
        at = self.random.randrange(len(data))
        number = self.random.choice(SIZES) & ((1 << 8 * width) - 1)
        return data[:at] + number.to_bytes(width, "little") + data[at + width :]

    def _lines(self, data: bytes) -> bytes:
        """Double, drop, move or change a line."""
        lines = data.split(b"\n")
        at, to = self.random.randrange(len(lines)), self.random.randrange(len(lines))
        match self.random.randrange(5):
            case 0:
                lines.insert(to, lines[at])
            case 1:
                del lines[at]
            case 2:
                lines[at] = b" " * self.random.randrange(9) + lines[at].lstrip()
            case 3:
                said = json.dumps(self._value()).encode()
                lines[at] = lines[at].partition(b":")[0] + b": " + said
            case _:
                lines[at] = self._bytewise(lines[at] or b" ", len(lines[at]) + 40)
        return b"\n".join(lines)

    def _value(self) -> Any:
        return self.random.choice(self.random.choice((SIZES, VALUES)))

    def _json(self, data: bytes) -> bytes:
        if self.random.random() < 0.3:
            return self._bytewise(data, len(data) + 64)
        return json.dumps(self._tree(json.loads(data))).encode()

    def _tree(self, value: Any) -> Any:
        """Change one place of a JSON value, deep ones no rarer than others."""
        places = list(_places(value))
        if not places:
            return self._value()
        container, key = self.random.choice(places)
        other, other_key = self.random.choice(places)
        match self.random.randrange(7):
            case 0 | 1 | 2:
                container[key] = self._value()
            case 3:
                container[key] = json.loads(json.dumps(other[other_key]))
            case 4:
                del container[key]
            case 5 if isinstance(container, list):
                container.insert(key, json.loads(json.dumps(other[other_key])))
            case 5:
                container[self.random.choice((str(other_key), f"{key}x", ""))] = container.pop(key)
            case _ if type(container[key]) is int:
                container[key] += self.random.choice((-1, 1, 2, -64, 64))
            case _:
                container[key] = self._value()
        return value

    def _safetensors(self, data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header, body = data[8 : 8 + length], data[8 + length :]
        match self.random.randrange(4):
            case 0:
                header = self._bytewise(header, len(header) + 64)
            case 1:
                body = self._bytes(body)
            case 2:
                header = json.dumps(self._tree(json.loads(header))).encode()
            case _:
                listed = json.loads(header)
                one = listed[self.random.choice(sorted(listed))]
                if self.random.random() < 0.5:
                    one["dtype"] = self.random.choice(sorted(ITEM_BYTES))
                else:
                    one["shape"] = self._shape(one["shape"])
                header, body = _laid_out(listed, body)
        said = self.random.choice(SIZES) if self.random.random() < 0.05 else len(header)
        return (said & ((1 << 64) - 1)).to_bytes(8, "little") + header + body

    def _shape(self, shape: list[int]) -> list[int]:
        shape = list(shape)
        at = self.random.randrange(len(shape) + 1)
        match self.random.randrange(5):
            case 0:
                shape.insert(at, self.random.choice((0, 1, 1, 2, 3)))
            case 1 if at < len(shape):
                del shape[at]
            case 2 if at < len(shape):
                shape[at] = self.random.choice(SIZES)
            case 3:
                self.random.shuffle(shape)
            case _ if at < len(shape):
                shape[at] = max(0, shape[at] + self.random.choice((-1, 1, 31, 32, 256)))
        return shape

    def _cellm(self, data: bytes) -> bytes:
        length = int.from_bytes(data[6:10], "little")
        preamble, header, body = data[:6], data[10 : 10 + length], data[10 + length :]
        match self.random.randrange(5):
            case 0:
                header = self._bytewise(header, len(header) + 64)
            case 1:
                body = self._bytes(body)
            case 2:
                header = json.dumps(self._tree(json.loads(header))).encode()
            case 3:
                preamble = self._bytewise(preamble, 6)[:6].ljust(6, b"\1")
            case _:
                listed = json.loads(header)
                one = self.random.choice(listed["tensors"])
                if self.random.random() < 0.5:
                    one["dtype"] = self.random.choice(DTYPES)
                else:
                    one["shape"] = self._shape(one["shape"])
                header, body = _cellm_laid_out(listed, body)
        said = self.random.choice(SIZES) if self.random.random() < 0.05 else len(header)
        return preamble + (said & 0xFFFFFFFF).to_bytes(4, "little") + header + body

    def _gguf(self, data: bytes) -> bytes:
        file = GgufParts(data)
        match self.random.randrange(6):
            case 0:
                file.data = self._bytes(file.data)
            case 1 if file.values:
                self._gguf_value(file)
            case 2 if file.values or file.tensors:
                listed: list[Any] = self.random.choice([part for part in (file.values, file.tensors) if part])
                at = self.random.randrange(len(listed))
                if self.random.random() < 0.5:
                    del listed[at]
                else:
                    listed.insert(at, list(self.random.choice(listed)))
            case 3 | 4 if file.tensors:
                self._gguf_tensor(file)
            case _:
                return self._bytes(data)
        if self.random.random() < 0.8:
            file.lay_out()
        return file.joined(self.random.choice(SIZES) if self.random.random() < 0.04 else None)

    def _gguf_value(self, file: GgufParts) -> None:
        one = self.random.choice(file.values)
        match self.random.randrange(4):
            case 0:
                one[0] = self._bytewise(one[0], 80)
            case 1:
                one[1] = self.random.choice((*range(14), 1 << 31))
            case 2:
                one[2] = self._numbers(one[2])
            case _:
                kind = self.random.choice(_KINDS)
                count = self.random.choice((0, 1, 2, 300))
                width = (
                    8 if kind not in NUMBERS else struct.calcsize(NUMBERS[kind][1:].replace("u1", "B")[:1])
                )
                body = self.random.randbytes(count * width)
                one[1], one[2] = 9, struct.pack("<IQ", VALUE_TYPES[kind], count) + body

    def _gguf_tensor(self, file: GgufParts) -> None:
        one = self.random.choice(file.tensors)
        match self.random.randrange(5):
            case 0:
                one[0] = self._bytewise(one[0], 80)
            case 1:
                one[1] = self._shape(one[1])
            case 2:
                one[2] = self.random.choice((*_NAMES.values(), 4, 5, 36, 99, (1 << 32) - 1))
            case 3:
                one[3] = self.random.choice(SIZES)
            case _:
                name = self.random.choice(sorted(FORMATS))
                one[1], one[2] = [ggml_format(name).block_size * self.random.choice((1, 2, 3))], _NAMES[name]


class GgufParts:
    """A GGUF file in parts: `values` of key, type and bytes; `tensors` of name, shape, type and offset."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self.head = self._take(8)
        n_tensors, n_values = struct.unpack("<QQ", self._take(16))
        if n_tensors > 1000 or n_values > 1000:
            raise ValueError("not worth taking apart")
        self.values: list[list[Any]] = [self._value() for _ in range(n_values)]
        self.tensors: list[list[Any]] = [self._tensor() for _ in range(n_tensors)]
        start = -(-self._at // 32) * 32
        self.data = data[start:]

    def lay_out(self) -> None:
        """Put the tensors one behind the other, as large as shapes and types say."""
        at = 0
        for tensor in self.tensors:
            tensor[3] = at
            with suppress(BitsmithError, KeyError):
                kind = next(name for name, number in _NAMES.items() if number == tensor[2])
                size = tensor_bytes("", tuple(reversed(tensor[1])), kind)
                at += -(-min(size, MAX_DATA_BYTES) // 32) * 32
        at = min(at, MAX_DATA_BYTES)
        self.data = self.data[:at].ljust(at, b"\x11")

    def joined(self, count: int | None) -> bytes:
        """Return the file; `count` is said to be its tensors or values instead."""
        counts = [len(self.tensors), len(self.values)]
        if count is not None:
            counts[count % 2] = count & ((1 << 64) - 1)
        out = [self.head, struct.pack("<QQ", *counts)]
        for key, kind, body in self.values:
            out += [struct.pack("<Q", len(key)), key, struct.pack("<I", kind & 0xFFFFFFFF), body]
        for name, shape, kind, offset in self.tensors:
            out += [struct.pack("<Q", len(name)), name, struct.pack("<I", len(shape))]
            out += [struct.pack("<Q", length & ((1 << 64) - 1)) for length in shape]
            out.append(struct.pack("<IQ", kind & 0xFFFFFFFF, offset & ((1 << 64) - 1)))
        head = b"".join(out)
        return head + bytes(-len(head) % 32) + self.data

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise ValueError("ends early")
        self._at += length
        return self._data[self._at - length : self._at]

    def _number(self, layout: str) -> int:
        value: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _value(self) -> list[Any]:
        key, kind, start = self._take(self._number("<Q")), self._number("<I"), self._at
        name, count = _KINDS[kind], 1
        if name == "ARRAY":
            name, count = _KINDS[self._number("<I")], self._number("<Q")
        if name == "STRING":
            for _ in range(count):
                self._take(self._number("<Q"))
        else:
            self._take(count * int(NUMBERS[name][2:]))
        return [key, kind, self._data[start : self._at]]

    def _tensor(self) -> list[Any]:
        name = self._take(self._number("<Q"))
        shape = list(struct.unpack(f"<{(n := self._number('<I'))}Q", self._take(8 * n)))
        return [name, shape, self._number("<I"), self._number("<Q")]


def _places(value: Any) -> Any:
    """Yield every container of a JSON value with every key or index."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _laid_out(header: dict[str, Any], body: bytes) -> tuple[bytes, bytes]:
    """Return a header with its tensors one behind the other, and as many bytes for them."""
    at = 0
    for entry in header.values():
        if "data_offsets" in entry:
            size = ITEM_BYTES[entry["dtype"]] * prod(entry["shape"])
            entry["data_offsets"] = [at, at + size]
            at += size
    if at > MAX_DATA_BYTES:
        raise ValueError("too large")
    return json.dumps(header).encode(), body[:at].ljust(at, b"\x11")


def _cellm_laid_out(header: dict[str, Any], body: bytes) -> tuple[bytes, bytes]:
    for entry in header["tensors"]:
        with suppress(BitsmithError):
            entry["nbytes"] = cellm_bytes("", entry["shape"], entry["dtype"])
    if sum(entry["nbytes"] for entry in header["tensors"]) > MAX_DATA_BYTES:
        raise ValueError("too large")
    start = 10 + len(json.dumps(header)) + 8 * len(header["tensors"])
    at = start
    for entry in header["tensors"]:
        entry["offset_bytes"] = at = -(-at // 64) * 64
        at += entry["nbytes"]
    text = json.dumps(header).encode()
    size = at - 10 - len(text)
    return text, body[:size].ljust(size, b"\x11")


def put_digests_right(files: dict[str, bytes]) -> None:
    """Make the SHA-256s of a manifest those of the tensors, so that what lies behind them is reached."""
    with suppress(Exception):  # broken ones stay as they are
        if "statistics.json" in files:
            said = json.loads(files["statistics.json"])
            said["tokens"] = _digests(files["tokens.safetensors"])
            for site, entry in said["sites"].items():
                found = _digests(files[entry["file"]])
                entry["tensors"] = {kind: found[f"{site}.{kind}"] for kind in entry["tensors"]}
            files["statistics.json"] = json.dumps(said).encode()
        if "paired.json" in files:
            said = json.loads(files["paired.json"])
            said["files"] = {name: _digests(files[name]) for name in said["files"]}
            files["paired.json"] = json.dumps(said).encode()


def _digests(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: hashlib.sha256(body[slice(*entry["data_offsets"])]).hexdigest()
        for name, entry in header.items()
    }
