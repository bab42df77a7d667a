"""Hadamard matrices and randomized rotations against dense float64 algebra."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.errors import BitsmithError
from bitsmith.numerics.hadamard import RandomHadamard, hadamard, hadamard_factor

ORDERS = [n for n in range(1, 601) if hadamard_factor(n) is not None]
SMALL = [n for n in ORDERS if n <= 168]


def dense(rotation: RandomHadamard) -> np.ndarray:
    return rotation.signs[:, None] * hadamard(rotation.n).astype(np.float64) / np.sqrt(rotation.n)


def random(*shape: int, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def test_every_order_found_up_to_600_is_a_hadamard_matrix() -> None:
    for n in ORDERS:
        h = hadamard(n)
        assert h.shape == (n, n) and (np.abs(h) == 1).all(), n
        wide = h.astype(np.float32)  # sums of at most 600 ones are exact
        assert np.array_equal(wide @ wide.T, n * np.eye(n, dtype=np.float32)), n


def test_orders_without_a_matrix_are_not_found_and_most_others_are() -> None:
    assert all(n in (1, 2) or n % 4 == 0 for n in ORDERS)
    below_200 = {n for n in ORDERS if n < 200}
    # 52 and 100 would need GF(25) and GF(49), the rest constructions other than Paley's
    assert set(range(4, 200, 4)) - below_200 == {52, 92, 100, 116, 156, 172, 184, 188}


@pytest.mark.parametrize(
    ("n", "factor"),
    [
        (1, (1, 1)),
        (2, (1, 2)),
        (12, (12, 1)),
        (20, (20, 1)),
        (28, (28, 1)),
        (36, (36, 1)),
        (44, (44, 1)),
        (60, (60, 1)),
        (896, (28, 32)),
        (1024, (1, 1024)),
        (1536, (12, 128)),
        (2560, (20, 128)),
        (3328, (104, 32)),
        (3584, (28, 128)),
        (4096, (1, 4096)),
        (5120, (20, 256)),
        (17408, (68, 256)),
    ],
)
def test_factors_of_hidden_sizes(n: int, factor: tuple[int, int]) -> None:
    assert hadamard_factor(n) == factor


@pytest.mark.parametrize("n", [0, 3, 6, 10, 52, 92, 2 * 1023])
def test_unknown_sizes_are_refused_by_number(n: int) -> None:
    assert hadamard_factor(n) is None
    with pytest.raises(BitsmithError, match=f"order {n} "):
        RandomHadamard(n, 0)


def test_signs_of_another_size_or_kind_are_refused() -> None:
    for signs in (np.ones(12), np.full(20, 0.5)):
        with pytest.raises(BitsmithError, match="20 channels"):
            RandomHadamard(20, signs=signs)


def test_equal_seeds_give_equal_rotations_and_signs_stand_in_for_the_seed() -> None:
    x, one = random(3, 40), RandomHadamard(40, 7)
    assert np.array_equal(one.forward(x), RandomHadamard(40, 7).forward(x))
    assert np.array_equal(one.forward(x), RandomHadamard(40, signs=one.signs).forward(x))
    assert not np.array_equal(one.forward(x), RandomHadamard(40, 8).forward(x))
    # as numpy's PCG64 draws them: another stream would not undo files already written
    assert RandomHadamard(12, 0).signs.tolist() == [1, 1, 1, -1, -1, -1, -1, -1, -1, 1, 1, 1]


@settings(max_examples=40)
@given(n=st.sampled_from(SMALL), rows=st.integers(0, 40), double=st.booleans(), seed=st.integers(0, 99))
def test_both_axes_agree_with_the_dense_matrix_and_undo_each_other(
    n: int, rows: int, double: bool, seed: int
) -> None:
    dtype, bound = (np.float64, 1e-13) if double else (np.float32, 1e-6)
    rotation, x = RandomHadamard(n, seed), random(rows, n, dtype=dtype)
    q = dense(rotation)
    assert np.abs(q @ q.T - np.eye(n)).max() < 1e-13
    forward, backward = rotation.forward(x), rotation.backward(x)
    assert forward.dtype == backward.dtype == dtype
    np.testing.assert_allclose(forward, x @ q, rtol=0, atol=bound)
    np.testing.assert_allclose(backward, x @ q.T, rtol=0, atol=bound)
    np.testing.assert_allclose(rotation.backward(forward), x, rtol=0, atol=bound)
    columns = x.T.copy()
    rotation.forward_first(columns)
    assert np.array_equal(columns, forward.T)  # Qᵀ xᵀ = (x Q)ᵀ, by the same operations
    rotation.backward_first(columns)
    np.testing.assert_allclose(columns, x.T, rtol=0, atol=bound)
    columns = x.T.copy()
    rotation.backward_first(columns)
    assert np.array_equal(columns, backward.T)


@settings(max_examples=25)
@given(n=st.sampled_from([4, 12, 64, 80]), rows=st.integers(1, 200), cut=st.integers(0, 200))
def test_slices_equal_the_whole_bit_for_bit(n: int, rows: int, cut: int) -> None:
    rotation, x = RandomHadamard(n, 1), random(rows, n, dtype=np.float32)
    whole, cut = rotation.forward(x), min(cut, rows)
    assert np.array_equal(whole, np.concatenate([rotation.forward(x[:cut]), rotation.forward(x[cut:])]))
    left, right = x[:cut].T.copy(), x[cut:].T.copy()
    rotation.forward_first(left)
    rotation.forward_first(right)
    assert np.array_equal(whole.T, np.concatenate([left, right], axis=1))


def test_threads_do_not_change_a_bit() -> None:
    rotation, x = RandomHadamard(160, 5), random(1000, 160, dtype=np.float32)
    before = numba.get_num_threads()
    found = []
    try:
        for threads in {1, before}:
            numba.set_num_threads(threads)
            columns = x.T.copy()
            rotation.forward_first(columns)
            found += [rotation.forward(x), columns.T]
    finally:
        numba.set_num_threads(before)
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("n", [2560, 4096, 5120])
def test_float32_is_rounded_once_and_lengths_are_kept_at_real_sizes(n: int) -> None:
    rotation, x = RandomHadamard(n, 2), random(8, n)
    exact, singles = rotation.forward(x), x.astype(np.float32)
    wide = rotation.forward(singles.astype(np.float64))
    assert np.array_equal(rotation.forward(singles), wide.astype(np.float32))
    lengths = np.linalg.norm(exact, axis=1) / np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-13)
    spike = np.zeros((1, n))
    spike[0, 17] = 1
    np.testing.assert_allclose(np.abs(rotation.forward(spike)), 1 / np.sqrt(n), rtol=1e-13)


def test_leading_axes_are_kept_and_vectors_turn() -> None:
    rotation = RandomHadamard(12, 0)
    x = random(2, 3, 12)
    assert rotation.forward(x).shape == x.shape
    assert np.array_equal(rotation.forward(x[1, 2]), rotation.forward(x)[1, 2])
    bias = x[0, 0].copy()
    rotation.forward_first(bias)
    assert np.array_equal(bias, rotation.forward(x[0, 0]))


def test_what_cannot_be_turned_in_place_is_refused() -> None:
    rotation = RandomHadamard(12, 0)
    for wrong in (random(3, 12).T, random(6, 2), np.ones((12, 2), np.float16)):
        with pytest.raises(ValueError, match="expected 12 contiguous rows"):
            rotation.forward_first(wrong)
    with pytest.raises(ValueError, match="expected 12 columns"):
        rotation.forward(random(4, 6))
