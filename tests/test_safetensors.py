"""The safetensors reader and writer against the real library, and against every fault a file can have."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from bitsmith.errors import BitsmithError, DamagedFileError, OutputError, UnsupportedError
from bitsmith.store import TensorData, open_checkpoint, open_safetensors, write_safetensors
from bitsmith.store.checkpoint import TensorRef
from broken_files import entry, packed

INDEX = "model.safetensors.index.json"


def sharded(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    """Write a sound folder of two shards, one tensor in each."""
    for number, name in ((1, "first"), (2, "second")):
        safetensors.numpy.save_file(
            {name: np.full((4, 2), number, np.float32)}, folder / f"model-{number:05}-of-00002.safetensors"
        )
    weight_map = weight_map or {
        "first": "model-00001-of-00002.safetensors",
        "second": "model-00002-of-00002.safetensors",
    }
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def chunks(ref: TensorRef, rows: int = 3) -> Iterator[Any]:
    for start in range(0, ref.n_rows, rows):
        yield ref.raw(start, min(start + rows, ref.n_rows))


# ---------------------------------------------------------------- faults of one file

HUGE = 1 << 62
FILE_FAULTS: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["0 bytes"]),
    "header longer than the file": (packed({}, length=1000), ["1000 bytes", "header"]),
    "header over 100 MB": (packed({}, length=100_000_001), ["100000001", "100000000"]),
    "header of 2^64-1": (packed({}, length=2**64 - 1), [str(2**64 - 1)]),
    "not UTF-8": (packed(b'{"\xff": 1}'), ["UTF-8"]),
    "not an object": (packed(b"[1]"), ["expected b'{'"]),
    "NUL padded": (packed(b'{"__metadata__":{}}\0\0'), ["NUL"]),
    "not JSON": (packed(b'{"a": '), ["JSON"]),
    "nested deeply": (packed(b'{"a":' + b"[" * 100_000), ["nested"]),
    "an integer of 5000 digits": (packed(b'{"a":' + b"9" * 5000 + b"}"), ["JSON"]),
    "duplicate tensor": (
        packed(b'{"w":' + json.dumps(entry("U8", [1], 0, 1)).encode() + b',"w":{}}', b"1"),
        ["'w'", "twice"],
    ),
    "duplicate inner key": (packed(b'{"w":{"dtype":"U8","dtype":"I8"}}'), ["'dtype'", "twice"]),
    "overlap": (
        packed({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
        ["tensor 'b'", "overlap"],
    ),
    "hole": (
        packed({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 6, 10)}, bytes(10)),
        ["tensor 'b'", "hole"],
    ),
    "hole at the start": (packed({"a": entry("U8", [4], 2, 6)}, bytes(6)), ["tensor 'a'", "hole"]),
    "out of the file": (packed({"a": entry("U8", [HUGE], 0, HUGE)}, b"1"), ["tensor 'a'", "download"]),
    "trailing bytes": (packed({"a": entry("U8", [4], 0, 4)}, bytes(6)), ["2 bytes belong to no tensor"]),
    "backward offsets": (packed({"a": entry("U8", [4], 4, 0)}, bytes(4)), ["tensor 'a'", "[4, 0]"]),
    "negative offsets": (packed({"a": entry("U8", [4], -4, 0)}, bytes(4)), ["tensor 'a'", "[-4, 0]"]),
    "three offsets": (
        packed({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}, bytes(4)),
        ["tensor 'a'", "data_offsets"],
    ),
    "shape against bytes": (packed({"a": entry("F32", [3], 0, 4)}, bytes(4)), ["tensor 'a'", "12", "4"]),
    "shape that overflows": (
        packed({"a": entry("F32", [HUGE, HUGE], 0, 4)}, bytes(4)),
        ["tensor 'a'", "overflow"],
    ),
    "shape that overflows to zero": (packed({"a": entry("F32", [0, HUGE, HUGE], 0, 0)}), ["'a'", "overflow"]),
    "negative dimension": (packed({"a": entry("U8", [-4, -1], 0, 4)}, bytes(4)), ["tensor 'a'", "shape"]),
    "boolean dimension": (packed({"a": entry("U8", [True], 0, 1)}, b"1"), ["tensor 'a'", "shape"]),
    "fractional dimension": (packed({"a": entry("U8", [1.0], 0, 1)}, b"1"), ["tensor 'a'", "shape"]),
    "too many dimensions": (packed({"a": entry("U8", [1] * 65, 0, 1)}, b"1"), ["tensor 'a'", "shape"]),
    "unknown dtype": (packed({"a": entry("F4", [2], 0, 1)}, b"1"), ["tensor 'a'", "F4"]),
    "dtype not a string": (packed({"a": entry(["F32"], [1], 0, 4)}, bytes(4)), ["tensor 'a'", "dtype"]),
    "entry not an object": (packed({"a": 3}), ["tensor 'a'"]),
    "extra field": (packed({"a": entry("U8", [1], 0, 1) | {"x": 1}}, b"1"), ["tensor 'a'"]),
    "bad metadata": (packed({"__metadata__": {"a": 1}}), ["__metadata__"]),
    "lone surrogate in a name": (packed({"a\ud800": entry("U8", [1], 0, 1)}, b"1"), ["Unicode"]),
    "truncated": (
        safetensors.numpy.save({"a": np.zeros((64, 64), np.float32)})[:-1],
        ["truncated", "tensor 'a'", "download"],
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_damaged_file_is_refused_before_anything_is_allocated(tmp_path: Path, fault: str) -> None:
    data, words = FILE_FAULTS[fault]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(BitsmithError) as caught:
            open_safetensors(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message
    assert peak < 32 << 20
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- faults of a folder

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _mapped(**weight_map: str) -> Callable[[Path], None]:
    return lambda folder: void(sharded(folder, weight_map))


def void(_: object) -> None:
    return None


def _without(*names: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        sharded(folder)
        for name in names:
            (folder / name).unlink()

    return build


def _twice(folder: Path) -> None:
    sharded(folder)
    safetensors.numpy.save_file({"first": np.zeros(2, np.float32)}, folder / SECOND)


def _extra(folder: Path) -> None:
    sharded(folder)
    both = {"second": np.zeros(2, np.float32), "stranger": np.zeros(2, np.float32)}
    safetensors.numpy.save_file(both, folder / SECOND)


def _leaving(folder: Path) -> None:
    sharded(folder)
    outside = folder.parent / "outside"
    outside.mkdir()
    shutil.move(folder / SECOND, outside / SECOND)
    (folder / SECOND).symlink_to(outside / SECOND)


def _leaving_config(folder: Path) -> None:
    sharded(folder)
    (folder.parent / "secret").write_text("{}")
    (folder / "config.json").symlink_to(folder.parent / "secret")


def _pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "extra.pt").write_bytes(b"\x80\x04.")


def _several(folder: Path) -> None:
    for name in ("a", "b"):
        safetensors.numpy.save_file({name: np.zeros(1, np.float32)}, folder / f"{name}.safetensors")


def _truncated(folder: Path) -> None:
    sharded(folder)
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1])


def _config(text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        sharded(folder)
        (folder / "config.json").write_text(text)

    return build


def _index(text: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        sharded(folder)
        (folder / INDEX).write_text(text)

    return build


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing shard": (_without(SECOND), [INDEX, SECOND, "download"]),
    "all shards missing": (_without(FIRST, SECOND), [INDEX, FIRST, SECOND]),
    "missing index": (_without(INDEX), [INDEX]),
    "missing index and shard": (_without(INDEX, FIRST), [INDEX, FIRST]),
    "tensor missing from its shard": (
        _mapped(first=FIRST, second=SECOND, ghost=SECOND, wraith=FIRST),
        [INDEX, "ghost", "wraith"],
    ),
    "tensor in another shard": (_mapped(first=SECOND, second=FIRST), [INDEX, "first", "second"]),
    "tensor missing from the index": (_extra, [INDEX, "stranger"]),
    "tensor in two shards": (_twice, ["'first'", FIRST, SECOND]),
    "truncated shard": (_truncated, [SECOND, "truncated", "download"]),
    "shard above the folder": (_mapped(first="../x.safetensors", second=SECOND), ["'first'", "../x.saf"]),
    "shard above, inside": (_mapped(first="a/../../x.safetensors", second=SECOND), ["'first'", "plain"]),
    "absolute shard": (_mapped(first="/etc/passwd", second=SECOND), ["'first'", "/etc/passwd"]),
    "shard on a drive": (_mapped(first="C:x.safetensors", second=SECOND), ["'first'", "C:x"]),
    "shard with a backslash": (_mapped(first="..\\x.safetensors", second=SECOND), ["'first'", "plain"]),
    "shard with a NUL": (_mapped(first="a\0b", second=SECOND), ["'first'", "plain"]),
    "shard without a name": (_mapped(first="", second=SECOND), ["'first'", "plain"]),
    "shard with an endless name": (_mapped(first="a" * 5000, second=SECOND), ["'first'", "plain"]),
    "shard that is the folder": (_mapped(first=".", second=SECOND), ["'first'", "plain"]),
    "shard not a string": (_index('{"weight_map": {"first": 3}}'), [INDEX, "'first'"]),
    "index without a map": (_index("{}"), [INDEX, "weight_map"]),
    "index with a key twice": (_index('{"weight_map": {"a": "x", "a": "y"}}'), [INDEX, "'a'", "twice"]),
    "index not JSON": (_index("{"), [INDEX, "JSON"]),
    "link out of the folder": (_leaving, [SECOND, "links out"]),
    "config linked out of the folder": (_leaving_config, ["config.json", "links out"]),
    "only pickles": (_pickles, ["pytorch_model.bin", "extra.pt", "safetensors"]),
    "several without an index": (_several, ["a.safetensors", "b.safetensors", INDEX]),
    "config not JSON": (_config("{nonsense"), ["config.json", "JSON"]),
    "config not an object": (_config("[]"), ["config.json", "object"]),
    "config with a key twice": (_config('{"a": 1, "a": 2}'), ["config.json", "'a'", "twice"]),
    "config not UTF-8": (lambda f: void((sharded(f) / "config.json").write_bytes(b"\xff{}")), ["UTF-8"]),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_damaged_folder_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    build, words = FOLDER_FAULTS[fault]
    build(folder)
    with pytest.raises(BitsmithError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_remote_code_keys_are_ignored_at_every_level(tmp_path: Path) -> None:
    config = {
        "model_type": "x",
        "auto_map": {"AutoModel": "evil.py"},
        "text_config": {"trust_remote_code": True},
    }
    (sharded(tmp_path) / "config.json").write_text(json.dumps(config))
    assert open_safetensors(tmp_path).config == {"model_type": "x", "text_config": {}}


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    safetensors.numpy.save_file({"a": np.arange(3, dtype=np.float32)}, blobs / "f00")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00")
    (blobs / "c00").write_text('{"model_type": "x"}')
    (snapshot / "config.json").symlink_to("../../blobs/c00")
    opened = open_checkpoint(snapshot)
    assert opened["a"].read().tolist() == [0, 1, 2]
    assert opened.config == {"model_type": "x"}


def test_file_changed_while_reading_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.zeros((100, 100), np.float32)}, path)
    opened = open_safetensors(path)
    with path.open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(DamagedFileError, match=r"model\.safetensors.*ends at byte 1000"):
        opened["a"].read()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_fp8_is_readable_as_bytes_and_refused_as_values(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed({"w": entry(dtype, [2, 3], 0, 6)}, bytes(range(6))))
    ref = open_safetensors(path)["w"]
    assert ref.raw(1, 2).tolist() == [3, 4, 5]
    with pytest.raises(UnsupportedError, match=r"tensor 'w'.*scales must be applied"):
        ref.read()


# ---------------------------------------------------------------- values


def test_every_bf16_and_f16_value_is_exact(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    bits = np.arange(1 << 16, dtype=np.uint16)
    header = {"b": entry("BF16", [256, 256], 0, 1 << 17), "h": entry("F16", [256, 256], 1 << 17, 1 << 18)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed(header, bits.tobytes() * 2))
    opened = open_safetensors(path)
    for name, kind in (("b", torch.bfloat16), ("h", torch.float16)):
        expected = torch.from_numpy(bits.view(np.int16)).view(kind).float().numpy().reshape(256, 256)
        found = opened[name].read()
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(opened[name].read(3, 9), expected[3:9])


DTYPES = {
    "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
ARRAYS = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda name: hnp.arrays(DTYPES[name], hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
HERE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@HERE
@given(arrays=st.dictionaries(NAMES, ARRAYS, max_size=5))
def test_reads_what_the_real_library_wrote(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays))
    with open_safetensors(path) as opened:
        assert set(opened) == set(arrays)
        for name, array in arrays.items():
            found = opened[name].read()
            assert found.shape == array.shape == opened[name].shape
            np.testing.assert_array_equal(found, array)
            assert opened[name].raw().tobytes() == array.tobytes()
            assert opened[name].nbytes == array.nbytes
            if array.ndim:
                np.testing.assert_array_equal(
                    opened[name].read(array.shape[0] // 2), array[array.shape[0] // 2 :]
                )


@HERE
@given(arrays=st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=5), shard_bytes=st.integers(1, 400))
def test_the_real_library_reads_what_we_wrote(
    tmp_path: Path, arrays: dict[str, Any], shard_bytes: int
) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "written"
    source.write_bytes(safetensors.numpy.save(arrays))
    with open_safetensors(source) as opened:
        tensors = [TensorData(name, ref.dtype, ref.shape, chunks(ref)) for name, ref in opened.items()]
        write_safetensors(target, tensors, {"model_type": "x"}, shard_bytes=shard_bytes, overwrite=True)
        digest = opened._identity == {} and {name: ref.raw().tobytes() for name, ref in opened.items()}
    found: dict[str, Any] = {}
    for path in target.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    with open_checkpoint(target) as again:
        assert {name: ref.raw().tobytes() for name, ref in again.items()} == digest
        assert again.config == {"model_type": "x"}
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- writing


def test_shards_are_sized_named_and_indexed_as_transformers_expects(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"layer.{n}.weight": rng.normal(size=(8, 16)).astype(np.float32) for n in range(5)}
    tensors = [TensorData(name, "F32", array.shape, [array[:3], array[3:]]) for name, array in arrays.items()]
    write_safetensors(
        tmp_path / "out", tensors, {"a": 1}, shard_bytes=2 * 8 * 16 * 4, files={"extra.txt": b"hi"}
    )
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "out" / shard, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            np.testing.assert_array_equal(opened.get_tensor(name), arrays[name])
    assert (tmp_path / "out" / "extra.txt").read_bytes() == b"hi"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"a": 1}


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "out", [TensorData("a", "F32", (2,), [np.ones(2, np.float32)])])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_mixed_dtypes_stay_aligned(tmp_path: Path) -> None:
    tensors = [TensorData("odd", "U8", (3,), [b"abc"]), TensorData("wide", "F64", (2,), [np.ones(2)])]
    write_safetensors(tmp_path / "out", tensors)
    opened = open_safetensors(tmp_path / "out")
    assert opened["wide"].offset % 8 == 0  # type: ignore[attr-defined]
    assert opened["odd"].raw().tobytes() == b"abc"


@pytest.mark.parametrize("given_bytes", [b"", b"1234567", b"123456789"])
def test_wrong_byte_counts_are_refused_and_leave_nothing(tmp_path: Path, given_bytes: bytes) -> None:
    tensors = [TensorData("good", "U8", (2,), [b"12"]), TensorData("bad", "F32", (2,), [given_bytes])]
    with pytest.raises(BitsmithError, match=r"tensor 'bad'.*expected 8"):
        write_safetensors(tmp_path / "out", tensors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"], ["\ud800"]])
def test_unsound_names_are_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(BitsmithError, match="tensor"):
        write_safetensors(tmp_path / "out", [TensorData(name, "U8", (1,), [b"1"]) for name in names])
    assert not list(tmp_path.iterdir())


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BitsmithError, match=r"tensor 'a'.*F4"):
        write_safetensors(tmp_path / "out", [TensorData("a", "F4", (2,), [b"1"])])


def test_overwriting_replaces_the_model_and_keeps_other_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    many = [TensorData(f"t{n}", "U8", (4,), [b"abcd"]) for n in range(3)]
    write_safetensors(out, many, shard_bytes=4)
    (out / "notes.txt").write_text("mine")
    one = [TensorData("only", "U8", (2,), [b"xy"])]
    with pytest.raises(OutputError, match="exists; pass --overwrite"):
        write_safetensors(out, one)
    assert set(open_safetensors(out)) == {"t0", "t1", "t2"}
    write_safetensors(out, one, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "notes.txt"]
    assert set(open_safetensors(out)) == {"only"}


def test_output_that_is_the_input_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    with open_safetensors(folder) as opened:
        tensors = [TensorData(name, ref.dtype, ref.shape, chunks(ref)) for name, ref in opened.items()]
        with pytest.raises(OutputError, match="is the input"):
            write_safetensors(folder, tensors, overwrite=True, sources=opened.files)
    assert set(open_safetensors(folder)) == {"first", "second"}


def test_transformers_loads_what_we_wrote(tmp_path: Path, demo_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with open_safetensors(demo_model) as opened:
        tensors = [TensorData(name, ref.dtype, ref.shape, chunks(ref, 512)) for name, ref in opened.items()]
        write_safetensors(tmp_path / "out", tensors, opened.config, shard_bytes=4_000_000)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype="float32", output_loading_info=True
        )
        assert not any(told.values())
        loaded = model.state_dict()
        for name, ref in opened.items():
            np.testing.assert_array_equal(loaded[name].float().numpy(), ref.read())
