"""Integer grids: hand-computed codes, round trips, searches that never lose, and error feedback."""

from __future__ import annotations

from dataclasses import replace

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from bitsmith.errors import BitsmithError
from bitsmith.formats.integer import GRIDS, Coded, GridFormat, grid_named, pack_codes, unpack_codes
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.passes.choice import Choice
from bitsmith.passes.grid_feedback import choose_grid, feedback
from bitsmith.passes.rounding import FEEDBACK_ONLY
from bitsmith.store.site_statistics import SiteStatistics

Float32 = NDArray[np.float32]
SEARCHED = [name for name, grid in GRIDS.items() if not grid.seed]
SEEDS = {"int8": "cellm-i8", "int4": "cellm-i4", "int2": "cellm-i2", "int1_g128": "cellm-q1_0_g128"}
FEW = settings(max_examples=60, deadline=None, database=None)


def rows_of(*values: float) -> Float32:
    return np.array([values], np.float32)


def weighted_error(rows: Float32, decoded: Float32, weights: NDArray[np.float64]) -> float:
    return float((weights * (rows.astype(np.float64) - decoded) ** 2).sum())


# ---------------------------------------------------------------- golden codes


def test_cellm_i8_by_hand() -> None:
    coded = GRIDS["cellm-i8"].quantize(rows_of(127, -64, 0.5, -0.5, 1.5, 126.49))
    assert coded.scales.tolist() == [[1.0]]
    assert (coded.codes[0].astype(int) - 128).tolist() == [127, -64, 1, -1, 2, 126]  # halves go away from 0


def test_cellm_i4_by_hand() -> None:
    coded = GRIDS["cellm-i4"].quantize(rows_of(7, -3.5, 0.5, -0.49, 2.5))
    assert coded.scales.tolist() == [[1.0]]
    assert coded.codes.tolist() == [[15, 4, 9, 8, 11]]
    assert pack_codes(coded.codes, 4, pad=8).tobytes() == bytes([0x4F, 0x89, 0x8B])


def test_cellm_i2_by_hand() -> None:
    coded = GRIDS["cellm-i2"].quantize(rows_of(1.5, 1.0, 0.99, 0, -0.01, -1, -1.01))
    assert coded.scales.tolist() == [[1.0]]
    assert coded.codes.tolist() == [[3, 3, 2, 2, 1, 1, 0]]
    assert pack_codes(coded.codes, 2, pad=1).tobytes() == bytes([0b10_10_11_11, 0b01_00_01_01])
    assert GRIDS["cellm-i2"].dequantize(coded).tolist() == [[1.5, 1.5, 0.5, 0.5, -0.5, -0.5, -1.5]]


def test_cellm_q1_by_hand() -> None:
    rows = np.zeros((1, 130), np.float32)
    rows[0, :4], rows[0, 128:] = [1, -2, 0, 29], [3, -1]
    coded = GRIDS["cellm-q1_0_g128"].quantize(rows)
    assert coded.scales.tolist() == [[0.25, 2.0]]  # 32 over 128 weights, 4 over the 2 of the tail
    assert np.flatnonzero(coded.codes[0]).tolist() == [0, 3, 128]  # a zero has no bit, unlike ggml's


@pytest.mark.parametrize(("name", "code"), [("cellm-i8", 128), ("cellm-i4", 8), ("cellm-i2", 2)])
def test_cellm_gives_a_row_of_zeros_the_scale_one(name: str, code: int) -> None:
    coded = GRIDS[name].quantize(np.zeros((2, 5), np.float32))
    assert coded.scales.tolist() == [[1.0], [1.0]]
    assert (coded.codes == code).all()


def test_cellm_takes_codes_before_it_rounds_the_scale() -> None:
    coded = GRIDS["cellm-i4"].quantize(rows_of(7.003, 0.5001))
    assert coded.scales.tolist() == [[1.0]]  # of 1.00043, under which 0.5001 is 0.4999 and goes to zero
    assert coded.codes.tolist() == [[15, 8]]
    assert GRIDS["int4"].nearest(rows_of(7.003, 0.5001), coded.scales).tolist() == [[15, 9]]


