"""NF4 and FP4 by their published definitions: code books, bytes by hand, the searches and error feedback."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.stats import norm

from bitsmith.errors import BitsmithError
from bitsmith.formats.nf4 import BLOCK_SIZES, DYNAMIC_MAP, FP4, NF4, FourBit, nest, unpack_nibbles
from bitsmith.numerics.input_metric import InputMetric
from bitsmith.passes.nf4_feedback import choose_four_bit, feedback, feedback_importance
from bitsmith.passes.rounding import output_error

Float32 = NDArray[np.float32]
BOOKS = [NF4, FP4]
books = pytest.mark.parametrize("form", BOOKS, ids=lambda form: form.name)


@pytest.fixture(scope="module")
def weights() -> Float32:
    """Rows (`96 256`) whose sizes differ, as those of a trained matrix do."""
    rng = np.random.default_rng(7)
    return (rng.standard_t(6, (96, 256)) * rng.lognormal(0, 0.4, (96, 1))).astype(np.float32)


class Inputs:
    """Correlated inputs of 256 columns: their moment, and others held out."""

    def __init__(self) -> None:
        rng = np.random.default_rng(8)
        mixing = rng.standard_normal((256, 256)) * np.geomspace(1, 0.02, 256)[:, None]
        seen, self.held = ((rng.standard_normal((n, 256)) @ mixing).astype(np.float32) for n in (4096, 512))
        self.moment = (seen.T @ seen / len(seen)).astype(np.float32)
        self.importance = np.diagonal(self.moment).copy()


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs()


def error(form: FourBit, weights: Float32, scales: Float32, importance: Float32 | None = None) -> float:
    """Return the weighted squared error of the nearest codes under `scales`."""
    flat = weights.reshape(-1)
    left = (flat - form.dequantize(form.nearest(flat, scales), scales)).astype(np.float64)
    columns = np.ones(1) if importance is None else importance
    return float((np.resize(columns, flat.size) * left**2).sum())


def test_nf4_levels_are_the_quantiles_of_the_paper() -> None:
    """QLoRA, equation 4, with the offset of its code: 8 quantiles above 0, 7 below, over the largest."""
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(NF4.levels, expected, rtol=0, atol=1e-6)


def test_fp4_levels_are_floats_of_two_exponent_bits() -> None:
    """Magnitude by bits: 000 is 0, 001 is 1/16; then 1 or 1½ times 8, 4, 2 as the exponent's bits say."""
    magnitudes = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    np.testing.assert_allclose(FP4.levels[:8] * 12, magnitudes, rtol=1e-6)
    assert (FP4.levels[8:] == -FP4.levels[:8]).all()


def test_dynamic_map_by_exact_arithmetic() -> None:
    """Decade d of 7 has 2^d middles of an even division of 0.1…1, of either sign; 0 and 1 beside them."""
    exact = [Fraction(0), Fraction(1)]
    for decade in range(7):
        for k in range(2**decade):
            middle = Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * k + 1, 2 ** (decade + 1))
            exact += [sign * middle / 10 ** (6 - decade) for sign in (1, -1)]
    assert len(exact) == len(DYNAMIC_MAP) == 256
    np.testing.assert_allclose(DYNAMIC_MAP, np.array(sorted(exact), float), rtol=3e-7)


def test_nf4_bytes_by_hand() -> None:
    """Two codes to a byte, the first in the high half; a block's scale is its largest magnitude."""
    twice = [
        -2.0, -1.39, -1.05, -0.79, -0.57, -0.37, -0.18, 0.0, 0.16, 0.32, 0.49, 0.68, 0.88, 1.13, 1.45, 2.0,
    ]  # fmt: skip
    weights = np.array([*twice * 4, 0.5, -0.25, 0.0], np.float32)
    scales = NF4.absmax(weights)
    assert scales.tolist() == [2.0, 0.5]
    packed = NF4.pack(NF4.nearest(weights, scales))
    block = "0123456789abcdef" * 4
    assert packed.tobytes().hex() == block + "f277"  # 1, -0.5 (nearest -0.525), 0, and 0 to fill the byte


