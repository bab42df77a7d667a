"""Decoding into given memory, by pieces and threads, and the error summed without decoded rows."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from bitsmith.errors import BitsmithError
from bitsmith.formats import FORMATS, decoder_named
from bitsmith.numerics.half import half_value

SHAPE = (640, 2048)  # more than one piece and one thread's least


def coded(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    few = (rng.standard_normal((8, SHAPE[1])) * 0.02).astype(np.float32)
    rows = np.tile(few, (SHAPE[0] // 8, 1))
    return rows * np.float32(1.01), np.tile(FORMATS[name].encode(few), (SHAPE[0] // 8, 1))


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_pieces_equal_rows_decoded_alone(name: str) -> None:
    _, blocks = coded(name)
    given = np.full(SHAPE, np.nan, np.float32)
    assert FORMATS[name].decode(blocks, given) is given
    alone = np.concatenate([FORMATS[name].decode(one[None]) for one in blocks[:8]])
    np.testing.assert_array_equal(given, np.tile(alone, (SHAPE[0] // 8, 1)))
    np.testing.assert_array_equal(FORMATS[name].decode(blocks), given)


@pytest.mark.parametrize("name", FORMATS)
def test_squared_error_is_that_of_the_decoded_rows(name: str) -> None:
    rows, blocks = coded(name)
    for some in (slice(0, 3), slice(None)):
        found = FORMATS[name].squared_error(rows[some], blocks[some])
        left = (rows[some] - FORMATS[name].decode(blocks[some])).astype(np.float64)
        np.testing.assert_allclose(found.error, np.square(left).sum(), rtol=1e-12)
        np.testing.assert_allclose(found.energy, np.square(rows[some].astype(np.float64)).sum(), rtol=1e-12)


def test_squared_error_does_not_depend_on_threads() -> None:
    rows, blocks = coded("Q4_K")
    before = numba.get_num_threads()
    found = set()
    try:
        for threads in {1, numba.config.NUMBA_NUM_THREADS}:
            numba.set_num_threads(threads)
            found.add(FORMATS["Q4_K"].squared_error(rows, blocks))
    finally:
        numba.set_num_threads(before)
    assert len(found) == 1


def test_squared_error_takes_types_that_are_only_read() -> None:
    kind = decoder_named("TQ2_0")
    blocks = np.zeros((2, kind.block_bytes), np.uint8)
    assert kind.squared_error(np.ones((2, kind.block_size), np.float32), blocks).error == 2 * kind.block_size


def test_squared_error_refuses_rows_of_another_shape() -> None:
    rows, blocks = coded("Q8_0")
    with pytest.raises(BitsmithError, match=r"Q8_0 blocks hold \(640, 2048\), found \(639, 2048\)"):
        FORMATS["Q8_0"].squared_error(rows[1:], blocks)


def test_every_half_is_widened_exactly() -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    expected = words.view(np.float16).astype(np.float32)
    found = FORMATS["F16"].decode(words.view(np.uint8)[None])[0]
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    assert np.isnan(found[~numbers]).all()
    assert half_value(np.uint16(0x8001)) == np.float32(-(2.0**-24))
