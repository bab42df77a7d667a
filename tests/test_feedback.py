"""Error feedback against the textbook's GPTQ, and what a row's result may depend on."""

from __future__ import annotations

import itertools

import numba
import numpy as np
import pytest

from bitsmith.formats import FORMATS, format_named
from bitsmith.formats.blocks import BlockFormat
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.passes.rounding import FEEDBACK_ONLY, Effort, round_rows

BLOCKED = [name for name, form in FORMATS.items() if isinstance(form, BlockFormat)]
DAMPING = 0.01


def correlated(width: int, tokens: int = 2000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((width // 4, width))
    inputs = rng.standard_normal((tokens, width // 4)) @ mixing + 3 * rng.standard_normal((tokens, width))
    inputs *= np.exp(0.7 * rng.standard_normal(width))
    return inputs.T @ inputs / tokens


def weights(out: int, width: int, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((out, width)) * 0.02).astype(np.float32)


def damped(moment: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    unit = np.diagonal(moment).mean()
    return moment / unit + damping * np.eye(len(moment))


def costs(form: BlockFormat, rows: np.ndarray, blocks: np.ndarray, metric: np.ndarray) -> np.ndarray:
    error = rows.astype(np.float64) - form.decode(blocks)
    return np.einsum("ij,jk,ik->i", error, metric, error, optimize=True)


def textbook_gptq(
    form: BlockFormat, rows: np.ndarray, metric: np.ndarray, importance: np.ndarray
) -> np.ndarray:
    """Return the codes of GPTQ, column by column with U from H⁻¹ = Uᵀ U, in float64.

    `importance` is `1 / U_jj²`, given because the search of scales decides by its last bit.
    """
    upper = np.linalg.cholesky(np.linalg.inv(metric)).T
    left = rows.astype(np.float64)
    codes = np.empty(rows.shape, np.uint8)
    np.testing.assert_allclose(importance, 1 / np.diagonal(upper) ** 2, rtol=1e-6)
    allowed = np.arange(form.first_code, len(form.levels))
    for column in range(rows.shape[1]):
        block, place = divmod(column, form.block_size)
        if place == 0:
            at = slice(block * form.block_size, (block + 1) * form.block_size)
            fields = form.fit(left[:, at].astype(np.float32), importance[at])
        sub = place // form.sub_size
        d, m = fields.d[:, None].astype(np.float64), fields.m[:, None].astype(np.float64)
        grid = d * fields.scales[:, sub, None] * form.levels[allowed] - m * fields.mins[:, sub, None]
        nearest = np.abs(grid - left[:, column, None]).argmin(axis=1)
        codes[:, column] = allowed[nearest]
        error = (left[:, column] - np.take_along_axis(grid, nearest[:, None], 1)[:, 0]) / upper[
            column, column
        ]
        left[:, column:] -= error[:, None] * upper[column, column:]
    return codes


@pytest.mark.parametrize("name", BLOCKED)
def test_feedback_is_gptq(name: str) -> None:
    form = FORMATS[name]
    assert isinstance(form, BlockFormat)
    width = max(4 * form.block_size, 256)
    moment, rows = correlated(width), weights(20, width)
    metric = InputMetric(moment, DAMPING, kind=np.float64)
    found = form.unpack(round_rows(form, rows, metric, FEEDBACK_ONLY))[1].reshape(rows.shape)
    (group,) = metric.groups(form.block_size)
    expected = textbook_gptq(form, rows, damped(moment), group.weights.astype(np.float32))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q6_K", "Q4_1", "Q8_0", "IQ4_XS", "Q2_0", "MXFP4"])
def test_float32_is_close_to_float64(name: str) -> None:
    form = format_named(name)
    moment, rows = correlated(768), weights(64, 768)
    assert isinstance(form, BlockFormat)
    single, double = (
        costs(form, rows, round_rows(form, rows, InputMetric(moment, kind=kind)), damped(moment)).sum()
        for kind in (np.float32, np.float64)
    )
    assert single == pytest.approx(double, rel=0.01)


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K", "Q5_1", "IQ4_NL", "Q1_0", "NVFP4"])
def test_a_row_depends_on_itself_alone(name: str) -> None:
    form = format_named(name)
    rows, metric = weights(150, 512), InputMetric(correlated(512))
    threads = numba.get_num_threads()
    whole = round_rows(form, rows, metric)
    cuts = [0, 1, 38, 102, 150]
    parts = [round_rows(form, rows[a:b], metric) for a, b in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(round_rows(form, rows[::-1].copy(), metric)[::-1], whole)
    try:
        numba.set_num_threads(1)
        np.testing.assert_array_equal(round_rows(form, rows, metric), whole)
    finally:
        numba.set_num_threads(threads)


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize(
    "effort",
    [
        {},
        {"descent": False, "refit": False},
        {"scales": False, "refit": False},
    ],
    ids=["all", "scales", "descent"],
)
def test_no_sweep_raises_the_cost_of_any_row(name: str, effort: dict[str, bool]) -> None:
    form = FORMATS[name]
    assert isinstance(form, BlockFormat)
    moment, rows = correlated(512), weights(40, 512)
    metric, exact = InputMetric(moment), damped(moment)
    # the first round starts from the same feedback whether or not its sweeps search scales
    before = costs(form, rows, round_rows(form, rows, metric, Effort(sweeps=0, **effort)), exact)
    start = before.sum()
    for sweeps in (1, 2, 3):
        after = costs(form, rows, round_rows(form, rows, metric, Effort(sweeps=sweeps, **effort)), exact)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    searched = form.scale_limits[0] < form.scale_limits[1]
    if effort.get("descent", True) or searched:
        assert before.sum() < start


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "Q4_K"])
def test_what_improves_a_panel_lowers_the_cost(name: str) -> None:
    form = FORMATS[name]
    assert isinstance(form, BlockFormat)
    moment, rows = correlated(512), weights(40, 512)
    metric, exact = InputMetric(moment), damped(moment)

    def cost(**effort: bool) -> float:
        return float(costs(form, rows, round_rows(form, rows, metric, Effort(**effort)), exact).sum())

    fed = cost(local=False)
    alone = cost(scales=False, descent=False, local=False)
    assert cost(scales=False, descent=False) == alone
    assert cost(descent=False) < 0.99 * fed
    assert cost(scales=False) < 0.99 * alone
    assert cost(scales=False, descent=False, refit=True) < 1.01 * alone  # the least of each panel, not of all


def test_block_diagonal_moments_equal_zeros_elsewhere() -> None:
    form = format_named("Q4_K")
    rows = weights(30, 1024)
    blocks = np.stack([correlated(256, seed=seed) for seed in range(4)])
    dense = np.zeros((1024, 1024))
    for index, block in enumerate(blocks):
        dense[index * 256 : (index + 1) * 256, index * 256 : (index + 1) * 256] = block
    expected = round_rows(form, rows, InputMetric(dense))
    np.testing.assert_array_equal(round_rows(form, rows, InputMetric(blocks)), expected)
    halves = np.stack([dense[a : a + 128, a : a + 128] for a in range(0, 1024, 128)])
    narrow = round_rows(form, rows, InputMetric(halves))  # two blocks to a superblock
    assert np.isfinite(form.decode(narrow)).all()
