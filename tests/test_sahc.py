"""Recipe `sahc`: rows are gated and replanned, and a killed run ends with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bitsmith.archs import claim
from bitsmith.errors import UnsupportedError
from bitsmith.lab.synth import synth
from bitsmith.run.audit import AuditLog, read_audit
from bitsmith.run.folder import write_folder
from bitsmith.run.sahc import sahc
from bitsmith.run.sahc_layer import Cosine, LayerProbe
from bitsmith.run.sahc_methods import Weights
from bitsmith.run.sahc_plan import COMPONENTS, INT4, INT8, STORED, PlanRow, plan_rows, prunings
from bitsmith.run.sahc_rows import SahcResult
from bitsmith.run.sahc_trial import Forward, Pick, Trials, row_of
from bitsmith.run.sahc_work import work_folder
from bitsmith.store import open_checkpoint

Float32 = NDArray[np.float32]
TEXT = "import os\nfor name in os.listdir('.'):\n    print(name, len(name))\n" * 60


def _row(shape: tuple[int, int], place: str | None = "layer") -> PlanRow:
    return PlanRow("w", "C1", "ffn.gate", shape, 0, place, COMPONENTS[0].chain)


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
    row = row_of(pick, 0)
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
    assert row_of(pick, 2 * values.size).ratio == 1.0


def test_a_row_whose_forward_is_unmeasured_is_kept(tmp_path: Path) -> None:
    pick = _chosen(_random((64, 64)), tmp_path, lambda _: None)
    assert pick.method is STORED
    assert pick.attempts[1].failed is not None
    assert pick.attempts[1].failed["outcome"] == "UNMEASURED"


def test_zeros_are_kept_and_nothing_divides_by_them(tmp_path: Path) -> None:
    assert _chosen(np.zeros((32, 32), np.float32), tmp_path).method is STORED


def test_full_rank_factors_are_refused_where_int4_is_smaller(tmp_path: Path) -> None:
    values = _random((128, 128))
    row = PlanRow("w", "C2", "attn.k", (128, 128), 0, "layer", COMPONENTS[1].chain)
    with AuditLog(tmp_path / "audit.jsonl") as log:
        pick = Trials(log).choose(row, Weights(values), _cosines(values))
    full = pick.attempts[1]
    assert full.method == "SVD full rank + int4"
    assert "bytes over plan" in {gate["name"] for gate in full.gates if gate["outcome"] == "FAIL"}
    assert pick.method is INT4


def test_a_layer_that_fails_together_replans_its_lowest_row(tmp_path: Path) -> None:
    values = _random((64, 64))
    with AuditLog(tmp_path / "audit.jsonl") as log:
        trials = Trials(log)
        pick = trials.choose(_row((64, 64)), Weights(values), _cosines(values))
        judged = trials.cosine.judge(0.9)
        moved = trials.advanced(pick, judged, _cosines(values))
    assert (pick.method, moved.method) == (INT4, INT8)
    assert moved.attempts[1].decision == "replan: row-int8"
    assert row_of(moved, 0).replans == 2


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
    """One dense layer of random weights."""
    return synth(tmp_path_factory.mktemp("sahc-model") / "small", "qwen3-tiny", layers=1, seed=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def _run(model: Path, text: Path, out: Path, **more: object) -> SahcResult:
    options = {"ctx_tokens": 32, "chunks": 4, "probe_chunks": 2, "ppl_limit": 1e9}
    return sahc(model, text, out, **{**options, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(small: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SahcResult]:
    out = tmp_path_factory.mktemp("sahc") / "out"
    return out, _run(small, text, out)


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
    decisions = [line.decision for line in read_audit(work_folder(out) / "audit.jsonl")]
    assert sum(said.startswith("replan: ") for said in decisions) == result.replans


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    whole: tuple[Path, SahcResult], small: Path, text: Path, tmp_path: Path
) -> None:
    class StoppedError(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "parts" and done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        _run(small, text, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    result = _run(small, text, tmp_path / "out")
    assert result.resumed == 3  # int4 alone and two parts
    assert result.sahc.sha256 == whole[1].sahc.sha256
    made = [work_folder(out) / "sahc.json" for out in (tmp_path / "out", whole[0])]
    assert made[0].read_bytes() == made[1].read_bytes()
    assert {path.name for path in made[0].parent.iterdir()} == {"sahc.json", "audit.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.sha256", "out.sahc"}


@pytest.mark.slow
def test_no_ratio_for_an_artifact_that_does_not_pass(
    small: Path, text: Path, tmp_path: Path, whole: tuple[Path, SahcResult]
) -> None:
    result = _run(small, text, tmp_path / "out", ppl_ratio_limit=0.5)  # nothing can pass that
    assert result.ratio is None
    assert all(row.ratio is None for row in (*result.rows, *result.components))
    assert result.rounds > 2
    assert {row.method for row in result.rows} == {"as stored"}
    assert not (tmp_path / "out").exists()


def test_a_packed_source_is_refused(small: Path, text: Path, tmp_path: Path) -> None:
    write_folder(small, tmp_path / "packed", "W4A16", group=32)
    with pytest.raises(UnsupportedError, match="give the checkpoint it was made of"):
        _run(tmp_path / "packed", text, tmp_path / "out")


def test_a_probe_leaves_the_original_alone(small: Path) -> None:
    from bitsmith.run.evaluate import open_model

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
