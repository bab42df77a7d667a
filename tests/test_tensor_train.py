"""TT-SVD against tensorly, the streamed sweep against the one in memory, the seed's configurations."""

import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.errors import BitsmithError
from bitsmith.numerics import tensor_train as tt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorly
    from tensorly.decomposition import tensor_train as tensorly_train


def decaying(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    return rng.standard_normal((rows, columns)) * 0.93 ** np.arange(columns) @ basis


def reconstructed(matrix: np.ndarray, modes: tt.Modes, ranks: tuple[int, ...]) -> np.ndarray:
    cores = tt.tt_svd(tt.to_tensor(matrix, modes), ranks)
    return tt.to_matrix(tt.tt_tensor(cores), modes, matrix.shape)


def relative(matrix: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(matrix - other) / np.linalg.norm(matrix))


@pytest.mark.parametrize(
    ("rows", "columns", "cores", "ranks"),
    [
        (120, 64, 3, (1, 4, 6, 1)),
        (120, 64, 3, (1, 10, 30, 1)),
        (97, 30, 3, (1, 6, 5, 1)),
        (120, 64, 4, (1, 5, 9, 4, 1)),
        (60, 49, 2, (1, 7, 1)),
        (120, 64, 3, (1, 512, 4096, 1)),
    ],
)
def test_reconstruction_is_tensorlys(rows: int, columns: int, cores: int, ranks: tuple[int, ...]) -> None:
    matrix = decaying(rows, columns)
    modes = tt.balanced_modes(rows, columns, cores)
    tensor = tt.to_tensor(matrix, modes)
    theirs = tensorly_train(tensorly.tensor(tensor), rank=list(ranks))
    mine = tt.tt_svd(tensor, ranks)
    assert tuple(core.shape for core in mine) == tuple(core.shape for core in theirs)
    assert np.allclose(tt.tt_tensor(mine), theirs.to_tensor(), atol=1e-12)
    used = tt.possible_ranks(modes.sizes, ranks)
    assert sum(core.size for core in theirs) == tt.parameter_count(modes.sizes, used)


@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_full_rank_is_exact_for_any_shape(rows: int, columns: int, cores: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns))
    modes = tt.balanced_modes(rows, columns, cores)
    assert np.allclose(reconstructed(matrix, modes, (1, *[10**6] * (cores - 1), 1)), matrix, atol=1e-11)


@pytest.mark.parametrize(("rows", "columns"), [(120, 64), (97, 30), (1009, 48), (12, 200), (1, 7), (5, 1)])
def test_the_stream_finds_what_memory_finds(monkeypatch, rows: int, columns: int) -> None:
    monkeypatch.setattr(tt, "SLAB_BYTES", 1)  # a slab for every middle index
    matrix = decaying(rows, columns)
    modes = tt.balanced_modes(rows, columns)
    asked = [(1, 2, 3, 1), (1, 5, 5, 1), (1, 5, 40, 1), (1, 999, 999, 1)]
    for ranks, train in zip(asked, tt.sweep(matrix, asked, modes), strict=True):
        other = reconstructed(matrix, modes, ranks)
        cosine = (matrix * other).sum(1) / np.linalg.norm(matrix, axis=1)
        length = np.linalg.norm(other, axis=1)
        cosine = np.divide(cosine, length, out=np.zeros_like(cosine), where=length > 0)
        assert train.relative_error == pytest.approx(relative(matrix, other), rel=1e-6, abs=1e-12)
        assert train.mean_row_cosine == pytest.approx(cosine.mean(), rel=1e-6, abs=1e-9)
        assert train.asked_ranks == ranks
        assert train.ranks == tt.possible_ranks(modes.sizes, ranks)
        assert train.padded_rows == np.prod(modes.rows) - rows


def test_ratio_and_gate() -> None:
    matrix = decaying(120, 64)
    small, full = tt.sweep(matrix, [(1, 2, 2, 1), (1, 999, 999, 1)])
    p1, p2, p3 = small.modes.sizes
    assert small.parameters == p1 * 2 + 2 * p2 * 2 + 2 * p3
    assert small.ratio == 120 * 64 / small.parameters
    assert small.passes_gate is False
    assert full.passes_gate is True
    assert full.mean_row_cosine == pytest.approx(1.0)
    assert full.ratio < 1, "a Tensor-Train of full rank holds more than the matrix"


def test_a_planted_train_is_recovered() -> None:
    rng = np.random.default_rng(1)
    modes = tt.Modes((4, 6, 5), (4, 4, 4))
    cores = [rng.standard_normal(shape) for shape in ((1, 16, 3), (3, 24, 2), (2, 20, 1))]
    matrix = tt.to_matrix(tt.tt_tensor(cores), modes, (120, 64))
    planted, below = tt.sweep(matrix, [(1, 3, 2, 1), (1, 2, 2, 1)], modes)
    assert planted.relative_error < 1e-7
    assert below.relative_error > 0.1


