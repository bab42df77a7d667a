"""The GGUF reader and writer against the `gguf` package, real ggml, and every fault a file can have."""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ggml_oracle
from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.formats import FORMATS
from bitsmith.store import TensorInfo, Typed, gguf_size_bytes, open_gguf, write_gguf
from broken_files import ARRAY, F32, Q8_0, STRING, U32, U64, info, pair, text, whole


def alignment(value: int, kind: int = U32) -> bytes:
    return whole([pair("general.alignment", kind, struct.pack("<Q" if kind == U64 else "<I", value))])


MOST = 2**64 - 1
FAULTS: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["ends at byte 0", "magic"]),
    "bad magic": (whole(magic=b"GGML"), ["GGML", "GGUF"]),
    "version 0": (whole(version=struct.pack("<I", 0)), ["version 0"]),
    "version 1": (whole(version=struct.pack("<I", 1)), ["version 1", "2 or 3"]),
    "version 4": (whole(version=struct.pack("<I", 4)), ["version 4"]),
    "big endian": (whole(version=struct.pack(">I", 3)), ["big-endian"]),
    "cut in the header": (whole()[:20], ["ends at byte 20"]),
    "2^64-1 tensors": (whole(n_tensors=MOST), [str(MOST), "tensors"]),
    "2^64-1 values": (whole(n_pairs=MOST), [str(MOST), "values"]),
    "more tensors than bytes": (whole(n_tensors=1000), ["1000 tensors"]),
    "key longer than the file": (whole([struct.pack("<Q", 60_000)]), ["60000", "key"]),
    "key of 2^64-1": (whole([struct.pack("<Q", MOST)]), [str(MOST), "key"]),
    "key of nothing": (whole([pair("", U32, bytes(4))]), ["key", "0 bytes"]),
    "key not UTF-8": (whole([text(b"\xff") + bytes(8)]), ["key", "UTF-8"]),
    "key twice": (whole([pair("a.b", U32, bytes(4))] * 2), ["'a.b'", "twice"]),
    "value type": (whole([pair("a.b", 77, bytes(4))]), ["'a.b'", "77"]),
    "string longer than the file": (
        whole([pair("a.b", STRING, struct.pack("<Q", 5000))]),
        ["'a.b'", "5000"],
    ),
    "string of 2^64-1": (whole([pair("a.b", STRING, struct.pack("<Q", MOST))]), ["'a.b'", str(MOST)]),
    "array longer than the file": (
        whole([pair("a.b", ARRAY, struct.pack("<IQ", U32, 5000))]),
        ["'a.b'", "5000"],
    ),
    "array of 2^64-1": (whole([pair("a.b", ARRAY, struct.pack("<IQ", U64, MOST))]), ["'a.b'", str(MOST)]),
    "array of 2^62 numbers": (whole([pair("a.b", ARRAY, struct.pack("<IQ", U32, 1 << 62))]), ["'a.b'"]),
    "array of 2^64-1 strings": (
        whole([pair("a.b", ARRAY, struct.pack("<IQ", STRING, MOST))]),
        ["'a.b'", str(MOST)],
    ),
    "array of strings cut": (
        whole([pair("a.b", ARRAY, struct.pack("<IQ", STRING, 2) + text("x"))], data=b"\xff" * 64),
        ["'a.b'"],
    ),
    "array of arrays": (whole([pair("a.b", ARRAY, struct.pack("<IQ", ARRAY, 1))]), ["'a.b'", "arrays"]),
    "array of an unknown type": (whole([pair("a.b", ARRAY, struct.pack("<IQ", 99, 1))]), ["'a.b'", "99"]),
    "alignment 0": (alignment(0), ["general.alignment", "UINT32 0"]),
    "alignment 48": (alignment(48), ["general.alignment", "48"]),
    "alignment 2^31": (alignment(1 << 31), ["general.alignment", str(1 << 31)]),
    "alignment of another type": (alignment(32, U64), ["general.alignment", "UINT64"]),
    "alignment an array": (
        whole([pair("general.alignment", ARRAY, struct.pack("<IQI", U32, 1, 32))]),
        ["general.alignment"],
    ),
    "part of a split": (
        whole([pair("split.count", 2, struct.pack("<H", 3))]),
        ["3 parts", "-00001-of-00003.gguf"],
    ),
    "5 dimensions": (whole(infos=[info("w", [1, 1, 1, 1, 1])]), ["tensor 'w'", "5 dimensions"]),
    "2^32-1 dimensions": (
        whole(infos=[text("w") + struct.pack("<I", 2**32 - 1)]),
        ["tensor 'w'", str(2**32 - 1)],
    ),
    "dimension 0": (whole(infos=[info("w", [0, 4])]), ["tensor 'w'", "(4, 0)"]),
    "dimension 2^63": (whole(infos=[info("w", [1 << 63])]), ["tensor 'w'", str(1 << 63)]),
    "dimensions that overflow": (whole(infos=[info("w", [1 << 40, 1 << 40])]), ["tensor 'w'", "overflow"]),
    "dimensions that overflow to 0": (whole(infos=[info("w", [1 << 32] * 4)]), ["tensor 'w'", "overflow"]),
    "name of 64 bytes": (whole(infos=[info("n" * 64, [1])]), ["name", "64 bytes", "63"]),
    "name of nothing": (whole(infos=[info("", [1]) + bytes(8)]), ["name", "0 bytes"]),
    "name with a NUL": (whole(infos=[info("a\0b", [1])]), ["name", "NUL"]),
    "name not UTF-8": (whole(infos=[info(b"\xff", [1])]), ["name", "UTF-8"]),
    "name twice": (whole(infos=[info("w", [1]), info("w", [1], offset=32)]), ["tensor 'w'", "twice"]),
    "unknown type": (whole(infos=[info("w", [32], kind=5)]), ["tensor 'w'", "ggml type 5"]),
    "type of 2^32-1": (whole(infos=[info("w", [32], kind=2**32 - 1)]), ["tensor 'w'", str(2**32 - 1)]),
    "row that cuts a block": (whole(infos=[info("w", [33, 2], Q8_0)]), ["tensor 'w'", "33", "32"]),
    "offset unaligned": (whole(infos=[info("w", [4], offset=4)]), ["tensor 'w'", "offset 4", "32"]),
    "offset past the end": (whole(infos=[info("w", [4], offset=1 << 40)]), ["tensor 'w'", "ends at"]),
    "offset that overflows": (
        whole(infos=[info("w", [4], offset=2**64 - 32)]),
        ["tensor 'w'", "ends at"],
    ),
    "region past the end": (whole(infos=[info("w", [257])]), ["tensor 'w'", "truncated", "download"]),
    "region smaller than its type": (
        whole(infos=[info("w", [32], F32, 0), info("v", [4], F32, 96)]),
        ["tensor 'w'", "'v'", "overlap"],
    ),
    "hole before the first": (whole(infos=[info("w", [4], offset=32)]), ["'w'", "32 bytes belong"]),
    "region larger than its type": (
        whole(infos=[info("w", [32], Q8_0, 0), info("v", [4], F32, 128)]),
        ["tensor 'v'", "64 bytes belong to no tensor"],
    ),
    "same region twice": (
        whole(infos=[info("w", [4]), info("v", [4])]),
        ["overlap"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_file_is_refused_before_anything_is_allocated(tmp_path: Path, fault: str) -> None:
    data, words = FAULTS[fault]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(BitsmithError) as caught:
            open_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message
    assert peak < 16 << 20


def test_the_fault_table_starts_from_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole([pair("a.b", U32, struct.pack("<I", 7))], [info("w", [4, 2])]))
    opened = open_gguf(path)
    assert opened.metadata == {"a.b": 7}
    assert opened["w"].shape == (2, 4)


def test_version_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole(infos=[info("w", [4])], version=struct.pack("<I", 2)))
    assert open_gguf(path)["w"].read().tolist() == [0, 0, 0, 0]


