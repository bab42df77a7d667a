"""llama.cpp's imatrix: read and written in both layouts, refused where broken, equal to llama-imatrix's."""

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.lab.corpus import write_held_out_text
from bitsmith.run.calibrate import calibrate
from bitsmith.run.execute import compress
from bitsmith.run.moments import model_specs
from bitsmith.store import open_checkpoint
from bitsmith.store.imatrix import Imatrix, read_imatrix, write_imatrix
from bitsmith.store.statistics import open_statistics
from ggml_oracle import library

RNG = np.random.default_rng(0)
SUMS = {name: RNG.random(n).astype(np.float32) * 1e3 for name, n in (("blk.0.b", 8), ("blk.0.a", 5))}
WRITTEN = Imatrix({name: (sums, 1024.0) for name, sums in SUMS.items()}, ("text.txt",), 2, 512)


def test_the_gguf_is_what_llama_imatrix_writes(tmp_path: Path) -> None:
    """Keys, names and shapes as in llama.cpp's IMatrixCollector::save_imatrix."""
    path = tmp_path / "i.gguf"
    write_imatrix(path, WRITTEN)
    reader = GGUFReader(path)
    found = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert found == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    names = [f"blk.0.{letter}.{what}" for letter in "ab" for what in ("in_sum2", "counts")]
    assert [tensor.name for tensor in reader.tensors] == names
    for tensor in reader.tensors:
        name, _, what = tensor.name.rpartition(".")
        expected = SUMS[name] if what == "in_sum2" else np.array([1024], np.float32)
        assert tensor.tensor_type.name == "F32" and tensor.shape.tolist() == [len(expected), 1]
        np.testing.assert_array_equal(tensor.data.reshape(-1), expected)


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def test_real_ggml_reads_the_gguf(tmp_path: Path) -> None:
    path, lib = tmp_path / "i.gguf", library()
    write_imatrix(path, WRITTEN)
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    opened = lib.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    assert opened
    count, find, value = lib.gguf_get_n_tensors, lib.gguf_find_key, lib.gguf_get_val_u32
    count.restype, count.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    find.restype, find.argtypes = ctypes.c_int64, [ctypes.c_void_p, ctypes.c_char_p]
    value.restype, value.argtypes = ctypes.c_uint32, [ctypes.c_void_p, ctypes.c_int64]
    assert count(opened) == 4
    assert value(opened, find(opened, b"imatrix.chunk_count")) == 2
    assert value(opened, find(opened, b"imatrix.chunk_size")) == 512
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    lib.gguf_free(opened)


def legacy(entries: dict[str, tuple[int, np.ndarray]], chunks: int = 2, text: bytes | None = b"t") -> bytes:
    """Bytes of a legacy file: per entry its name, the chunks counted, and mean squares times the chunks."""
    out = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        out += values.astype("<f4").tobytes()
    return out if text is None else out + struct.pack("<ii", chunks, len(text)) + text


def test_the_legacy_layout_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    write_imatrix(path, WRITTEN)
    means = {name: (2, SUMS[name].astype(np.float64) / 1024 * 2) for name in sorted(SUMS)}
    assert path.read_bytes() == legacy(means, text=b"text.txt")


@pytest.mark.parametrize("tail", [b"t", b"", None])
def test_theirs_in_the_legacy_layout_is_read(tmp_path: Path, tail: bytes | None) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy({"blk.0.a": (3, np.array([3, 6, 0]))}, text=tail))
    found = read_imatrix(path)
    sums, count = found.entries["blk.0.a"]
    np.testing.assert_allclose(sums / count, [1, 2, 0])
    assert found.datasets == ((tail.decode(),) if tail else ()) and found.chunks == (0 if tail is None else 2)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    for name in ("i.gguf", "i.dat"):
        write_imatrix(tmp_path / name, WRITTEN)
        found = read_imatrix(tmp_path / name)
        assert (found.datasets, found.chunks, found.chunk_tokens) == (("text.txt",), 2, 512)
        assert found.entries.keys() == SUMS.keys() and len(found.sha256) == 64
        for key, (sums, count) in found.entries.items():
            assert count == 1024
            np.testing.assert_allclose(sums, SUMS[key], rtol=2e-7)
        with pytest.raises(OutputError, match="--overwrite"):
            write_imatrix(tmp_path / name, WRITTEN)


def gguf_imatrix(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = GGUFWriter(path, "imatrix")
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.in_sum2": np.ones(8, np.float32)}, "'a': has sums but no counts"),
        ({"a.counts": ONE}, "no tensor ends in .in_sum2"),
        ({"a.in_sum2": np.ones(8, np.float16), "a.counts": ONE}, "F16 and F32"),
    ],
)
def test_a_broken_gguf_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    path = gguf_imatrix(tmp_path / "i.gguf", tensors)
    with pytest.raises(BitsmithError, match=message) as caught:
        read_imatrix(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_legacy_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = legacy({"blk.0.a": (3, np.ones(4)), "blk.0.b": (3, np.ones(2))})
    without_tail = len(whole) - 9
    for length in set(range(len(whole))) - {without_tail}:
        path = tmp_path / "i.dat"
        path.write_bytes(whole[:length])
        with pytest.raises(BitsmithError, match=r"i\.dat"):
            read_imatrix(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no imatrix at all", "the number of entries at byte 0"),
        (struct.pack("<i", 0), "expected 1 to"),
        (struct.pack("<ii", 1, 1 << 30), "a name's length at byte 4"),
        (struct.pack("<ii", 1, -5), "a name's length at byte 4 is -5"),
        (legacy({"a": (1, np.ones(2))})[:13] + struct.pack("<i", 1 << 30), "values at byte 17 needs"),
        (legacy({"a": (-1, np.ones(2))}), "a count of chunks at byte 9 is -1"),
        (struct.pack("<i", 2) + 2 * legacy({"a": (1, np.ones(1))}, text=None)[4:], "'a' twice"),
        (struct.pack("<ii", 1, 2) + b"\xff\xfe", "a name is not UTF-8"),
    ],
)
def test_a_broken_legacy_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    with pytest.raises(BitsmithError, match=message) as caught:
        read_imatrix(path)
    assert "\n" not in str(caught.value)