def test_cellm_groups_by_hand() -> None:
    rows = np.zeros((1, 40), np.float32)
    rows[0, 0], rows[0, 32], rows[0, 33] = 14, 3.5, -1.75
    coded = GRIDS["cellm-i4_g32"].quantize(rows)
    assert coded.scales.tolist() == [[2.0, 0.5]]
    assert coded.codes[0, [0, 1, 32, 33]].tolist() == [15, 8, 15, 4]


def test_asymmetric_by_hand() -> None:
    coded = GRIDS["int4a"].quantize(rows_of(-1.0, 0.0, 6.5, 0.26), search=False)
    assert (coded.scales.tolist(), coded.zeros.tolist()) == ([[0.5]], [[2]])  # type: ignore[union-attr]
    assert coded.codes.tolist() == [[0, 2, 15, 3]]
    assert GRIDS["int4a"].dequantize(coded).tolist() == [[-1.0, 0.0, 6.5, 0.5]]


def test_bits_per_weight_by_hand() -> None:
    assert GRIDS["int4_g128"].bpw(1024) == 4 + 16 / 128
    assert GRIDS["int4a_g32"].bpw(1024) == 4 + (16 + 4) / 32
    assert GRIDS["int2"].bpw(1024) == 2 + 16 / 1024
    assert GRIDS["cellm-q1_0_g128"].row_bytes(130) == 2 * 18
    assert GRIDS["cellm-i4"].row_bytes(5) == 3 + 2


# ---------------------------------------------------------------- properties


@FEW
@given(st.data())
def test_what_lies_on_the_grid_comes_back(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["int8", "int4", "int2", "int1", *(n for n in GRIDS if "cellm" in n)]))
    grid = GRIDS[name]
    columns = data.draw(st.integers(1, 150))
    codes = data.draw(hnp.arrays(np.uint8, (3, columns), elements=st.integers(0, grid.top)))
    if grid.bits >= 4:
        codes = np.maximum(codes, 1)  # cellm has no -8
    width = grid.width(columns)
    codes[:, ::width] = grid.top  # the largest magnitude of each group gives its scale
    scales = np.ldexp(
        1.0, data.draw(hnp.arrays(np.int64, (3, grid.groups(columns)), elements=st.integers(-8, 4)))
    )
    rows = grid.dequantize(Coded(codes, scales.astype(np.float32)))
    found = grid.quantize(rows, search=False)
    assert found.codes.tolist() == codes.tolist()
    assert found.scales.tolist() == scales.tolist()
    if not grid.seed:
        assert np.array_equal(grid.dequantize(grid.quantize(rows)), rows)


@FEW
@given(
    rows=hnp.arrays(np.float32, (2, 96), elements=st.floats(-1e4, 1e4, width=32)),
    importance=hnp.arrays(np.float32, 96, elements=st.floats(0, 1e3, width=32)) | st.none(),
    name=st.sampled_from(SEARCHED),
)
def test_the_search_is_never_worse_than_the_largest_magnitude(
    rows: Float32, importance: Float32 | None, name: str
) -> None:
    grid = GRIDS[name]
    weights = np.ones(96) if importance is None else importance.astype(np.float64)
    weights = np.maximum(weights / (weights.max() or 1.0), 1e-9)
    found = grid.quantize(rows, importance)
    for other in [
        grid.quantize(rows, search=False),
        *(GRIDS[s].quantize(rows) for n, s in SEEDS.items() if n == name),
    ]:
        ours, theirs = (weighted_error(rows, grid.dequantize(coded), weights) for coded in (found, other))
        energy = weighted_error(rows, np.zeros_like(rows), weights)
        assert ours <= theirs * (1 + 1e-5) + 1e-11 * energy


