"""`.cellm` files: bytes by hand, an independent reader, every fault a file can have, and conversions."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.store import (
    CellmCheckpoint,
    CellmInfo,
    open_cellm,
    open_checkpoint,
    write_cellm_file,
)
from broken_files import mutations

DATA_START = 1024


# ---------------------------------------------------------------- bytes by hand

GOLDEN_HEADER = (
    '{"model_type":"qwen3_5_text","source_model_type":null,"source_safetensors_format":"pt",'
    '"text_tensor_prefix":"model.","vision_tensor_prefix":null,"projector_tensor_prefix":null,"vocab_size":5,'
    '"hidden_dim":3,"intermediate_size":4,"num_layers":1,"num_heads":1,"num_kv_heads":1,"head_dim":null,'
    '"rms_norm_eps":1e-6,"rope_theta":10000000.0,"bos_token_id":null,"eos_token_id":4,'
    '"max_position_embeddings":64,"tie_word_embeddings":true,"source_torch_dtype":null,'
    '"source_architectures":["é"],"source_quantization":null,"source_quantization_config":null,'
    '"source_text_config":{"a":{"c":1e-6,"d":0.00001},"b":[1.5,-2e16,true]},"source_vision_config":null,'
    '"source_projector_config":null,"tensors":['
    '{"name":"a","offset_bytes":960,"nbytes":4,"shape":[2],"dtype":"f16"},'
    '{"name":"w","offset_bytes":1024,"nbytes":6,"shape":[2,5],"dtype":"i4"},'
    '{"name":"w.qscale","offset_bytes":1088,"nbytes":4,"shape":[2],"dtype":"f16"}]}'
)
GOLDEN_METADATA = {
    "model_type": "qwen3_5_text", "source_safetensors_format": "pt", "text_tensor_prefix": "model.",
    "vocab_size": 5, "hidden_dim": 3, "intermediate_size": 4, "num_layers": 1, "num_heads": 1,
    "num_kv_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000000, "eos_token_id": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "source_architectures": ["é"],
    "source_text_config": {"b": [1.5, -2e16, True], "a": {"d": 1e-5, "c": 1e-6}},
}  # fmt: skip
GOLDEN_TENSORS = [
    CellmInfo("w.qscale", (2,), "f16"), CellmInfo("w", (2, 5), "i4"), CellmInfo("a", (2,), "f16"),
]  # fmt: skip
GOLDEN_BYTES = {
    "a": struct.pack("<2e", 1.5, -2.0),
    "w": bytes([0x4F, 0x89, 0x8B, 0x10, 0x32, 0x84]),  # 15 4 9 8 11 | pad 8, and 0 1 2 3 4 | pad 8
    "w.qscale": struct.pack("<2e", 0.5, 2.0),
}


def golden(path: Path) -> Path:
    write_cellm_file(path, GOLDEN_METADATA, GOLDEN_TENSORS, lambda info: [GOLDEN_BYTES[info.name]])
    return path


def test_a_file_is_written_byte_for_byte(tmp_path: Path) -> None:
    blob = golden(tmp_path / "x.cellm").read_bytes()
    header = GOLDEN_HEADER.encode()
    start = blob[: 10 + len(header)]
    assert start == b"CELLM\x01" + len(header).to_bytes(4, "little") + header
    offset = -(-len(start) // 64) * 64
    rest = b"".join(GOLDEN_BYTES[name].ljust(64, b"\0") for name in ("a", "w", "w.qscale"))
    assert blob[offset:] == rest[: 128 + 4]
    assert not any(blob[len(start) : offset])


def test_a_file_by_hand_is_read(tmp_path: Path) -> None:
    with open_checkpoint(golden(tmp_path / "x.cellm")) as opened:
        assert list(opened) == ["a", "w"]  # scales belong to their codes
        assert opened["a"].read().tolist() == [1.5, -2.0]
        assert opened["w"].read().tolist() == [[3.5, -2, 0.5, 0, 1.5], [-16, -14, -12, -10, -8]]
        assert opened["w"].read(1, 2).tolist() == [[-16, -14, -12, -10, -8]]
        assert (opened["w"].dtype, opened["w"].nbytes) == ("i4", 6 + 4)
        assert opened["w"].raw(0, 1).tobytes() == GOLDEN_BYTES["w"][:3] + GOLDEN_BYTES["w.qscale"][:2]
        assert opened.metadata["rope_theta"] == 1e7
        assert opened.config == {"b": [1.5, -2e16, True], "a": {"d": 1e-5, "c": 1e-6}}


def test_scales_are_part_of_the_digest(tmp_path: Path) -> None:
    path = golden(tmp_path / "x.cellm")
    first = open_cellm(path).source_digest
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    assert open_cellm(path).source_digest != first


def test_a_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    path = golden(tmp_path / "x.cellm").rename(tmp_path / "model")
    assert isinstance(open_checkpoint(path), CellmCheckpoint)


def header_of(*entries: Any, **fields: Any) -> dict[str, Any]:
    return {"model_type": "m", **fields, "tensors": list(entries)}


def entry(
    name: Any, shape: Any, dtype: Any = "f16", nbytes: Any = 4, offset: Any = DATA_START
) -> dict[str, Any]:
    return {"name": name, "offset_bytes": offset, "nbytes": nbytes, "shape": shape, "dtype": dtype}


def packed(
    header: Any, data: bytes = bytes(64), *, length: int | None = None, start: bytes = b"CELLM\x01"
) -> bytes:
    """Return a file with any header, sound or not; data start at `DATA_START`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    said = len(text) if length is None else length
    return (start + said.to_bytes(4, "little") + text).ljust(DATA_START, b"\0") + data


