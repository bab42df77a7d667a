"""Every format: sizes, bytes, decoding bit for bit, rows at the edge of what floats hold."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import ggml_oracle
from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.formats import FORMATS, decoder_named, format_named
from bitsmith.formats.blocks import BlockFormat, Fields
from bitsmith.numerics.finite import first_non_finite

BLOCKED = [name for name, kind in FORMATS.items() if isinstance(kind, BlockFormat)]
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "MXFP4": (),
    "NVFP4": (),
}
SCALE_BYTES = {"MXFP4": (1, 250), "NVFP4": (4, 127)}  # how many, and the first that is not to be drawn
patient = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def blocked(name: str) -> BlockFormat:
    found = FORMATS[name]
    assert isinstance(found, BlockFormat)
    return found


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def random_blocks(name: str, rng: np.random.Generator, rows: int, per_row: int) -> np.ndarray:
    """Return random bytes whose float16 fields are finite."""
    kind = FORMATS[name]
    raw = rng.integers(0, 256, (rows * per_row, kind.block_bytes), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        field = (rng.standard_normal(len(raw)) * 10.0 ** rng.uniform(-7, 3, len(raw))).astype(np.float16)
        raw[:, at : at + 2] = field.view(np.uint8).reshape(-1, 2)
    if name in SCALE_BYTES:
        count, end = SCALE_BYTES[name]
        raw[:, :count] %= end
    return raw.reshape(rows, -1)


def decoded_by_gguf(name: str, raw: np.ndarray) -> np.ndarray | None:
    """Return what the `gguf` package decodes, None for a type that it does not know."""
    try:
        return dequantize(raw, GGMLQuantizationType[name])
    except (KeyError, NotImplementedError):
        return None


def test_registry_agrees_with_ggml() -> None:
    expected = {
        "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q1_0", "Q2_0", "MXFP4", "NVFP4",
    }  # fmt: skip
    assert set(FORMATS) == expected
    for name, kind in FORMATS.items():
        assert kind.ggml_type == ggml_oracle.type_number(name)
        assert (kind.block_size, kind.block_bytes) == ggml_oracle.block_of(name)
        if name in GGMLQuantizationType.__members__:
            assert (kind.block_size, kind.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        assert format_named(name.lower()) is kind


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@patient
def test_size_laws(name: str, data: st.DataObject) -> None:
    kind = FORMATS[name]
    weights = data.draw(st.integers(1, 1024))
    rows = data.draw(st.integers(1, 3))
    if weights % kind.block_size:
        assert not kind.fits(weights)
        with pytest.raises(BitsmithError, match=f"{name} needs rows divisible by {kind.block_size}"):
            kind.encode(np.zeros((rows, weights), np.float32))
        return
    encoded = kind.encode(np.ones((rows, weights), np.float32))
    assert encoded.dtype == np.uint8
    assert encoded.shape == (rows, kind.row_bytes(weights))
    assert encoded.size * 8 == kind.bpw * rows * weights
    decoded = kind.decode(encoded)
    assert decoded.dtype == np.float32
    assert decoded.shape == (rows, weights)


@pytest.mark.parametrize("name", BLOCKED)
def test_decoding_is_bit_exact_on_random_blocks(name: str) -> None:
    raw = random_blocks(name, np.random.default_rng(1), 64, 3)
    assert ggml_oracle.accepts(name, raw)
    found = bits(FORMATS[name].decode(raw))
    np.testing.assert_array_equal(found, bits(ggml_oracle.dequantize(name, raw)))
    theirs = decoded_by_gguf(name, raw)
    assert (theirs is None) == (name in ("Q1_0", "Q2_0"))
    if theirs is not None:
        np.testing.assert_array_equal(found, bits(theirs))


@pytest.mark.parametrize("name", FORMATS)
def test_real_ggml_takes_and_reads_our_blocks(name: str) -> None:
    rng = np.random.default_rng(2)
    rows = (rng.standard_t(3, (16, 768)) * 0.02).astype(np.float32)
    encoded = FORMATS[name].encode(rows, rng.chisquare(1, 768).astype(np.float32))
    assert ggml_oracle.accepts(name, encoded)
    expected = bits(FORMATS[name].decode(encoded))
    np.testing.assert_array_equal(bits(ggml_oracle.dequantize(name, encoded)), expected)
    theirs = decoded_by_gguf(name, encoded)
    if theirs is not None:
        np.testing.assert_array_equal(bits(theirs), expected)


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_plain_types_round_like_ggml(name: str) -> None:
    rng = np.random.default_rng(3)
    patterns = rng.integers(0, 2**32, (64, 1024), dtype=np.uint32).view(np.float32)
    limit = np.float32(65504 if name == "F16" else 3.3e38)
    rows = np.where(np.abs(patterns) <= limit, patterns, np.float32(0.1))
    np.testing.assert_array_equal(FORMATS[name].encode(rows), ggml_oracle.quantize(name, rows))
    largest = FORMATS[name].decode(FORMATS[name].encode(np.full((1, 2), 3.4028235e38, np.float32)))
    assert np.isfinite(largest).all()


@pytest.mark.parametrize("name", BLOCKED)
@given(data=st.data())
@patient
def test_pack_and_unpack_are_inverses(name: str, data: st.DataObject) -> None:
    kind = blocked(name)
    raw = random_blocks(name, np.random.default_rng(data.draw(st.integers(0, 2**32))), 2, 1)
    fields, codes = kind.unpack(raw)
    np.testing.assert_array_equal(kind.pack(fields, codes), raw)
    assert codes.max() < len(kind.levels)
    affine = fields.steps().repeat(kind.sub_size, 1) * kind.levels[codes] - fields.offsets().repeat(
        kind.sub_size, 1
    )
    np.testing.assert_array_equal(affine, kind.decode(raw))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", BLOCKED)
def test_encoding_is_fit_then_round_then_pack(name: str, weighted: bool) -> None:
    kind = blocked(name)
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((9, 512)).astype(np.float32)
    importance = rng.chisquare(1, 512).astype(np.float32) if weighted else None
    fields = kind.fit(rows, importance)
    assert isinstance(fields, Fields)
    packed = kind.pack(fields, kind.round(rows, fields))
    np.testing.assert_array_equal(packed.reshape(9, -1), kind.encode(rows, importance))


@pytest.mark.parametrize("name", BLOCKED)
def test_rounding_takes_the_nearest_level(name: str) -> None:
    kind = blocked(name)
    rows = np.random.default_rng(5).standard_normal((4, 512)).astype(np.float32)
    fields = kind.fit(rows)
    levels = kind.levels[kind.first_code :]
    grid = fields.steps()[..., None] * levels - fields.offsets()[..., None]
    wanted = rows.reshape(*fields.scales.shape, kind.sub_size, 1)
    nearest = np.abs(wanted - grid[:, :, None, :]).min(axis=-1).reshape(rows.shape)
    reached = np.abs(rows - kind.decode(kind.encode(rows)))
    np.testing.assert_allclose(reached, nearest, atol=1e-6)


def edge_rows() -> np.ndarray:
    rng = np.random.default_rng(6)
    noise = rng.standard_normal(512).astype(np.float32)
    spike = noise * np.float32(1e-3)
    spike[77] = 6e4
    with np.errstate(under="ignore"):
        rows = [
            np.zeros(512), np.full(512, 0.37), np.full(512, -0.37), np.full(512, 3.4e38), spike, -spike,
            noise * np.float32(1e-40), noise * np.float32(1e-30), noise * np.float32(1e-7),
            noise * np.float32(3e-6), noise * np.float32(1e6), noise * np.float32(1e30),
            noise * np.float32(8e37),
            np.abs(noise), -np.abs(noise),
            np.where(np.arange(512) % 64 < 32, noise, 0), np.where(np.arange(512) < 256, 1e-38, 1e30),
            noise + np.float32(100), noise - np.float32(100), np.where(np.arange(512) % 16 == 0, 1, 0) * 1e-4,
        ]  # fmt: skip
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "F32"])
def test_edge_rows_stay_finite_and_no_worse_than_zeros(name: str) -> None:
    kind = FORMATS[name]
    rows = edge_rows()
    rng = np.random.default_rng(7)
    for importance in (
        None,
        rng.chisquare(1, 512).astype(np.float32),
        np.zeros(512, np.float32),
        np.where(np.arange(512) % 3 == 0, 1e30, 1e-30).astype(np.float32),
    ):
        encoded = kind.encode(rows, importance)
        assert ggml_oracle.accepts(name, encoded)
        decoded = kind.decode(encoded)
        assert np.isfinite(decoded).all()
        assert not decoded[0].any()
        weights = (
            np.ones(512) if importance is None or not importance.any() else importance.astype(np.float64)
        )
        wide = rows.astype(np.float64)
        error = ((wide - decoded) ** 2 * weights).sum(axis=1)
        assert (error <= (wide**2 * weights).sum(axis=1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", BLOCKED)
@given(
    rows=arrays(np.float32, (2, 256), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
)
@patient
def test_any_finite_rows_encode_to_finite_values(name: str, rows: np.ndarray) -> None:
    encoded = FORMATS[name].encode(rows)
    assert ggml_oracle.accepts(name, encoded)
    assert np.isfinite(FORMATS[name].decode(encoded)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_depend_neither_on_threads_nor_on_slicing(name: str) -> None:
    kind = FORMATS[name]
    rng = np.random.default_rng(8)
    rows = (rng.standard_t(3, (701, 768)) * 0.02).astype(np.float32)
    importance = rng.lognormal(0, 1.5, 768).astype(np.float32)
    before = numba.get_num_threads()
    try:
        for weights in (None, importance):
            numba.set_num_threads(1)
            alone = kind.encode(rows, weights)
            numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
            np.testing.assert_array_equal(kind.encode(rows, weights), alone)
            parts = [kind.encode(rows[a:b], weights) for a, b in ((0, 1), (1, 130), (130, 701))]
            np.testing.assert_array_equal(np.concatenate(parts), alone)
            np.testing.assert_array_equal(kind.decode(alone[5:6]), kind.decode(alone)[5:6])
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("name", FORMATS)
def test_no_rows_give_no_bytes(name: str) -> None:
    kind = FORMATS[name]
    encoded = kind.encode(np.empty((0, 512), np.float32))
    assert encoded.shape == (0, kind.row_bytes(512))
    assert kind.decode(encoded).shape == (0, 512)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(BitsmithError, match="unknown type 'Q9_K'; known: F32"):
        format_named("Q9_K")
    with pytest.raises(BitsmithError, match=r"importance has shape \(31,\), expected \(32,\)"):
        FORMATS["Q8_0"].encode(np.ones((1, 32), np.float32), np.ones(31, np.float32))
    for bad in (np.nan, np.inf, -1.0):
        with pytest.raises(BitsmithError, match="importance holds values that are negative or not finite"):
            FORMATS["Q8_0"].encode(np.ones((1, 32), np.float32), np.full(32, bad, np.float32))
    with pytest.raises(BitsmithError, match="Q8_0 rows are multiples of 34 bytes, found 35"):
        FORMATS["Q8_0"].decode(np.zeros((1, 35), np.uint8))


def test_foreign_types_decode_but_do_not_encode() -> None:
    rows = np.random.default_rng(9).standard_normal((4, 512)).astype(np.float32)
    for name in ("IQ3_S", "TQ2_0"):
        blocks = ggml_oracle.quantize(name, rows)
        kind = decoder_named(name.lower())
        assert kind.row_bytes(512) == blocks.shape[1]
        np.testing.assert_array_equal(bits(kind.decode(blocks)), bits(ggml_oracle.dequantize(name, blocks)))
        with pytest.raises(UnsupportedError, match=f"{name} can be read but not written"):
            kind.encode(rows)
        assert name not in FORMATS
    assert decoder_named("q4_K") is FORMATS["Q4_K"]
    with pytest.raises(BitsmithError, match="unknown type 'Q7_X'; ggml knows: F32"):
        decoder_named("Q7_X")
    with pytest.raises(UnsupportedError, match="Q8_K cannot be decoded"):
        decoder_named("Q8_K").decode(np.zeros((1, 292), np.uint8))


@given(
    rows=arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 5000)), elements=st.just(1.5)),
    data=st.data(),
)
@patient
def test_first_non_finite_is_found(rows: np.ndarray, data: st.DataObject) -> None:
    assert first_non_finite(rows) is None
    bad = sorted(data.draw(st.sets(st.integers(0, rows.size - 1), min_size=1, max_size=3)))
    rows.reshape(-1)[bad] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    assert first_non_finite(rows) == divmod(bad[0], rows.shape[1])
