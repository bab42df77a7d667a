"""Closed-form correction: norms that are off are put right, what is right stays, bytes stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bitsmith.errors import BitsmithError, OutputError
from bitsmith.run.allocate import held_out_kld
from bitsmith.run.correct import correct
from bitsmith.run.execute import compress
from bitsmith.store import TensorInfo, open_gguf, write_gguf

NORMS = ("attn_norm.weight", "ffn_norm.weight", "output_norm.weight")


def random_tokens(chunks: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (chunks, 64))


@pytest.fixture(scope="module")
def plain(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "q.gguf"
    compress(tiny_qwen3, out, "Q8_0", pure=True)
    return out


def detuned(plain: Path, out: Path) -> Path:
    """Write `plain` with the gains of its norms a quarter off, each channel by itself."""
    random = np.random.default_rng(5)

    def encode(ref: object, name: str) -> np.ndarray:
        raw = ref.raw()
        if not name.endswith(NORMS):
            return raw
        values = raw.view(np.float32)
        return (
            (values * np.exp(0.25 * random.standard_normal(values.shape))).astype(np.float32).view(np.uint8)
        )

    with open_gguf(plain) as stored:
        infos = [TensorInfo(name, ref.shape, ref.dtype) for name, ref in stored.items()]
        write_gguf(out, stored.typed_metadata(), infos, lambda info: [encode(stored[info.name], info.name)])
    return out


def test_norms_that_are_off_are_put_right(tiny_qwen3: Path, plain: Path, tmp_path: Path) -> None:
    off, out = detuned(plain, tmp_path / "off.gguf"), tmp_path / "out.gguf"
    record = correct(tiny_qwen3, off, out, random_tokens(6, 0), held := random_tokens(2, 1))
    assert record.kept == "all"
    assert record.held_kld_after_nats < 0.05 * record.held_kld_before_nats
    assert record.held_kld_after_nats == min(record.tried.values())
    assert set(record.gains) == {f"layers.{n}.{s}" for n in range(3) for s in ("mixer.in", "ffn.in")} | {
        "head.in"
    }
    measured = held_out_kld(tiny_qwen3, out, held)["mean_kld"].value
    assert measured == pytest.approx(record.held_kld_after_nats, rel=1e-6)
    with open_gguf(plain) as right, open_gguf(off) as before, open_gguf(out) as after:
        assert [(n, r.dtype, r.shape) for n, r in after.items()] == [
            (n, r.dtype, r.shape) for n, r in before.items()
        ]
        for name in after:
            if name.endswith(NORMS):
                gain = after[name].read() / right[name].read()
                assert np.abs(np.log(gain)).max() < 0.1, name
            else:
                assert np.array_equal(after[name].raw(), before[name].raw()), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["off.gguf", "out.gguf"]


def test_inputs_that_cannot_be_corrected_are_refused(tiny_qwen3: Path, plain: Path, tmp_path: Path) -> None:
    tokens, out = random_tokens(1, 0), tmp_path / "out.gguf"
    with pytest.raises(BitsmithError, match="no GGUF"):
        correct(tiny_qwen3, tiny_qwen3, out, tokens, tokens)
    with pytest.raises(BitsmithError, match="held-out"):
        correct(tiny_qwen3, plain, out, tokens, tokens[:0])
    with pytest.raises(OutputError, match="exists"):
        correct(tiny_qwen3, plain, plain, tokens, tokens)
    assert not list(tmp_path.iterdir())
