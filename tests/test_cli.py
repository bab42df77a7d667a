"""The command line as a stranger meets it: real processes, real files, one clear line for each bad input."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitsmith.cli.main import app, main
from bitsmith.errors import OutputError
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth
from bitsmith.run.verify import verify
from bitsmith.store import open_gguf
from bitsmith.store.imatrix import read_imatrix

README = Path(__file__).parents[1] / "README.md"


def bitsmith(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "bitsmith.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def completed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run `main` here, which spares a start."""
    monkeypatch.setattr(sys, "argv", ["bitsmith", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return subprocess.CompletedProcess(sys.argv, int(stop.value.code or 0), *capsys.readouterr())


def in_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str]:
    """Return the exit code of `main` and what is on stderr."""
    done = completed(capsys, monkeypatch, *arguments)
    return done.returncode, done.stderr


def copy_of_demo(folder: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL, folder / "model"))


def sharded(folder: Path) -> Path:
    """The demo model as two shards with an index."""
    from safetensors.numpy import save_file
    from safetensors.torch import load_file

    model = copy_of_demo(folder)
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(state)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    index = {}
    for i, half in enumerate(halves, 1):
        shard = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: state[n].float().numpy() for n in half}, model / shard)
        index |= dict.fromkeys(half, shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return model


def missing_shard(folder: Path) -> Path:
    model = sharded(folder)
    (model / "model-00002-of-00002.safetensors").unlink()
    return model


def truncated(folder: Path) -> Path:
    model = copy_of_demo(folder)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return model


def unknown_architecture(folder: Path) -> Path:
    model = copy_of_demo(folder)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mamba9"}))
    return model


def orphan_tensor(folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    model = copy_of_demo(folder)
    state = load_file(model / "model.safetensors")
    state["model.layers.0.mlp.extra.weight"] = state["model.norm.weight"].clone()
    save_file(state, model / "model.safetensors")
    return model


def nan_weight(folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    model = copy_of_demo(folder)
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, model / "model.safetensors")
    return model


def nothing(folder: Path) -> Path:
    return folder / "absent"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (missing_shard, r"model-00002-of-00002\.safetensors"),
        (truncated, r"model\.safetensors.*download"),
        (unknown_architecture, r"mamba9.*qwen3_5"),
        (orphan_tensor, r"model\.layers\.0\.mlp\.extra\.weight"),
        (nan_weight, r"model\.layers\.1\.mlp\.up_proj\.weight.*\b3\b.*\b5\b"),
        (nothing, r"absent"),
    ],
)
def test_bad_model_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, make, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    done = completed(capsys, monkeypatch, "compress", model, "-o", tmp_path / "out.gguf", "--type", "Q4_K_M")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert re.search(expected, lines[0]), lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_generating_without_a_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of_demo(tmp_path)
    (model / "tokenizer.json").unlink()
    out = tmp_path / "out.gguf"
    made = completed(capsys, monkeypatch, "compress", model, "-o", out, "--type", "Q8_0")
    assert "no tokenizer" in made.stdout
    done = completed(capsys, monkeypatch, "generate", out, "-p", "hi", "-n", "2")
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*out\.gguf: has no tokenizer.*\n", done.stderr)


