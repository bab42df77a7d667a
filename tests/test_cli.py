"""The command line as a stranger meets it: real processes, real files, one clear line for each bad input."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitsmith.lab.models import DEMO_MODEL
from bitsmith.lab.synth import synth
from bitsmith.store import open_gguf
from command_line import completed, in_process

README = Path(__file__).parents[1] / "README.md"


def bitsmith(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "bitsmith.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


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
