"""The fuzz targets: their seeds are sound, their guards bite, and what they found stays found."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import seeds as sound
from bitsmith.archs import claim
from bitsmith.errors import BitsmithError, DamagedFileError
from bitsmith.formats.nf4 import NF4
from bitsmith.store import open_cellm, open_checkpoint, open_safetensors
from bitsmith.store.imatrix import Imatrix, read_imatrix, write_imatrix
from broken_files import STRING, U32, info, pair, text, whole
from readers import FOLDER_FILES, MODEL_FILES, READERS, FaultError, split

FUZZ = Path(__file__).parent.parent / "fuzz"
PLANTED = """
import sys, time
sys.path.insert(0, {fuzz!r})
import readers, run
from bitsmith.errors import BitsmithError

def read(path):
    data = path.read_bytes()
    if data and not data.startswith(b"1"):  # libFuzzer keeps no empty input
        {what}
    raise BitsmithError("is no such thing", path=path)

readers.READERS["planted"] = readers.Reader("planted", read)
run.HANG_SECONDS = 3
sys.exit(run.main())
"""


@pytest.mark.parametrize("name", READERS)
def test_the_seeds_of_every_reader_are_taken(tmp_path: Path, name: str) -> None:
    taken = [READERS[name](data, tmp_path) for data in sound.seeds(name)]
    assert len(taken) > 0 and all(taken[:1])
    assert taken.count(False) == (1 if name == "plan" else 0)  # one plan is another model's


@pytest.mark.parametrize("name", READERS)
def test_the_corpus_of_every_reader_is_taken_or_refused(tmp_path: Path, name: str) -> None:
    for file in sorted((FUZZ / "corpus" / name).glob("*")):
        READERS[name](file.read_bytes(), tmp_path)


@pytest.mark.parametrize(
    "said",
    ["no\nline", "names no file", "a \x1b[31m control character"],
    ids=["two lines", "no file", "control"],
)
def test_a_refusal_that_is_no_line_with_the_file_is_a_fault(tmp_path: Path, said: str) -> None:
    def read(path: Path) -> None:
        raise BitsmithError(said, path=None if said.startswith("names") else path)

    with pytest.raises(FaultError):
        type(READERS["gguf"])("planted", read)(b"", tmp_path)


def fuzzed(script: Path, reader: str, folder: Path, inputs: int) -> tuple[int, dict[str, Any]]:
    report = folder / f"{reader}.json"
    command = [sys.executable, script, reader, "--inputs", str(inputs), "--corpus", folder / reader]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONOPTIMIZE": ""}
    run = subprocess.run(
        [*map(str, command), "--json", str(report)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert report.exists(), run.stderr[-3000:]
    return run.returncode, json.loads(report.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_short_run_finds_nothing(tmp_path: Path, name: str) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this machine")
    inputs = 20_000 if READERS[name].is_binary and not READERS[name].parts else 1_000
    status, found = fuzzed(FUZZ / "run.py", name, tmp_path, inputs)
    assert status == 0 and found["faults"] == []
    assert found["inputs"] == inputs == found["taken"] + found["refused"]
    assert found["taken"] > 0 and found["edges"] > 40
    assert 0 < found["traced_bytes"] < 64 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kept"),
    [
        ("return None.shape", "crash-"),
        ("bytearray(65 << 20)", "crash-"),
        ("time.sleep(60)", "timeout-"),
        ("import os; os.abort()", "crash-"),
    ],
    ids=["exception", "memory", "hang", "abort"],
)
def test_what_is_planted_is_found(tmp_path: Path, what: str, kept: str) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this machine")
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.format(fuzz=str(FUZZ), what=what))
    status, found = fuzzed(script, "planted", tmp_path, 100_000)
    assert status == 1 and found["inputs"] < 100_000
    assert [Path(file).name.startswith(kept) for file in found["faults"]] == [True]


# What fuzzing found: one test each, named by what was wrong.


def folder_of(tmp_path: Path, packed: bytes) -> Path:
    for name, data in split(packed, FOLDER_FILES).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def read_all(folder: Path) -> int:
    """Read a first row of every tensor; return the most bytes that were held."""
    tracemalloc.start()
    try:
        with open_checkpoint(folder) as opened:
            for ref in opened.values():
                ref.read(0, min(1, ref.n_rows))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def imatrix_with(*values: bytes) -> bytes:
    tensors = [info("a.in_sum2", [4, 1]), info("a.counts", [1, 1], offset=32)]
    return whole(
        [pair("general.type", STRING, text("imatrix")), *values], tensors, np.ones(16, "<f4").tobytes()
    )


@pytest.mark.parametrize(
    "value",
    [
        pair("imatrix.datasets", 9, struct.pack("<IQ2I", U32, 2, 7, 8)),
        pair("imatrix.datasets", U32, struct.pack("<I", 7)),
        pair("imatrix.chunk_count", 5, struct.pack("<i", -1)),
        pair("imatrix.chunk_size", 7, b"\1"),
    ],
    ids=["numbers for texts", "a number for texts", "a negative count", "a flag for a size"],
)
def test_an_imatrix_of_other_metadata_is_refused(tmp_path: Path, value: bytes) -> None:
    (tmp_path / "i.gguf").write_bytes(imatrix_with(value))
    with pytest.raises(DamagedFileError, match=r"metadata 'imatrix\."):
        read_imatrix(tmp_path / "i.gguf")


def test_an_imatrix_of_a_text_whose_name_is_not_utf8_can_be_written_again(tmp_path: Path) -> None:
    name = struct.pack("<IQ", STRING, 1) + text(b"caf\xe9.txt")
    (tmp_path / "i.gguf").write_bytes(imatrix_with(pair("imatrix.datasets", 9, name)))
    found = read_imatrix(tmp_path / "i.gguf")
    assert found.datasets == ("caf�.txt",)
    write_imatrix(tmp_path / "o.gguf", Imatrix(found.entries, found.datasets))
    assert read_imatrix(tmp_path / "o.gguf").datasets == found.datasets


def cellm(tensors: list[dict[str, Any]]) -> bytes:
    header = json.dumps({"tensors": tensors}).encode()
    start = -(-(10 + len(header) + 200) // 64) * 64
    listed = [{**one, "offset_bytes": start + one["offset_bytes"]} for one in tensors]
    header = json.dumps({"tensors": listed}).encode()
    return (b"CELLM\1" + len(header).to_bytes(4, "little") + header).ljust(start, b" ") + bytes(256)


def cellm_entry(name: str, shape: list[int], dtype: str, nbytes: int = 0, at: int = 0) -> dict[str, Any]:
    return {"name": name, "offset_bytes": at, "nbytes": nbytes, "shape": shape, "dtype": dtype}


@pytest.mark.parametrize("dtype", ["f16", "f8e4m3"])
def test_an_empty_cellm_tensor_too_wide_to_shape_is_refused(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "m.cellm").write_bytes(cellm([cellm_entry("a", [0, 1 << 61], dtype)]))
    with pytest.raises(DamagedFileError, match="size overflows"):
        open_cellm(tmp_path / "m.cellm")


def test_a_cellm_matrix_without_columns_that_has_scales_is_refused(tmp_path: Path) -> None:
    tensors = [cellm_entry("a", [3, 0], "i2"), cellm_entry("a.qscale", [3, 2], "f16", 12)]
    (tmp_path / "m.cellm").write_bytes(cellm(tensors))
    with pytest.raises(DamagedFileError, match="has 2 scales for each row of 0"):
        open_cellm(tmp_path / "m.cellm")


def test_an_empty_safetensors_tensor_too_wide_to_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(sound._file({"a": ("F16", (0, 3 << 60), b"")}))
    with pytest.raises(DamagedFileError, match="size overflows"):
        open_safetensors(tmp_path / "m.safetensors")


@pytest.mark.parametrize("block", [[1, 1 << 26], [1, 1 << 40], [1 << 80, 1 << 80]])
def test_a_block_of_scales_is_no_larger_than_the_matrix(tmp_path: Path, block: list[int]) -> None:
    scales = (3, 1) if block[0] == 1 else (1, 1)
    tensors: Mapping[str, Any] = {
        "a.weight": ("F8_E4M3", (3, 4), b"\x38" * 12),
        "a.weight_scale_inv": ("F32", scales, np.full(scales, 2, "<f4").tobytes()),
    }
    settings = {"quant_method": "fp8", "weight_block_size": block}
    folder = folder_of(tmp_path, sound._quantized(settings, tensors))
    assert read_all(folder) < 1 << 20
    with open_checkpoint(folder) as opened:
        np.testing.assert_array_equal(opened["a.weight"].read(), np.full((3, 4), 2, np.float32))


def test_a_bitsandbytes_state_of_no_weights_too_wide_to_shape_is_refused(tmp_path: Path) -> None:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1 << 59, 1 << 59, 0]}
    tensors: dict[str, Any] = {
        "a.weight": ("U8", (0, 1), b""),
        "a.weight.quant_map": ("F32", (16,), np.asarray(NF4.levels, "<f4").tobytes()),
        "a.weight.absmax": ("F32", (0,), b""),
    }
    packed = sound._quantized({"quant_method": "bitsandbytes"}, tensors | sound._state(state))
    with pytest.raises(DamagedFileError, match="shape"):
        open_checkpoint(folder_of(tmp_path, packed))


def factored(form: Mapping[str, Any], tensors: Mapping[str, Any]) -> bytes:
    settings = {"quant_method": "bitsmith", "version": 1, "modules": {"a": form}}
    return sound._quantized(settings, tensors)


def train(shape: tuple[int, int], rows: list[int], columns: list[int]) -> dict[str, Any]:
    return {"form": "train", "shape": shape, "modes": [rows, columns], "ranks": [1, 1, 1, 1], "cores": "f16"}


def cores(begin: str, form: Mapping[str, Any]) -> dict[str, Any]:
    sizes = [m * n for m, n in zip(*form["modes"], strict=True)]
    shapes = [(sizes[0], 1), (sizes[1], 1), (1, sizes[2])]
    return {f"a.{begin}_core_{n}": ("F16", shape) for n, shape in enumerate(shapes)}


def test_a_small_file_makes_no_row_of_a_gigabyte(tmp_path: Path) -> None:
    blocks = {"form": "factored", "shape": [1, 1 << 26], "rest": "f16", "columns": {"size": 1, "kept": [0]}}
    with pytest.raises(DamagedFileError, match=r"not within 0\.\."):
        open_checkpoint(folder_of(tmp_path, factored(blocks, {"a.weight_rest": ("F16", (1, 1))})))


def test_a_product_of_trains_from_a_small_file_is_not_held_whole(tmp_path: Path) -> None:
    left = train((1, 1 << 10), [1, 1, 1], [8, 8, 16])
    right = train((1 << 10, 1 << 16), [8, 8, 16], [64, 32, 32])
    form = {"form": "trains", "weight_left": left, "weight_right": right}
    packed = factored(form, cores("weight_left", left) | cores("weight_right", right))
    assert len(packed) < 10_000
    assert read_all(folder_of(tmp_path, packed)) < 64 << 20


def test_a_product_of_trains_in_parts_is_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = train((8, 8), [2, 2, 2], [2, 2, 2])
    form = {"form": "trains", "weight_left": wide, "weight_right": wide}
    folder = folder_of(tmp_path, factored(form, cores("weight_left", wide) | cores("weight_right", wide)))
    with open_checkpoint(folder) as opened:
        whole_rows = opened["a.weight"].read()
    monkeypatch.setattr("bitsmith.store.factored_reader._HELD_BYTES", 3 * 4 * 8)
    monkeypatch.setattr("bitsmith.store.factored._INNER_BYTES", 1)
    with open_checkpoint(folder) as opened:
        np.testing.assert_allclose(opened["a.weight"].read(), whole_rows, rtol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("re:(a|a)*$", "takes too long to match"),
        ("re:(?:a{0,65535}){65535}", "repeats too often"),
        ("re:" + "a" * 2000, "is too long"),
    ],
)
def test_a_pattern_that_takes_for_ever_is_refused(tmp_path: Path, pattern: str, said: str) -> None:
    module = "a" * 40 + "b"
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "format": "int-quantized"}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"g": group},
    }
    tensors: Mapping[str, Any] = {
        f"{module}.weight": ("I8", (2, 64)),
        f"{module}.weight_scale": ("F32", (2, 1)),
    }
    packed = sound._quantized(settings | {"ignore": [pattern]}, tensors)
    with pytest.raises(DamagedFileError, match=said):
        open_checkpoint(folder_of(tmp_path, packed))


def test_a_refused_config_is_named_with_its_folder(tmp_path: Path) -> None:
    files = split(sound.seeds("model")[0], MODEL_FILES)
    config = json.loads(files["config.json"]) | {"num_attention_heads": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    with open_checkpoint(tmp_path) as opened, pytest.raises(BitsmithError) as caught:
        claim(opened)
    assert str(caught.value).startswith(f"{tmp_path}: config.json: num_attention_heads is None")
