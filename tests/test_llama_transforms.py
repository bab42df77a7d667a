"""Transformed models in real llama.cpp: the perplexity of the untransformed ones, before any quantization."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bitsmith.lab.corpus import held_out_text
from bitsmith.numerics.divergence import TokenScores, token_scores
from bitsmith.passes.transform import TRANSFORMS, Vectors, model_of, transform_named, with_needs
from bitsmith.run.execute import compress
from bitsmith.store import open_checkpoint
from exact_forward import random_vectors
from llama_oracle import Llama

CTX, CHUNKS = 128, 4
FIRST = ("untie", "drop-mtp", "fold", "rotate")
KEEPING = ("fold", *(name for name in TRANSFORMS if name not in FIRST))
ALL = (*FIRST, *KEEPING[1:])


def _exported(folder: Path, out: Path, type_name: str, names: Sequence[str]) -> Path:
    """Write a GGUF of the model, changed by random scales of both signs and random orders."""
    transforms = with_needs([transform_named(name) for name in names])
    vectors: dict[str, Vectors] = {}
    with open_checkpoint(folder) as checkpoint:
        model = model_of(checkpoint)
        for transform in transforms:
            vectors[transform.name] = random_vectors(transform, model)
            model = model.applying(transform, vectors[transform.name])
    return compress(folder, out, type_name, transforms=transforms, vectors=vectors).out


def _real(source: Path, changed: Path, chunks: int) -> TokenScores:
    """Score the second half of each chunk, as llama-perplexity does."""
    first = CTX // 2
    with Llama(source) as model, Llama(changed) as other:
        text = held_out_text(10 * CTX * chunks)
        tokens = np.array(model.tokenize(text)[: CTX * chunks]).reshape(chunks, CTX)
        logits = [
            np.concatenate([one.logits(chunk, first)[:-1] for chunk in tokens]) for one in (model, other)
        ]
    return token_scores(*logits, tokens[:, first + 1 :].reshape(-1))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        pytest.param("demo_model", ALL, id="demo_model-all"),
        pytest.param("tiny_qwen3_5_tied", ALL, id="tiny_qwen3_5_tied-all"),
        pytest.param("tiny_qwen3", KEEPING, id="tiny_qwen3-keeping"),
        pytest.param("demo_model", KEEPING, id="demo_model-keeping", marks=pytest.mark.slow),
        pytest.param("tiny_qwen3_5_tied", KEEPING, id="tiny_qwen3_5_tied-keeping", marks=pytest.mark.slow),
        pytest.param("tiny_qwen3", ALL, id="tiny_qwen3-all", marks=pytest.mark.slow),
    ],
)
def test_perplexity_of_an_f32_export_stays(
    name: str, names: Sequence[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Within 0.01 %: llama.cpp keeps K and V in float16, whatever the weights."""
    folder: Path = request.getfixturevalue(name)
    source = compress(folder, tmp_path / "source.gguf", "F32").out
    scores = _real(source, _exported(folder, tmp_path / "changed.gguf", "F32", names), CHUNKS)
    assert scores.nll_cand.mean() == pytest.approx(scores.nll_ref.mean(), abs=1e-4)
    assert 0 < scores.kld.mean() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("names", [ALL, KEEPING], ids=["all", "keeping"])
def test_perplexity_of_the_bf16_export_stays(names: Sequence[str], demo_model: Path, tmp_path: Path) -> None:
    """Within 0.05 %; rounding other values moves single tokens by about 0.7 %, so many are scored."""
    source = compress(demo_model, tmp_path / "source.gguf", "BF16").out
    scores = _real(source, _exported(demo_model, tmp_path / "changed.gguf", "BF16", names), 16 * CHUNKS)
    assert scores.nll_cand.mean() == pytest.approx(scores.nll_ref.mean(), abs=5e-4)
