"""Compressing: what is written, what is measured about it, and everything that must be refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numba import config
from numpy.typing import NDArray

from bitsmith.archs import export_view
from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError, DamagedFileError, OutputError, UnsupportedError
from bitsmith.formats import format_named
from bitsmith.lab.synth import synth_tensors
from bitsmith.run import encode
from bitsmith.run.execute import compress, plan_for
from bitsmith.run.mixes import MIXES, mix_named
from bitsmith.store import TensorData, open_checkpoint, open_gguf, write_gguf, write_safetensors
from bitsmith.store.gguf_layout import TensorInfo, Typed


def decoded(file: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor of a GGUF as the gguf package reads and decodes it."""
    reader = gguf.GGUFReader(file)
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in reader.tensors
    }


def with_weight(folder: Path, name: str, place: tuple[int, ...], value: float) -> Path:
    """A tiny Qwen3.5 with one weight replaced; twice as many V as K heads, so that export moves rows."""
    config = published_config("tiny")
    data = []
    for tensor, ref in synth_tensors(config).items():
        rows = ref.read()
        if tensor == name:
            rows[place] = value
        encoded = rows.reshape(1, -1).astype(np.float32).view(np.uint8)
        data.append(TensorData(tensor, "F32", ref.shape, [encoded]))
    write_safetensors(folder, data, config)
    return folder


@pytest.mark.parametrize("type_name", ["Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K", "Q5_0", "BF16", "F32"])
def test_the_file_is_what_the_plan_says(tiny_qwen3_5: Path, tmp_path: Path, type_name: str) -> None:
    out = tmp_path / "out.gguf"
    plan = plan_for(tiny_qwen3_5, type_name)
    record = compress(tiny_qwen3_5, out, type_name)
    assert record.plan == plan
    assert record.file_bytes == plan.file_bytes == out.stat().st_size
    reader = gguf.GGUFReader(out)
    assert {t.name: t.tensor_type.name for t in reader.tensors} == {r.gguf_name: r.type for r in plan.rows}
    assert {t.name: t.n_bytes for t in reader.tensors} == {r.gguf_name: r.nbytes for r in plan.rows}
    assert reader.fields["general.file_type"].contents() == MIXES[type_name].file_type
    assert reader.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert reader.fields["general.architecture"].contents() == "qwen35"
    assert reader.fields["general.name"].contents() == tiny_qwen3_5.name


def test_the_recorded_error_is_that_of_the_file(tiny_qwen3_5: Path, tmp_path: Path) -> None:
    record = compress(tiny_qwen3_5, tmp_path / "out.gguf", "Q4_K_M")
    read_back = decoded(tmp_path / "out.gguf")
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        export = export_view(checkpoint)
        for written in record.tensors:
            weights = export[written.gguf_name].ref.read().astype(np.float64)
            error = np.sum((weights - read_back[written.gguf_name]) ** 2) / np.sum(weights**2)
            assert written.relative_error == pytest.approx(error, rel=1e-5, abs=1e-18)
            assert (written.relative_error > 0) == (written.type != "F32")
    assert [w.gguf_name for w in record.tensors] == [row.gguf_name for row in record.plan.rows]


def test_float_types_hold_the_exact_values(tiny_qwen3_5_tied: Path, tmp_path: Path) -> None:
    for type_name in ("F32", "BF16"):
        compress(tiny_qwen3_5_tied, tmp_path / f"{type_name}.gguf", type_name)
        read_back = decoded(tmp_path / f"{type_name}.gguf")
        with open_checkpoint(tiny_qwen3_5_tied) as checkpoint:
            for tensor in export_view(checkpoint).tensors:
                np.testing.assert_array_equal(read_back[tensor.gguf_name], tensor.ref.read())


