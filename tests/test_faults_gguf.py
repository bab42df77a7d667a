"""GGUF files as the CVEs of other readers describe them: refused, and nothing of their size is allocated."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest

from bitsmith.errors import BitsmithError
from bitsmith.store import open_checkpoint
from bitsmith.store.imatrix import read_imatrix
from broken_files import ARRAY, F32, Q8_0, STRING, U32, info, pair, text, whole

BF16, Q4_0 = 30, 2
MOST = (1 << 64) - 1

CVES: dict[str, tuple[bytes, list[str]]] = {
    # ggml's parser of 2024: counts, lengths and dimensions multiplied before they were believed
    "CVE-2024-21836: n_tensors times the size of an entry wraps": (
        whole(n_tensors=(1 << 64) // 88 + 1),
        [str((1 << 64) // 88 + 1), "tensors"],
    ),
    "CVE-2024-23605: n_kv times the size of a pair wraps": (
        whole(n_pairs=(1 << 64) // 48 + 1),
        [str((1 << 64) // 48 + 1), "metadata values"],
    ),
    "CVE-2024-23496: a string's length plus one is zero": (whole([struct.pack("<Q", MOST)]), [str(MOST)]),
    "CVE-2024-23496: in a value": (whole([pair("k", STRING, struct.pack("<Q", MOST))]), ["'k'", str(MOST)]),
    "CVE-2024-21825: elements of an array times their size wrap": (
        whole([pair("k", ARRAY, struct.pack("<IQ", U32, (1 << 62) + 1))]),
        ["'k'", str((1 << 62) + 1)],
    ),
    "CVE-2024-21825: strings of an array times their size wrap": (
        whole([pair("k", ARRAY, struct.pack("<IQ", STRING, (1 << 60) + 1))]),
        ["'k'", str((1 << 60) + 1)],
    ),
    "CVE-2024-21802: more dimensions than there is room for": (
        whole(infos=[info("w", [1] * 64)]),
        ["tensor 'w'", "64 dimensions"],
    ),
    "CVE-2024-21802: dimensions whose product wraps": (
        whole(infos=[info("w", [1 << 31, 1 << 31, 1 << 2, 1])]),
        ["tensor 'w'", "overflow"],
    ),
    # the sum of the tensors' sizes wraps (2025), and with what is allocated beside them (2026)
    "CVE-2025-53630: sizes add up to 2^64 and a little": (
        whole(infos=[info("a", [1 << 61]), info("b", [1 << 61], offset=1 << 63), info("c", [8], offset=0)]),
        ["tensor 'a'", "overflow"],
    ),
    "CVE-2026-27940: sizes that with the entries' own add up to 2^64": (
        whole(infos=[info("a", [(1 << 61) - 32]), info("b", [(1 << 61) - 512], offset=(1 << 63) - 128)]),
        ["tensor 'a'", "truncated"],
    ),
    "CVE-2026-33298: rows times their stride wrap": (
        whole(infos=[info("w", [1 << 20, (1 << 42) + 1])]),
        ["tensor 'w'", "overflow"],
    ),
    "padding of 2^64-4 bytes wraps": (
        whole(infos=[info("a", [(1 << 62) - 1]), info("b", [8])]),
        ["tensor 'a'", "overflow"],
    ),
    "a row of blocks wraps before it is divided": (
        whole(infos=[info("w", [5124095576030431008], Q4_0)]),
        ["tensor 'w'", "truncated"],
    ),
    # Ollama read what the header promised, beyond the end of the file
    "CVE-2026-7482: a tensor larger than the file": (
        whole(infos=[info("w", [1 << 20, 4], BF16)]),
        ["tensor 'w'", "truncated"],
    ),
    "CVE-2026-7482: an offset beyond the file": (
        whole(infos=[info("w", [4], F32, 1 << 20)]),
        ["tensor 'w'", "ends at"],
    ),
    "a type whose blocks need more than the region has": (
        whole(infos=[info("w", [64], F32, 0), info("v", [32], Q8_0, 64)]),
        ["tensor 'w'", "'v'", "overlap"],
    ),
    "alignment of 2^31": (
        whole([pair("general.alignment", U32, struct.pack("<I", 1 << 31))]),
        ["general.alignment", str(1 << 31)],
    ),
    "a name without an end": (whole(infos=[text("n" * 10_000)]), ["name", "10000 bytes"]),
}  # fmt: skip


@pytest.mark.parametrize("described", CVES)
def test_what_broke_other_readers_is_refused(described: str, tmp_path: Path) -> None:
    content, words = CVES[described]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for open_it in (open_checkpoint, read_imatrix):
        tracemalloc.start()
        try:
            with pytest.raises(BitsmithError) as caught:
                open_it(path)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        message = str(caught.value)
        assert message.startswith(str(path)) and "\n" not in message
        assert all(word in message for word in words), message
        assert peak_bytes < 4 << 20
