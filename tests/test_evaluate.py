"""Evaluation end to end on tiny artifacts: protocol, intervals, JSON, and wrong inputs."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from bitsmith.errors import BitsmithError
from bitsmith.lab.corpus import held_out_text
from bitsmith.run.cellm import write_cellm
from bitsmith.run.evaluate import evaluate, evaluate_all
from bitsmith.run.evaluation import INTERVAL
from bitsmith.run.execute import compress

CTX = 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text(held_out_text(8_000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def ggufs(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    names = ("BF16", "Q8_0", "Q4_K_M")
    return {name: compress(demo_model, folder / f"{name}.gguf", name).out for name in names}


def test_a_lossless_gguf_does_not_differ_at_all(demo_model: Path, ggufs: dict[str, Path], text: Path) -> None:
    found = evaluate(demo_model, ggufs["BF16"], text, CTX, 3)
    assert found.max_kld.value == 0.0
    assert found.ppl_ratio.value == 1.0
    assert found.top1_agreement.value == 1.0
    back = evaluate(ggufs["BF16"], demo_model, text, CTX, 3)
    assert back.measures == found.measures
    assert back.protocol == found.protocol


def test_fewer_bits_diverge_more(demo_model: Path, ggufs: dict[str, Path], text: Path) -> None:
    eight, four = evaluate_all(demo_model, [ggufs["Q8_0"], ggufs["Q4_K_M"]], text, CTX, 6)
    assert 0 < eight.mean_kld.value < four.mean_kld.value / 10
    assert four.candidate.bpw < eight.candidate.bpw < eight.reference.bpw
    assert eight.ppl_ref == four.ppl_ref
    assert four == evaluate(demo_model, ggufs["Q4_K_M"], text, CTX, 6)


def test_the_record_says_what_was_measured(demo_model: Path, ggufs: dict[str, Path], text: Path) -> None:
    found = evaluate(demo_model, ggufs["Q8_0"], text, 65, 4, seed=3)
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    protocol = record["protocol"]
    tokens = len(Tokenizer.from_file(str(demo_model / "tokenizer.json")).encode(text.read_text("utf-8")).ids)
    assert protocol["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert protocol["text_tokens"] == tokens
    assert protocol["chunks_available"] == tokens // 65
    assert (protocol["chunks"], protocol["scored_tokens"], protocol["seed"]) == (4, 4 * (65 - 1 - 32), 3)
    assert record["candidate"]["file_bytes"] == ggufs["Q8_0"].stat().st_size
    assert record["reference"]["file_bytes"] == (demo_model / "model.safetensors").stat().st_size
    assert record["reference"]["bpw"] == pytest.approx(16, abs=0.01)
    for name, measure in record["measures"].items():
        assert measure["unit"] in ("nats", "perplexity", "ratio", "fraction"), name
        assert measure["low"] <= measure["value"] <= measure["high"], name
        assert measure["interval"] == INTERVAL
    assert len(found.rows()) == len(record["measures"])


def test_one_chunk_has_no_intervals(demo_model: Path, ggufs: dict[str, Path], text: Path) -> None:
    found = evaluate(demo_model, ggufs["Q8_0"], text, CTX, 1)
    for measure in found.to_json()["measures"].values():
        assert (measure["low"], measure["high"], measure["interval"]) == (None, None, None)
    assert {interval for _, _, interval in found.rows()} == {"unmeasured"}


def test_more_chunks_than_there_are_takes_all(demo_model: Path, text: Path) -> None:
    protocol = evaluate(demo_model, demo_model, text, 256, 10_000).protocol
    assert protocol.chunks == protocol.chunks_available == protocol.text_tokens // 256


def test_special_tokens_in_a_text_are_plain_text(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("x = 1\n" * 100 + "<|endoftext|>" * 20)
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    special = len(tokenizer.encode(text.read_text()).ids)
    assert evaluate(demo_model, demo_model, text, CTX, 1).protocol.text_tokens > special + 20


def test_progress_reports_each_stage_to_its_end(demo_model: Path, ggufs: dict[str, Path], text: Path) -> None:
    last: dict[str, tuple[int, int]] = {}
    evaluate(
        demo_model,
        ggufs["Q8_0"],
        text,
        CTX,
        2,
        progress=lambda s, done, total: last.update({s: (done, total)}),
    )
    assert set(last) == {"reference", "candidate", "head"}
    assert all(done == total for done, total in last.values())


def test_a_text_that_is_too_short(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("import os\n")
    with pytest.raises(BitsmithError, match=r"short\.txt: has \d+ tokens, one chunk needs 512"):
        evaluate(demo_model, demo_model, text)


def test_a_text_that_is_not_utf8(demo_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9 " * 1000)
    with pytest.raises(BitsmithError, match=r"latin\.txt: is not UTF-8: byte 0xe9 at offset 3"):
        evaluate(demo_model, demo_model, text)


def test_a_text_that_is_not_there(demo_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BitsmithError, match="cannot be read: No such file"):
        evaluate(demo_model, demo_model, tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("ctx", "chunks", "message"), [(3, None, "too short"), (64, 0, "nothing to measure")]
)
def test_numbers_that_leave_nothing_to_measure(
    demo_model: Path, text: Path, ctx: int, chunks: int | None, message: str
) -> None:
    with pytest.raises(BitsmithError, match=message):
        evaluate(demo_model, demo_model, text, ctx, chunks)


def test_vocabularies_of_different_sizes(demo_model: Path, tiny_qwen3: Path, text: Path) -> None:
    with pytest.raises(BitsmithError, match="the vocabulary has 4352 tokens, the reference's 4096"):
        evaluate(demo_model, tiny_qwen3, text)


def test_vocabularies_of_different_words(demo_model: Path, tmp_path: Path, text: Path) -> None:
    other = shutil.copytree(demo_model, tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace("<|im_start|>", "<|im_begin|>"), "utf-8")
    with pytest.raises(
        BitsmithError, match=r"token \d+ is '<\|im_begin\|>', the reference's is '<\|im_start\|>'"
    ):
        evaluate(demo_model, other, text)


def test_a_candidate_without_a_tokenizer(demo_model: Path, tmp_path: Path, text: Path) -> None:
    file = write_cellm(demo_model, tmp_path / "x.cellm", "i8").out
    shutil.rmtree(tmp_path / "x.cellm.tokenizer")
    found = evaluate(demo_model, file, text, ctx_tokens=CTX, chunks=1)
    said = f"{file}: has no tokenizer; only the vocabulary's size, 4096, agrees"
    assert found.to_json()["warnings"] == [said]
    assert 0 < found.mean_kld.value < 0.01
    assert 8 < found.candidate.bpw < 8.2
    with pytest.raises(BitsmithError, match=r"tokenizer\.json is missing"):
        evaluate(file, demo_model, text, ctx_tokens=CTX, chunks=1)


def test_logits_that_overflow_are_refused(demo_model: Path, tmp_path: Path, text: Path) -> None:
    huge = shutil.copytree(demo_model, tmp_path / "huge")
    weights = load_file(huge / "model.safetensors")
    weights["lm_head.weight"][5] = 3e38
    save_file(weights, huge / "model.safetensors", metadata={"format": "pt"})
    scored = 2 * (CTX // 2 - 1)
    with pytest.raises(
        BitsmithError, match=rf"huge: logits are NaN or infinite at \d+ of {scored} scored tokens"
    ):
        evaluate(demo_model, huge, text, CTX, 2)


def test_the_library_is_silent(demo_model: Path, text: Path) -> None:
    code = (
        "import sys, pathlib; from bitsmith.run.evaluate import evaluate; "
        f"evaluate(*map(pathlib.Path, sys.argv[1:]), {CTX}, 1)"
    )
    command = [sys.executable, "-W", "error", "-c", code, demo_model, demo_model, text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_follows_the_last_whole_chunk_is_not_scored(
    demo_model: Path, text: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    content = text.read_text("utf-8")
    end = tokenizer.encode(content).offsets[2 * CTX - 1][1]
    cut, longer = tmp_path / "cut.txt", tmp_path / "longer.txt"
    cut.write_text(content[:end], "utf-8")
    longer.write_text(content[: end + CTX], "utf-8")
    first, second = (evaluate(demo_model, demo_model, path, CTX) for path in (cut, longer))
    assert first.protocol.chunks == second.protocol.chunks == 2
    assert second.protocol.text_tokens > first.protocol.text_tokens
    assert first.measures == second.measures
