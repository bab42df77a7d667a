"""Commands that calibrate or follow statistics: recipes, targets, tuning, what is kept and refused."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitsmith.cli.main import app
from bitsmith.errors import OutputError
from bitsmith.run.verify import verify
from bitsmith.store import open_gguf
from bitsmith.store.imatrix import read_imatrix
from command_line import in_process


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(200)))
    return path


@pytest.fixture(scope="module")
def stats(tiny_qwen3: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stats") / "stats"
    made = ("--text", text, "-o", out, "--ctx", "32", "--chunks", "16")
    done = CliRunner().invoke(app, ["calibrate", *map(str, (tiny_qwen3, *made))])
    assert done.exit_code == 0 and "16 chunks of 32 tokens, 2 of them held out" in done.stdout, done.stderr
    return out


def test_outputs_in_the_way_are_kept(
    tiny_qwen3: Path, stats: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, model = tmp_path / "out.gguf", tmp_path / "model.gguf"
    goal = ("--target", "6bpw", "--stats", stats)
    assert in_process(capsys, monkeypatch, "compress", tiny_qwen3, "-o", model, "--type", "BF16") == (0, "")
    kept = model.read_bytes()
    code, errors = in_process(capsys, monkeypatch, "compress", model, "-o", model, "--overwrite", *goal)
    assert code == 1 and "is the input" in errors and model.read_bytes() == kept
    out.write_bytes(b"precious")
    code, errors = in_process(capsys, monkeypatch, "compress", tiny_qwen3, "-o", out, *goal)
    assert code == 1 and "exists; pass --overwrite" in errors and out.read_bytes() == b"precious"
    out.rename(tmp_path / "out.gguf.plan.yaml")
    for options in (("-o", out, *goal), ("-o", out, "--plan-out", tmp_path / "out.gguf.plan.yaml")):
        code, errors = in_process(capsys, monkeypatch, "compress", tiny_qwen3, *options)
        assert code == 1 and re.search(r"out\.gguf\.plan\.yaml: exists; pass --overwrite", errors)
    assert (tmp_path / "out.gguf.plan.yaml").read_bytes() == b"precious"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.gguf", "model.gguf.record.json", "model.gguf.sha256", "out.gguf.plan.yaml"}


def types_in(file: Path) -> dict[str, str]:
    with open_gguf(file) as written:
        return {name: ref.dtype for name, ref in written.items()}


def check_recipe(out: Path, record: dict[str, Any]) -> None:
    """What every allocation leaves: the file, its manifest and its plan, and figures in the record."""
    assert {path.name for path in out.parent.iterdir() if path.name.startswith(("out", "."))} == {
        "out.gguf", "out.gguf.record.json", "out.gguf.sha256", "out.gguf.plan.yaml", "out.json",
    }  # fmt: skip
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert (out.parent / "out.gguf.sha256").read_text().startswith(f"{digest}  out.gguf\n")
    assert (record["sha256"], record["file_bytes"]) == (digest, out.stat().st_size)
    assert verify(out).passed
    planned = re.findall(
        r"^  (\S+): \{type: (\w+)", (out.parent / "out.gguf.plan.yaml").read_text(), flags=re.M
    )
    assert dict(planned) == types_in(out)
    candidates = record["candidates"]
    assert len(candidates) >= 3
    klds = [one["measures"]["mean_kld"]["value"] for one in candidates]
    assert klds == sorted(klds) and klds[0] > 0
    listed = {one["name"]: one for one in record["allocation"]["candidates"]}
    assert listed[candidates[0]["name"]]["types"] == types_in(out)
    for one in listed.values():
        assert one["predicted_nats"] > 0 and one["file_bytes"] <= record["allocation"]["limit_bytes"]
    assert re.search(r"context \d+ tokens, \d chunks", record["protocol"])


def test_the_recipe_keeps_its_target_and_tells_what_it_measured(
    tiny_qwen3: Path, stats: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, plan = tmp_path / "out.gguf", tmp_path / "out.gguf.plan.yaml"
    command = ("compress", tiny_qwen3, "-o", out, "--stats", stats, "--rounder", "weighted")
    recipe = ("--recipe", "auto", "--target", "2600000", "--json", tmp_path / "out.json")
    assert in_process(capsys, monkeypatch, *command, *recipe) == (0, "")
    record = json.loads((tmp_path / "out.json").read_text())
    check_recipe(out, record)
    assert 2_400_000 < out.stat().st_size <= 2_600_000
    assert record["calibration"] is None and record["tuning"] is None
    assert {"mean_kld", "kld_99_9", "ppl_ratio"} <= record["measured"].keys()
    kld = record["measured"]["mean_kld"]
    assert 0 < kld["low"] <= kld["value"] <= kld["high"]
    best = record["candidates"][0]["measures"]["mean_kld"]
    assert record["measured"]["mean_kld"]["value"] == pytest.approx(best["value"], rel=1e-6)
    again = tmp_path / "again.gguf"
    command = ("compress", tiny_qwen3, "-o", again, "--stats", stats, "--rounder", "weighted", "--plan", plan)
    assert in_process(capsys, monkeypatch, *command) == (0, "")
    assert again.read_bytes() == out.read_bytes()


def test_the_recipe_fits_memory_on_a_text_of_its_own_and_tunes(
    tiny_qwen3: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from bitsmith.run import recipe
    from bitsmith.run.calibrate import calibrate

    def short(*args: Any, **options: Any) -> Any:
        return calibrate(*args, **options, ctx_tokens=32, chunks=2)

    monkeypatch.setattr(recipe, "calibrate", short)  # the same calibration on less of the text
    out = tmp_path / "out.gguf"
    command = ("compress", tiny_qwen3, "-o", out, "--text", text, "--rounder", "weighted")
    goal = (
        "--fit",
        "15.6MiB",
        "--ctx",
        "1000",
        "--tune",
        "--tune-steps",
        "2",
        "--json",
        tmp_path / "out.json",
    )
    assert in_process(capsys, monkeypatch, *command, *goal) == (0, "")
    record = json.loads((tmp_path / "out.json").read_text())
    check_recipe(out, record)
    memory = record["allocation"]["memory"]
    assert memory["ctx_tokens"] == 1024 and memory["kv_bytes"] == 2 * 1024 * 2 * 64 * 2 * 3
    assert out.stat().st_size + memory["total_bytes"] <= int(15.6 * 2**20)
    assert record["calibration"]["chunks"] == 2 and record["calibration"]["held_chunks"] == 1
    tuning = record["tuning"]
    assert tuning["held_kld_after_nats"] <= tuning["held_kld_before_nats"]
    assert tuning["steps"] == 2 and isinstance(tuning["kept"], bool)
    assert (
        record["measured"]["mean_kld"]["value"]
        <= record["candidates"][0]["measures"]["mean_kld"]["value"] * 1.05
    )


def test_bits_per_weight_count_the_tensors_alone(
    tiny_qwen3: Path, stats: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan, record = tmp_path / "plan.yaml", tmp_path / "plan.json"
    monkeypatch.chdir(tmp_path)
    command = ("compress", tiny_qwen3, "--dry-run", "--target", "4.5bpw", "--stats", stats)
    assert in_process(capsys, monkeypatch, *command, "--plan-out", plan, "--json", record) == (0, "")
    found = json.loads(record.read_text())
    assert 4.4 < 8 * found["tensor_bytes"] / found["parameters"] <= 4.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.yaml"]


def test_a_killed_recipe_is_gone_on_with_by_the_same_options_alone(
    tiny_qwen3: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsmith.run import recipe
    from bitsmith.run.calibrate import calibrate
    from bitsmith.run.job import Job

    texts: list[Path] = []

    def short(model: Path, given: Path, out: Path, **options: Any) -> Any:
        texts.append(given)
        return calibrate(model, given, out, **options, ctx_tokens=32, chunks=2)

    def stop(stage: str, *_: int) -> None:
        if stage == "compress":
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "calibrate", short)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[2000:])
    out = tmp_path / "out.gguf"
    for given, overwrite in ((text, False), (text, False), (other, True)):
        job = Job(tiny_qwen3, out, "Q8_0", text=given, rounder="weighted", overwrite=overwrite)
        with pytest.raises(KeyboardInterrupt):
            recipe.make(job, None, stop)
        assert (tmp_path / ".out.gguf.recipe" / "statistics").is_dir() and not out.exists()
        for changed, name in (({"type_name": "Q4_0"}, "type_name"), ({"text": tmp_path / "x"}, "text")):
            with pytest.raises(
                OutputError, match=rf"recipe/journal: .* with other {name}\b.*; run that again"
            ):
                recipe.make(replace(job, **changed, overwrite=False), None)  # type: ignore[arg-type]
    assert texts == [text, other]
    made = recipe.make(Job(tiny_qwen3, out, "Q8_0", text=other, rounder="weighted"), None)
    assert texts == [text, other] and re.search(r"held-out part of \S*other\.txt", made.protocol)
    assert {path.name for path in tmp_path.iterdir()} == {
        "other.txt", "out.gguf", "out.gguf.record.json", "out.gguf.sha256",
    }  # fmt: skip


def test_tuning_without_anything_held_out_is_refused_before_the_work(
    tiny_qwen3: Path, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = {"single": "chunks, and these have none", "imatrix.dat": "an imatrix holds none"}
    for name, expected in given.items():
        made = ("--text", text, "-o", tmp_path / name, "--ctx", "32", "--chunks", "1", "--no-saliency")
        assert in_process(capsys, monkeypatch, "calibrate", tiny_qwen3, *made) == (0, "")
        command = ("compress", tiny_qwen3, "-o", tmp_path / "out.gguf", "--stats", tmp_path / name, "--tune")
        code, errors = in_process(capsys, monkeypatch, *command)
        assert code == 1 and expected in errors and len(errors.splitlines()) == 1
    assert not list(tmp_path.glob("*out.gguf*"))


@pytest.mark.slow
def test_without_text_or_statistics_the_recipe_reads_pythons_own_sources(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsmith.run import corpus, recipe
    from bitsmith.run.job import Job

    monkeypatch.setattr(corpus.default_text, "__defaults__", (20_000,))
    made = recipe.make(Job(tiny_qwen3, tmp_path / "out.gguf", "Q8_0", rounder="weighted"), None)
    assert made.calibration is not None and made.calibration.chunks >= 2
    assert "python-standard-library.txt" in made.protocol


def test_calibrate_takes_a_text_or_converts_statistics(
    tiny_qwen3: Path, text: Path, stats: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    entries = []
    for name in ("i.gguf", "i.dat"):
        done = in_process(capsys, monkeypatch, "calibrate", tiny_qwen3, "--stats", stats, "-o", name)
        assert done == (0, "")
        entries.append(read_imatrix(tmp_path / name).entries)
    assert entries[0].keys() == entries[1].keys() and "blk.2.ffn_down.weight" in entries[0]
    for options in ((), ("--text", text, "--stats", stats)):
        code, errors = in_process(capsys, monkeypatch, "calibrate", tiny_qwen3, "-o", "no", *options)
        assert code == 1 and len(errors.splitlines()) == 1
        assert "either a text to run through the model, or statistics to convert" in errors
    code, errors = in_process(capsys, monkeypatch, "calibrate", tiny_qwen3, "--stats", stats, "-o", "no")
    assert code == 1 and "expected .gguf or .dat" in errors
    left = [f"i.{kind}{suffix}" for kind in ("dat", "gguf") for suffix in ("", ".record.json", ".sha256")]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
