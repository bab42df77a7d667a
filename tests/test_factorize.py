"""What matrices become as factors and trains: errors, metrics, turns of rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import linalg
from threadpoolctl import threadpool_info, threadpool_limits

from bitsmith.errors import BitsmithError
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
from bitsmith.run.factored_scheme import form_of, parse_scheme

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