@FEW
@given(
    rows=hnp.arrays(np.float32, (2, 70), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    name=st.sampled_from(list(GRIDS)),
)
def test_scales_are_finite_halves_and_codes_in_range(rows: Float32, name: str) -> None:
    grid = GRIDS[name]
    with np.errstate(over="ignore"):
        coded = grid.quantize(rows)
    assert coded.codes.shape == rows.shape
    assert coded.codes.max() <= grid.top
    assert coded.scales.shape == (2, grid.groups(70))
    assert np.array_equal(coded.scales.astype(np.float16).astype(np.float32), coded.scales)
    assert np.isfinite(grid.dequantize(coded)).all()
    if coded.zeros is not None:
        assert coded.zeros.max() <= grid.top
        assert (grid.dequantize(coded)[rows == 0] == 0).all()


@FEW
@given(bits=st.sampled_from([1, 2, 4, 8]), data=st.data())
def test_packing_is_undone_and_has_the_size_it_says(bits: int, data: st.DataObject) -> None:
    columns = data.draw(st.integers(0, 70))
    codes = data.draw(hnp.arrays(np.uint8, (2, columns), elements=st.integers(0, 2**bits - 1)))
    packed = pack_codes(codes, bits, pad=1)
    assert np.array_equal(unpack_codes(packed, bits, columns), codes)
    grid = GridFormat("any", bits)
    if bits > 1 and columns:
        assert packed.shape[1] + 2 == grid.row_bytes(columns)
    loose = np.unpackbits(packed, axis=1, bitorder="little")[:, : columns * bits].reshape(2, columns, bits)
    assert np.array_equal(loose @ (1 << np.arange(bits)), codes)


def test_a_gaussian_row_gets_the_scale_that_theory_says() -> None:
    rows = np.random.default_rng(0).standard_normal((8, 4096)).astype(np.float32)
    energy = float((rows.astype(np.float64) ** 2).sum())
    for name, distortion in (("int2", 0.1188), ("int1", 0.3634)):  # Max (1960), table II
        grid = GRIDS[name]
        error = weighted_error(rows, grid.dequantize(grid.quantize(rows)), np.ones(4096)) / energy
        assert error == pytest.approx(distortion, rel=0.02)


def test_a_weight_that_matters_keeps_its_place() -> None:
    rows = np.random.default_rng(1).standard_normal((4, 128)).astype(np.float32)
    importance = np.ones(128, np.float32)
    importance[5] = 1e6
    for name in ("int8", "int4_g32", "int2", "int4a_g64", "int1_g128"):
        plain, weighed = (GRIDS[name].dequantize(GRIDS[name].quantize(rows, h)) for h in (None, importance))
        assert np.abs(weighed - rows)[:, 5].max() <= np.abs(plain - rows)[:, 5].max()
        assert np.allclose(weighed[:, 5], rows[:, 5], rtol=2e-3), name


def test_bfloat_scales_have_eight_bits() -> None:
    grid = replace(GRIDS["int4_g32"], scale_type="BF16")
    scales = grid.quantize(np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)).scales
    assert (scales.view(np.uint32) & 0xFFFF == 0).all()
    assert grid.stored(np.array([1.00390625, 3.4e38], np.float32)).tolist() == [1.0, 3.3895313892515355e38]


def test_codes_do_not_depend_on_threads() -> None:
    rows = np.random.default_rng(3).standard_normal((130, 1024)).astype(np.float32)
    before = numba.get_num_threads()
    found = []
    for threads in {1, before}:
        numba.set_num_threads(threads)
        found += [GRIDS[name].quantize(rows) for name in ("int4a_g32", "int2")]
    numba.set_num_threads(before)
    for one, other in zip(found, found[2:], strict=False):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True) if a is not None)


def test_refusals_say_what_is_expected() -> None:
    rows = np.zeros((2, 64), np.float32)
    with pytest.raises(BitsmithError, match=r"unknown grid 'int5'; known: int8"):
        grid_named("int5")
    with pytest.raises(BitsmithError, match=r"importance is \(3,\), expected \(64,\)"):
        GRIDS["int4"].quantize(rows, np.ones(3, np.float32))
    with pytest.raises(BitsmithError, match="finite and not negative"):
        GRIDS["int4"].quantize(rows, np.full(64, np.nan, np.float32))
    with pytest.raises(BitsmithError, match=r"matrices, found shape \(2, 2, 2\)"):
        GRIDS["int4"].quantize(np.zeros((2, 2, 2), np.float32))


# ---------------------------------------------------------------- error feedback


