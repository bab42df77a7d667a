"""Q1_0, Q2_0, MXFP4 and NVFP4: bytes computed by hand from ggml's layouts, and scales against every other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import ggml_oracle
from bitsmith.cli.main import app
from bitsmith.formats import FORMATS
from bitsmith.formats.blocks import BlockFormat
from bitsmith.lab.corpus import held_out_text
from bitsmith.numerics.divergence import token_scores
from bitsmith.store import TensorInfo, open_gguf, write_gguf
from llama_oracle import Llama

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def blocked(name: str) -> BlockFormat:
    found = FORMATS[name]
    assert isinstance(found, BlockFormat)
    return found


def weights(*parts: object) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(part, np.float32)) for part in parts])[None]


# float16: 0.5 = 3800, 1.5 = 3E00, 2 = 4000, -0.5 = B800, little end first.
# Q1_0: + - - + + - - - is 1 0 0 1 1 0 0 0, the lowest bit first: 19.
SIGNS = [1, -1, -1, 1, 1, -1, -1, -1] + 8 * [1] + 8 * [-1] + 52 * [1, -1]
SIGN_BYTES = "19 FF 00" + 13 * " 55"
# Q2_0: codes 0 1 2 3 are d times -1 0 1 2; four in a byte, the first lowest: 0 + 1·4 + 2·16 + 3·64 = E4.
# MXFP4: scale 2^-2 is 2^(7D - 127); weight j in the low nibble of byte j, weight 16 + j in the high one.
MX_ROW = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 15] + 16 * [7]
MX_BYTES = "7D 70 71 72 73 74 75 76 77 79 7A 7B 7C 7D 7E 7F 7F"
# NVFP4: scales 1 = 0111.000, 1/2 = 0110.000, 1½ = 0111.100, 3/512 = 0000.011, then 8 bytes for each 16.
NV_SUB = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 1]
NV_BYTES = "38 30 3C 03" + 4 * " 90 A1 B2 C3 D4 E5 F6 17"
# Decoded, all give the weights back but Q1_0's for magnitudes 1 and 3.
MEANS = weights(SIGNS[:64], 3 * np.array(SIGNS[64:]))
GOLDEN = {
    "Q1_0 halves": ("Q1_0", weights(0.5 * np.array(SIGNS)), "00 38 " + SIGN_BYTES),
    "Q1_0 mean of 1 and 3": ("Q1_0", MEANS, "00 40 " + SIGN_BYTES),
    "Q1_0 zeros are positive": ("Q1_0", weights(64 * [0.0, -0.0]), "00 00" + 16 * " FF"),
    "Q2_0": ("Q2_0", weights(16 * [-0.5, 0, 0.5, 1]), "00 38" + 16 * " E4"),
    "Q2_0 mirrored": ("Q2_0", weights(16 * [0.5, 0, -0.5, -1]), "00 B8" + 16 * " E4"),
    "MXFP4": ("MXFP4", weights(E2M1[MX_ROW] / 4), MX_BYTES),
    "NVFP4": ("NVFP4", weights(*(scale * E2M1[NV_SUB] for scale in (1, 0.5, 1.5, 3 / 512))), NV_BYTES),
}  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "expected"), GOLDEN.values(), ids=GOLDEN.keys())
def test_bytes_are_those_computed_by_hand(name: str, rows: np.ndarray, expected: str) -> None:
    raw = np.frombuffer(bytes.fromhex(expected), np.uint8)[None]
    np.testing.assert_array_equal(FORMATS[name].encode(rows), raw)
    decoded = FORMATS[name].decode(raw)
    np.testing.assert_array_equal(decoded, ggml_oracle.dequantize(name, raw))
    np.testing.assert_array_equal(decoded, rows if rows is not MEANS else 2 * weights(SIGNS))


def test_one_bit_scale_is_the_weighted_mean_magnitude() -> None:
    encoded = FORMATS["Q1_0"].encode(MEANS, np.repeat([3, 1], 64).astype(np.float32))
    assert encoded[0, :2].tobytes() == bytes.fromhex("00 3E")  # (3·1 + 1·3) / 4 = 1.5


def test_one_bit_blocks_are_ggmls_without_importance() -> None:
    rows = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    np.testing.assert_array_equal(FORMATS["Q1_0"].encode(rows), ggml_oracle.quantize("Q1_0", rows))


@pytest.mark.parametrize(("name", "subs"), [("MXFP4", 1), ("NVFP4", 4)])
def test_every_scale_byte_decodes_as_in_ggml(name: str, subs: int) -> None:
    kind = FORMATS[name]
    raw = np.empty((256, kind.block_bytes), np.uint8)
    raw[:, :subs] = np.arange(256)[:, None]
    raw[:, subs:] = np.resize([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], kind.block_bytes - subs)
    with np.errstate(over="ignore"):
        decoded = kind.decode(raw)
    found, theirs = decoded.view(np.uint32), ggml_oracle.dequantize(name, raw).view(np.uint32)
    np.testing.assert_array_equal(found, theirs)
    np.testing.assert_array_equal(decoded[120, : kind.block_size // subs // 2], decoded_at(name, 120))


def decoded_at(name: str, byte: int) -> np.ndarray:
    """Return the low nibbles 0 2 4 6 8 A C E under a scale byte by the formats' definitions."""
    if name == "MXFP4":
        return np.tile(E2M1[::2], 2) * 2.0 ** (byte - 127)
    return E2M1[::2] * (1 + (byte & 7) / 8) * 2.0 ** ((byte >> 3) - 7)


