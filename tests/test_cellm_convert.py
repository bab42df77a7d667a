"""Conversions to `.cellm`: an independent reader finds what was written, and cellm's choice of tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bitsmith.archs import claim
from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError, DamagedFileError, OutputError, UnsupportedError
from bitsmith.formats.integer import GRIDS
from bitsmith.lab.synth import synth_tensors
from bitsmith.run.calibrate import calibrate
from bitsmith.run.cellm import CellmRecord, is_selected, write_cellm
from bitsmith.store import TensorData, open_cellm, open_checkpoint, write_safetensors


def read_independently(
    path: Path, group: int | None = None
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Parse a .cellm file knowing its description alone."""
    blob = path.read_bytes()
    assert blob[:6] == b"CELLM\x01"
    (length,) = struct.unpack("<I", blob[6:10])
    header = json.loads(blob[10 : 10 + length])
    stored = {one["name"]: one for one in header["tensors"]}
    assert list(stored) == sorted(stored)
    end, found = 10 + length, {}
    for one in stored.values():
        start = one["offset_bytes"]
        assert start % 64 == 0 and 0 <= start - end < 64 and not any(blob[end:start])
        end = start + one["nbytes"]
    assert end == len(blob)

    def halves(one: dict[str, Any]) -> NDArray[Any]:
        raw = blob[one["offset_bytes"] : one["offset_bytes"] + one["nbytes"]]
        return np.array(struct.unpack(f"<{len(raw) // 2}e", raw), np.float32).reshape(one["shape"])

    for name, one in stored.items():
        raw = blob[one["offset_bytes"] : one["offset_bytes"] + one["nbytes"]]
        if name.endswith(".qscale"):
            continue
        if one["dtype"] == "f16":
            found[name] = halves(one)
            continue
        (rows, columns), levels = one["shape"], np.empty(one["shape"], np.float32)
        each, scales = len(raw) // rows, np.empty(one["shape"], np.float32)
        for r in range(rows):
            row = raw[r * each : (r + 1) * each]
            for j in range(columns):
                if one["dtype"] == "i8":
                    levels[r, j] = row[j] - 256 * (row[j] > 127)
                elif one["dtype"] == "i4":
                    levels[r, j] = (row[j // 2] >> 4 * (j % 2) & 15) - 8
                elif one["dtype"] == "i2":
                    levels[r, j] = (-1.5, -0.5, 0.5, 1.5)[row[j // 4] >> 2 * (j % 4) & 3]
                else:
                    block = row[j // 128 * 18 :]
                    levels[r, j] = 1 if block[2 + j % 128 // 8] >> j % 8 & 1 else -1
                    (scales[r, j],) = struct.unpack("<e", block[:2])
        if name + ".qscale" in stored:
            per_row = halves(stored[name + ".qscale"]).reshape(rows, -1)
            scales = np.repeat(per_row, group or columns, axis=1)[:, :columns]
        found[name] = levels * scales
    return header, found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer in a few kilobytes: odd columns, ragged groups, every dtype that is copied."""
    rng = np.random.default_rng(0)
    shapes = {
        "lm_head.weight": (6, 130),
        "model.embed_tokens.weight": (6, 130),
        "model.layers.0.mlp.up_proj.weight": (5, 33),
        "model.layers.0.linear_attn.in_proj_qkv.weight": (4, 130),
        "model.layers.0.linear_attn.conv1d.weight": (4, 1, 4),
        "model.layers.0.input_layernorm.weight": (33,),
        "model.layers.0.linear_attn.A_log": (),
        "model.visual.blocks.0.mlp.linear_fc1.weight": (3, 7),
        "mtp.layers.0.self_attn.q_proj.weight": (3, 8),
    }
    config = {
        "architectures": ["X"], "model_type": "x", "dtype": "float32", "vocab_size": 6, "hidden_size": 130,
        "intermediate_size": 33, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e7}, "eos_token_id": [4, 5],
    }  # fmt: skip
    data = []
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        data.append(TensorData(name, "F32", shape, [values]))
    folder = tmp_path_factory.mktemp("small") / "model"
    write_safetensors(folder, data, config)
    return folder


def expected(model: Path, record: CellmRecord) -> dict[str, NDArray[Any]]:
    """What the file must hold: the source through the grid that the record names, or float16."""
    found: dict[str, NDArray[Any]] = {}
    with open_checkpoint(model) as source:
        for one in record.tensors:
            rows = source[one.name].read()
            grid = None if one.grid is None else GRIDS[one.grid]
            plain = rows.astype(np.float16).astype(np.float32)
            found[one.name] = plain if grid is None else grid.dequantize(grid.quantize(rows))
    return found


@pytest.mark.parametrize("like_seed", [True, False])
@pytest.mark.parametrize(
    ("kind", "group"), [("f16", None), ("i8", None), ("i4", None), ("i4", 32), ("i2", None), ("q1", None)]
)
def test_an_independent_reader_finds_what_was_written(
    small: Path, tmp_path: Path, kind: str, group: int | None, like_seed: bool
) -> None:
    out = tmp_path / "out.cellm"
    record = write_cellm(small, out, kind, like_seed=like_seed, group=group)
    header, found = read_independently(out, group)
    wanted = expected(small, record)
    assert found.keys() == wanted.keys()
    assert record.file_bytes == out.stat().st_size
    with open_checkpoint(out) as opened:
        for name, values in wanted.items():
            assert np.array_equal(found[name], values), name
            assert np.array_equal(opened[name].read(), values), name
        assert sum(ref.nbytes for ref in opened.values()) == sum(one.nbytes for one in record.tensors)
    assert (header["rope_theta"], header["eos_token_id"], header["head_dim"]) == (1e7, 4, None)
    assert header["source_text_config"]["num_hidden_layers"] == 1
    assert (header["vision_tensor_prefix"], header["source_torch_dtype"]) == (
        (None, None) if like_seed else ("model.visual.", "float32")
    )


def quantized(record: CellmRecord) -> set[str]:
    return {one.name.removeprefix("model.").removesuffix(".weight") for one in record.tensors if one.grid}


def test_tensors_are_selected_as_cellm_does(small: Path, tmp_path: Path) -> None:
    def chosen(kind: str, **options: Any) -> set[str]:
        return quantized(write_cellm(small, tmp_path / "x.cellm", kind, overwrite=True, **options))

    outer, mlp, delta = (
        {"lm_head", "embed_tokens"},
        "layers.0.mlp.up_proj",
        "layers.0.linear_attn.in_proj_qkv",
    )
    aside = {"visual.blocks.0.mlp.linear_fc1", "mtp.layers.0.self_attn.q_proj"}
    assert chosen("i8", like_seed=True) == {*outer, mlp}
    assert chosen("i4", like_seed=True) == {*outer, mlp, *aside}
    assert chosen("i4", like_seed=True, group=128) == {mlp, delta, *aside}
    assert chosen("i2", like_seed=True) == {mlp, delta}
    assert chosen("q1", like_seed=True) == {*outer, mlp, delta, *aside}
    assert chosen("i2") == {*outer, mlp, delta}
    assert chosen("i2", selection="layers") == {mlp, delta}
    assert chosen("f16") == set()


@pytest.mark.parametrize(
    ("kind", "mebibytes"), [("f16", 1666.0), ("i4", 755.0), ("i2", 836.2), ("q1", 199.7)]
)
def test_the_seed_table_sizes_of_qwen3_5_0_8b(kind: str, mebibytes: float) -> None:
    """The published files' sizes, to the digit, from shapes alone (the header adds less than 0.1 MiB)."""
    grid = None if kind == "f16" else GRIDS["cellm-q1_0_g128" if kind == "q1" else f"cellm-{kind}"]
    total = 0
    for name, ref in synth_tensors(published_config("0.8B")).items():
        chosen = grid is not None and is_selected("cellm", grid, name, ref.shape)
        total += ref.shape[0] * grid.row_bytes(ref.shape[1]) if chosen and grid is not None else 2 * ref.size
    assert total / 2**20 == pytest.approx(mebibytes, abs=0.06)


def test_better_scales_at_equal_bytes(tiny_qwen3_5: Path, tmp_path: Path) -> None:
    seed = write_cellm(tiny_qwen3_5, tmp_path / "seed.cellm", "i2", like_seed=True)
    ours = write_cellm(tiny_qwen3_5, tmp_path / "ours.cellm", "i2", selection="cellm")
    assert [one.nbytes for one in seed.tensors] == [one.nbytes for one in ours.tensors]
    for theirs, better in zip(seed.tensors, ours.tensors, strict=True):
        assert (theirs.grid, better.grid) in ((None, None), ("cellm-i2", "int2"))
        assert better.grid is None or better.relative_error < 0.5 * theirs.relative_error


def test_a_cellm_file_is_a_checkpoint_of_its_model(tiny_qwen3_5: Path, tmp_path: Path) -> None:
    write_cellm(tiny_qwen3_5, tmp_path / "x.cellm", "i8")
    with open_checkpoint(tiny_qwen3_5) as source, open_checkpoint(tmp_path / "x.cellm") as opened:
        assert opened.config["text_config"] == source.config["text_config"]
        names = [spec.name for spec, _ in claim(opened)]
        assert names == [spec.name for spec, _ in claim(source)]


def test_float16_cellm_is_quantized_again(tiny_qwen3: Path, tmp_path: Path) -> None:
    write_cellm(tiny_qwen3, tmp_path / "f16.cellm", "f16")
    write_cellm(tmp_path / "f16.cellm", tmp_path / "again.cellm", "i4", like_seed=True)
    write_cellm(tiny_qwen3, tmp_path / "direct.cellm", "i4", like_seed=True)
    again, direct = (open_cellm(tmp_path / f"{name}.cellm") for name in ("again", "direct"))
    assert again.keys() == direct.keys()
    for name, ref in again.items():
        assert np.array_equal(ref.raw(), direct[name].raw()), name


def test_statistics_guide_the_codes(tiny_qwen3: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
    calibrate(tiny_qwen3, tmp_path / "text.txt", tmp_path / "stats", ctx_tokens=64, chunks=8, saliency=False)
    held = {}
    for rounder in ("nearest", "weighted", "gptq"):
        out = tmp_path / f"{rounder}.cellm"
        record = write_cellm(
            tiny_qwen3, out, "i2", selection="layers", statistics=tmp_path / "stats", rounder=rounder
        )
        coded = [one for one in record.tensors if one.grid]
        assert {one.rounder for one in coded} == {rounder}
        held[rounder] = np.mean([one.held_error for one in coded if one.held_error is not None])
        assert out.stat().st_size == (tmp_path / "nearest.cellm").stat().st_size
    assert held["gptq"] < held["weighted"] < held["nearest"]


def unfinished(model: Path) -> None:
    """Put a NaN into the last tensor of a copied model."""
    file = model / "model.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-4:] = struct.pack("<f", np.nan)
    file.write_bytes(blob)


REFUSALS: dict[str, tuple[Callable[[Path, Path], Any], type[BitsmithError], str]] = {
    "kind": (lambda m, t: write_cellm(m, t / "x.cellm", "i3"), BitsmithError, "kind 'i3'; known: f16, i8"),
    "group": (lambda m, t: write_cellm(m, t / "x.cellm", "i4", group=48), BitsmithError, "grid 'int4_g48'"),
    "blocks": (
        lambda m, t: write_cellm(m, t / "x.cellm", "q1", group=64),
        BitsmithError,
        "groups of 128 columns, not 64",
    ),
    "selection": (
        lambda m, t: write_cellm(m, t / "x.cellm", "i4", selection="all"),  # type: ignore[arg-type]
        BitsmithError,
        "unknown selection 'all'; known: cellm, text, layers",
    ),
    "rounder": (
        lambda m, t: write_cellm(m, t / "x.cellm", "i4", rounder="gptq"),
        BitsmithError,
        "rounder gptq needs statistics",
    ),
    "suffix": (lambda m, t: write_cellm(m, t / "x.gguf", "i4"), OutputError, "must end in .cellm"),
    "statistics": (
        lambda m, t: write_cellm(m, t / "x.cellm", "i4", like_seed=True, statistics=t / "stats"),
        BitsmithError,
        "use no statistics",
    ),
    "config": (
        lambda m, t: ((m / "config.json").write_text("{}"), write_cellm(m, t / "x.cellm", "i4")),
        BitsmithError,
        "config.json has no vocab_size",
    ),
    "not finite": (
        lambda m, t: (unfinished(m), write_cellm(m, t / "x.cellm", "i4")),
        DamagedFileError,
        "tensor '.*': is nan at .*, expected finite weights",
    ),
    "coded before": (
        lambda m, t: (write_cellm(m, t / "a.cellm", "i4"), write_cellm(t / "a.cellm", t / "x.cellm", "i2")),
        UnsupportedError,
        "is stored as i4; expected the original",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_nothing_behind(small: Path, tmp_path: Path, case: str) -> None:
    convert, kind, words = REFUSALS[case]
    model = tmp_path / "model"
    model.mkdir()
    for file in small.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    with pytest.raises(kind, match=words):
        convert(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("a.cellm")} == {"model"}


def test_an_existing_output_is_kept_unless_overwritten(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.cellm"
    write_cellm(small, out, "i4")
    first = out.read_bytes()
    with pytest.raises(OutputError, match="exists; pass --overwrite"):
        write_cellm(small, out, "i2")
    assert out.read_bytes() == first
    write_cellm(small, out, "i4", overwrite=True)
    assert out.read_bytes() == first  # the same bytes for the same model
