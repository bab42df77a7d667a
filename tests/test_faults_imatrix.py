"""Rows of an imatrix that cannot weigh anything: left out with a warning, their tensors rounded plainly."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError
from bitsmith.formats import FORMATS
from bitsmith.run.cellm import write_cellm
from bitsmith.run.execute import Record, compress
from bitsmith.run.folder import write_folder
from bitsmith.run.moments import export_imatrix, model_specs
from bitsmith.store import TensorInfo, open_checkpoint, open_gguf, write_gguf
from bitsmith.store.imatrix import read_imatrix
from bitsmith.store.statistics import open_statistics

K, Q, GATE = (f"blk.1.{name}.weight" for name in ("attn_k", "attn_q", "ffn_gate"))
WIDTH = 256
ONES = np.ones(WIDTH, np.float32)


def at(index: int, value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    row = ONES.copy()
    row[index] = value
    return row


WHAT = "expected a finite one of at least 0"
FAULTS: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], str]] = {
    "nan": (at(3, np.nan), np.ones(1), f"sum of squares nan at column 3, {WHAT}"),
    "inf": (at(0, np.inf), np.ones(1), f"sum of squares inf at column 0, {WHAT}"),
    "negative": (at(255, -1), np.ones(1), f"sum of squares -1.0 at column 255, {WHAT}"),
    "zero": (0 * ONES, np.ones(1), "the sums of all its 256 columns are zero"),
    "no tokens": (ONES, np.zeros(1), "no token was counted"),
    "negative count": (ONES, -np.ones(1), "counts -1.0 tokens"),
    "nan count": (ONES, np.full(1, np.nan), "counts nan tokens"),
    "narrow": (ONES[:255], np.ones(1), "holds 255 sums, expected 256"),
    "wide": (np.ones(512, np.float32), np.ones(1), "holds 512 sums, expected 256"),
    "experts": (np.ones((4, WIDTH)), np.ones((4, 1)), "holds 1024 sums and 4 counts, expected one matrix's"),
    "two rows": (np.ones((2, WIDTH)), np.ones(1), "holds 512 sums and 1 counts, expected one matrix's"),
}  # fmt: skip


def imatrix(path: Path, entries: dict[str, tuple[Any, Any]]) -> Path:
    """Write an imatrix GGUF with any values and shapes."""
    tensors = {}
    for name, (sums, counts) in entries.items():
        tensors[f"{name}.in_sum2"] = np.asarray(sums, np.float32)
        tensors[f"{name}.counts"] = np.asarray(counts, np.float32)
    infos = [TensorInfo(name, array.shape, "F32") for name, array in tensors.items()]
    write_gguf(path, {"general.type": "imatrix"}, infos, lambda info: [tensors[info.name]])
    return path


def specs_of(model: Path) -> list[TensorSpec]:
    with open_checkpoint(model) as checkpoint:
        return model_specs(checkpoint)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_of_no_use_is_left_out_with_a_warning_that_names_it(
    fault: str, tiny_qwen3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sums, counts, why = FAULTS[fault]
    path = imatrix(tmp_path / "i.gguf", {K: (sums, counts), Q: (ONES, np.ones(1))})
    specs = specs_of(tiny_qwen3)
    with caplog.at_level(logging.WARNING, "bitsmith"):
        statistics = open_statistics(path, specs)
        open_statistics(path, specs)
    note = f"{K}: {why}; left out, so it is rounded as without statistics"
    assert statistics.notes == (note,)
    assert [record.getMessage() for record in caplog.records] == [f"{path}: {note}"]
    assert [spec.gguf_name for spec in specs if statistics.of(spec) is not None] == [Q]


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_file_without_any_row_of_use_is_refused(fault: str, tiny_qwen3: Path, tmp_path: Path) -> None:
    sums, counts, why = FAULTS[fault]
    path = imatrix(tmp_path / "i.gguf", {K: (sums, counts)})
    with pytest.raises(BitsmithError) as caught:
        open_statistics(path, specs_of(tiny_qwen3))
    assert str(caught.value) == f"{path}: tensor '{K}': {why}; no entry of the file is of use"


@pytest.mark.parametrize(("value", "said"), [(np.nan, "nan at column 1"), (3e38, "inf at column 1")])
def test_rows_of_the_legacy_layout_are_left_out_too(value: float, said: str, tmp_path: Path) -> None:
    rows = {b"a": np.array([1, value], "<f4"), b"b": np.ones(2, "<f4")}
    content = struct.pack("<i", len(rows))
    for name, values in rows.items():
        content += struct.pack("<i", len(name)) + name + struct.pack("<ii", 1, len(values)) + values.tobytes()
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    found = read_imatrix(path)
    assert list(found.entries) == ["b"]
    assert list(found.left_out) == ["a"] and said in found.left_out["a"]


def blocks(path: Path, name: str) -> bytes:
    with open_gguf(path) as opened:
        return opened[name].raw().tobytes()


def compressed(model: Path, out: Path, path: Path | None) -> Record:
    return compress(model, out, "Q4_K_S", statistics=path)


def test_its_tensor_is_rounded_as_without_statistics(tiny_qwen3: Path, tmp_path: Path) -> None:
    uneven = np.linspace(0, 100, WIDTH, dtype=np.float32) ** 2
    entries = {K: (at(3, np.nan), [1]), Q: (uneven, [1]), GATE: (0 * ONES, [1])}
    path = imatrix(tmp_path / "i.gguf", entries)
    record = compressed(tiny_qwen3, tmp_path / "guided.gguf", path)
    compressed(tiny_qwen3, tmp_path / "plain.gguf", None)
    same = {n: blocks(tmp_path / "guided.gguf", n) == blocks(tmp_path / "plain.gguf", n) for n in entries}
    assert same == {K: True, Q: False, GATE: True}
    assert [note.partition(":")[0] for note in record.to_json()["plan"]["notes"]] == [K, GATE]
    rounders = {written.gguf_name: written.rounding.rounder for written in record.tensors}
    assert (rounders[K], rounders[Q], rounders[GATE]) == ("nearest", "weighted", "nearest")


@pytest.mark.slow
def test_packed_outputs_and_conversions_warn_as_well(
    tiny_qwen3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    makers: list[Any] = [
        lambda path: write_cellm(tiny_qwen3, tmp_path / "x.cellm", "i4", statistics=path),
        lambda path: write_folder(tiny_qwen3, tmp_path / "folder", "W4A16", statistics=path),
        lambda path: export_imatrix(tiny_qwen3, path, tmp_path / "converted.dat"),
    ]
    for number, make in enumerate(makers):
        path = imatrix(tmp_path / f"{number}.gguf", {K: (0 * ONES, [1]), Q: (ONES, [1])})
        with caplog.at_level(logging.WARNING, "bitsmith"):
            make(path)
        [said] = [record.getMessage() for record in caplog.records]
        assert str(path) in said and K in said
        caplog.clear()
    assert list(read_imatrix(tmp_path / "converted.dat").entries) == [Q]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_columns_that_nothing_entered_are_rounded_plainly(name: str) -> None:
    """Blocks whose columns all weigh nothing are rounded about as well as without weights."""
    rows = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    importance = np.concatenate([np.zeros(256), np.ones(256)]).astype(np.float32)
    form = FORMATS[name]
    guided, plain = (form.decode(form.encode(rows, weights)) for weights in (importance, None))
    errors = [float(((found - rows)[:, :256] ** 2).sum()) for found in (guided, plain)]
    assert np.isfinite(guided).all()
    assert errors[0] <= 1.1 * errors[1]