def test_negative_zero_is_kept_when_packed_again() -> None:
    kind = blocked("MXFP4")
    raw = np.full((1, 17), 0x88, np.uint8)
    assert not kind.decode(raw).view(np.uint32).any()
    np.testing.assert_array_equal(kind.pack(*kind.unpack(raw)), raw)
    assert not (kind.encode(np.zeros((1, 32), np.float32))[0, 1:]).any()


def drawn(size: int, importance: bool, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    rows = (rng.standard_t(4, (32, 8 * size)) * sigma).astype(np.float32)
    drawn = rng.lognormal(0, 1, 8 * size) ** 2 if importance else np.ones(8 * size)
    return rows, drawn.astype(np.float32)


@pytest.mark.parametrize("sigma", [0.02, 1.0])
@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("name", ["Q2_0", "MXFP4", "NVFP4"])
def test_scales_are_within_one_percent_of_the_best(name: str, importance: bool, sigma: float) -> None:
    kind = blocked(name)
    size = 64 if name == "Q2_0" else kind.sub_size
    rows, weight = drawn(size, importance, sigma)
    x, w = rows.reshape(-1, size).astype(np.float64), np.tile(weight, len(rows)).reshape(-1, size)
    largest = np.abs(x).max(axis=1)
    best = np.full(len(x), np.inf)
    tried = [s * largest / at for at in np.geomspace(0.8, 30, 200) for s in (1, -1)]
    for scale in kind.scale_values if len(kind.scale_values) else tried:
        grid = np.broadcast_to(scale, len(x))[:, None] * np.unique(kind.levels)
        places = np.abs(x[:, :, None] - grid[:, None, :]).min(axis=2)
        best = np.minimum(best, (w * places**2).sum(axis=1))
    decoded = kind.decode(kind.encode(rows, weight)).reshape(x.shape)
    error = (w * (x - decoded) ** 2).sum(axis=1)
    assert error.sum() <= 1.01 * best.sum()
    if len(kind.scale_values):
        assert (error >= best * (1 - 1e-6)).all()


RULES = ["ffn_gate=q2_0", "ffn_up=MXFP4", "ffn_down=NVFP4", "attn|ssm_out=Q1_0"]


def test_llama_cpp_runs_a_file_of_all_four(demo_model: Path, tmp_path: Path) -> None:
    """It rounds activations to 8 bits where weights are quantized: a small divergence of its own."""
    mixed, plain = tmp_path / "mixed.gguf", tmp_path / "plain.gguf"
    options = [part for rule in RULES for part in ("--tensor-type", rule)]
    done = CliRunner().invoke(
        app, ["compress", str(demo_model), "-o", str(mixed), "--type", "Q4_K_M", "--pure", *options]
    )
    assert done.exit_code == 0, done.output
    with open_gguf(mixed) as stored:
        assert {ref.dtype for ref in stored.values()} == {"F32", "Q4_K", "Q2_0", "MXFP4", "NVFP4", "Q1_0"}
        infos = [TensorInfo(name, ref.shape, "F32") for name, ref in stored.items()]
        write_gguf(plain, stored.typed_metadata(), infos, lambda info: [stored[info.name].read()])
    with Llama(plain) as reference, Llama(mixed) as model:
        tokens = np.array(reference.tokenize(held_out_text(1500))[:128])
        logits = [one.logits(tokens, 64)[:-1] for one in (reference, model)]
    scores = token_scores(*logits, tokens[65:])
    assert 0 < scores.kld.mean() < 2e-3
    assert scores.same_top.mean() > 0.95