def specs_of(model: Path) -> list[TensorSpec]:
    with open_checkpoint(model) as checkpoint:
        return model_specs(checkpoint)


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_entries_are_held_against_the_model(tiny_qwen3: Path, tmp_path: Path, suffix: str) -> None:
    specs, path = specs_of(tiny_qwen3), tmp_path / f"i{suffix}"
    good = {"blk.1.attn_k.weight": (np.full(256, 512, np.float32), 256.0)}
    write_imatrix(path, Imatrix(good))
    statistics = open_statistics(path, specs)
    [k] = [spec for spec in specs if spec.gguf_name == "blk.1.attn_k.weight"]
    np.testing.assert_array_equal(statistics.of(k).diagonal, np.full(256, 2, np.float32))
    assert sum(statistics.of(spec) is not None for spec in specs) == 1 and statistics.tokens() is None
    for name, width, message in (
        ("blk.1.attn_k.weight", 255, "'blk.1.attn_k.weight': holds 255 sums, expected 256; no entry"),
        ("blk.7.attn_k.weight", 256, "'blk.7.attn_k.weight': is no matrix of this model"),
        ("blk.1.attn_norm.weight", 256, "is no matrix of this model"),
    ):
        write_imatrix(path, Imatrix({name: (np.ones(width, np.float32), 1.0)}), overwrite=True)
        with pytest.raises(BitsmithError, match=message):
            open_statistics(path, specs)
    with pytest.raises(BitsmithError, match="no statistics of this model"):
        open_statistics(path, specs, partial=True)


def tool(name: str) -> str:
    """Path of a llama.cpp tool in the folder BITSMITH_LLAMA_BIN or on the PATH; skips where there is none."""
    folder = os.environ.get("BITSMITH_LLAMA_BIN")
    found = shutil.which(name, path=folder) if folder else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: set BITSMITH_LLAMA_BIN to a folder of llama.cpp's tools")
    return found


def ran(*arguments: object) -> str:
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=True, timeout=280)
    return done.stdout + done.stderr


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_values_agree_with_llama_imatrix_on_the_same_tokens(
    demo_model: Path, tmp_path: Path, suffix: str
) -> None:
    # four chunks: llama-imatrix splits three so that it leaves out the last tokens, a batch of fewer than 16
    llama_imatrix = tool("llama-imatrix")
    text = tmp_path / "text.txt"
    write_held_out_text(text, limit_bytes=12_000)
    compress(demo_model, tmp_path / "m.gguf", "F32")
    theirs, ours = tmp_path / f"theirs{suffix}", tmp_path / f"ours{suffix}"
    options = ["-c", 512, "--chunks", 4, "--process-output", "--no-ppl", "-t", 1, "--no-repack"]
    ran(
        llama_imatrix,
        "-m",
        tmp_path / "m.gguf",
        "-f",
        text,
        "-o",
        theirs,
        "--output-format",
        suffix[1:],
        *options,
    )
    calibrate(demo_model, text, ours, chunks=4)
    one, other = read_imatrix(ours), read_imatrix(theirs)
    assert one.entries.keys() == other.entries.keys() and len(one.entries) == 32
    assert (one.chunks, one.chunk_tokens) == (other.chunks, other.chunk_tokens) == (4, 512)
    for name, (sums, count) in one.entries.items():
        assert count == other.entries[name][1]
        np.testing.assert_allclose(sums, other.entries[name][0], rtol=5e-3)  # llama.cpp's KV cache is F16
    assert open_statistics(theirs, specs_of(demo_model)).chunks == 4


@pytest.mark.parametrize("name", ["tiny_qwen3_5", "tiny_qwen3_5_tied"])
@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_llama_quantize_takes_every_entry(
    name: str, suffix: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """MTP tensors, the head and the tied embedding too, which llama-imatrix itself never covers."""
    llama_quantize, folder = tool("llama-quantize"), request.getfixturevalue(name)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 60)
    imatrix, model = tmp_path / f"i{suffix}", tmp_path / "m.gguf"
    calibrate(folder, text, imatrix, ctx_tokens=70, chunks=2)
    compress(folder, model, "F32")
    said = ran(llama_quantize, "--imatrix", imatrix, model, tmp_path / "q.gguf", "IQ4_XS", 1)
    assert f"have {len(read_imatrix(imatrix).entries)} importance matrix entries" in said
    absent = [line.split()[-1] for line in said.splitlines() if "did not find weights for" in line]
    assert absent == ([] if name.endswith("tied") else ["token_embd.weight"])