def test_fp4_bytes_by_hand() -> None:
    weights = np.array([1, -1, 2 / 3, -2 / 3, 0.5, -0.5, 1 / 3, -1 / 3, 0.25, 1 / 6, 0.0052, 0], np.float32)
    form = replace(FP4, block_size=32)
    packed = form.pack(form.nearest(weights, form.absmax(weights)))
    assert packed.tobytes().hex() == "3b2a5d4c7610"


def test_double_quantization_by_hand() -> None:
    """Scales 1 and 3: the mean 2 is taken off, ±1 are left; the map ends at 1 and at -0.99296875."""
    nested = nest(np.array([1, 3], np.float32))
    assert (nested.offset, nested.absmax.tolist(), nested.codes.tolist()) == (2.0, [1.0], [0, 255])
    np.testing.assert_allclose(nested.scales(), [2 - 0.99296875, 3], rtol=1e-7)


def test_every_256_scales_have_an_absmax() -> None:
    scales = np.repeat(np.array([1.0, 2.0, 5.0], np.float32), [256, 256, 10])
    nested = nest(scales)
    assert len(nested.absmax) == 3 and len(nested.codes) == 522
    np.testing.assert_allclose(nested.scales(), scales, rtol=0.02)
    assert (nested.scales(300, 520) == nested.scales()[300:520]).all()


@books
def test_equal_scales_are_their_mean(form: FourBit) -> None:
    nested = nest(np.full(5, 0.25, np.float32))
    assert nested.scales().tolist() == [0.25] * 5
    zeros = np.zeros(130, np.float32)
    assert not form.dequantize(form.nearest(zeros, form.absmax(zeros)), form.absmax(zeros)).any()
    assert nest(np.empty(0, np.float32)).scales().size == 0


@books
@settings(max_examples=30)
@given(codes=arrays(np.uint8, st.integers(0, 200), elements=st.integers(0, 15)), scale=st.floats(1e-3, 1e3))
def test_codes_survive_bytes_and_rounding(form: FourBit, codes: NDArray[np.uint8], scale: float) -> None:
    assert (unpack_nibbles(form.pack(codes))[: codes.size] == codes).all()
    for sign in (1, -1):
        scales = np.full(form.blocks(codes.size), sign * scale, np.float32)
        values = form.dequantize(codes, scales)
        again = form.nearest(values, scales)
        assert (form.dequantize(again, scales) == values).all()


@books
@settings(max_examples=30)
@given(
    weights=arrays(np.float32, st.integers(1, 3), elements=st.floats(-8, 8, width=16)),
    importance=arrays(np.float32, 32, elements=st.floats(0, 100, width=16)),
    data=st.data(),
)
def test_searched_scales_are_never_worse(
    form: FourBit, weights: Float32, importance: Float32, data: st.DataObject
) -> None:
    form = replace(form, block_size=data.draw(st.sampled_from([32, 64])))
    seed = data.draw(st.integers(0, 1000))
    rows = np.random.default_rng(seed).standard_normal((6, 32)).astype(np.float32)
    rows[:, : weights.size] *= weights
    best = error(form, rows, form.fit(rows.reshape(-1), importance), importance)
    assert best <= error(form, rows, form.absmax(rows.reshape(-1)), importance) * (1 + 1e-6) + 1e-9


@books
def test_search_gains_where_scales_are_stored_in_8_bits(form: FourBit, weights: Float32) -> None:
    """At least 10 % of bitsandbytes' squared error, the scales of both as stored."""
    flat = weights.reshape(-1)
    largest = form.absmax(flat)
    left = flat - form.dequantize(form.nearest(flat, largest), nest(largest).scales())
    theirs = float((left.astype(np.float64) ** 2).sum())
    assert error(form, weights, form.searched(flat).scales()) < 0.9 * theirs


@books
def test_importance_moves_errors_to_columns_that_matter_less(form: FourBit, weights: Float32) -> None:
    importance = np.geomspace(1e-3, 1e3, 256).astype(np.float32)
    flat = weights.reshape(-1)
    weighted = error(form, weights, form.searched(flat, importance).scales(), importance)
    assert weighted < 0.97 * error(form, weights, form.searched(flat).scales(), importance)


