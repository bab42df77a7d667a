"""Checkpoints as transformers writes them: all are measured, supported ones compressed, the rest refused."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

from bitsmith.archs.tokenizer import load_tokenizer, tokenizer_metadata
from bitsmith.cli.main import app
from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.run.assay import assay
from bitsmith.run.compress import compress
from bitsmith.run.evaluate import evaluate, open_model
from bitsmith.run.forward import final_hidden_states
from bitsmith.run.inspect import inspect
from bitsmith.run.job import Job
from bitsmith.store import open_checkpoint
from wild_models import HEADS, OTHERS, SUPPORTED, VOCAB, built, model_type, save, shapes

SAMPLE = ("gpt2", "gpt_oss")
FAMILIES = [
    name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in (*SUPPORTED, *OTHERS)
]
REFUSED = [name if name == "gpt2" else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 12))
GGML_ARCH = {"qwen3": "qwen3", "qwen3_5": "qwen35", "qwen3_5_text": "qwen35"}


def matrices(folder: Path) -> int:
    """Count matrices: two dimensions or more, each expert of a stack for itself, no biases of experts."""
    count = 0
    for name, shape in shapes(folder):
        stack = ".experts." in name and not name.split(".experts.")[1].split(".")[0].isdigit()
        if stack:
            count += shape[0] if len(shape) == 3 else 0
        else:
            count += len(shape) >= 2
    return count


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_inspected_and_assayed(name: str, tmp_path: Path) -> None:
    folder = save(built(name), tmp_path / "model")
    seen, kind = inspect(folder), model_type(folder)
    assert seen.parameters == sum(prod(shape) for _, shape in shapes(folder))
    assert seen.architecture == GGML_ARCH.get(kind)
    assert sum(part.share for part in seen.components) == pytest.approx(1)
    measured = assay(folder, resamples=2)
    assert len(measured.matrices) == matrices(folder)
    assert len({matrix.name for matrix in measured.matrices}) == len(measured.matrices)
    if kind not in GGML_ARCH:
        assert any(repr(kind) in note for note in seen.notes)
        assert any(repr(kind) in note for note in measured.notes)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = save(built(name), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("any text " * 50)
    before = sorted(tmp_path.rglob("*"))
    why = rf"model_type '{model_type(folder)}' is not supported; known: qwen3, qwen3_5, qwen3_5_text"
    for out, type_name in (("o.gguf", "Q4_0"), ("w4", "W4A16"), ("nf4", "NF4"), ("rows", "INT4")):
        with pytest.raises(UnsupportedError, match=why):
            compress(Job(model=folder, out=tmp_path / out, type_name=type_name))
    with pytest.raises(UnsupportedError, match=why):
        evaluate(folder, folder, text, 8)
    assert sorted(tmp_path.rglob("*")) == before
    refused = CliRunner().invoke(app, ["generate", str(folder), "-p", "x", "--gen", "2"])
    assert isinstance(refused.exception, BitsmithError)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize(
    ("dtype", "shard_bytes"), [(torch.float32, None), (torch.bfloat16, 60_000), (torch.float16, None)]
)
def test_what_is_supported_gives_transformers_logits(
    name: str, dtype: torch.dtype, shard_bytes: int | None, tmp_path: Path
) -> None:
    """Of the folder in its own type, and of the GGUF that F32 makes of it: single files and shards."""
    model = built(name)
    folder = save(model, tmp_path / "model", dtype, shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_bytes is not None)
    rounded = type(model).from_pretrained(folder, dtype=torch.float32).eval()  # a cast would round RoPE too
    with torch.inference_mode():
        tokens = torch.from_numpy(TOKENS)
        if hasattr(rounded, "lm_head"):
            expected = rounded(tokens).logits[:, :-1].numpy()
        else:
            states = rounded(input_ids=tokens).last_hidden_state[:, :-1]
            expected = (states @ rounded.get_input_embeddings().weight.T).numpy()
    gguf = tmp_path / "f32.gguf"
    compress(Job(model=folder, out=gguf, type_name="F32"))
    for artifact in (folder, gguf):
        with open_model(artifact) as ours:
            states = final_hidden_states(ours, TOKENS, 0)
            found = states @ np.asarray(ours.head.read(), np.float32).T
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_what_is_supported_is_compressed_to_every_kind(name: str, tmp_path: Path) -> None:
    folder = save(built(name), tmp_path / "model")
    for out, type_name in (("o.gguf", "Q4_0"), ("o.cellm", "i4"), ("rows", "INT4")):
        compress(Job(model=folder, out=tmp_path / out, type_name=type_name))
        with open_checkpoint(tmp_path / out) as written:
            assert sum(ref.size for ref in written.values()) > 0
    assert inspect(tmp_path / "o.gguf").architecture == GGML_ARCH[model_type(folder)]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6}}, "'dynamic'"),
        ({"attention_bias": True}, r"self_attn\.k_proj\.bias"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(
    config: dict[str, object], why: str, tmp_path: Path
) -> None:
    folder = save(hf.Qwen3ForCausalLM(hf.Qwen3Config(**HEADS, **config)), tmp_path / "model")
    assert inspect(folder).parameters == sum(prod(shape) for _, shape in shapes(folder))
    with pytest.raises(UnsupportedError, match=why) as refused:
        compress(Job(model=folder, out=tmp_path / "o.gguf", type_name="Q4_0"))
    assert str(folder) in str(refused.value)
    assert not (tmp_path / "o.gguf").exists()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (hf.Qwen3ForSequenceClassification, r"tensor score\.weight"),
        (hf.Qwen3ForTokenClassification, r"score\.bias, score\.weight"),
        (hf.Qwen3Model, r"lm_head\.weight.* without its output head"),
    ],
)
def test_other_heads_are_measured_and_refused(model: type, why: str, tmp_path: Path) -> None:
    folder = save(model(hf.Qwen3Config(**HEADS)), tmp_path / "model")
    assert inspect(folder).parameters == sum(prod(shape) for _, shape in shapes(folder))
    with pytest.raises(UnsupportedError, match=why):
        compress(Job(model=folder, out=tmp_path / "o.gguf", type_name="Q4_0"))


def test_a_tokenizer_that_transformers_saved_says_what_it_did(tmp_path: Path) -> None:
    """transformers 5 keeps no `add_bos_token` and writes the chat template to a file of its own."""
    folder = save(hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**HEADS, "vocab_size": 4352})), tmp_path / "model")
    tokenizer = hf.AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.save_pretrained(folder)
    assert (folder / "chat_template.jinja").is_file()
    with open_model(folder) as model, open_checkpoint(DEMO_MODEL) as original:
        keys, _ = tokenizer_metadata(model.source, model.arch)
        first = load_tokenizer(model.source).encode("def f(x): pass").ids
        assert first == load_tokenizer(original).encode("def f(x): pass").ids
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template
    assert not keys.get("tokenizer.ggml.add_bos_token")


@pytest.mark.parametrize(("place", "key"), [(0, "add_bos_token"), (1, "add_eos_token")])
def test_a_template_that_adds_an_end_token_is_followed(place: int, key: str, tmp_path: Path) -> None:
    folder = save(hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**HEADS, "vocab_size": 4352})), tmp_path / "model")
    content = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = [{"Sequence": {"id": "A", "type_id": 0}}]
    template.insert(place, end)
    ids = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [4093], "tokens": ["<|endoftext|>"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": ids,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    said = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    with open_model(folder) as model:
        keys, _ = tokenizer_metadata(model.source, model.arch)
    assert keys[f"tokenizer.ggml.{key}"] is True
    assert len([k for k in ("add_bos_token", "add_eos_token") if keys.get(f"tokenizer.ggml.{k}")]) == 1
