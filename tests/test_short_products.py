"""Products in 16-bit whole numbers: how near they are, and that no sum leaves 32 bits."""

from __future__ import annotations

import numpy as np
import pytest

from bitsmith.numerics.lane_products import LANES
from bitsmith.numerics.short_products import add_short_products, short_matrix, short_values, shorten


def products(matrix: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    short, lanes = short_matrix(matrix, size), short_values(len(values), size)
    chunks = len(values) // size
    for chunk in range(chunks):
        shorten(values[chunk * size : (chunk + 1) * size], lanes.codes[chunk], lanes.scales[chunk])
    out = np.zeros((len(matrix), LANES), np.float32)
    add_short_products(*short, *lanes, chunks, out)
    return out


@pytest.mark.parametrize("size", [32, 256])
def test_products_are_near_those_in_float64(size: int) -> None:
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((32, 4 * size)) * rng.lognormal(0, 2, 4 * size)).astype(np.float32)
    values = (rng.standard_normal((4 * size, LANES)) * rng.lognormal(0, 9, LANES)).astype(np.float32)
    exact = matrix.astype(np.float64) @ values
    lengths = np.linalg.norm(matrix, axis=1)[:, None] * np.linalg.norm(values.astype(np.float64), axis=0)
    assert (np.abs(products(matrix, values, size) - exact) / lengths).max() < 1e-3


def test_the_largest_sums_stay_within_their_words() -> None:
    ones = np.ones((256, LANES), np.float32)
    lone = np.zeros((4, 256), np.float32)
    lone[:, 7] = -1e30
    np.testing.assert_allclose(products(np.ones((4, 256), np.float32), ones, 256), 256, rtol=1e-3)
    np.testing.assert_allclose(products(lone, ones, 256), -1e30, rtol=1e-3)
    zeros = np.zeros((256, LANES), np.float32)
    assert not products(lone, zeros, 256).any()
    assert not products(np.zeros((4, 256), np.float32), ones, 256).any()