@books
def test_blocks_need_not_end_with_rows(form: FourBit) -> None:
    """Of 10 x 50 weights 8 blocks of 64 cross rows or end early: importance follows the columns."""
    rows = np.random.default_rng(3).standard_normal((10, 50)).astype(np.float32)
    importance = np.geomspace(1, 100, 50).astype(np.float32)
    flat, whole = rows.reshape(-1), form.fit(rows.reshape(-1), importance)
    assert len(whole) == 8
    parts = [form.fit(flat[:192], importance), form.fit(flat[192:], importance, 192)]
    assert (np.concatenate(parts) == whole).all()
    for block in range(8):  # each by itself, its columns' importance given by hand
        cut = slice(64 * block, 64 * block + 64)
        alone = form.fit(flat[cut], np.resize(importance, 500)[cut])
        assert abs(alone[0] - whole[block]) <= 1e-6 * abs(whole[block])


@books
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_feedback_lowers_the_error_of_held_out_outputs(
    form: FourBit, block_size: int, weights: Float32, inputs: Inputs
) -> None:
    form, flat = replace(form, block_size=block_size), weights.reshape(-1)
    metric = InputMetric(inputs.moment, 0.01)
    weighted = form.searched(flat, inputs.importance).scales()
    codes = form.nearest(flat, weighted)
    plain = output_error(weights - form.dequantize(codes, weighted).reshape(weights.shape), inputs.held)
    scales = form.searched(flat, feedback_importance(form, metric)).scales()
    fed = form.dequantize(feedback(form, weights, scales, metric), scales).reshape(weights.shape)
    assert output_error(weights - fed, inputs.held) < 0.7 * plain


def test_the_choice_is_made_by_held_out_outputs(weights: Float32, inputs: Inputs) -> None:
    choice = choose_four_bit(NF4, weights, inputs)
    assert choice.rounder == "gptq" and choice.held_errors["weighted"] < choice.held_errors["nearest"]
    assert choose_four_bit(NF4, weights, inputs, "nearest").rounder == "nearest"
    assert choose_four_bit(NF4, weights, None).rounder == "nearest"
    narrow = weights[:, :100]

    class Narrow:
        importance, moment, held = inputs.importance[:100], inputs.moment[:100, :100], inputs.held[:, :100]

    assert choose_four_bit(NF4, narrow, Narrow()).rounder == "weighted"


def test_feedback_is_refused_where_blocks_cross_rows(inputs: Inputs) -> None:
    with pytest.raises(BitsmithError, match="whole blocks of 64, found 100 columns"):
        feedback(NF4, np.ones((2, 100), np.float32), np.ones(4, np.float32), InputMetric(inputs.moment))
    with pytest.raises(BitsmithError, match="rows have 128 weights, the second moment 256"):
        feedback(NF4, np.ones((2, 128), np.float32), np.ones(4, np.float32), InputMetric(inputs.moment))


def test_block_sizes_and_importance_are_checked() -> None:
    for size in BLOCK_SIZES:
        assert replace(NF4, block_size=size).blocks(4097) == -(-4097 // size)
    with pytest.raises(BitsmithError, match=r"NF4 has blocks of 32, 64, .* weights, not of 48"):
        replace(NF4, block_size=48)
    with pytest.raises(BitsmithError, match="finite and not negative"):
        NF4.fit(np.ones(64, np.float32), np.full(64, -1, np.float32))


@books
def test_same_codes_for_any_number_of_threads(form: FourBit, inputs: Inputs) -> None:
    rows = np.random.default_rng(4).standard_normal((520, 256)).astype(np.float32)
    metric, before = InputMetric(inputs.moment), numba.get_num_threads()

    def coded() -> tuple[bytes, bytes]:
        scales = form.searched(rows.reshape(-1), inputs.importance).scales()
        plain = form.nearest(rows.reshape(-1), scales)
        return plain.tobytes(), feedback(form, rows, scales, metric).tobytes()

    try:
        numba.set_num_threads(1)
        alone = coded()
        numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
        assert coded() == alone
    finally:
        numba.set_num_threads(before)


def test_scales_whose_inverse_nearly_overflows_are_searched() -> None:
    weights = np.zeros(64, np.float32)
    weights[1:] = np.float32(1e-38)
    assert np.isfinite(NF4.fit(weights)).all()
