"""Weights as factors: what is computed, what is stored, what is read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import linalg
from threadpoolctl import threadpool_info, threadpool_limits

from bitsmith.archs import claim
from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.formats.integer import grid_named
from bitsmith.numerics.tensor_train import (
    ArrayRows,
    balanced_modes,
    fitted_cores,
    sweep,
    to_matrix,
    tt_tensor,
)
from bitsmith.passes.factorize import (
    ErrorMetric,
    FactorCode,
    factorize,
    head_energies,
    low_rank,
    with_remainder,
    without_columns,
)
from bitsmith.passes.trains import divisors, rounded_train, rounded_trains
from bitsmith.run.calibrate import calibrate
from bitsmith.run.evaluate import evaluate_all
from bitsmith.run.factored_scheme import form_of, parse_scheme
from bitsmith.run.folder import FolderRecord, plan_folder, write_folder
from bitsmith.run.overrides import split_rule
from bitsmith.store import TensorData, open_checkpoint, write_safetensors
from bitsmith.store.factored import form_bytes
from bitsmith.store.statistics import open_statistics

Float32 = NDArray[np.float32]

FLOATS = FactorCode(None)


@pytest.fixture(scope="module")
def weights() -> tuple[Float32, NDArray[np.float64]]:
    """A matrix (`96 64`) with a decaying spectrum and second moments of correlated, uneven inputs."""
    rng = np.random.default_rng(5)
    left, _ = np.linalg.qr(rng.standard_normal((96, 64)))
    right, _ = np.linalg.qr(rng.standard_normal((64, 64)))
    matrix = (left * 0.93 ** np.arange(64)) @ right.T
    inputs = rng.standard_normal((512, 64)) @ rng.standard_normal((64, 64)) * np.geomspace(0.05, 3, 64)
    return matrix.astype(np.float32), inputs.T @ inputs / 512


def kept_blocks(scheme: str) -> list[int]:
    return [int(block) for block in scheme.rpartition("x")[2].split(".")]


RULES = [
    (r"layers\.0\.mlp\.gate_proj", "SVD:r=16:int4"),
    (r"layers\.0\.mlp\.up_proj", "svd+int4:bpw=5.5"),
    (r"layers\.0\.mlp\.down_proj", "SVD:r=8:f16"),
    (r"layers\.0\.self_attn\.o_proj", "INT4:cols=16x0.2"),
    (r"layers\.0\.self_attn\.q_proj", "INT8:rows=16x1.3"),
    (r"layers\.1\.mlp\.gate_proj", "SVD+INT4:r=8:kernel=32:rows=16x0.1.4"),
    (r"layers\.1\.mlp\.down_proj", "TT:r=8:f32"),
    ("embed_tokens", "TT:r=12"),
    ("lm_head", "TT+SVD:r=6:core=24"),
]


@pytest.fixture(scope="module")
def mixed(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FolderRecord]:
    """A folder with every kind of factors in it, in several shards."""
    out = tmp_path_factory.mktemp("factored") / "mixed"
    return out, write_folder(tiny_qwen3, out, "INT4", group=32, tensor_types=RULES, shard_bytes=60_000)


# ---------------------------------------------------------------- what is computed


def test_whitened_low_rank_is_the_svd_of_the_weighed_matrix(
    weights: tuple[Float32, NDArray[np.float64]],
) -> None:
    matrix, moment = weights
    metric = ErrorMetric(moment, 0.01)
    assert metric.matrix is not None
    root = linalg.cholesky(metric.matrix, lower=True)
    for shape in (matrix, np.ascontiguousarray(matrix[:40])):  # tall, wide
        left, right = low_rank(shape, 12, metric)
        u, s, v = linalg.svd(shape.astype(np.float64) @ root, full_matrices=False)
        best = (u[:, :12] * s[:12]) @ v[:12] @ linalg.inv(root)
        assert np.abs(left @ right - best).max() < 1e-5 * np.abs(shape).max()
        assert metric.error(shape - (left @ right).astype(np.float32)) == pytest.approx(
            float((s[12:] ** 2).sum()), rel=1e-3
        )


def test_whitened_beats_plain_where_it_counts(weights: tuple[Float32, NDArray[np.float64]]) -> None:
    matrix, moment = weights
    metric, plain = ErrorMetric(moment, 0.01), ErrorMetric()
    for code in (FLOATS, FactorCode(grid_named("int8_g32")), FactorCode(grid_named("int4_g32"))):
        whitened = factorize(matrix, 32, code, metric).decoded
        unaware = factorize(matrix, 32, code, plain).decoded
        assert metric.error(matrix - whitened) < 0.8 * metric.error(matrix - unaware)
        assert plain.error(matrix - whitened) > plain.error(matrix - unaware)


def test_full_rank_is_exact(weights: tuple[Float32, NDArray[np.float64]]) -> None:
    matrix, moment = weights
    for one in (matrix, np.ascontiguousarray(matrix.T)):
        for metric in (ErrorMetric(), ErrorMetric(moment)) if one is matrix else (ErrorMetric(),):
            found = factorize(one, 64, FLOATS, metric).decoded
            assert np.abs(found - one).max() < 2e-6 * np.abs(one).max() * 64
            halves = factorize(one, 64, FactorCode(None, "F16"), metric).decoded
            assert 0 < np.abs(halves - one).max() < 1e-2 * np.abs(one).max()


def test_turns_of_rounding_only_lower_the_error(weights: tuple[Float32, NDArray[np.float64]]) -> None:
    matrix, moment = weights
    code = FactorCode(grid_named("int4_g32"))
    for metric in (ErrorMetric(), ErrorMetric(moment)):
        errors = [factorize(matrix, 40, code, metric, rounds).error for rounds in (1, 2, 6)]
        assert errors[0] >= errors[1] >= errors[2]
        assert errors[2] < errors[0]
        left, right = low_rank(matrix, 40, metric)
        naive = [code.grid.dequantize(code.grid.quantize(f.astype(np.float32))) for f in (left, right)]  # type: ignore[union-attr]
        assert errors[0] < metric.error(matrix - naive[0] @ naive[1])


def test_a_remainder_is_never_worse_than_its_codes_alone(
    weights: tuple[Float32, NDArray[np.float64]],
) -> None:
    matrix, moment = weights
    grid, code = grid_named("int4_g32"), FactorCode(grid_named("int8_g32"))
    noise = np.random.default_rng(1).standard_normal(matrix.shape).astype(np.float32)
    outlier = noise.copy()
    outlier[:, 3] *= 50
    for metric in (ErrorMetric(), ErrorMetric(moment), ErrorMetric(moment, feed=False)):
        for one in (noise, np.zeros_like(matrix)):
            alone = metric.error(one - metric.rounded(one, grid).decoded)
            found = with_remainder(one, 4, code, grid, metric, rounds=2)
            assert found.error <= alone
            assert found.error == pytest.approx(metric.error(one - found.decoded), rel=1e-6, abs=1e-12)
    plain = ErrorMetric()
    alone = plain.error(outlier - plain.rounded(outlier, grid).decoded)
    assert with_remainder(outlier, 4, code, grid, plain, rounds=2).error < 0.7 * alone


def test_variances_alone_weigh_columns(weights: tuple[Float32, NDArray[np.float64]]) -> None:
    matrix, moment = weights
    variances = np.diagonal(moment).astype(np.float32)
    metric, exact = ErrorMetric(importance=variances), ErrorMetric(np.diag(np.diagonal(moment)))
    code = FactorCode(grid_named("int4_g32"))
    left = exact.error(matrix - factorize(matrix, 24, code, metric).decoded)
    assert left < 0.9 * exact.error(matrix - factorize(matrix, 24, code, ErrorMetric()).decoded)
    assert not metric.feeds


def test_dropped_columns_are_made_up_for(weights: tuple[Float32, NDArray[np.float64]]) -> None:
    matrix, moment = weights
    metric, kept = ErrorMetric(moment, 0.01), np.arange(48)

    def cost(columns: Float32) -> float:
        whole = np.zeros_like(matrix)
        whole[:, kept] = columns
        return metric.error(matrix - whole)

    target, inner = without_columns(matrix, kept, metric)
    assert cost(target) < cost(matrix[:, kept])
    nudged = target + 1e-2 * np.random.default_rng(0).standard_normal(target.shape).astype(np.float32)
    assert cost(target) < cost(nudged)
    assert inner.matrix is not None
    assert metric.matrix is not None
    assert np.allclose(inner.matrix, metric.matrix[:48, :48] / np.diagonal(metric.matrix)[:48].mean())


def test_heads_are_ranked_by_what_they_put_out() -> None:
    rng = np.random.default_rng(2)
    output = rng.standard_normal((32, 24)).astype(np.float32)
    inputs = rng.standard_normal((400, 24)) * np.repeat([1, 0.1, 3], 8)
    moment = inputs.T @ inputs / 400
    brute = [
        float(np.mean(np.sum((inputs[:, 8 * h : 8 * h + 8] @ output[:, 8 * h : 8 * h + 8].T) ** 2, axis=1)))
        for h in range(3)
    ]
    assert np.allclose(head_energies(output, 3, moment), brute)
    with pytest.raises(BitsmithError, match="24 columns are not 5 heads"):
        head_energies(output, 5)


@pytest.mark.parametrize("shape", [(100, 48), (37, 20)])
def test_cores_are_the_train_that_is_measured(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(3).standard_normal(shape)
    modes = balanced_modes(*shape)
    for rank in (2, 9, 10_000):
        cores = fitted_cores(ArrayRows(matrix), (1, rank, rank, 1))
        rebuilt = to_matrix(tt_tensor(cores), modes, shape)
        [train] = sweep(matrix, [(1, rank, rank, 1)])
        error = float(np.linalg.norm(rebuilt - matrix) / np.linalg.norm(matrix))
        assert error == pytest.approx(train.relative_error, abs=1e-9)
        assert [core.shape[0] for core in cores] == list(train.ranks[:-1])


def exact_trains(shape: tuple[int, int], core: int, rank: int, scales: bool = False) -> Any:
    scheme = f"TT+SVD:core={core}:r={rank}:f32" if core else f"TT:r={rank}:f32{':scales' * scales}"
    return form_of(parse_scheme(scheme), shape, 0)


def test_a_product_of_trains_of_full_rank_is_the_whitened_svd(
    weights: tuple[Float32, NDArray[np.float64]],
) -> None:
    matrix, moment = weights
    for metric in (ErrorMetric(), ErrorMetric(moment)):
        trains = rounded_trains(ArrayRows(matrix), exact_trains((96, 64), 12, 10_000), metric)
        found = trains["weight_left"].rows() @ trains["weight_right"].rows()
        left, right = low_rank(matrix, 12, metric)
        assert np.abs(found - left @ right).max() < 1e-4 * np.abs(matrix).max()
    coarse = rounded_trains(ArrayRows(matrix), exact_trains((96, 64), 12, 9), ErrorMetric())
    found = coarse["weight_left"].rows() @ coarse["weight_right"].rows()
    assert ErrorMetric().error(matrix - found) < ErrorMetric().error(matrix)


def test_trains_with_scales_err_less_where_weights_are(
    weights: tuple[Float32, NDArray[np.float64]],
) -> None:
    matrix, moment = weights
    often, variances = np.geomspace(1, 1000, 96), np.diagonal(moment)
    scales = divisors(often, 96), divisors(variances, 64)
    plain, scaled = (exact_trains((96, 64), 0, 9, given) for given in (False, True))

    def cost(found: Float32) -> float:
        return float(np.einsum("i,j,ij->", often, variances, np.square(found - matrix)))

    found = rounded_train(ArrayRows(matrix), scaled, scales)
    assert cost(found.rows()) < 0.8 * cost(rounded_train(ArrayRows(matrix), plain).rows())
    assert np.allclose(found.rows(7, 20), found.rows()[7:20], atol=1e-6)
    assert divisors(None, 3).tolist() == [1, 1, 1]
    assert divisors(np.zeros(3), 3).tolist() == [1, 1, 1]


# ---------------------------------------------------------------- what is stored and read back


def test_plans_tell_every_byte(tiny_qwen3: Path, mixed: tuple[Path, FolderRecord]) -> None:
    out, record = mixed
    plan = plan_folder(tiny_qwen3, "INT4", group=32, tensor_types=RULES, shard_bytes=60_000)
    assert plan.file_bytes == record.file_bytes
    assert plan.file_bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert len(list(out.glob("*.safetensors"))) > 2
    with open_checkpoint(out) as checkpoint:
        for row in plan.rows:
            assert checkpoint[row.name].nbytes == row.nbytes, row.name
    by_name = {row.name: row for row in plan.rows}
    row = by_name["model.layers.0.mlp.up_proj.weight"]
    assert row.nbytes <= 5.5 * row.shape[0] * row.shape[1] / 8
    form = form_of(parse_scheme(row.scheme), row.shape, 32)
    assert row.nbytes == form_bytes(form)


def test_what_is_read_is_what_was_measured(tiny_qwen3: Path, mixed: tuple[Path, FolderRecord]) -> None:
    out, record = mixed
    with open_checkpoint(tiny_qwen3) as original, open_checkpoint(out) as checkpoint:
        assert set(original) == set(checkpoint)
        for tensor in record.tensors:
            want = np.asarray(original[tensor.name].read(), np.float32)
            found = checkpoint[tensor.name].read()
            error = float(np.square(want - found).sum() / np.square(want).sum())
            assert error == pytest.approx(tensor.relative_error, rel=1e-4, abs=1e-9), tensor.name
            assert error < 1
        kinds = {name: checkpoint[name].dtype for name in checkpoint}
    assert kinds["model.layers.0.mlp.gate_proj.weight"] == "rank 16 int4_g32"
    assert kinds["model.embed_tokens.weight"].startswith("TT 1,12,12,1 int8")
    assert kinds["lm_head.weight"].startswith("rank 24 TT 1,6,6,1 int8")
    assert kinds["model.layers.1.self_attn.q_proj.weight"] == "int4_g32"


def test_any_slice_of_rows_is_the_same(mixed: tuple[Path, FolderRecord]) -> None:
    out, record = mixed
    rng = np.random.default_rng(0)
    with open_checkpoint(out) as checkpoint:
        for tensor in record.tensors:
            if tensor.scheme != "BF16":
                ref = checkpoint[tensor.name]
                whole = ref.read()
                for _ in range(6):
                    start, stop = sorted(rng.integers(0, ref.n_rows + 1, 2).tolist())
                    assert np.allclose(ref.read(start, stop), whole[start:stop], atol=1e-6), tensor.name


def test_pruned_blocks_are_zero_and_the_others_are_not(mixed: tuple[Path, FolderRecord]) -> None:
    out, _ = mixed
    with open_checkpoint(out) as checkpoint:
        o = checkpoint["model.layers.0.self_attn.o_proj.weight"].read()
        q = checkpoint["model.layers.0.self_attn.q_proj.weight"].read()
        split = checkpoint["model.layers.1.mlp.gate_proj.weight"].read()
    assert np.flatnonzero(np.abs(o).sum(0)).tolist() == [*range(16), *range(32, 48)]
    assert np.flatnonzero(np.abs(q).sum(1)).tolist() == [*range(16, 32), *range(48, 64)]
    assert np.flatnonzero(np.abs(split).sum(1)).tolist() == [*range(32), *range(64, 80)]
    assert np.linalg.matrix_rank(split[:32]) == 8


def test_a_written_folder_is_evaluated(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 60)
    exact = [(r"layers\.0\.mlp", "SVD:r=256:f16")]
    pruned = [(r"layers\.0\.mlp", "SVD:r=4"), ("attn", "INT4:heads=0.5")]
    outs = [tmp_path / "exact", tmp_path / "pruned"]
    for out, rules in zip(outs, (exact, pruned), strict=True):
        write_folder(demo_model, out, "BF16", tensor_types=rules)
    losses = [found.mean_kld.value for found in evaluate_all(demo_model, outs, text, 32, 2)]
    assert losses[0] < 1e-4
    assert 1e-2 < losses[1] < 50


@pytest.fixture(scope="module")
def statistics(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    words = np.random.default_rng(0).choice(
        ["def ", "add", "(a, b)", ":\n", "    ", "return ", "x = ", "1"], 900
    )
    (folder / "text.txt").write_text("".join(words))
    calibrate(tiny_qwen3, folder / "text.txt", folder / "stats", ctx_tokens=32, chunks=8, saliency=False)
    return folder / "stats"


def test_statistics_decide_what_is_stored(tiny_qwen3: Path, statistics: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rules = [
        (r"layers\.0\.mlp\.up_proj", "SVD:r=12:f32"),
        ("embed_tokens", "TT:r=8:scales"),
        ("lm_head", "TT+SVD:r=9999:core=16:f32"),
    ]
    record = write_folder(tiny_qwen3, tmp_path / "out", "BF16", tensor_types=rules, statistics=statistics)
    plan = plan_folder(tiny_qwen3, "BF16", tensor_types=rules, statistics=statistics)
    assert plan.file_bytes == record.file_bytes
    assert {one.rounder for one in record.tensors} == {"", "weighted"}
    with open_checkpoint(tiny_qwen3) as original, open_checkpoint(tmp_path / "out") as checkpoint:
        specs = {spec.name: spec for spec, _ in claim(original)}
        known = open_statistics(statistics, specs.values())
        for tensor, rank in ((name, 12), ("lm_head.weight", 16)):
            weight = np.asarray(original[tensor].read(), np.float64)
            inputs = known.hugging_face(specs[tensor])
            assert inputs is not None
            assert inputs.moment is not None
            moment = inputs.moment.astype(np.float64)
            unit = np.diagonal(moment).mean()
            root = linalg.cholesky(moment / unit + 0.01 * np.eye(len(moment)), lower=True)
            _, sigma, _ = linalg.svd(weight @ root)  # Eckart, Young, Mirsky in that metric, by itself
            left = (weight - checkpoint[tensor].read()) @ root
            assert np.square(left).sum() == pytest.approx(np.square(sigma[rank:]).sum(), rel=1e-4)
        rows = checkpoint["model.embed_tokens.weight"]
        assert rows.dtype.endswith("scaled")
        assert np.allclose(rows.read(5, 9), rows.read()[5:9], atol=1e-6)


def test_a_killed_run_goes_on(tiny_qwen3: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    rules = [(r"layers\.0\.mlp", "SVD:r=6")]

    def kill(stage: str, done: int, total: int) -> None:
        del total
        if stage == "round" and done == 3:
            raise KeyboardInterrupt

    write_folder(tiny_qwen3, undisturbed, "BF16", tensor_types=rules)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tiny_qwen3, killed, "BF16", tensor_types=rules, progress=kill)
    assert not killed.exists()
    assert write_folder(tiny_qwen3, killed, "BF16", tensor_types=rules).resumed == 2
    for file in undisturbed.iterdir():
        assert (killed / file.name).read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "undisturbed"]


def test_key_and_value_heads_that_nobody_reads_go_too(tiny_qwen3: Path) -> None:
    plan = plan_folder(tiny_qwen3, "INT4:heads=0.25")
    schemes = {row.name.split("model.layers.0.")[-1]: row.scheme for row in plan.rows}
    q, k, v, o = (schemes[f"self_attn.{side}_proj.weight"] for side in "qkvo")
    [head] = kept_blocks(q)
    assert kept_blocks(o) == [head]
    assert kept_blocks(k) == kept_blocks(v) == [head // 2]
    assert schemes["mlp.up_proj.weight"] == "INT4"
    with pytest.raises(BitsmithError, match="leaves to measurement"):
        form_of(parse_scheme("INT4:heads=0.25"), (64, 64), 0)


def test_factors_do_not_depend_on_threads_of_blas() -> None:
    rng = np.random.default_rng(0)
    matrix, inputs = (rng.standard_normal(shape).astype(np.float32) for shape in ((768, 256), (999, 256)))
    metric, found = ErrorMetric(inputs.T @ inputs), []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            cores = fitted_cores(ArrayRows(matrix), (1, 60, 60, 1))
            found.append(
                [*cores, *low_rank(matrix, 200, metric), factorize(matrix, 200, FLOATS, metric).decoded]
            )
            blas = [info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"]
            assert set(blas) == {threads}
    for alone, together in zip(*found, strict=True):
        assert np.array_equal(alone, together)


def test_ranks_by_error_and_heads_by_output(demo_model: Path) -> None:
    rules = [
        (r"layers\.3\.mlp\.up_proj", "SVD:error=0.3"),
        ("in_proj_qkv", "SVD+INT4:r=32:kernel=qk:heads=.5"),
    ]
    plan = plan_folder(demo_model, "INT4:heads=0.5", tensor_types=rules)
    schemes = {row.name: row.scheme for row in plan.rows}
    rank = int(schemes["model.layers.3.mlp.up_proj.weight"].split("=")[1])
    with open_checkpoint(demo_model) as checkpoint:
        sigma = np.linalg.svd(checkpoint["model.layers.3.mlp.up_proj.weight"].read(), compute_uv=False)
    tails = [float(np.sqrt(np.square(sigma[r:]).sum() / np.square(sigma).sum())) for r in (rank - 1, rank)]
    assert tails[1] <= 0.3 < tails[0]
    assert schemes["model.layers.0.mlp.up_proj.weight"] == "INT4"
    kept = {name: kept_blocks(scheme) for name, scheme in schemes.items() if scheme.startswith("INT4:")}
    attention, delta = "model.layers.3.self_attn.", "model.layers.0.linear_attn."
    heads = kept[f"{attention}o_proj.weight"]
    assert heads == kept[f"{attention}q_proj.weight"]
    assert len(heads) == 2
    values = kept[f"{delta}out_proj.weight"]
    assert values == kept[f"{delta}in_proj_z.weight"]
    mixed = schemes[f"{delta}in_proj_qkv.weight"]
    assert ":kernel=512:" in mixed
    assert kept_blocks(mixed) == [*range(8), *(8 + head for head in values)]  # q and k stay
    assert len(values) == 4


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("SVD", "needs one of r=, bpw= and error="),
        ("SVD:r=4:bpw=2", "needs one of"),
        ("SVD:r=0", "no value that r= could have"),
        ("SVD:r=x", "no value"),
        ("SVD:bpw=nan", "no value"),
        ("SVD:r=4:int3", "unknown option 'INT3'"),
        ("INT4:r=4", "has no factors"),
        ("SVD:r=4:kernel=8", "kernel= needs codes"),
        ("SVD+INT4:r=4:f16", "beside codes factors are"),
        ("TT:r=4:rows=16x0", "keeps all rows"),
        ("TT:r=4:heads=0.5", "keeps all rows"),
        ("TT:r=4:scales", "needs statistics of"),
        ("TT+SVD:r=4:core=8:scales", "scales are for TT"),
        ("TT+SVD:r=4", "core= is for TT\\+SVD"),
        ("SVD:r=4:core=8", "core= is for TT\\+SVD"),
        ("SVD:r=4:r=5", "says twice what rank is"),
        ("SVD:error=1", "no value that error="),
        ("INT4:heads=0", "no value that heads="),
        ("INT4:heads=0.5:rows=16x0", "heads= says which"),
        ("SVD+INT4:r=4:error=0.5", "needs one of"),
        ("SVD+INT4:error=0.5", "error= is for SVD"),
        ("SVD+INT4:r=4:kernel=qk", "only DeltaNet's in_proj_qkv"),
        ("SVD:r=4:[red]", "unknown option"),
        ("INT4:rows=16x3.1", "rows keeps blocks"),
        ("INT4:cols=48x0", "columns keeps blocks"),
        ("INT4:rows=16x", "no value"),
        ("SVD:bpw=0.01", "takes 0."),
        ("SVD+INT4:r=4:kernel=100000", "has a kernel"),
        ("SVDX:r=4", "unknown scheme"),
    ],
)
def test_schemes_that_make_no_sense(tiny_qwen3: Path, tmp_path: Path, scheme: str, said: str) -> None:
    with pytest.raises(BitsmithError, match=said):
        write_folder(tiny_qwen3, tmp_path / "out", scheme)
    assert not (tmp_path / "out").exists()


def test_other_packings_do_not_mix_in(tiny_qwen3: Path) -> None:
    with pytest.raises(BitsmithError, match="cannot be in one folder"):
        plan_folder(tiny_qwen3, "SVD:r=4", tensor_types=[("down_proj", "W4A16")])
    with pytest.raises(BitsmithError, match="groups of"):
        plan_folder(tiny_qwen3, "SVD:r=4", group=48)
    with pytest.raises(BitsmithError, match="matches"):
        plan_folder(tiny_qwen3, "W4A16", tensor_types=[("embed_tokens", "W8A16")])  # these pack no tables


MODULE = "model.layers.0.mlp.gate_proj"


def settings(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def module(**fields: Any) -> Callable[[Path], None]:
    return settings(lambda said: said["modules"][MODULE].update(fields))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (settings(lambda said: said.update(version=2)), "factors of version 2"),
        (settings(lambda said: said.pop("modules")), "modules is no map"),
        (settings(lambda said: said["modules"].update({MODULE: 3})), "is no map"),
        (settings(lambda said: said["modules"].pop(MODULE)), "belongs to no factored weight"),
        (settings(lambda said: said["modules"].update({"x": said["modules"][MODULE]})), "is missing"),
        (module(rank=15), r"expected I32 \[\d+, \d+\]"),
        (module(rank=-1), "is not within"),
        (module(rank="16"), "is no list of integers"),
        (module(rank=0), "has rank 0"),
        (module(factors="int3"), "factors is int3"),
        (module(factors=["int4"]), "factors is"),
        (module(form="tucker"), "form is tucker"),
        (module(shape=[1 << 40, 64]), "is not within"),
        (module(shape=[4]), "expected out and in"),
        (module(rows={"size": 16, "kept": [9999]}), "rows keeps blocks"),
        (module(rows={"size": 0, "kept": [0]}), "rows keeps blocks"),
        (module(rows={"size": 16}), "kept"),
        (module(more=1), "more"),
        (
            settings(lambda said: said["modules"]["model.embed_tokens"].update(ranks=[1, 12, 12])),
            "has no three cores",
        ),
        (
            settings(lambda said: said["modules"]["model.embed_tokens"].update(modes=[[1, 1, 1]] * 2)),
            "has modes for 1x1",
        ),
        (settings(lambda said: said["modules"]["model.embed_tokens"].update(scales=1)), "scales is 1"),
        (settings(lambda said: said["modules"]["model.embed_tokens"].update(scales=True)), "is missing"),
        (settings(lambda said: said["modules"]["lm_head"].pop("weight_left")), "weight_left"),
        (
            settings(lambda said: said["modules"]["lm_head"].update(weight_right=3)),
            "weight_right is no train",
        ),
        (
            settings(lambda said: said["modules"]["lm_head"]["weight_left"].update(shape=[9, 9])),
            "multiplies",
        ),
    ],
)
def test_damaged_settings_are_refused(
    mixed: tuple[Path, FolderRecord], tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(mixed[0], folder)
    damage(folder)
    with pytest.raises((DamagedFileError, UnsupportedError), match=said):
        open_checkpoint(folder)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def tensor(name: str, dtype: str, shape: tuple[int, ...], size: int) -> TensorData:
        return TensorData(f"a.{name}", dtype, shape, [bytes(size)])

    said = {"form": "factored", "shape": [8, 16], "rank": 4, "factors": "f32"}
    config = {"quantization_config": {"quant_method": "bitsmith", "version": 1, "modules": {"a": said}}}
    left, right = tensor("weight_left", "F32", (8, 4), 128), tensor("weight_right", "F32", (4, 16), 256)
    for number, (parts, wrong) in enumerate(
        [
            ([left], "is missing, rank 4 f32 needs it"),
            ([left, tensor("weight_right", "F32", (4, 8), 128)], r"is F32 \[4, 8\], expected F32 \[4, 16\]"),
            ([left, tensor("weight_right", "F16", (4, 16), 128)], "is F16"),
            ([left, right, tensor("weight", "F32", (8, 16), 512)], "is stored plainly and as factors"),
            ([left, right, tensor("weight_rest", "F32", (8, 16), 512)], "belongs to no factored weight"),
        ]
    ):
        folder = tmp_path / str(number)
        write_safetensors(folder, [*parts, TensorData("b", "I8", (1,), [bytes(1)])], config)
        with pytest.raises(DamagedFileError, match=wrong):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        ("ffn_down=Q6_K", ("ffn_down", "Q6_K")),
        (
            r"layers\.0\.(?:gate|up)_proj=SVD:bpw=4.5:int8",
            (r"layers\.0\.(?:gate|up)_proj", "SVD:bpw=4.5:int8"),
        ),
        ("qkv=SVD+INT4:r=8:kernel=qk:rows=64x0.2", ("qkv", "SVD+INT4:r=8:kernel=qk:rows=64x0.2")),
        ("(?<=mlp.)up=TT+SVD:core=9:r=3", ("(?<=mlp.)up", "TT+SVD:core=9:r=3")),
        ("a=b=INT8", ("a=b", "INT8")),
        ("a=SVD:[r]=4", ("a=SVD:[r]", "4")),  # an unknown type, refused later
        ("SVD:r=4", ("SVD:r", "4")),
        ("=INT8", None),
        ("up=", None),
        ("up", None),
    ],
)
def test_rules_are_told_from_options(rule: str, parts: tuple[str, str] | None) -> None:
    assert split_rule(rule) == parts