def test_the_seeds_configurations_scale_with_the_columns() -> None:
    assert tt.scaled_ranks(4096) == tt.SEED_RANKS
    assert tt.scaled_ranks(256)[-1] == (1, 32, 256, 1)
    assert tt.scaled_ranks(64)[0] == (1, 1, 1, 1)
    trains = tt.sweep(decaying(512, 256))
    assert [train.asked_ranks for train in trains] == list(tt.scaled_ranks(256))
    errors = [train.relative_error for train in trains]
    assert errors == sorted(errors, reverse=True)


def test_modes_are_balanced_and_pad_little() -> None:
    for rows in (248320, 12288, 4096, 151936, 97, 1):
        factors = tt.balanced_modes(rows, 1).rows
        assert rows <= np.prod(factors) < rows + max(2, rows // 1000) + 3
        assert max(factors) <= 4 * min(factors) + 3
        assert factors[1] == max(factors)
    assert np.prod(tt.balanced_modes(248320, 4096).rows) == 248320


def test_svd_core_is_the_product_of_both_trains() -> None:
    matrix = decaying(120, 64)
    train = tt.svd_core(matrix, core_rank=12, ranks=(1, 6, 5, 1))
    # the signs of singular vectors are free and the factors' trains depend on them: the largest entry decides
    found = np.linalg.svd(matrix)[2]
    right = (found * np.sign(np.take_along_axis(found, np.abs(found).argmax(1)[:, None], 1)))[:12]
    tall_modes, wide_modes = tt.balanced_modes(120, 12), tt.balanced_modes(12, 64)
    tall = reconstructed(matrix @ right.T, tall_modes, (1, 6, 5, 1))
    wide = reconstructed(right, wide_modes, (1, 6, 5, 1))
    assert train.core_rank == 12
    assert train.relative_error == pytest.approx(relative(matrix, tall @ wide), rel=1e-6)
    exact = tt.svd_core(matrix, core_rank=12, ranks=(1, 999, 999, 1))
    values = np.linalg.svd(matrix, compute_uv=False)
    best = np.sqrt((values[12:] ** 2).sum() / (values**2).sum())
    assert exact.relative_error == pytest.approx(best, rel=1e-9)
    single = tt.svd_core(matrix, 12, (1, 6, 5, 1), known=-found.T, dtype=np.float32)
    assert single.relative_error == pytest.approx(train.relative_error, rel=1e-5)
    assert single.mean_row_cosine == pytest.approx(train.mean_row_cosine, rel=1e-4)


def test_a_sweep_in_float32_finds_what_float64_finds() -> None:
    matrix = decaying(512, 256)
    for single, double in zip(tt.sweep(matrix, dtype=np.float32), tt.sweep(matrix), strict=True):
        assert single.relative_error == pytest.approx(double.relative_error, abs=1e-5)
        assert single.mean_row_cosine == pytest.approx(double.mean_row_cosine, abs=1e-4)


def test_memory_stays_far_below_the_matrix(monkeypatch) -> None:
    monkeypatch.setattr(tt, "SLAB_BYTES", 1 << 20)
    rows, columns = 40_000, 64

    class Source:
        shape = (rows, columns)

        def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
            index = np.arange(start, rows if stop is None else stop, dtype=np.float32)
            return np.sin(np.outer(index, np.arange(1, columns + 1, dtype=np.float32)))

    tracemalloc.start()
    trains = tt.sweep(Source(), [(1, 8, 8, 1), (1, 64, 64, 1)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    p1, _, p3 = trains[0].modes.sizes
    m1, _, m3 = trains[0].modes.rows
    slab = max(tt.SLAB_BYTES, 8 * m1 * m3 * columns)
    assert peak < 8 * (p1**2 + 4 * p3**2) + 8 * slab
    assert peak < 8 * rows * columns / 1.5


def test_zeros_are_not_measured() -> None:
    for train in tt.sweep(np.zeros((24, 12)), [(1, 2, 2, 1)]):
        assert (train.relative_error, train.mean_row_cosine, train.passes_gate) == (None, None, None)


def test_rows_of_zeros_do_not_count() -> None:
    matrix = decaying(30, 16)
    matrix[::2] = 0
    (train,) = tt.sweep(matrix, [(1, 999, 999, 1)])
    assert train.mean_row_cosine == pytest.approx(1.0)


def test_what_cannot_be_decomposed_is_refused() -> None:
    matrix = np.ones((6, 4))
    for ranks in ((1, 2, 1), (2, 2, 2, 1), (1, 0, 2, 1)):
        with pytest.raises(BitsmithError, match="ranks"):
            tt.sweep(matrix, [ranks])
    with pytest.raises(BitsmithError, match="expected a matrix"):
        tt.sweep(np.ones(5))
    with pytest.raises(BitsmithError, match="cannot hold"):
        tt.sweep(matrix, modes=tt.Modes((1, 1, 2), (1, 2, 2)))
    with pytest.raises(BitsmithError, match="three cores"):
        tt.sweep(matrix, modes=tt.Modes((2, 3), (2, 2)))
    matrix[1, 1] = np.nan
    with pytest.raises(BitsmithError, match="finite"):
        tt.sweep(matrix)
