"""What the GGUF writer refuses, and that it holds little and leaves nothing behind."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitsmith.errors import BitsmithError, OutputError
from bitsmith.store import TensorInfo, Typed, gguf_size_bytes, open_gguf, write_gguf

WRONG_METADATA: dict[str, tuple[Any, str]] = {
    "negative": (-1, "does not fit UINT32"),
    "too large": (2**32, "does not fit UINT32"),
    "large in an array": ([2**31], "does not fit INT32"),
    "float too large": (1e300, "does not fit FLOAT32"),
    "empty array": ([], "empty array"),
    "mixed array": ([1, "a"], "not all INT32"),
    "flags among numbers": ([1, True], "not all INT32"),
    "an object": ({"a": 1}, "dict"),
    "nothing": (None, "NoneType"),
    "unknown type": (Typed("UINT128", 1), "UINT128"),
    "array type": (Typed("ARRAY", [1]), "ARRAY"),
    "text as a number": (Typed("UINT32", "1"), "not all UINT32"),
    "lone surrogate": ("\ud800", "Unicode"),
}


@pytest.mark.parametrize("fault", WRONG_METADATA)
def test_metadata_that_gguf_cannot_hold_is_refused(tmp_path: Path, fault: str) -> None:
    value, words = WRONG_METADATA[fault]
    with pytest.raises(BitsmithError, match=f"'a.key'.*{words}"):
        write_gguf(tmp_path / "x.gguf", {"a.key": value}, [], lambda _: [])
    assert not list(tmp_path.iterdir())


WRONG_TENSORS: dict[str, tuple[list[TensorInfo], str]] = {
    "long name": ([TensorInfo("n" * 64, (1,), "F32")], "64 bytes"),
    "no name": ([TensorInfo("", (1,), "F32")], "0 bytes"),
    "NUL in a name": ([TensorInfo("a\0", (1,), "F32")], "NUL"),
    "surrogate in a name": ([TensorInfo("\ud800", (1,), "F32")], "Unicode"),
    "name twice": ([TensorInfo("w", (1,), "F32")] * 2, "'w': appears twice"),
    "five dimensions": ([TensorInfo("w", (1,) * 5, "F32")], "'w': has shape"),
    "empty dimension": ([TensorInfo("w", (4, 0), "F32")], "'w': has shape"),
    "row that cuts a block": ([TensorInfo("w", (2, 100), "Q4_K")], "'w': has rows of 100, Q4_K"),
    "unknown type": ([TensorInfo("w", (1,), "Q9_Z")], "'w': has the unknown ggml type 'Q9_Z'"),
}


@pytest.mark.parametrize("fault", WRONG_TENSORS)
def test_tensors_that_gguf_cannot_hold_are_refused(tmp_path: Path, fault: str) -> None:
    tensors, words = WRONG_TENSORS[fault]
    for act in (
        lambda: gguf_size_bytes({}, tensors),
        lambda: write_gguf(tmp_path / "x.gguf", {}, tensors, lambda _: [b"1234"]),
    ):
        with pytest.raises(BitsmithError, match=words):
            act()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chunks", [[], [b"1234"], [b"12345678", b"9"], [np.zeros(3, np.float32)]])
def test_wrong_byte_counts_are_refused_and_leave_nothing(tmp_path: Path, chunks: list[Any]) -> None:
    with pytest.raises(BitsmithError, match=r"x\.gguf: tensor 'w': .*expected 8"):
        write_gguf(tmp_path / "x.gguf", {}, [TensorInfo("w", (2,), "F32")], lambda _: chunks)
    assert not list(tmp_path.iterdir())


def test_output_that_exists_or_is_the_input_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tensors = [TensorInfo("w", (2,), "F32")]
    write_gguf(path, {}, tensors, lambda _: [bytes(8)])
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists; pass --overwrite"):
        write_gguf(path, {}, tensors, lambda _: [b"12345678"])
    with open_gguf(path) as opened, pytest.raises(OutputError, match="is the input"):
        write_gguf(path, {}, tensors, lambda _: [b"12345678"], overwrite=True, sources=opened.files)
    assert path.read_bytes() == before
    write_gguf(path, {}, tensors, lambda _: [b"12345678"], overwrite=True)
    assert open_gguf(path)["w"].raw().tobytes() == b"12345678"


def test_writing_holds_one_chunk_at_a_time(tmp_path: Path) -> None:
    rows, width = 64, 1 << 18

    def encode(_: TensorInfo) -> Iterator[Any]:
        for number in range(rows):
            yield np.full((1, width), number, np.float32)

    tracemalloc.start()
    try:
        write_gguf(tmp_path / "x.gguf", {}, [TensorInfo("w", (rows, width), "F32")], encode)
        with open_gguf(tmp_path / "x.gguf") as opened:
            for start, stop in opened["w"].slices(1 << 20):
                assert np.all(opened["w"].read(start, stop) == start)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20 < opened["w"].nbytes // 8