def opened_from(tmp_path: Path, content: bytes) -> CellmCheckpoint:
    (tmp_path / "x.cellm").write_bytes(content)
    return open_cellm(tmp_path / "x.cellm")


def test_float8_by_hand(tmp_path: Path) -> None:
    codes = bytes([0x00, 0x38, 0xB8, 0x77, 0x7F, 0x01, 0x08, 0x3C])
    opened = opened_from(tmp_path, packed(header_of(entry("w", [8], "f8e4m3", 8)), codes))
    assert opened["w"].read().tolist() == [0, 1, -1, 240, 240, 2**-9, 2**-6, 1.5]


@pytest.mark.parametrize(
    ("columns", "groups", "width"),
    [(96, 2, 64), (256, 2, 128), (130, 2, 128), (40, 2, 32), (60, 5, 12), (48, 1, 48)],
)
def test_groups_are_told_from_the_number_of_scales(
    tmp_path: Path, columns: int, groups: int, width: int
) -> None:
    scales = np.arange(1, groups + 1).astype("<f2").tobytes()
    header = header_of(
        entry("w", [1, columns], "i8", columns),
        entry("w.qscale", [1, groups], "f16", 2 * groups, DATA_START + 256),
    )
    opened = opened_from(tmp_path, packed(header, bytes([1] * 256) + scales))
    assert opened["w"].read()[0].tolist() == [1 + j // width for j in range(columns)]


def test_tensors_may_lie_anywhere(tmp_path: Path) -> None:
    """cellm's `quantize` tool puts scales right behind the codes."""
    header = header_of(entry("w", [1, 3], "i8", 3), entry("w.qscale", [1], "f16", 2, DATA_START + 3))
    opened = opened_from(tmp_path, packed(header, bytes([255, 0, 127]) + struct.pack("<e", 2.0)))
    assert opened["w"].read().tolist() == [[-2, 0, 254]]


# ---------------------------------------------------------------- damaged files

HUGE = 1 << 62
SCALES = entry("w.qscale", [2], "f16", 4, DATA_START + 64)
CODES = entry("w", [2, 4], "i4", 4)
FAULTS: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["0 bytes"]),
    "cut in the preamble": (b"CELLM\x01\x00", ["7 bytes", "truncated"]),
    "another magic": (packed(header_of(), start=b"CELLX\x01"), ["CELLX", "expected b'CELLM'"]),
    "another version": (packed(header_of(), start=b"CELLM\x02"), ["version 2", "expected 1"]),
    "header longer than the file": (packed(header_of(), length=5000), ["5000 bytes", "header"]),
    "header of 4 GB": (packed(header_of(), length=2**32 - 1), ["4294967295", "100000000"]),
    "not UTF-8": (packed(b'{"\xff": 1}'), ["UTF-8"]),
    "not JSON": (packed(b'{"tensors": ['), ["JSON"]),
    "not an object": (packed(b"[1]"), ["not a JSON object"]),
    "nested deeply": (packed(b'{"a":' + b"[" * 100_000, bytes(64)), ["nested"]),
    "a key twice": (packed(b'{"tensors":[],"tensors":[]}'), ["'tensors'", "twice"]),
    "no tensors": (packed({"model_type": "m"}), ["no list of tensors"]),
    "tensors that are no list": (packed({"tensors": {}}), ["no list of tensors"]),
    "an entry that is no object": (packed(header_of(3)), ["without a name"]),
    "a name that is no text": (packed(header_of(entry(7, [2]))), ["without a name"]),
    "a lone surrogate": (packed(header_of(entry("a\ud800", [2]))), ["without a name"]),
    "a missing field": (packed(header_of({"name": "a", "offset_bytes": 0})), ["tensor 'a'", "no nbytes"]),
    "the same name twice": (packed(header_of(entry("a", [2]), entry("a", [2]))), ["tensor 'a'", "twice"]),
    "unknown dtype": (packed(header_of(entry("a", [2], "q4"))), ["tensor 'a'", "'q4'", "q1_0_g128"]),
    "dtype that is no text": (packed(header_of(entry("a", [2], 4))), ["tensor 'a'", "dtype"]),
    "shape against bytes": (packed(header_of(entry("a", [3]))), ["tensor 'a'", "4 bytes", "needs 6"]),
    "shape that overflows": (packed(header_of(entry("a", [HUGE, HUGE]))), ["tensor 'a'", "overflows"]),
    "shape that overflows to 0": (packed(header_of(entry("a", [0, HUGE, HUGE], nbytes=0))), ["overflows"]),
    "negative shape": (packed(header_of(entry("a", [-2, -1]))), ["tensor 'a'", "whole numbers"]),
    "boolean shape": (packed(header_of(entry("a", [True, 2]))), ["tensor 'a'", "whole numbers"]),
    "shape that is no list": (packed(header_of(entry("a", 2))), ["tensor 'a'", "whole numbers"]),
    "codes that are no matrix": (packed(header_of(entry("a", [8], "i4"))), ["'a'", "i4 needs a matrix"]),
    "blocks that are no matrix": (packed(header_of(entry("a", [], "q1_0_g128"))), ["'a'", "needs a matrix"]),
    "offset in the header": (packed(header_of(entry("a", [2], offset=8))), ["tensor 'a'", "8 to 12"]),
    "offset past the end": (packed(header_of(entry("a", [2], offset=HUGE))), ["tensor 'a'", "truncated"]),
    "negative offset": (packed(header_of(entry("a", [2], offset=-64))), ["tensor 'a'", "whole numbers"]),
    "fractional offset": (packed(header_of(entry("a", [2], offset=1024.0))), ["tensor 'a'", "whole numbers"]),
    "overlap": (
        packed(header_of(entry("a", [2]), entry("b", [2], offset=DATA_START + 2))),
        ["tensor 'a'", "'b'", "overlap"],
    ),
    "truncated": (packed(header_of(entry("a", [2])), b"123"), ["tensor 'a'", "truncated"]),
    "codes without scales": (packed(header_of(CODES)), ["tensor 'w'", "'w.qscale' is missing"]),
    "scales without codes": (packed(header_of(SCALES), bytes(128)), ["tensor 'w.qscale'", "not there"]),
    "scales of floats": (
        packed(header_of(entry("w", [2]), SCALES), bytes(128)),
        ["tensor 'w.qscale'", "has none"],
    ),
    "scales of other rows": (
        packed(header_of(CODES, SCALES | {"shape": [1], "nbytes": 2}), bytes(128)),
        ["tensor 'w.qscale'", "expected f16 of 2 rows"],
    ),
    "scales of another type": (
        packed(header_of(CODES, SCALES | {"dtype": "f8e4m3", "nbytes": 2}), bytes(128)),
        ["tensor 'w.qscale'", "expected f16"],
    ),
    "groups that do not divide": (
        packed(header_of(CODES, SCALES | {"shape": [2, 3], "nbytes": 12}), bytes(128)),
        ["tensor 'w.qscale'", "3 scales for each row of 4"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_file_is_refused_in_one_line_before_anything_is_allocated(tmp_path: Path, fault: str) -> None:
    content, words = FAULTS[fault]
    path = tmp_path / "x.cellm"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(
            DamagedFileError if "version" not in fault and "unknown" not in fault else UnsupportedError
        ) as caught:
            open_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert all(word in message for word in words), message
    assert peak < 4 << 20


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    blob = golden(tmp_path / "x.cellm").read_bytes()
    for end in range(0, len(blob), 37):
        with pytest.raises(DamagedFileError):
            opened_from(tmp_path, blob[:end])


SOUND = packed(
    header_of(
        CODES,
        SCALES,
        entry("a", [2, 3], "f16", 12, DATA_START + 128),
        entry("q", [1, 9], "q1_0_g128", 18, DATA_START + 192),
        source_text_config={"x": 1},
    ),
    bytes(range(256)),
)
TOKENS = [
    b"9" * 19,
    b"-1",
    b"1e9",
    b"[",
    b"{",
    b"null",
    b'"',
    b"\\ud800",
    b"i2",
    b"q1_0_g128",
    b".qscale",
    b"0",
]


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    database=None,
)
@given(content=mutations(SOUND, TOKENS))
def test_a_broken_file_opens_or_is_refused(tmp_path: Path, content: bytes) -> None:
    try:
        opened = opened_from(tmp_path, content)
    except BitsmithError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
        return
    with opened, np.errstate(all="ignore"):
        for ref in opened.values():
            assert ref.raw().size == ref.nbytes <= len(content)
            assert ref.read().shape == ref.shape


def test_the_writer_refuses_what_a_file_cannot_hold(tmp_path: Path) -> None:
    def write(tensors: list[CellmInfo], chunk: bytes = bytes(4), **metadata: Any) -> None:
        write_cellm_file(tmp_path / "x.cellm", metadata, tensors, lambda _: [chunk])

    one = CellmInfo("a", (2,), "f16")
    with pytest.raises(BitsmithError, match="tensor 'a': appears twice"):
        write([one, one])
    with pytest.raises(BitsmithError, match="encoded to 3 bytes, expected 4"):
        write([one], bytes(3))
    with pytest.raises(BitsmithError, match="encoded to more bytes, expected 4"):
        write([one], bytes(5))
    with pytest.raises(BitsmithError, match="cannot be written"):
        write([CellmInfo("a\ud800", (2,), "f16")])
    with pytest.raises(BitsmithError, match="i4 needs a matrix"):
        write([CellmInfo("a", (2,), "i4")])
    assert not list(tmp_path.iterdir())