def test_the_same_source_gives_the_same_bytes_in_any_slices(
    tiny_qwen3_5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(tiny_qwen3_5, tmp_path / "whole.gguf", "Q4_K_M")
    monkeypatch.setattr(encode, "SLICE_BYTES", 10_000)
    sliced = compress(tiny_qwen3_5, tmp_path / "sliced.gguf", "Q4_K_M")
    assert whole.sha256 == sliced.sha256
    for one, other in zip(whole.tensors, sliced.tensors, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-9)


def test_a_float_gguf_compresses_to_the_bytes_of_its_original(tiny_qwen3_5: Path, tmp_path: Path) -> None:
    compress(tiny_qwen3_5, tmp_path / "bf16.gguf", "BF16")
    through = compress(tmp_path / "bf16.gguf", tmp_path / "through.gguf", "IQ4_XS")
    direct = compress(tiny_qwen3_5, tmp_path / "direct.gguf", "IQ4_XS")
    assert through.sha256 == direct.sha256


def test_metadata_of_a_gguf_made_by_others_is_kept(tiny_qwen3: Path, tmp_path: Path) -> None:
    compress(tiny_qwen3, tmp_path / "ours.gguf", "BF16")
    with open_gguf(tmp_path / "ours.gguf") as ours:
        theirs = {
            **ours.typed_metadata(),
            "general.alignment": Typed("UINT32", 128),
            "general.license": "apache-2.0",
            "other.number": Typed("UINT64", 2**40),
            "split.count": Typed("UINT16", 0),
        }
        infos = [TensorInfo(name, ref.shape, ref.dtype) for name, ref in ours.items()]
        write_gguf(tmp_path / "theirs.gguf", theirs, infos, lambda info: [ours[info.name].raw()])
    record = compress(tmp_path / "theirs.gguf", tmp_path / "out.gguf", "Q8_0")
    assert record.plan.file_bytes == (tmp_path / "out.gguf").stat().st_size
    with open_gguf(tmp_path / "out.gguf") as written:
        kept = written.metadata
        assert (kept["general.alignment"], kept["other.number"]) == (128, 2**40)
        assert kept["general.license"] == "apache-2.0"
        assert kept["general.file_type"] == mix_named("Q8_0").file_type
        assert "split.count" not in kept


def test_a_manifest_goes_with_the_output(tiny_qwen3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    record = compress(tiny_qwen3, out, "Q8_0")
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert record.sha256 == digest
    kept = hashlib.sha256((tmp_path / "out.gguf.record.json").read_bytes()).hexdigest()
    listed = f"{digest}  out.gguf\n{kept}  out.gguf.record.json\n"
    assert (tmp_path / "out.gguf.sha256").read_text() == listed
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["out.gguf", "out.gguf.record.json", "out.gguf.sha256"]


def test_the_record_is_json(tiny_qwen3_5: Path, tmp_path: Path) -> None:
    record = compress(tiny_qwen3_5, tmp_path / "out.gguf", "Q4_K_M", tensor_types=[("ffn_up", "Q6_K")])
    text = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert text["plan"]["digest"] == record.plan.digest
    assert text["plan"]["set_aside"] == list(record.plan.set_aside)
    assert len(text["tensors"]) == len(record.plan.rows)
    assert sum(tensor["nbytes"] for tensor in text["tensors"]) == text["plan"]["tensor_bytes"]
    assert text["peak_memory_bytes"] > 1 << 20


def test_progress_counts_the_written_bytes(tiny_qwen3: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    record = compress(tiny_qwen3, tmp_path / "out.gguf", "Q8_0", progress=lambda *step: seen.append(step))
    assert seen == sorted(seen)
    assert seen[-1] == ("compress", record.plan.tensor_bytes, record.plan.tensor_bytes)


def test_an_existing_output_is_kept_unless_asked(tiny_qwen3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"out\.gguf: exists; pass --overwrite"):
        compress(tiny_qwen3, out, "Q8_0")
    assert out.read_bytes() == b"precious"
    assert compress(tiny_qwen3, out, "Q8_0", overwrite=True).file_bytes == out.stat().st_size


def test_the_input_is_never_overwritten(tiny_qwen3: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    compress(tiny_qwen3, model, "BF16")
    before = model.read_bytes()
    (tmp_path / "link.gguf").symlink_to(model)
    for out in (model, tmp_path / "link.gguf"):
        with pytest.raises(OutputError, match="is the input"):
            compress(model, out, "Q8_0", overwrite=True)
    assert model.read_bytes() == before


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.GGUF.txt"])
def test_an_output_of_another_kind_is_refused(tiny_qwen3: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"must end in \.gguf"):
        compress(tiny_qwen3, tmp_path / name, "Q8_0")


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("mlp.up_proj.weight", (3, 5), np.nan, r"is nan at \[3, 5\], expected finite"),
        ("linear_attn.in_proj_z.weight", (130, 7), -np.inf, r"is -inf at \[130, 7\], expected finite"),
        ("linear_attn.conv1d.weight", (9, 0, 2), np.inf, r"is inf at \[9, 0, 2\], expected finite"),
        ("input_layernorm.weight", (11,), np.nan, r"is nan at \[11\], expected finite"),
        ("linear_attn.A_log", (5,), 200.0, r"is -inf at \[\d\] of blk\.1\.ssm_a, expected finite"),
    ],
)
def test_weights_that_are_not_finite_are_refused_with_their_place(
    tmp_path: Path, name: str, place: tuple[int, ...], value: float, message: str
) -> None:
    tensor = f"model.language_model.layers.1.{name}"
    model = with_weight(tmp_path / "model", tensor, place, value)
    with pytest.raises(DamagedFileError, match=message) as refusal:
        compress(model, tmp_path / "out.gguf", "Q4_K_M")
    assert tensor in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tensor_of_zeros_has_no_error(tmp_path: Path) -> None:
    tensor = "model.language_model.layers.1.mlp.up_proj.weight"
    model = with_weight(tmp_path / "model", tensor, (slice(None),), 0.0)
    record = compress(model, tmp_path / "out.gguf", "Q3_K_M")
    assert {w.relative_error for w in record.tensors if w.hf_name == tensor} == {0.0}
    assert not decoded(tmp_path / "out.gguf")["blk.1.ffn_up.weight"].any()


def test_a_failure_leaves_an_earlier_output_alone(tmp_path: Path) -> None:
    model = with_weight(tmp_path / "model", "model.language_model.norm.weight", (0,), np.nan)
    out = tmp_path / "out.gguf"
    out.write_bytes(b"earlier")
    with pytest.raises(DamagedFileError):
        compress(model, out, "Q8_0", overwrite=True)
    assert out.read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf"]


def test_bad_options_are_refused_before_anything_is_written(tiny_qwen3: Path, tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], type[BitsmithError]]] = [
        ({"type_name": "Q4_Z"}, BitsmithError),
        ({"type_name": "Q4_K_M", "tensor_types": [("nothing", "Q8_0")]}, BitsmithError),
    ]
    for options, error in refused:
        with pytest.raises(error):
            compress(tiny_qwen3, tmp_path / "out.gguf", **options)
    unknown = shutil.copytree(tiny_qwen3, tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"model_type": "mamba9"}))
    with pytest.raises(UnsupportedError, match="mamba9"):
        compress(unknown, tmp_path / "out.gguf", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["unknown"]


def test_the_compress_command_never_loads_torch(tiny_qwen3: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from bitsmith.cli.main import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "found = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "sys.exit(f'loaded: {found}' if found else 0)"
    )
    command = [sys.executable, "-W", "error", "-O", "-c", code, "compress", tiny_qwen3]
    done = subprocess.run(
        [*command, "-o", tmp_path / "out.gguf"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert (tmp_path / "out.gguf").exists()


def test_the_number_of_threads_does_not_change_the_bytes(
    tiny_qwen3_5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from pathlib import Path; from bitsmith.run.execute import compress\n"
        "print(compress(Path(sys.argv[1]), Path(sys.argv[2]), 'Q3_K_M').sha256)"
    )
    expected = compress(tiny_qwen3_5, tmp_path / "here.gguf", "Q3_K_M").sha256
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1" if config.NUMBA_NUM_THREADS > 1 else "2")
    command = [sys.executable, "-c", code, tiny_qwen3_5, tmp_path / "there.gguf"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == expected


def test_the_declared_block_sizes_are_ggufs() -> None:
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    for mix in MIXES.values():
        fmt = format_named(mix.base)
        assert (fmt.block_size, fmt.block_bytes) == sizes.get(mix.base, (64, 18)), mix.base