def test_ctrl_c_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    model = synth(tmp_path / "model", "0.8B", layers=1, vision=False, mtp=False)
    command = [
        sys.executable,
        "-m",
        "bitsmith.cli.main",
        "compress",
        str(model),
        "-o",
        str(tmp_path / "out.gguf"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob(".out.gguf*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGKILL)  # where compiled code would not let it end
    assert re.fullmatch(r"error: interrupted.*the same command .*\n", stderr)
    assert not list(tmp_path.glob("out.gguf*"))


def test_existing_output_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    done = bitsmith("compress", DEMO_MODEL, "-o", out)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: .*out\.gguf.*exists.*--overwrite.*\n", done.stderr)
    assert out.read_bytes() == b"precious"


def test_short_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    done = completed(capsys, monkeypatch, "evaluate", DEMO_MODEL, DEMO_MODEL, "--text", text)
    assert done.returncode != 0
    assert re.search(r"short\.txt.*\b512\b", done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_override_that_names_nothing_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--dry-run", "--tensor-type", "no_such_tensor=Q6_K")
    done = completed(capsys, monkeypatch, "compress", DEMO_MODEL, *options)
    assert done.returncode != 0
    assert "no_such_tensor" in done.stderr


def test_dry_run_bytes_are_the_written_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = tmp_path / "out.gguf", tmp_path / "plan.json"
    command = ("compress", DEMO_MODEL, "--type", "IQ4_XS", "--tensor-type", "ffn_down=Q6_K",
               "--tensor-type", "embed_tokens=Q8_0")  # fmt: skip
    dry = completed(capsys, monkeypatch, *command, "--dry-run", "--json", plan)
    assert dry.returncode == 0, dry.stderr
    assert list(tmp_path.iterdir()) == [plan]
    done = completed(capsys, monkeypatch, *command, "-o", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(plan.read_text())["file_bytes"] == out.stat().st_size
    assert f"{out.stat().st_size:,}" in dry.stdout


def test_demo_writes_its_files_and_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = completed(capsys, monkeypatch, "demo", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"demo-Q4_K_M.gguf", "record.json", "evaluation.json", "report.html"} <= {
        p.name for p in tmp_path.iterdir()
    }
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    kld = evaluation["measures"]["mean_kld"]
    assert 0 < kld["low"] <= kld["value"] <= kld["high"]
    assert kld["unit"] == "nats"
    assert "mean KLD" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["artifacts"][1]["measures"]["mean_kld"]["value"] == kld["value"]
    assert report["samples"][0]["passages"][0]["text"] in done.stdout


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("bitsmith ") and "MODEL" not in line]


def test_readme_commands_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").symlink_to(DEMO_MODEL)
    monkeypatch.chdir(tmp_path)
    commands = readme_commands()
    assert commands
    for command in commands:
        done = completed(capsys, monkeypatch, *shlex.split(command, comments=True)[1:])
        assert done.returncode == 0, f"{command}\n{done.stderr}"


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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--target 3", r"3 bytes.* too small: the smallest formats offered take [\d,]+ bytes"),
        ("--target foo", r"target 'foo' is not understood; expected 4\.66bpw"),
        ("--target 1bpw", r"1 bpw: tensor data of at most [\d,]+ bytes is too small"),
        ("--target 0bpw", r"must be above 0"),
        ("--target 4.5XB", r"unknown unit 'XB'"),
        ("--fit 1MiB", r"leaves nothing for the weights"),
        ("--fit 4bpw", r"must be a size such as 8GiB"),
        ("--target 5bpw --fit 8GiB", r"--target and --fit exclude each other"),
        ("--recipe auto", r"needs a size: --target"),
        ("--target 5bpw --type Q4_K_M", r"chooses the types itself"),
        ("--target 5bpw --pure", r"chooses the types itself"),
        ("--target 5bpw --tensor-type ffn_up=Q6_K", r"chooses the types itself"),
        ("--tune-steps 3", r"--tune-steps is for --tune"),
        ("--text t --stats s", r"--text and --stats exclude each other"),
        ("--rounder gptq", r"rounder gptq needs statistics of the inputs: pass --stats"),
        ("--text absent.txt", r"absent\.txt"),
        ("--target 5bpw --stats absent", r"absent: does not exist"),
        ("--plan absent.yaml", r"absent\.yaml: cannot be read"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_what_cannot_be_compressed_is_one_line_and_leaves_nothing(
    tiny_qwen3: Path, tmp_path: Path, options: str, expected: str, dry: bool,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if dry and ("rounder" in options or "absent.txt" in options):
        pytest.skip("a dry run neither rounds nor reads a text")
    monkeypatch.chdir(tmp_path)
    where = ["--dry-run"] if dry else ["-o", "out.gguf"]
    code, errors = in_process(capsys, monkeypatch, "compress", tiny_qwen3, *where, *options.split())
    assert code == 1
    assert re.fullmatch(rf"error: .*{expected}.*\n", errors), errors
    assert not list(tmp_path.iterdir())


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


def test_a_plan_can_be_edited_and_passed_back(
    tiny_qwen3_5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, again = tmp_path / "plan.yaml", tmp_path / "out.gguf", tmp_path / "again.yaml"
    dry = ("compress", tiny_qwen3_5, "--dry-run", "--type", "Q3_K_M", "--plan-out", plan)
    assert in_process(capsys, monkeypatch, *dry) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
    lines = plan.read_text()
    edited, count = re.subn(r"(blk\.2\.ffn_down\.weight: \{type: )\w+", r"\1Q6_K", lines)
    assert count == 1 and edited != lines
    plan.write_text(edited)
    types = dict(re.findall(r"^  (\S+): \{type: (\w+)", edited, flags=re.M))
    code, errors = in_process(
        capsys, monkeypatch, "compress", tiny_qwen3_5, "--plan", plan, "-o", out, "--plan-out", again
    )
    assert (code, errors) == (0, "")
    with open_gguf(out) as written:
        assert {name: ref.dtype for name, ref in written.items()} == types
    assert types["blk.2.ffn_down.weight"] == "Q6_K" and len(set(types.values())) > 3
    assert dict(re.findall(r"^  (\S+): \{type: (\w+)", again.read_text(), flags=re.M)) == types
    for options in (("--type", "Q4_K_M"), ("--pure",), ("--tensor-type", "ffn_up=Q8_0")):
        code, errors = in_process(
            capsys, monkeypatch, "compress", tiny_qwen3_5, "--plan", plan, "-o", tmp_path / "x.gguf", *options
        )
        assert code == 1 and "a plan names every type" in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "x.gguf").exists()


def test_the_name_of_an_output_follows_the_models_folder(
    tiny_qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_qwen3, tmp_path / "Qwen3.5-4B")
    monkeypatch.chdir(tmp_path)
    assert in_process(capsys, monkeypatch, "compress", "Qwen3.5-4B", "--type", "q8_0") == (0, "")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"Qwen3.5-4B"} | {f"Qwen3.5-4B-Q8_0.gguf{end}" for end in ("", ".record.json", ".sha256")}


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


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (
            "compress",
            "--out --type --recipe --target --fit --ctx --stats --text --rounder --tune --tune-steps --plan"
            " --plan-out --pure --tensor-type --no-fallback --dry-run --overwrite --json",
        ),
        (
            "calibrate",
            "--out --text --stats --ctx --chunks --block --saliency --no-saliency --overwrite --json",
        ),
    ],
)
def test_help_names_every_option(command: str, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = bitsmith(command, "--help")
    assert done.returncode == 0
    shown = set(re.findall(r"--[a-z][a-z-]*", done.stdout))
    assert set(flags.split()) <= shown, set(flags.split()) - shown
