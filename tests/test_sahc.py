"""Recipe `sahc`: rows are gated and replanned, and a killed run ends with the same bytes."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from bitsmith.archs import claim
from bitsmith.errors import BitsmithError, DamagedFileError, OutputError, UnsupportedError
from bitsmith.lab.synth import synth
from bitsmith.report.written import print_planned, print_written
from bitsmith.run.audit import AuditLog, read_audit
from bitsmith.run.calibrate import calibrate
from bitsmith.run.compress import compress, plan
from bitsmith.run.evaluate import open_model
from bitsmith.run.folder import write_folder
from bitsmith.run.gate import FORWARD_COSINE
from bitsmith.run.job import Job
from bitsmith.run.sahc import sahc
from bitsmith.run.sahc_artifact import artifact_gates
from bitsmith.run.sahc_layer import Cosine, LayerProbe
from bitsmith.run.sahc_methods import Coded, Rows, Weights, relative_error
from bitsmith.run.sahc_plan import COMPONENTS, INT4, INT8, STORED, PlanRow, plan_rows, prunings
from bitsmith.run.sahc_planned import SahcPlan
from bitsmith.run.sahc_rows import SahcRecord, SahcResult
from bitsmith.run.sahc_trial import Forward, Pick, Trials, row_of
from bitsmith.run.sahc_work import CANDIDATE_NAME, Workplace, refuse_output, work_folder
from bitsmith.run.verify import verify
from bitsmith.run.workplace import digest
from bitsmith.store import open_checkpoint
from bitsmith.store.manifest import write_manifest

Float32 = NDArray[np.float32]
TEXT = "import os\nfor name in os.listdir('.'):\n    print(name, len(name))\n" * 60


def _row(shape: tuple[int, int], place: str | None = "layer") -> PlanRow:
    return PlanRow("w", "C1", "ffn.gate", shape, 0, place, COMPONENTS[0].chain, 2 * shape[0] * shape[1])


def _cosines(values: Float32) -> Forward:
    """Judge by the cosines of the outputs for inputs drawn at random."""
    inputs = np.random.default_rng(9).standard_normal((values.shape[1], 64)).astype(np.float32)

    def cosine(found: Float32) -> Cosine:
        one, other = values @ inputs, found @ inputs
        dots = (one * other).sum(0) / np.sqrt((one**2).sum(0) * (other**2).sum(0))
        return Cosine(float(dots.mean()), None, None, "64 drawn inputs")

    return cosine


def _chosen(values: Float32, tmp_path: Path, forward: Forward | None = None) -> Pick:
    with AuditLog(tmp_path / "audit.jsonl") as log:
        shape = values.shape[0], values.shape[1]
        return Trials(log).choose(_row(shape), Weights(values), forward or _cosines(values))


def _random(shape: tuple[int, int], seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_planted_low_rank_matrix_keeps_its_svd(tmp_path: Path) -> None:
    pick = _chosen(_random((512, 16)) @ _random((16, 128), 1), tmp_path)
    assert pick.method is COMPONENTS[0].chain[0]
    row = row_of(pick)
    assert row.scheme == "SVD:r=16:int4"
    assert row.ratio is not None
    assert row.ratio > 18
    assert row.total_error is not None
    assert row.total_error < 0.2


def test_a_random_matrix_falls_to_int4_and_the_log_says_why(tmp_path: Path) -> None:
    pick = _chosen(_random((512, 128)), tmp_path)
    assert pick.method is INT4
    first, second = pick.attempts
    assert first.failed is not None
    assert first.failed["name"] == "SVD error"
    assert first.decision == "replan: row-int4"
    assert second.failed is None
    assert second.decision == "keep row-int4"
    failed = {gate["name"] for gate in first.gates if gate["outcome"] == "FAIL"}
    assert failed == {"SVD error", "error over theory"}
    assert "forward cosine" not in {gate["name"] for gate in first.gates}  # not run for what failed already
    lines = list(read_audit(tmp_path / "audit.jsonl"))
    assert [line.decision for line in lines].count("replan: row-int4") == 1
    assert lines[0].what == "w: SVD r512/4096 + int4: SVD error"
    assert lines[0].value == pytest.approx(0.9, abs=0.05)
    assert lines[0].limit == 0.1


def test_the_order_of_fallbacks_ends_with_what_is_stored(tmp_path: Path) -> None:
    values = _random((64, 64))
    bad = Cosine(0.2, None, None, "bad")
    pick = _chosen(values, tmp_path, lambda _: bad)
    assert pick.method is STORED
    assert [one.method for one in pick.attempts] == [
        "SVD r512/4096 + int4", "row-int4", "row-int8", "as stored",
    ]  # fmt: skip
    assert row_of(pick).ratio == 1.0


def test_a_row_whose_forward_is_unmeasured_is_kept(tmp_path: Path) -> None:
    pick = _chosen(_random((64, 64)), tmp_path, lambda _: None)
    assert pick.method is STORED
    assert pick.attempts[1].failed is not None
    assert pick.attempts[1].failed["outcome"] == "UNMEASURED"


def test_zeros_are_kept_and_nothing_divides_by_them(tmp_path: Path) -> None:
    assert _chosen(np.zeros((32, 32), np.float32), tmp_path).method is STORED


def test_full_rank_factors_are_refused_where_int4_is_smaller(tmp_path: Path) -> None:
    values = _random((128, 128))
    row = PlanRow("w", "C2", "attn.k", (128, 128), 0, "layer", COMPONENTS[1].chain, 2 * 128 * 128)
    with AuditLog(tmp_path / "audit.jsonl") as log:
        pick = Trials(log).choose(row, Weights(values), _cosines(values))
    full = pick.attempts[1]
    assert full.method == "SVD full rank + int4"
    assert "bytes over plan" in {gate["name"] for gate in full.gates if gate["outcome"] == "FAIL"}
    assert pick.method is INT4


def test_outliers_that_int4_cannot_hold_go_to_int8(tmp_path: Path) -> None:
    values = _random((64, 512)) / 8
    values[np.arange(64), np.random.default_rng(1).permutation(512)[:64]] = 6.0
    pick = _chosen(values, tmp_path)
    failed = {gate["name"] for gate in pick.attempts[1].gates if gate["outcome"] == "FAIL"}
    assert pick.attempts[1].method == "row-int4"
    assert failed == {"quantization error"}
    assert pick.method is INT8


class _Negated(Rows):
    """A method that is worse than zeros."""

    def code(self, weights: Weights) -> Coded:
        return replace(super().code(weights), decoded=-weights.values)


def test_what_is_worse_than_zeros_is_refused(tmp_path: Path) -> None:
    values = _random((64, 64))
    plan = replace(_row((64, 64)), component="C5", chain=(_Negated(4), STORED))
    with AuditLog(tmp_path / "audit.jsonl") as log:
        pick = Trials(log).choose(plan, Weights(values), _cosines(values))
    total = next(gate for gate in pick.attempts[0].gates if gate["name"] == "total error")
    assert (total["value"], total["limit"], total["outcome"]) == (pytest.approx(2.0), 1.0, "FAIL")
    assert pick.method is STORED


def test_a_layer_that_fails_together_replans_its_lowest_row(tmp_path: Path) -> None:
    values = _random((64, 64))
    with AuditLog(tmp_path / "audit.jsonl") as log:
        trials = Trials(log)
        pick = trials.choose(_row((64, 64)), Weights(values), _cosines(values))
        judged = trials.cosine.judge(0.9)
        moved = trials.advanced(pick, judged, _cosines(values))
    assert (pick.method, moved.method) == (INT4, INT8)
    assert moved.attempts[1].decision == "replan: row-int8"
    assert row_of(moved).replans == 2


def test_every_tensor_has_a_component_and_pruning_keeps_heads_together(tiny_qwen3_5: Path) -> None:
    with open_checkpoint(tiny_qwen3_5) as checkpoint:
        rows = plan_rows(claim(checkpoint))
        assert [row.name for row in rows] == [spec.name for spec, _ in claim(checkpoint)]
        by_role = {row.role: row for row in rows if row.layer == 0 and row.place}
        assert by_role["delta.in_qkv"].component == "C3"
        assert {row.component for row in rows if row.place is None and row.role != "norm.final"} == {"C5"}
        config = checkpoint.config["text_config"]
        here = [row for row in rows if row.layer == 0 and row.place]
        kept = prunings(checkpoint, here, config)
        blocks, axis = kept[by_role["delta.out"].name]
        heads = config["linear_num_value_heads"]
        assert axis == 1
        assert len(blocks.kept) == heads - heads // 4
        qkv, _ = kept[by_role["delta.in_qkv"].name]
        assert qkv.length == by_role["delta.in_qkv"].shape[0] - heads // 4 * blocks.size


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dense layer of random weights, tied."""
    return synth(tmp_path_factory.mktemp("sahc-model") / "small", "qwen3-tiny", layers=1, seed=3, tied=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def _run(model: Path, text: Path, out: Path, **more: object) -> SahcResult:
    options = {"ctx_tokens": 32, "chunks": 4, "probe_chunks": 2, "ppl_limit": 1e9}
    return sahc(model, text, out, **{**options, **more})  # type: ignore[arg-type]


def _job(model: Path, text: Path, out: Path, **more: object) -> Job:
    options = {"recipe": "sahc", "text": text, "ctx_tokens": 32, "chunks": 4}
    return Job(model, out, **{**options, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(small: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SahcResult]:
    """The recipe as `bitsmith compress` runs it, undisturbed."""
    record = compress(_job(small, text, tmp_path_factory.mktemp("sahc") / "out"))
    assert isinstance(record, SahcRecord)
    return record.out, record.result


def test_a_dry_run_names_methods_and_exact_bytes(small: Path, whole: tuple[Path, SahcResult]) -> None:
    planned = plan(Job(small, recipe="sahc"))
    assert isinstance(planned, SahcPlan)
    tried = {row.name: row.attempts for row in whole[1].rows}
    for row in planned.rows:
        sizes = {method.method: method.nbytes for method in row.chain}
        assert all(sizes[one.method] == one.stored_bytes for one in tried[row.name])
    assert planned.int4_file_bytes == whole[1].int4.artifact.file_bytes
    assert planned.planned_bytes < planned.int4_bytes < planned.stored_bytes


def test_tables_say_planned_beside_actual(
    whole: tuple[Path, SahcResult], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = whole
    print_written(SahcRecord(out, work_folder(out), tmp_path / "audit.jsonl", result))
    said = " ".join(capsys.readouterr().out.split())
    planned = f"{result.components[0].theory_ratio:.2f}×"
    for part in ("C1 FFN", "25.3×", planned, "row-int4"):
        assert part in said
    passed, failed = result.gates_passed, result.gates_failed
    assert f"gates: {passed} passed, {failed} failed, 0 unmeasured; {result.replans} replans" in said
    assert "does not pass the limit of 100" in said  # a random model's own perplexity
    assert f"{result.int4.artifact.file_bytes:,}" in said
    assert "4 of " in said  # the protocol's chunks
    print_planned(plan(Job(small, recipe="sahc")))
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing written (dry run)" in said
    assert f"{result.int4.artifact.file_bytes:,} bytes of files" in said


def test_the_recipe_collapses_to_int4_and_says_so(whole: tuple[Path, SahcResult]) -> None:
    out, result = whole
    assert result.replans > 0
    assert result.gates_failed > 0
    assert all(row.ratio is not None for row in result.rows)
    assert result.ratio is not None
    assert result.bytes_over_int4 >= 0.99
    assert [row.name for row in result.components] == ["C1", "C2", "C4", "C5"]
    table = result.components[0]
    assert table.claimed_ratio == 25.3
    assert table.theory_ratio == pytest.approx(19.8, abs=0.5)
    assert table.ratio is not None
    assert table.ratio < 4
    with open_checkpoint(out) as written:
        stored = sum(ref.nbytes for ref in written.values())
    assert stored == sum(row.stored_bytes for row in result.rows)
    record = json.loads((work_folder(out) / "sahc.json").read_text())
    assert "seconds" not in record
    assert record["sahc"]["sha256"] == result.sahc.sha256
    checked = verify(out)
    assert checked.passed and checked.kind == "sahc"
    found = {one.name: one.relative_error for one in checked.tensors}
    assert found.keys() == {row.name for row in result.rows}
    for row in result.rows:
        assert found[row.name] == pytest.approx((row.total_error or 0.0) ** 2, rel=1e-4)
    decisions = [line.decision for line in read_audit(work_folder(out) / "audit.jsonl")]
    assert sum(said.startswith("replan: ") for said in decisions) == result.replans


def _command(model: Path, text: Path, out: Path) -> subprocess.Popen[bytes]:
    options = ["--recipe", "sahc", "--text", text, "-o", out, "--ctx", 32, "--chunks", 4]
    arguments = [sys.executable, "-m", "bitsmith.cli.main", "compress", model, *options]
    return subprocess.Popen(
        [str(one) for one in arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _kept(journal: Path) -> bytes:
    """Return the whole lines of a journal."""
    data = journal.read_bytes() if journal.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def _files(out: Path) -> dict[str, bytes]:
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    return made | {"result": (work_folder(out) / "sahc.json").read_bytes()}


def test_every_row_is_stored_as_it_was_judged(whole: tuple[Path, SahcResult], small: Path) -> None:
    _check_errors(whole[1], small, whole[0])


def _check_errors(result: SahcResult, model: Path, out: Path) -> None:
    with open_checkpoint(model) as source, open_checkpoint(out) as written:
        for row in result.rows:
            found = relative_error(
                *(np.asarray(one[row.name].read(), np.float32) for one in (source, written))
            )
            assert found == pytest.approx(row.total_error, rel=1e-4, abs=1e-6), row.name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_statistics_guide_the_plan_and_row_int4_alike(
    whole: tuple[Path, SahcResult], small: Path, text: Path, tmp_path: Path
) -> None:
    stats, out = tmp_path / "stats", tmp_path / "out"
    calibrate(small, text, stats, ctx_tokens=32, chunks=24, saliency=False)
    record = compress(_job(small, text, out, statistics=stats))
    assert isinstance(record, SahcRecord)
    _check_errors(record.result, small, out)
    guided, plain = record.result, whole[1]
    assert guided.int4.artifact.file_bytes == plain.int4.artifact.file_bytes
    assert guided.int4.sha256 != plain.int4.sha256
    assert guided.int4.measures["mean_kld"].value < plain.int4.measures["mean_kld"].value
    said = [gate["evidence"] for row in guided.rows for one in row.attempts for gate in one.gates]
    assert any("in the metric of the inputs" in one for one in said)


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(
    whole: tuple[Path, SahcResult], small: Path, text: Path, tmp_path: Path
) -> None:
    out, journal = tmp_path / "out", tmp_path / "out.sahc" / "journal"
    killed = _command(small, text, out)
    while killed.poll() is None and _kept(journal).count(b"\n") < 3:  # the key, int4 alone, a part
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    record = compress(_job(small, text, out))
    assert isinstance(record, SahcRecord)
    assert record.result.resumed >= 2
    assert _files(out) == _files(whole[0])
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.record.json", "out.sha256", "out.sahc"}
    assert {path.name for path in journal.parent.iterdir()} == {"sahc.json", "audit.jsonl"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_command_killed_at_random_moments_repeats_nothing_that_had_finished(
    whole: tuple[Path, SahcResult], small: Path, text: Path, tmp_path: Path
) -> None:
    out, journal = tmp_path / "out", tmp_path / "out.sahc" / "journal"
    moments, kills, kept = random.Random(7), 0, b""
    started = time.monotonic()
    assert _command(small, text, tmp_path / "timed").wait() == 0
    seconds = time.monotonic() - started
    while True:
        running = _command(small, text, out)
        with suppress(subprocess.TimeoutExpired):
            running.wait(moments.uniform(0.4, 0.9) * seconds)
        finished = running.poll()
        running.kill()
        running.wait()
        if finished is not None:
            assert finished == 0
            break
        kills += 1
        if not journal.exists() and (journal.parent / "sahc.json").exists():
            break  # it had finished, and died on its way out
        assert _kept(journal).startswith(kept)
        kept = _kept(journal)
    assert kills >= 2
    names = [json.loads(line)["name"] for line in kept.splitlines()[1:]]
    assert len(names) == len(set(names))
    assert _files(out) == _files(whole[0])
    assert {path.name for path in journal.parent.iterdir()} == {"sahc.json", "audit.jsonl"}


def test_an_output_in_its_place_is_known_by_the_run_that_placed_it(small: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.sahc"

    def opened(key: str) -> Workplace:
        return Workplace(out, work, {"source": key}, False, [small], None)

    with opened("one") as place:
        shutil.copytree(small, work / CANDIDATE_NAME)
        made = digest(work / CANDIDATE_NAME)
        write_manifest(work / CANDIDATE_NAME, {"output": CANDIDATE_NAME, "sources": {}})
        place.place(made)
    with opened("one") as place:  # killed before its result was written
        assert place.has(CANDIDATE_NAME, made)
        place.place(made)
    assert digest(out) == made == digest(small)
    (out / "model.safetensors").unlink()
    shutil.copytree(small, work / CANDIDATE_NAME)
    write_manifest(work / CANDIDATE_NAME, {"output": CANDIDATE_NAME, "sources": {}})
    with opened("one") as place:  # killed while files were moved into a folder that was there
        place.place(made)
    assert digest(out) == made
    with pytest.raises(OutputError, match=r'other source \("one", now "another"\)'):
        opened("another")
    with pytest.raises(OutputError, match="out: exists; pass --overwrite"):
        refuse_output(out, tmp_path / "elsewhere", False, [])


@pytest.mark.slow
def test_no_ratio_for_an_artifact_that_does_not_pass(
    small: Path, text: Path, tmp_path: Path, whole: tuple[Path, SahcResult]
) -> None:
    result = _run(small, text, tmp_path / "out", ppl_ratio_limit=0.5)  # nothing can pass that
    assert result.ratio is None
    with pytest.raises(
        BitsmithError, match=r"out: is not written, .*over the original's 1 \(at most 0.5 passes"
    ):
        SahcRecord(tmp_path / "out", tmp_path, tmp_path / "log", result).refuse_failed()
    assert all(row.ratio is None for row in (*result.rows, *result.components))
    assert result.rounds > 2
    assert {row.method for row in result.rows} == {"as stored"}
    assert not (tmp_path / "out").exists()


def test_what_cannot_pass_is_refused_and_leaves_nothing(small: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    with open_checkpoint(small) as checkpoint:
        tensors = {name: np.array(ref.read()) for name, ref in checkpoint.items()}
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
    weights = broken / "model.safetensors"
    save_file(tensors, weights)
    with pytest.raises(DamagedFileError, match=r"up_proj.weight': is nan at \[3, 5\]"):
        compress(_job(broken, text, tmp_path / "out"))
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, weights)
    with pytest.raises(BitsmithError, match=r"up_proj\.weight"):
        compress(_job(broken, text, tmp_path / "out"))
    with pytest.raises(BitsmithError, match="one chunk needs 8192"):
        compress(_job(small, text, tmp_path / "out", ctx_tokens=8192))
    with pytest.raises(BitsmithError, match=r"own perplexity is .* does not pass the limit of 2 "):
        compress(_job(small, text, tmp_path / "out", ppl_limit=2.0))
    with pytest.raises(BitsmithError, match="recipe sahc is judged on a text: --text FILE"):
        compress(replace(_job(small, text, tmp_path / "out"), text=None))
    with pytest.raises(BitsmithError, match="recipe sahc is not made with --rounder, --type"):
        compress(_job(small, text, tmp_path / "out", type_name="Q8_0", rounder="gptq"))
    with pytest.raises(OutputError, match="is the input"):
        compress(_job(small, text, small))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_artifact_that_lacks_tensors_or_numbers_does_not_pass(small: Path, tmp_path: Path) -> None:
    with open_model(small) as model:
        source = model.checkpoint
        probe = LayerProbe(model, np.arange(64).reshape(2, 32))
        whole = artifact_gates(source, source, probe, None, FORWARD_COSINE)
        assert [one.passed for one in whole] == [True, True, True]
        tensors = {name: np.array(ref.read()) for name, ref in source.items()}
        dropped = tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.norm.weight"][:2] = np.inf
        tensors["model.layers.0.mlp.down_proj.weight"] = np.ascontiguousarray(dropped[:3])
        save_file(tensors, tmp_path / "model.safetensors")
        with open_checkpoint(tmp_path / "model.safetensors") as written:
            shapes, finite, cosine = artifact_gates(source, written, probe, None, FORWARD_COSINE)
    assert (shapes.outcome, shapes.value) == ("FAIL", 2)
    assert "up_proj" in shapes.evidence
    assert (finite.outcome, finite.value) == ("FAIL", 2)
    assert cosine.outcome == "UNMEASURED"


def test_a_packed_source_is_refused(small: Path, text: Path, tmp_path: Path) -> None:
    write_folder(small, tmp_path / "packed", "W4A16", group=32)
    with pytest.raises(UnsupportedError, match="give the checkpoint it was made of"):
        _run(tmp_path / "packed", text, tmp_path / "out")


def test_a_probe_leaves_the_original_alone(small: Path) -> None:
    with open_model(small) as model:
        probe = LayerProbe(model, np.arange(64).reshape(2, 32))
        probe.enter(0)
        names = probe.names()
        name = next(name for name in names if name.endswith("mlp.gate_proj.weight"))
        exact = np.array(model.checkpoint[name].read())
        assert probe.layer({name: exact}).value == pytest.approx(1.0, abs=1e-6)
        broken = probe.layer({name: -exact}).value
        assert broken is not None
        assert broken < 0.9
        assert probe.layer({name: exact}).value == pytest.approx(1.0, abs=1e-6)
        assert probe.head(model.head.read()).value == pytest.approx(1.0, abs=1e-6)
        assert probe.embedding(model.embedding.read()).value == pytest.approx(1.0, abs=1e-6)
