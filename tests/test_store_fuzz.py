"""Sound files broken at random open or are refused in one line, and never take much memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.store import Checkpoint, open_gguf, open_safetensors
from broken_files import ARRAY, F32, Q8_0, STRING, U32, entry, info, mutations, packed, pair, text, whole

SOUND_GGUF = whole(
    [
        pair("general.alignment", U32, struct.pack("<I", 32)),
        pair("a.tokens", ARRAY, struct.pack("<IQ", STRING, 3) + text("x") + text("yy") + text("")),
        pair("a.types", ARRAY, struct.pack("<IQ3i", 5, 3, 1, 2, 3)),
    ],
    [info("w", [32, 3], Q8_0), info("v", [4], F32, 128), info("u", [], F32, 160)],
    bytes(192),
)
SOUND_SAFETENSORS = packed(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("BF16", [4, 6], 0, 48),
        "b.weight": entry("F32", [3], 48, 60),
        "c": entry("I64", [], 60, 68),
    },
    bytes(range(68)),
)
GGUF_TOKENS = [struct.pack("<Q", number) for number in (0, 1, 1 << 31, 1 << 62, 1 << 63, 2**64 - 1)]
SAFETENSORS_TOKENS = [b"9" * 19, b"-1", b"1e9", b"[", b"{", b"null", b'"', b"\\ud800", b"F8_E4M3", b"\0"]
FUZZ = settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    database=None,
)


def open_or_refuse(path: Path, content: bytes, opener: Callable[[Path], Checkpoint]) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    try:
        opened = opener(path)
    except BitsmithError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20
    with opened, np.errstate(all="ignore"):  # any bytes are floats, and some of those overflow
        for ref in opened.values():
            assert ref.raw().size == ref.nbytes <= len(content)
            try:
                assert ref.read().shape == ref.shape
            except UnsupportedError as error:
                assert ref.name in str(error) or ref.dtype in str(error)


@pytest.mark.parametrize(
    ("opener", "sound"), [(open_gguf, SOUND_GGUF), (open_safetensors, SOUND_SAFETENSORS)]
)
def test_the_file_to_break_is_sound(
    tmp_path: Path, opener: Callable[[Path], Checkpoint], sound: bytes
) -> None:
    (tmp_path / "model").write_bytes(sound)
    assert len(opener(tmp_path / "model")) == 3


@FUZZ
@given(content=mutations(SOUND_GGUF, GGUF_TOKENS))
def test_a_broken_gguf_opens_or_is_refused(tmp_path: Path, content: bytes) -> None:
    open_or_refuse(tmp_path / "model.gguf", content, open_gguf)


@FUZZ
@given(content=mutations(SOUND_SAFETENSORS, SAFETENSORS_TOKENS))
def test_a_broken_safetensors_opens_or_is_refused(tmp_path: Path, content: bytes) -> None:
    open_or_refuse(tmp_path / "model.safetensors", content, open_safetensors)