def correlated(columns: int, seed: int = 0) -> tuple[Float32, NDArray[np.float64]]:
    """Return rows (`24 columns`) and a second moment with a few strong directions and unlike variances."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((512, columns // 8)) @ rng.standard_normal((columns // 8, columns))
    inputs = (inputs + rng.standard_normal(inputs.shape)) * np.exp(0.5 * rng.standard_normal(columns))
    return rng.standard_normal((24, columns)).astype(np.float32), inputs.T @ inputs / 512


def metric_error(rows: Float32, decoded: Float32, moment: NDArray[np.float64]) -> float:
    errors = rows.astype(np.float64) - decoded
    return float(np.einsum("ij,jk,ik->", errors, moment, errors))


@pytest.mark.parametrize(
    "name", ["int8", "int4", "int4_g32", "int4a", "int4a_g64", "int2", "int2_g32", "int1_g128"]
)
def test_feedback_beats_the_weighted_search(name: str) -> None:
    rows, moment = correlated(128)
    grid, metric = GRIDS[name], InputMetric(moment)
    weighted = grid.quantize(rows, np.diagonal(moment).astype(np.float32))
    fed = feedback(grid, rows, metric)
    assert fed.scales.shape == (24, grid.groups(128))
    assert np.array_equal(fed.scales.astype(np.float16).astype(np.float32), fed.scales)
    before, after = (metric_error(rows, grid.dequantize(coded), moment) for coded in (weighted, fed))
    assert after < 0.6 * before


@pytest.mark.parametrize("name", ["int4", "int2_g32", "int4a"])
def test_feedback_on_a_row_does_not_depend_on_the_others(name: str) -> None:
    rows, moment = correlated(64)
    metric = InputMetric(moment)
    whole = feedback(GRIDS[name], rows, metric)
    alone = feedback(GRIDS[name], rows[5:9], metric)
    for a, b in zip(whole, alone, strict=True):
        if a is not None and b is not None:
            assert np.array_equal(a[5:9], b)


def test_the_rounder_is_chosen_by_held_out_inputs() -> None:
    rows, moment = correlated(64)
    held = np.random.default_rng(9).multivariate_normal(np.zeros(64), moment, 200).astype(np.float32)
    inputs = SiteStatistics("site", 512, np.diagonal(moment).astype(np.float32), moment=moment, held=held)
    choice = choose_grid(GRIDS["int2"], rows, inputs)
    assert (choice.rounder, choice.shrink > 0) == ("gptq", True)
    assert min(choice.held_errors.values()) < 0.6 * choice.held_errors["weighted"]
    opposite = replace(
        inputs, moment=np.linalg.inv(moment)
    )  # calibration that has nothing to do with the text
    assert choose_grid(GRIDS["int2"], rows, opposite).rounder in ("weighted", "nearest")
    assert choose_grid(GRIDS["int2"], rows, inputs, "weighted") == Choice("weighted")
    assert choose_grid(GRIDS["int2"], rows, replace(inputs, moment=None)) == Choice("weighted")
    assert choose_grid(GRIDS["int2"], rows, replace(inputs, held=None)) == Choice("weighted")
    assert choose_grid(GRIDS["int2"], rows, replace(inputs, held=None), "gptq") == Choice("gptq", 0.01)
    assert choose_grid(GRIDS["cellm-i2"], rows, inputs) == Choice("nearest")
    assert choose_grid(GRIDS["int2"], rows, None) == Choice("nearest")


def test_plain_feedback_is_gptq_on_the_same_scales() -> None:
    rows, moment = correlated(64)
    grid, metric = GRIDS["int4"], InputMetric(moment)
    fed = feedback(grid, rows, metric, replace(FEEDBACK_ONLY, refit=False))
    scale = fed.scales.astype(np.float64)
    damped = moment / np.diagonal(moment).mean() + 0.01 * np.eye(64)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, codes = rows.astype(np.float64).copy(), np.empty(rows.shape, np.int64)
    for j in range(64):
        codes[:, j] = np.clip(np.rint(left[:, j] / scale[:, 0]), -8, 7)
        error = (left[:, j] - codes[:, j] * scale[:, 0]) / upper[j, j]
        left[:, j:] -= np.outer(error, upper[j, j:])
    assert (codes + 8 == fed.codes).mean() > 0.99  # ties and float32


def test_feedback_refuses_what_it_cannot_round() -> None:
    rows, moment = correlated(64)
    metric = InputMetric(moment)
    with pytest.raises(BitsmithError, match="cellm-i4 is encoded as cellm does; error feedback needs int4"):
        feedback(GRIDS["cellm-i4"], rows, metric)
    with pytest.raises(BitsmithError, match="rows have 32 weights, the second moment 64"):
        feedback(GRIDS["int4"], rows[:, :32], metric)
    with pytest.raises(BitsmithError, match="whole groups of 32, found 40"):
        feedback(GRIDS["int4"], rows[:, :40], InputMetric(moment[:40, :40]))