def test_file_changed_while_reading_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole(infos=[info("w", [256])]))
    opened = open_gguf(path)
    with path.open("r+b") as stream:
        stream.truncate(200)
    with pytest.raises(DamagedFileError, match="ends at byte 200"):
        opened["w"].read()


# ---------------------------------------------------------------- values

ROWS = 6
SIZES = {kind.name: size for kind, size in GGML_QUANT_SIZES.items() if kind.name not in ("Q8_1", "Q8_K")}


def blocks(name: str, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return rows of valid blocks: small bytes keep every float field finite."""
    weights, nbytes = SIZES[name]
    per_row = max(1, 64 // weights) * 3
    return np.random.default_rng(seed).integers(0, 0x3C, (ROWS, per_row * nbytes), dtype=np.uint8)


def stored(name: str) -> tuple[TensorInfo, np.ndarray[Any, np.dtype[np.uint8]]]:
    raw = blocks(name)
    weights, nbytes = SIZES[name]
    return TensorInfo(f"blk.0.{name}", (2, 3, raw.shape[1] // nbytes * weights), name), raw


@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_type_reads_as_the_gguf_package_decodes_it(tmp_path: Path, name: str) -> None:
    tensor, raw = stored(name)
    path = tmp_path / "model.gguf"
    write_gguf(path, {}, [tensor], lambda _: [raw[:1], raw[1:]])
    ref = open_gguf(path)[tensor.name]
    try:
        expected = dequantize(raw, GGMLQuantizationType[name]).reshape(tensor.shape)
    except NotImplementedError:
        plain = {"I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "F64": "f8"}
        if name not in plain and name not in FORMATS:
            with pytest.raises(UnsupportedError, match=name):
                ref.read()
            return
        values = raw.view(plain[name]) if name in plain else ggml_oracle.dequantize(name, raw)
        expected = values.reshape(tensor.shape)
    np.testing.assert_array_equal(ref.read(), expected)
    np.testing.assert_array_equal(ref.read(1, 2), expected[1:])
    assert ref.read(1, 1).shape == (0, *tensor.shape[1:])
    np.testing.assert_array_equal(ref.raw(1, 2), raw[3:].reshape(-1))
    assert ref.nbytes == raw.nbytes


def test_one_dimensional_blocks_are_read_at_any_place(tmp_path: Path) -> None:
    raw = blocks("Q8_0")[0]
    path = tmp_path / "model.gguf"
    weights = raw.size // 34 * 32
    write_gguf(path, {}, [TensorInfo("w", (weights,), "Q8_0")], lambda _: [raw])
    ref = open_gguf(path)["w"]
    expected = dequantize(raw, GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(ref.read(5, 77), expected[5:77])
    np.testing.assert_array_equal(ref.raw(32, 64), raw[34:68])
    with pytest.raises(BitsmithError, match=r"tensor 'w'.*cuts a block"):
        ref.raw(1, 2)


# ---------------------------------------------------------------- against the gguf package and ggml

METADATA: dict[str, Any] = {
    "general.architecture": "qwen35",
    "general.name": "Tiny — 小",
    "qwen35.block_count": 4,
    "qwen35.rope.freq_base": 1e7,
    "qwen35.flag": True,
    "qwen35.rope.dimension_sections": [11, 11, 10, 0],
    "tokenizer.ggml.tokens": ["a", "", "<|é|>", "\n"],
    "tokenizer.ggml.scores": [0.5, -1.0],
    "tokenizer.ggml.add": [True, False],
    "wide.number": Typed("UINT64", 2**63),
    "small.numbers": Typed("UINT8", [0, 255]),
    "signed": Typed("INT64", -5),
    "precise": Typed("FLOAT64", 0.1),
    "nothing": Typed("STRING", []),
}
PLAIN_METADATA = {key: value.value if isinstance(value, Typed) else value for key, value in METADATA.items()}


def some_tensors() -> tuple[list[TensorInfo], dict[str, np.ndarray[Any, Any]]]:
    arrays = {name: blocks(name, seed) for seed, name in enumerate(["F32", "BF16", "Q4_K", "Q6_K", "Q8_0"])}
    infos = [
        TensorInfo(f"blk.{name}.weight", (ROWS, raw.shape[1] // SIZES[name][1] * SIZES[name][0]), name)
        for name, raw in arrays.items()
    ]
    return infos, {tensor.name: arrays[tensor.type] for tensor in infos}


def by_rows(arrays: dict[str, Any]) -> Callable[[TensorInfo], Iterator[Any]]:
    def encode(tensor: TensorInfo) -> Iterator[Any]:
        yield from arrays[tensor.name]

    return encode


@pytest.mark.parametrize("align", [None, 8, 64, 4096])
def test_the_gguf_package_reads_what_we_wrote(tmp_path: Path, align: int | None) -> None:
    infos, arrays = some_tensors()
    metadata = METADATA if align is None else METADATA | {"general.alignment": align}
    path = tmp_path / "model.gguf"
    seen: list[tuple[str, int]] = []
    written = write_gguf(
        path,
        metadata,
        infos,
        by_rows(arrays),
        progress=lambda tensor, nbytes: seen.append((tensor.name, nbytes)),
    )
    assert written == path.stat().st_size == gguf_size_bytes(metadata, infos)
    assert sum(nbytes for _, nbytes in seen) == sum(tensor.nbytes for tensor in infos)
    reader = GGUFReader(path)
    for key, value in PLAIN_METADATA.items():
        if value != []:  # the package cannot give an empty array back
            assert reader.fields[key].contents() == value, key
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data.view(np.uint8).reshape(ROWS, -1), arrays[tensor.name])
    opened = open_gguf(path)
    assert {key: opened.metadata[key] for key in METADATA} == PLAIN_METADATA
    again = tmp_path / "again.gguf"
    write_gguf(again, opened.typed_metadata(), infos, by_rows(arrays))
    assert again.read_bytes() == path.read_bytes()


def test_we_read_what_the_gguf_package_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "qwen35")
    writer.add_uint32("a.int", 3)
    writer.add_array("a.tokens", ["x", "ÿ", ""])
    writer.add_array("a.numbers", [1, -2])
    writer.add_bool("a.flag", False)
    arrays = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "v": np.arange(5, dtype=np.float16)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = open_gguf(path)
    expected = {"a.int": 3, "a.tokens": ["x", "ÿ", ""], "a.numbers": [1, -2], "a.flag": False}
    assert {key: opened.metadata[key] for key in expected} == expected
    assert opened.value_types["a.numbers"] == "INT32"
    for name, array in arrays.items():
        np.testing.assert_array_equal(opened[name].read(), array)
    copy = tmp_path / "copy.gguf"
    infos = [TensorInfo(name, ref.shape, ref.dtype) for name, ref in opened.items()]
    write_gguf(copy, opened.typed_metadata(), infos, lambda tensor: [opened[tensor.name].raw()])
    assert copy.read_bytes() == path.read_bytes()


class _Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def _ggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the llama extra is not installed")
    library = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Params]
    for name, result in (
        ("gguf_get_n_tensors", ctypes.c_int64),
        ("gguf_get_tensor_name", ctypes.c_char_p),
        ("gguf_get_tensor_offset", ctypes.c_size_t),
        ("gguf_get_tensor_type", ctypes.c_int),
        ("gguf_get_tensor_size", ctypes.c_size_t),
        ("gguf_get_data_offset", ctypes.c_size_t),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = [ctypes.c_void_p] + [ctypes.c_int64] * ("tensor_" in name)
    library.gguf_free.argtypes = [ctypes.c_void_p]
    return library


def test_real_ggml_reads_what_we_wrote(tmp_path: Path) -> None:
    ggml = _ggml()
    infos, arrays = some_tensors()
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, infos, by_rows(arrays))
    context = ggml.gguf_init_from_file(str(path).encode(), _Params(True, None))
    assert context
    content = path.read_bytes()
    base = ggml.gguf_get_data_offset(context)
    assert ggml.gguf_get_n_tensors(context) == len(infos)
    for number, tensor in enumerate(infos):
        assert ggml.gguf_get_tensor_name(context, number).decode() == tensor.name
        assert ggml.gguf_get_tensor_type(context, number) == GGMLQuantizationType[tensor.type]
        assert ggml.gguf_get_tensor_size(context, number) == tensor.nbytes
        start = base + ggml.gguf_get_tensor_offset(context, number)
        assert content[start : start + tensor.nbytes] == arrays[tensor.name].tobytes()
    ggml.gguf_free(context)


def test_a_vocabulary_of_248k_tokens_comes_back(tmp_path: Path) -> None:
    tokens = [f"token {number} é" for number in range(248_320)]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)}
    path = tmp_path / "model.gguf"
    write_gguf(path, metadata, [], lambda _: [])
    with open_gguf(path) as opened:
        assert opened.metadata == metadata


# ---------------------------------------------------------------- properties

HERE = [HealthCheck.function_scoped_fixture]
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda key: key not in ("general.alignment", "split.count")
)
VALUES = st.one_of(
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.floats(width=32, allow_nan=False),
    st.text(max_size=20),
    st.lists(st.text(max_size=5), min_size=1, max_size=5),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5),
)
SHAPES = st.dictionaries(
    KEYS.filter(lambda key: len(key.encode()) < 64),
    st.tuples(st.lists(st.integers(1, 4), max_size=3), st.sampled_from(["F32", "F16", "Q8_0", "Q4_K", "I8"])),
    max_size=5,
)


@settings(max_examples=80, suppress_health_check=HERE, deadline=None)
@given(metadata=st.dictionaries(KEYS, VALUES, max_size=6), shapes=SHAPES, seed=st.integers(0, 99))
def test_what_is_written_is_read(tmp_path: Path, metadata: dict[str, Any], shapes: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    infos = [TensorInfo(name, (*lead, 2 * SIZES[kind][0]), kind) for name, (lead, kind) in shapes.items()]
    data = {tensor.name: rng.integers(0, 256, tensor.nbytes, dtype=np.uint8) for tensor in infos}
    path = tmp_path / "model.gguf"
    size = write_gguf(path, metadata, infos, lambda t: np.array_split(data[t.name], 3), overwrite=True)
    assert size == path.stat().st_size == gguf_size_bytes(metadata, infos)
    with open_gguf(path) as opened:
        assert opened.metadata == metadata
        assert list(opened.metadata) == list(metadata)
        assert [(name, ref.shape, ref.dtype) for name, ref in opened.items()] == [
            (tensor.name, tensor.shape, tensor.type) for tensor in infos
        ]
        for name, raw in data.items():
            np.testing.assert_array_equal(opened[name].raw(), raw)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]
