"""Our numbers against real llama.cpp's: the same chunks of the same GGUFs, and generation."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from bitsmith.errors import BitsmithError, DamagedFileError, UnsupportedError
from bitsmith.lab.corpus import held_out_text
from bitsmith.numerics.divergence import TokenScores, token_scores
from bitsmith.run.evaluate import evaluate
from bitsmith.run.evaluation import Evaluation
from bitsmith.run.execute import compress
from bitsmith.run.generate import generate
from bitsmith.store import TensorInfo, open_gguf, write_gguf
from llama_oracle import Llama

CTX, CHUNKS = 128, 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(held_out_text(6_000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bf16(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(demo_model, tmp_path_factory.mktemp("bf16") / "m.gguf", "BF16").out


@pytest.fixture(scope="module")
def q4(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(demo_model, tmp_path_factory.mktemp("q4") / "m.gguf", "Q4_K_M").out


def _real(ref: Path, candidate: Path, text: Path) -> TokenScores:
    """Score llama.cpp's own tokens of `text` with its own logits, indexed as llama-perplexity does."""
    first = CTX // 2
    with Llama(ref) as ref_model, Llama(candidate) as cand_model:
        tokens = np.array(ref_model.tokenize(text.read_text("utf-8"))[: CTX * CHUNKS]).reshape(CHUNKS, CTX)
        logits = [
            np.concatenate([model.logits(chunk, first)[:-1] for chunk in tokens])
            for model in (ref_model, cand_model)
        ]
    return token_scores(*logits, tokens[:, first + 1 :].reshape(-1))


def _ours(ref: Path, candidate: Path, text: Path) -> Evaluation:
    return evaluate(ref, candidate, text, CTX, CHUNKS)


@pytest.mark.parametrize("name", ["demo_model", "tiny_qwen3_5", "tiny_qwen3_5_tied", "tiny_qwen3"])
def test_perplexity_of_an_f32_export_is_llama_cpps(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, text: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    gguf = compress(folder, tmp_path / "m.gguf", "F32").out
    ours, real = _ours(folder, gguf, text), _real(gguf, gguf, text)
    assert real.nll_ref.size == ours.protocol.scored_tokens
    assert ours.ppl_ref.value == pytest.approx(np.exp(real.nll_ref.mean()), rel=2e-5)
    assert ours.max_kld.value < 1e-9


def test_perplexity_of_the_bf16_export_is_llama_cpps(demo_model: Path, bf16: Path, text: Path) -> None:
    """Within 0.05 %: llama.cpp also rounds activations to BF16 where weights are."""
    ours, real = _ours(demo_model, bf16, text), _real(bf16, bf16, text)
    assert ours.ppl_ref.value == pytest.approx(np.exp(real.nll_ref.mean()), rel=5e-4)


def _decoded(quantized: Path, out: Path) -> Path:
    """Write the GGUF again with every tensor decoded to F32."""
    with open_gguf(quantized) as checkpoint:
        tensors = [TensorInfo(name, ref.shape, "F32") for name, ref in checkpoint.items()]
        write_gguf(out, checkpoint.typed_metadata(), tensors, lambda info: [checkpoint[info.name].read()])
    return out


def test_divergence_of_quantized_weights_is_llama_cpps(
    demo_model: Path, q4: Path, text: Path, tmp_path: Path
) -> None:
    """llama.cpp runs the same values as F32 tensors, so that only the weights make a difference."""
    f32 = compress(demo_model, tmp_path / "f32.gguf", "F32").out
    ours, real = _ours(demo_model, q4, text), _real(f32, _decoded(q4, tmp_path / "decoded.gguf"), text)
    assert ours.ppl_cand.value == pytest.approx(np.exp(real.nll_cand.mean()), rel=1e-4)
    assert ours.mean_kld.value == pytest.approx(real.kld.mean(), rel=2e-3)
    # a quantile is one token's divergence: llama.cpp's float16 K and V show in it unaveraged
    assert ours.median_kld.value == pytest.approx(np.median(real.kld), rel=1e-2)
    assert ours.kld_99.value == pytest.approx(np.quantile(real.kld, 0.99), rel=1e-2)
    assert ours.top1_agreement.value == pytest.approx(real.same_top.mean(), abs=0.005)


def test_divergence_of_a_quantized_file_is_near_llama_cpps(
    demo_model: Path, bf16: Path, q4: Path, text: Path
) -> None:
    """Run as it is, llama.cpp also rounds activations to 8 bits, which adds its own small divergence."""
    ours, real = _ours(demo_model, q4, text), _real(bf16, q4, text)
    assert ours.ppl_cand.value == pytest.approx(np.exp(real.nll_cand.mean()), rel=3e-2)
    assert ours.mean_kld.value == pytest.approx(real.kld.mean(), rel=0.15)
    assert ours.top1_agreement.value == pytest.approx(real.same_top.mean(), abs=0.05)


def test_generation_is_llama_cpps_greedy_continuation(demo_model: Path, q4: Path) -> None:
    prompt, n_tokens = "def __init__(self", 6
    with Llama(q4) as model:
        tokens = model.tokenize(prompt)
        given = len(tokens)
        for _ in range(n_tokens):
            tokens.append(int(model.last_logits(tokens).argmax()))
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    assert generate(q4, prompt, n_tokens) == tokenizer.decode(tokens[given:])


def test_generation_is_silent_unless_asked(q4: Path) -> None:
    code = (
        "import sys, pathlib; from bitsmith.run.generate import generate; "
        "generate(pathlib.Path(sys.argv[1]), 'import', 2, verbose=len(sys.argv) > 2)"
    )
    quiet, verbose = (
        subprocess.run(
            [sys.executable, "-c", code, str(q4), *more],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        for more in ((), ("verbose",))
    )
    assert quiet.stdout + quiet.stderr == ""
    assert "llama" in verbose.stdout + verbose.stderr


def test_a_truncated_gguf_never_reaches_llama_cpp(q4: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(q4.read_bytes()[:500_000])
    with pytest.raises(DamagedFileError, match=r"cut\.gguf"):
        generate(cut, "import", 2)


def test_a_gguf_that_llama_cpp_refuses(q4: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(q4.read_bytes().replace(b"qwen35.block_count", b"qwen35.black_count", 1))
    with pytest.raises(BitsmithError, match=r"llama\.cpp cannot load it"):
        generate(odd, "import", 2)


def test_without_the_extra_generation_says_what_to_install(q4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsmith.run.generate.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"install bitsmith\[llama\]"):
        generate(q4, "import", 2)
