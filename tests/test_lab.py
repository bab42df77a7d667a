"""The lab trains real models: deterministic, resumable, loadable by transformers, honest about its split."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitsmith.errors import BitsmithError, OutputError
from bitsmith.lab import train as training
from bitsmith.lab.corpus import held_out_text
from bitsmith.lab.train import TrainSpec, train
from bitsmith.run.corpus import documents, is_held_out, source_files

SPEC = TrainSpec(
    arch="qwen3",
    hidden_size=128,
    num_hidden_layers=1,
    intermediate_size=128,
    vocab_size=512,
    steps=4,
    batch_size=2,
    context_tokens=32,
    compile=False,
)


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on twenty real sources instead of all: the code under test is the same, the wait is not."""
    monkeypatch.setattr(training, "documents", lambda held_out: islice(documents(held_out), 20))
    monkeypatch.setattr("bitsmith.lab.corpus.documents", lambda held_out: islice(documents(held_out), 20))


@pytest.mark.slow
def test_a_killed_training_ends_as_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = load_file(train(tmp_path / "unbroken", SPEC) / "model.safetensors")

    def killed(self: object, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_SAVED_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(training, "_LOGGED_EVERY_STEPS", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training._Run, "_note", killed)
        train(tmp_path / "broken", SPEC)
    assert not (tmp_path / "broken").exists()
    assert (tmp_path / ".broken.training").exists()
    resumed = load_file(train(tmp_path / "broken", SPEC) / "model.safetensors")
    assert not (tmp_path / ".broken.training").exists()
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_resuming_with_other_options_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_SAVED_EVERY_SECONDS", 0.0)
    run = training._Run(SPEC, tmp_path / ".out.training")
    run._advance(run.model, torch.zeros((2, 33), dtype=torch.int64), 0.0)
    run._save()
    with pytest.raises(BitsmithError, match=r"\.out\.training.*other options"):
        train(tmp_path / "out", dataclasses.replace(SPEC, seed=1))


def test_the_written_folder_is_a_real_one(tmp_path: Path) -> None:
    out = train(tmp_path / "model", dataclasses.replace(SPEC, arch="qwen3_5", num_hidden_layers=4))
    state = load_file(out / "model.safetensors")
    floats = {name for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert floats == {n for n in state if n.endswith(("A_log", "linear_attn.norm.weight"))}
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("def f(x):\n    return x", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    rows = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert rows[0]["loss_unit"] == "nats per token"
    assert rows[-1]["step"] == SPEC.steps
    with pytest.raises(OutputError, match="exists"):
        train(out, SPEC)


def test_tied_training_stores_no_head(tmp_path: Path) -> None:
    out = train(tmp_path / "model", dataclasses.replace(SPEC, tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_the_splits_are_disjoint_and_the_held_out_text_is_of_one() -> None:
    names = [name for name, _ in source_files()]
    held_out = [name for name in names if is_held_out(name)]
    assert 0.02 < len(held_out) / len(names) < 0.1
    text = held_out_text(5000)
    assert 4900 <= len(text.encode()) <= 5000


def test_the_bundled_model_was_trained_as_its_log_says(demo_model: Path) -> None:
    rows = [json.loads(line) for line in (demo_model / "training_log.jsonl").read_text().splitlines()]
    assert rows[-1]["seconds"] >= 30 * 60
    assert rows[-1]["held_out_loss_nats"] < rows[1]["held_out_loss_nats"]
    assert sum(p.stat().st_size for p in demo_model.glob("*.safetensors")) <= 16 * 2**20
    assert Tokenizer.from_file(str(demo_model / "tokenizer.json")).get_vocab_size() == 4096
