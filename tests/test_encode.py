"""Encoding guided by statistics: what the record claims is what the file does to held-out inputs."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import config

from bitsmith.archs import claim, import_view
from bitsmith.archs.published import published_config
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.formats import format_named
from bitsmith.lab.synth import synth_tensors
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.passes.choice import CHOICE_ROWS
from bitsmith.passes.rounding import round_rows
from bitsmith.passes.trial import sample_runs
from bitsmith.run.calibrate import calibrate
from bitsmith.run.encode import TensorEncoder, Written
from bitsmith.run.execute import Record, compress
from bitsmith.run.plan import open_source, plan_of_types
from bitsmith.store import TensorData, open_checkpoint, open_gguf, write_safetensors
from bitsmith.store.statistics import SiteStatistics, Statistics, open_statistics

CTX = 40
SOME = r"blk\.1\.(attn_qkv|ssm_out)\."
Q3 = [(SOME, "Q3_K"), (r"blk\.3\.attn_k\.", "Q4_0")]
"""Three matrices to round among tensors that stay BF16 or F32: error feedback takes its time."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(200)))
    return path


@pytest.fixture(scope="module")
def stats(tiny_qwen3_5: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "stats"
    calibrate(tiny_qwen3_5, text, out, ctx_tokens=CTX, chunks=6)
    return out


@pytest.fixture(scope="module")
def by_rounder(
    tiny_qwen3_5: Path, stats: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("rounded")
    return {
        rounder: rounded(tiny_qwen3_5, folder / f"{rounder}.gguf", stats, rounder=rounder)
        for rounder in ("nearest", "weighted", "gptq", "auto")
    }


def rounded(model: Path, out: Path, statistics: Path | None, **options: Any) -> Record:
    return compress(model, out, "BF16", tensor_types=Q3, statistics=statistics, **options)


def quantized(record: Record) -> dict[str, Written]:
    return {one.hf_name: one for one in record.tensors if one.type in ("Q3_K", "Q4_0")}


def held_errors_of(file: Path, model: Path, statistics: Path) -> dict[str, float]:
    """`sum |E x|² / sum |W x|²` by Hugging Face name: both models' matrices and x in Hugging Face order."""
    with open_checkpoint(model) as original, open_gguf(file) as written:
        specs = {spec.name: (spec, ref) for spec, ref in claim(original)}
        opened = open_statistics(statistics, [spec for spec, _ in specs.values()])
        view = import_view(written)
        errors = {}
        for name, (spec, ref) in specs.items():
            stored = name.replace("model.language_model.", "model.")  # a GGUF does not tell the prefix
            site = opened.hugging_face(spec) if stored in view and len(ref.shape) == 2 else None
            if site is None or site.held is None:
                continue
            weights = ref.read().astype(np.float64)
            left = (weights - view[stored].read().astype(np.float64)) @ site.held.astype(np.float64).T
            errors[name] = float((left**2).sum() / ((weights @ site.held.astype(np.float64).T) ** 2).sum())
        return errors


@pytest.mark.parametrize("rounder", ["weighted", "gptq", "auto"])
def test_held_out_errors_of_the_record_are_those_of_the_file(
    by_rounder: dict[str, Record], tiny_qwen3_5: Path, stats: Path, rounder: str
) -> None:
    record = by_rounder[rounder]
    found = held_errors_of(record.out, tiny_qwen3_5, stats)
    assert (record.rounder, len(quantized(record))) == (rounder, 3)
    for name, written in quantized(record).items():
        told = written.rounding
        assert told.held_errors[told.rounder] == pytest.approx(found[name], rel=1e-3)
        assert told.held_tokens == CTX
    assert any(name.endswith("linear_attn.out_proj.weight") for name in quantized(record))


def test_the_guard_never_lets_a_tensor_do_worse_than_the_weighted_search(
    by_rounder: dict[str, Record], tiny_qwen3_5: Path, stats: Path
) -> None:
    weighted = held_errors_of(by_rounder["weighted"].out, tiny_qwen3_5, stats)
    for rounder in ("gptq", "auto"):
        found = held_errors_of(by_rounder[rounder].out, tiny_qwen3_5, stats)
        for name, written in quantized(by_rounder[rounder]).items():
            assert found[name] <= weighted[name] * (1 + 1e-5)
            told = written.rounding
            if told.rounder == "gptq":
                assert told.held_errors["weighted"] == pytest.approx(weighted[name], rel=1e-3)
                assert told.damping in (0.003, 0.03, 0.3)
                assert f"gptq {told.damping:g}" in told.tried
    assert any(one.rounding.rounder == "gptq" for one in quantized(by_rounder["gptq"]).values())


def test_what_a_rounder_is_shows_in_the_record_and_in_the_bytes(by_rounder: dict[str, Record]) -> None:
    assert len({record.sha256 for record in by_rounder.values()}) >= 3
    nearest, weighted = (quantized(by_rounder[name]) for name in ("nearest", "weighted"))
    assert {one.rounding.rounder for one in nearest.values()} == {"nearest"}
    assert all(not one.rounding.held_errors and one.rounding.damping is None for one in nearest.values())
    assert {one.rounding.rounder for one in weighted.values()} == {"weighted"}
    for name, one in nearest.items():  # the plain search minimises what it is measured by here
        assert one.type != "Q3_K" or one.relative_error < weighted[name].relative_error
    assert {record.statistics for record in by_rounder.values()} == {by_rounder["auto"].statistics}
    others = [one for one in by_rounder["gptq"].tensors if one.type in ("BF16", "F32")]
    assert {one.rounding.rounder for one in others} == {"nearest"}


def test_tensors_that_nothing_guides_are_the_plain_ones(
    by_rounder: dict[str, Record], tiny_qwen3_5: Path, tmp_path: Path
) -> None:
    plain = rounded(tiny_qwen3_5, tmp_path / "plain.gguf", None)
    assert plain.sha256 == by_rounder["nearest"].sha256
    assert plain.rounder == "nearest" and plain.statistics is None
    changed = quantized(by_rounder["gptq"]).keys()
    with open_gguf(plain.out) as one, open_gguf(by_rounder["gptq"].out) as other:
        same = {t.gguf_name: t.hf_name for t in plain.tensors}
        for gguf_name, hf_name in same.items():
            equal = np.array_equal(one[gguf_name].raw(), other[gguf_name].raw())
            assert equal == (hf_name not in changed), gguf_name


def test_feedback_is_what_the_whole_matrix_rounds_to(
    by_rounder: dict[str, Record], tiny_qwen3_5: Path, stats: Path
) -> None:
    """The file's blocks are `round_rows` of all rows at once in GGUF order."""
    with open_checkpoint(tiny_qwen3_5) as checkpoint, open_gguf(by_rounder["gptq"].out) as written:
        source = open_source(checkpoint)
        opened = open_statistics(stats, [tensor.spec for tensor in source.tensors])
        tensors = {tensor.hf_name: tensor for tensor in source.tensors}
        checked = 0
        for name, one in quantized(by_rounder["gptq"]).items():
            told, tensor = one.rounding, tensors[name]
            if told.rounder != "gptq":
                continue
            site = opened.of(tensor.spec)
            metric = InputMetric(site.moment, told.damping, shrink=told.shrink)
            blocks = round_rows(format_named(one.type), tensor.ref.read().astype(np.float32), metric)
            np.testing.assert_array_equal(written[one.gguf_name].raw().reshape(-1), blocks.reshape(-1))
            checked += 1
    assert checked


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_an_imatrix_gives_the_weighted_search(
    tiny_qwen3_5: Path, text: Path, tmp_path: Path, suffix: str
) -> None:
    imatrix = tmp_path / f"imatrix{suffix}"
    calibrate(tiny_qwen3_5, text, imatrix, ctx_tokens=CTX, chunks=1)
    record = rounded(tiny_qwen3_5, tmp_path / "out.gguf", imatrix)
    assert record.rounder == "auto" and record.statistics is not None
    with open_checkpoint(tiny_qwen3_5) as checkpoint, open_gguf(record.out) as written:
        source = open_source(checkpoint)
        opened = open_statistics(imatrix, [tensor.spec for tensor in source.tensors])
        tensors = {tensor.hf_name: tensor for tensor in source.tensors}
        for name, one in quantized(record).items():
            assert one.rounding.rounder == "weighted" and not one.rounding.held_errors
            rows = tensors[name].ref.read().astype(np.float32)
            importance = opened.of(tensors[name].spec).diagonal
            expected = format_named(one.type).encode(rows, importance)
            np.testing.assert_array_equal(written[one.gguf_name].raw().reshape(-1), expected.reshape(-1))
    with pytest.raises(BitsmithError, match=r"imatrix\.\w+: holds E\[x²\] alone, rounder gptq needs"):
        rounded(tiny_qwen3_5, tmp_path / "other.gguf", imatrix, rounder="gptq")
    with pytest.raises(BitsmithError, match="is the input"):
        rounded(tiny_qwen3_5, imatrix.rename(tmp_path / "x.gguf"), tmp_path / "x.gguf", overwrite=True)
    beside = {
        f"{name}{suffix}" for name in ("out.gguf", imatrix.name) for suffix in (".record.json", ".sha256")
    }
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "x.gguf", *beside}


def test_rounders_that_cannot_be_are_refused(
    tiny_qwen3_5: Path, tiny_qwen3: Path, stats: Path, tmp_path: Path
) -> None:
    for rounder in ("weighted", "gptq"):
        with pytest.raises(BitsmithError, match=f"rounder {rounder} needs statistics.*--stats"):
            rounded(tiny_qwen3_5, tmp_path / "out.gguf", None, rounder=rounder)
    with pytest.raises(BitsmithError, match="unknown rounder 'best'; known: nearest, weighted, gptq, auto"):
        rounded(tiny_qwen3_5, tmp_path / "out.gguf", stats, rounder="best")
    with pytest.raises(BitsmithError, match=r"is no site of this model|columns, this model"):
        compress(tiny_qwen3, tmp_path / "out.gguf", "Q8_0", statistics=stats)
    with pytest.raises(BitsmithError, match="does not exist"):
        rounded(tiny_qwen3_5, tmp_path / "out.gguf", tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_the_bytes_depend_neither_on_slices_nor_on_threads(
    by_rounder: dict[str, Record], tiny_qwen3_5: Path, stats: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    code = (
        "import sys; from pathlib import Path; from bitsmith.run import encode\n"
        "from bitsmith.run.execute import compress\n"
        "encode.SLICE_BYTES = int(sys.argv[4])\n"
        f"types = {Q3!r}\n"
        "print(compress(*map(Path, sys.argv[1:3]), 'BF16', tensor_types=types,"
        " statistics=Path(sys.argv[3]), rounder='auto').sha256)"
    )
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1" if config.NUMBA_NUM_THREADS > 1 else "2")
    command = [sys.executable, "-c", code, tiny_qwen3_5, tmp_path / "out.gguf", stats, "70000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == by_rounder["auto"].sha256


def test_compressing_with_statistics_does_not_load_torch(
    tiny_qwen3_5: Path, stats: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from bitsmith.cli.main import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "found = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "sys.exit(f'loaded: {found}' if found else 0)"
    )
    options = ["--no-sequential", "--stats", stats, "--type", "BF16", "--tensor-type", "blk.1.ssm_out=Q4_0"]
    command = [sys.executable, "-c", code, "compress", tiny_qwen3_5, "-o", tmp_path / "out.gguf", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert (tmp_path / "out.gguf").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from bitsmith.run.execute import compress

seen = 0
def progress(stage, done, total):
    global seen
    seen += 1
    if seen == int(sys.argv[5]):
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))

types = {types!r}
compress(*map(Path, sys.argv[1:3]), "BF16", tensor_types=types, statistics=Path(sys.argv[3]),
         rounder="weighted", progress=progress)
"""


@pytest.mark.parametrize(("how", "calls"), [("SIGKILL", 2), ("SIGINT", 3)])
def test_a_killed_run_goes_on_with_the_same_bytes(
    by_rounder: dict[str, Record], tiny_qwen3_5: Path, stats: Path, tmp_path: Path, how: str, calls: int
) -> None:
    out = tmp_path / "out.gguf"
    code = KILLED.format(types=Q3)
    command = [sys.executable, "-c", code, tiny_qwen3_5, out, stats, how, str(calls)]
    died = subprocess.run(command, capture_output=True, check=False)
    assert died.returncode == -getattr(signal, how), died.stderr
    assert (tmp_path / ".out.gguf.parts").is_dir() and not out.exists()
    record = rounded(tiny_qwen3_5, out, stats, rounder="weighted")
    assert record.resumed == 1
    assert record.sha256 == by_rounder["weighted"].sha256
    assert replace_times(record) == replace_times(by_rounder["weighted"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "out.gguf", "out.gguf.record.json", "out.gguf.sha256",
    }  # fmt: skip


def replace_times(record: Record) -> list[Written]:
    return [replace(one, seconds=0.0) for one in record.tensors]


def test_parts_of_other_options_are_refused_or_dropped(
    by_rounder: dict[str, Record], tiny_qwen3_5: Path, stats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    code = KILLED.format(types=Q3)
    command = [sys.executable, "-c", code, tiny_qwen3_5, out, stats, "SIGKILL", "4"]
    subprocess.run(command, capture_output=True, check=False)
    assert (tmp_path / ".out.gguf.parts" / "file").exists()
    with pytest.raises(OutputError, match=r'other rounder \("weighted", now "gptq"\)'):
        rounded(tiny_qwen3_5, out, stats, rounder="gptq")
    assert not out.exists() and (tmp_path / ".out.gguf.parts" / "file").exists()
    record = rounded(tiny_qwen3_5, out, stats, rounder="gptq", overwrite=True)
    assert record.resumed == 0 and record.sha256 == by_rounder["gptq"].sha256


class Known(Statistics):
    """Statistics that a test gives: of one site."""

    def __init__(self, site: SiteStatistics) -> None:
        super().__init__(Path("known"), [], partial=True)
        self.digest, self._site_known = "known", site

    def knows(self, spec: Any) -> bool:
        return spec.site == self._site_known.site

    def _load(self, site: str) -> SiteStatistics | None:
        return self._site_known if site == self._site_known.site else None

    def tokens(self) -> tuple[Any, Any]:
        return np.zeros((1, 4), np.int64), np.zeros((1, 4), np.int64)


def encoded_with(model: Path, site: SiteStatistics, name: str, form: str) -> tuple[Written, np.ndarray]:
    """Encode one tensor of `model` by `auto` guided by `site`; return its record and its bytes."""
    with open_checkpoint(model) as checkpoint:
        source = open_source(checkpoint)
        [tensor] = [tensor for tensor in source.tensors if tensor.hf_name == name]
        types = {t.gguf_name: "F32" for t in source.tensors} | {tensor.gguf_name: form}
        [row] = [r for r in plan_of_types(source, types, mix="F32").rows if r.type == form]
        encoder = TensorEncoder(Known(site), "auto", model)
        blocks: list[np.ndarray] = []

        def write(parts: Any) -> None:
            blocks[:] = [np.array(part) for part in parts]

        return encoder.encode_guided(tensor, row, write), np.concatenate(blocks)


def pairs(rng: np.random.Generator, rows: int, columns: int, sign: float) -> np.ndarray:
    """Inputs whose neighbouring columns are nearly the same, times `sign`."""
    even = rng.normal(size=(rows, columns // 2))
    odd = sign * even + 0.2 * rng.normal(size=even.shape)
    return np.stack([even, odd], axis=-1).reshape(rows, columns).astype(np.float32)


def test_the_whole_tensor_decides_where_the_sample_was_wrong(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    rng = np.random.default_rng(5)
    # in the left columns held-out inputs are like the fitted ones, in the right ones pairs change their sign
    fit = np.concatenate([pairs(rng, 4096, 128, 1.0), pairs(rng, 4096, 128, 1.0)], axis=1)
    held = np.concatenate([pairs(rng, 256, 128, 1.0), pairs(rng, 256, 128, -1.0)], axis=1)
    site = SiteStatistics("layers.0.ffn.in", 4096, (fit**2).mean(0), None, fit.T @ fit / 4096, held, 256)
    seen = np.concatenate([np.arange(*run) for run in sample_runs(512, CHOICE_ROWS)])

    def change(rows: np.ndarray) -> np.ndarray:
        rows[seen, 128:] = 0.0
        rows[np.setdiff1d(np.arange(512), seen), :128] = 0.0
        return rows

    model = edited(tmp_path / "model", name, change)
    told, blocks = encoded_with(model, site, name, "Q4_0")
    tried = told.rounding.tried
    assert min(tried, key=lambda key: tried[key]).startswith("gptq")
    assert told.rounding.rounder == "weighted" and told.rounding.damping is None
    assert told.rounding.held_errors["weighted"] < told.rounding.held_errors["gptq"]
    with open_checkpoint(model) as checkpoint:
        expected = format_named("Q4_0").encode(checkpoint[name].read().astype(np.float32), site.importance)
    np.testing.assert_array_equal(blocks.reshape(-1), expected.reshape(-1))
    fair = replace(site, held=np.concatenate([pairs(rng, 256, 128, 1.0)] * 2, axis=1))
    assert encoded_with(model, fair, name, "Q4_0")[0].rounding.rounder == "gptq"


@pytest.mark.parametrize("form", ["Q3_K", "Q4_K", "Q5_0", "IQ4_XS"])
@pytest.mark.parametrize("kind", ["dead columns", "one direction", "nothing at all", "dead when held out"])
def test_moments_without_an_inverse_give_finite_weights(tmp_path: Path, kind: str, form: str) -> None:
    name, site_name = "model.layers.0.mlp.gate_proj.weight", "layers.0.ffn.in"
    rng = np.random.default_rng(3)
    fit, held = rng.normal(size=(2, 300, 256)).astype(np.float32)
    if kind == "dead columns":
        fit[:, 40:90] = held[:, 40:90] = 0.0
    elif kind == "one direction":
        fit = fit[:, :1] * fit[0]
    elif kind == "nothing at all":
        fit[:], held[:] = 0.0, 0.0
    else:
        held[:] = 0.0
    site = SiteStatistics(site_name, 300, (fit**2).mean(0), None, fit.T @ fit / 300, held[:32], 32)
    model = edited(tmp_path / "model", name, lambda rows: rows[:512])
    told, blocks = encoded_with(model, site, name, form)
    decoded = format_named(form).decode(blocks.reshape(512, -1))
    assert np.isfinite(decoded).all()
    assert all(np.isfinite(error) for error in told.rounding.held_errors.values())
    weights = edited_rows(model, name)
    assert np.square(decoded - weights).sum() < 0.2 * np.square(weights).sum()
    assert told.relative_error == pytest.approx(
        np.square(decoded - weights).sum() / np.square(weights).sum(), rel=1e-4
    )


def edited_rows(model: Path, name: str) -> np.ndarray:
    with open_checkpoint(model) as checkpoint:
        rows: np.ndarray = checkpoint[name].read().astype(np.float32)
    return rows


def test_a_calibration_too_short_to_trust_is_guarded(tiny_qwen3_5: Path, text: Path, tmp_path: Path) -> None:
    """Eight tokens tell error feedback next to nothing; a single chunk leaves nothing to hold out."""
    files: dict[str, Record] = {}
    for chunks in (1, 2):
        stats = tmp_path / f"stats{chunks}"
        calibrate(tiny_qwen3_5, text, stats, ctx_tokens=8, chunks=chunks)
        for rounder in ("weighted", "auto"):
            out = tmp_path / f"{rounder}{chunks}.gguf"
            files[f"{rounder}{chunks}"] = rounded(tiny_qwen3_5, out, stats, rounder=rounder)
    assert files["auto1"].sha256 == files["weighted1"].sha256
    assert {one.rounding.rounder for one in quantized(files["auto1"]).values()} == {"weighted"}
    found, weighted = (
        held_errors_of(files[name].out, tiny_qwen3_5, tmp_path / "stats2") for name in ("auto2", "weighted2")
    )
    for name in quantized(files["auto2"]):
        assert found[name] <= weighted[name] * (1 + 1e-5)


def edited(folder: Path, name: str, change: Any) -> Path:
    """A tiny dense Qwen3 of one layer, with one tensor changed."""
    config = published_config("qwen3-tiny", layers=1)
    data = []
    for tensor, ref in synth_tensors(config).items():
        rows = ref.read().astype(np.float32)
        rows = change(rows) if tensor == name else rows
        data.append(TensorData(tensor, "F32", rows.shape, [np.ascontiguousarray(rows)]))
    write_safetensors(folder, data, config)
    return folder
