"""The lab's pair and its distillation: whole models' losses, the merge's own tokens, resuming, refusals."""

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitsmith.errors import BitsmithError, OutputError, UnsupportedError
from bitsmith.lab import train as training
from bitsmith.lab.distillation import Distilled, distilled
from bitsmith.lab.models import STUDENT_MODEL, TEACHER_MODEL
from bitsmith.lab.pair import STUDENT, TEACHER, train_pair
from bitsmith.lab.train import train
from bitsmith.run import descent
from bitsmith.run.corpus import documents
from bitsmith.run.execute import compress
from bitsmith.run.paired import paired
from bitsmith.run.paired_inputs import open_sides, read_corpus
from paired_models import DENSE, LARGE, LINES, SMALL, write_model

Pair = tuple[Path, Path]
CTX, TOKENS, SAMPLES = 64, 10 * 64 + 5, 128
ASKED: dict[str, Any] = {"tokens": TOKENS, "ctx_tokens": CTX, "samples": SAMPLES, "batch_chunks": 2}
SHORT: dict[str, Any] = {
    "vocab_size": 512,
    "steps": 3,
    "batch_size": 2,
    "context_tokens": 32,
    "compile": False,
    "intermediate_size": 64,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("models")
    return (
        write_model(folder / "teacher", 1, **DENSE, **LARGE, num_hidden_layers=2),
        write_model(folder / "student", 2, **DENSE, **SMALL, num_hidden_layers=1),
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(LINES))
    return path


@pytest.fixture(scope="module")
def made(pair: Pair, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    out = tmp_path_factory.mktemp("made") / "distilled"
    return distilled(*pair, text, out, **ASKED, steps=32, learning_rate=3e-3, kl_share=0.7)


def loss_nats(pair: Pair, student: Path, text: Path, kl_share: float) -> float:
    """Return by transformers' whole models the mixed loss on the chunks that the pairing holds out."""
    with open_sides(*pair) as sides:
        tokens = torch.from_numpy(read_corpus(sides, text, TOKENS, CTX, SAMPLES, sparse=True).split[1])
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (pair[0], student)]
    with torch.no_grad():
        wanted, found = (torch.log_softmax(model(tokens).logits[:, :-1].double(), -1) for model in models)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    nll = -found.gather(-1, tokens[:, 1:, None]).mean()
    return float(kl_share * kl + (1 - kl_share) * nll)


def test_the_losses_are_those_of_whole_models(pair: Pair, text: Path, made: Distilled) -> None:
    assert made.held_loss_before_nats == pytest.approx(loss_nats(pair, pair[1], text, 0.7), abs=1e-5)
    assert made.held_loss_after_nats == pytest.approx(loss_nats(pair, made.out, text, 0.7), abs=1e-5)
    assert made.held_loss_after_nats < made.held_loss_before_nats - 1


def test_its_tokens_are_those_of_the_pairing(pair: Pair, text: Path, made: Distilled, tmp_path: Path) -> None:
    found = paired(*pair, text, tmp_path / "paired", tokens=TOKENS, ctx_tokens=CTX, samples=SAMPLES)
    held = len(found.manifest.held_chunks) * CTX
    assert (made.fit_tokens, made.held_tokens) == (found.manifest.fit_tokens, held) == (9 * CTX, CTX)
    assert made.trained_tokens == 32 * 2 * CTX


def test_the_best_step_is_kept(pair: Pair, text: Path, tmp_path: Path) -> None:
    """No step is better than the teacher itself as the student, whose bytes come back."""
    model = pair[0]
    worse = distilled(model, model, text, tmp_path / "worse", **ASKED, steps=3, kl_share=1.0)
    assert worse.best_step == 0
    assert worse.held_loss_before_nats == worse.held_loss_after_nats == pytest.approx(0, abs=1e-5)
    assert min(row["held_loss_nats"] for row in worse.log[1:]) > worse.held_loss_before_nats
    before, after = (load_file(path / "model.safetensors") for path in (model, worse.out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_killed_distillation_ends_as_an_unbroken_one(
    pair: Pair, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ASKED | {"steps": 6}
    unbroken = distilled(*pair, text, tmp_path / "unbroken", **asked)

    def killed(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("tune", 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(descent, "_SAVED_EVERY_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        distilled(*pair, text, tmp_path / "broken", **asked, progress=killed)
    assert not (tmp_path / "broken").exists()
    steps: list[int] = []
    resumed = distilled(
        *pair,
        text,
        tmp_path / "broken",
        **asked,
        progress=lambda stage, done, _: steps.append(done) if stage == "tune" else None,
    )
    assert steps == [4, 5, 6]
    whole, broken = ((one.out / "model.safetensors").read_bytes() for one in (unbroken, resumed))
    assert whole == broken
    assert {path.name for path in tmp_path.iterdir()} == {"unbroken", "broken"}


def test_a_tied_student_with_an_mtp_layer(tiny_qwen3_5_tied: Path, text: Path, tmp_path: Path) -> None:
    """The head follows the embedding, the MTP layer stays as it is, and so does every type."""
    model = tiny_qwen3_5_tied
    asked = ASKED | {"steps": 2, "kl_share": 0.0}
    out = distilled(model, model, text, tmp_path / "out", **asked).out
    before = {name: a for path in model.glob("*.safetensors") for name, a in load_file(path).items()}
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("mtp.") for name in changed)
    assert any(name.startswith("mtp.") for name in before)
    matrices = {name for name in before if not name.startswith("mtp.") and before[name].ndim == 2}
    assert matrices <= changed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "leave nothing to learn"),
        ({"batch_chunks": 0}, "leave nothing to learn"),
        ({"learning_rate": float("nan")}, "learning rate is nan"),
        ({"kl_share": 1.5}, "share of the divergence is 1.5"),
        ({"tokens": CTX}, "too few"),
    ],
)
def test_what_cannot_be_asked_for(
    pair: Pair, text: Path, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(BitsmithError, match=message):
        distilled(*pair, text, tmp_path / "out", **(ASKED | wrong))
    assert not list(tmp_path.iterdir())


def test_outputs_and_students_that_are_refused(pair: Pair, text: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        distilled(*pair, text, pair[1].parent, **ASKED)
    with pytest.raises(OutputError, match="is the input"):
        distilled(*pair, text, pair[1], **ASKED, overwrite=True)
    with pytest.raises(OutputError, match="in a folder that exists"):
        distilled(*pair, text, tmp_path / "none" / "out", **ASKED)
    with pytest.raises(BitsmithError, match="has to be the larger"):
        distilled(pair[1], pair[0], text, tmp_path / "out", **ASKED)
    compress(pair[1], tmp_path / "student.gguf", "F16")
    with pytest.raises(UnsupportedError, match="no Hugging Face checkpoint"):
        distilled(pair[0], tmp_path / "student.gguf", text, tmp_path / "out", **ASKED)


@pytest.fixture(scope="module")
def few_documents() -> dict[bool, list[str]]:
    """Six real sources of each split, read once: the code under test is the same, the wait is not."""
    return {held_out: list(islice(documents(held_out), 6)) for held_out in (False, True)}


@pytest.fixture
def small_corpus(few_documents: dict[bool, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (training.__name__, "bitsmith.lab.corpus"):
        monkeypatch.setattr(f"{module}.documents", lambda held_out: few_documents[held_out])


@pytest.mark.usefixtures("small_corpus")
def test_a_pair_is_trained_and_goes_on(tmp_path: Path) -> None:
    teacher = dataclasses.replace(TEACHER, **SHORT, hidden_size=128, num_hidden_layers=2)
    student = dataclasses.replace(STUDENT, **SHORT, num_hidden_layers=1)

    def killed(stage: str, done: int, total: int) -> None:
        if stage == "student":
            raise KeyboardInterrupt

    out = tmp_path / "pair"
    with pytest.raises(KeyboardInterrupt):
        train_pair(out, teacher=teacher, student=student, progress=killed)
    weights = (out / "teacher" / "model.safetensors").stat()
    with pytest.raises(OutputError, match="other options"):
        train_pair(out, teacher=dataclasses.replace(teacher, seed=5), student=student)
    assert train_pair(out, teacher=teacher, student=student) == out
    assert (out / "teacher" / "model.safetensors").stat() == weights
    with pytest.raises(OutputError, match="holds a pair"):
        train_pair(out, teacher=teacher, student=student)
    with open_sides(out / "teacher", out / "student") as sides:
        assert (sides.teacher.n_layers, sides.student.n_layers) == (2, 1)
        digest = sides.teacher.model.checkpoint.source_digest
    header, *rows = _log(out / "student")
    assert header["teacher_sha256"] == digest
    assert rows[-1]["held_out_kld_nats"] > 0
    assert "lm_head.weight" not in load_file(out / "student" / "model.safetensors")


def test_pairs_that_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="none/pair: cannot be made"):
        train_pair(tmp_path / "none" / "pair")
    with pytest.raises(BitsmithError, match="leave nothing to train"):
        train_pair(tmp_path / "pair", teacher_minutes=0)
    with pytest.raises(OutputError, match="in a folder that exists"):
        train(tmp_path / "none" / "teacher", TEACHER)


@pytest.mark.usefixtures("small_corpus")
def test_a_student_learns_its_teachers_distributions(tmp_path: Path) -> None:
    """With nothing but the divergence in the loss, the divergence goes down and the loss is it."""
    spec = dataclasses.replace(
        STUDENT, **(SHORT | {"steps": 25}), num_hidden_layers=1, kl_share=1.0, learning_rate=1e-2
    )
    teacher = train(tmp_path / "teacher", dataclasses.replace(spec, seed=7))
    run = training._Run(dataclasses.replace(spec, seed=1), tmp_path / "state", teacher)
    stream = np.arange(2000, dtype=np.int64) % 500
    before = run._held_out(run.model, stream)["held_out_kld_nats"]
    first = run._advance(run.model, torch.from_numpy(stream[:66].reshape(2, 33)), 0.0)
    with torch.no_grad():
        assert first > 0
        assert run._held_out(run.model, stream)["held_out_kld_nats"] != before
    rows = run.fit(stream, stream, lambda *_: None)
    assert rows[-1]["held_out_kld_nats"] < 0.8 * before
    with pytest.raises(BitsmithError, match="tokenizer has 512 tokens, expected 640"):
        train(tmp_path / "other", dataclasses.replace(spec, vocab_size=640), teacher=teacher)


def test_heads_that_are_given() -> None:
    config = training.model_config(STUDENT)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 32)
    config = training.model_config(training.TrainSpec(hidden_size=384))
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 64)


def test_the_bundled_pair_is_what_its_logs_say() -> None:
    for folder, spec in ((TEACHER_MODEL, TEACHER), (STUDENT_MODEL, STUDENT)):
        header, first, *_, last = _log(folder)
        assert header["spec"] == dataclasses.asdict(spec)
        assert last["seconds"] >= 60 * spec.minutes
        assert last["held_out_loss_nats"] < first["held_out_loss_nats"] - 0.5
    assert sum(p.stat().st_size for f in (TEACHER_MODEL, STUDENT_MODEL) for p in f.iterdir()) < 13 * 2**20
    with open_sides(TEACHER_MODEL, STUDENT_MODEL) as sides:
        assert _log(STUDENT_MODEL)[0]["teacher_sha256"] == sides.teacher.model.checkpoint.source_digest
    assert _log(TEACHER_MODEL)[-1]["held_out_loss_nats"] < _log(STUDENT_MODEL)[-1]["held_out_loss_nats"]


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
