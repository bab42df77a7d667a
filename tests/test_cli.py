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

README = Path(__file__).parents[1] / "README.md"


def bitsmith(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "bitsmith.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=cwd, check=False)


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
def test_bad_model_is_one_clear_line_and_leaves_nothing(tmp_path: Path, make, expected: str) -> None:
    model = make(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    done = bitsmith("compress", model, "-o", tmp_path / "out.gguf", "--type", "Q4_K_M")
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert re.search(expected, lines[0]), lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_generating_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = copy_of_demo(tmp_path)
    (model / "tokenizer.json").unlink()
    out = tmp_path / "out.gguf"
    assert "no tokenizer" in bitsmith("compress", model, "-o", out).stdout
    done = bitsmith("generate", out, "-p", "hi", "-n", "2")
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
    assert process.returncode == 130
    assert re.fullmatch(r"error: interrupted.*\n", stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_existing_output_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    done = bitsmith("compress", DEMO_MODEL, "-o", out)
    assert done.returncode != 0
    assert re.search(r"out\.gguf.*exists.*--overwrite", done.stderr)
    assert out.read_bytes() == b"precious"


def test_short_text_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short")
    done = bitsmith("evaluate", DEMO_MODEL, DEMO_MODEL, "--text", text)
    assert done.returncode != 0
    assert re.search(r"short\.txt.*\b512\b", done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_override_that_names_nothing_is_refused(tmp_path: Path) -> None:
    done = bitsmith("compress", DEMO_MODEL, "--dry-run", "--tensor-type", "no_such_tensor=Q6_K")
    assert done.returncode != 0
    assert "no_such_tensor" in done.stderr


def test_dry_run_bytes_are_the_written_bytes(tmp_path: Path) -> None:
    out, plan = tmp_path / "out.gguf", tmp_path / "plan.json"
    overrides = ("--tensor-type", "ffn_down=Q6_K", "--tensor-type", "embed_tokens=Q8_0")
    dry = bitsmith("compress", DEMO_MODEL, "--type", "IQ4_XS", "--dry-run", "--json", plan, *overrides)
    assert dry.returncode == 0, dry.stderr
    assert list(tmp_path.iterdir()) == [plan]
    done = bitsmith("compress", DEMO_MODEL, "--type", "IQ4_XS", "-o", out, *overrides)
    assert done.returncode == 0, done.stderr
    assert json.loads(plan.read_text())["file_bytes"] == out.stat().st_size
    assert f"{out.stat().st_size:,}" in dry.stdout


def test_demo_writes_its_files_and_one_table(tmp_path: Path) -> None:
    done = bitsmith("demo", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"demo-Q4_K_M.gguf", "record.json", "evaluation.json", "report.html"} <= {
        p.name for p in tmp_path.iterdir()
    }
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    kld = evaluation["measures"]["mean_kld"]
    assert 0 < kld["low"] <= kld["value"] <= kld["high"]
    assert kld["unit"] == "nats"
    assert "mean KLD" in done.stdout
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("bitsmith ") and "MODEL" not in line]


def test_readme_commands_run(tmp_path: Path) -> None:
    (tmp_path / "tiny").symlink_to(DEMO_MODEL)
    commands = readme_commands()
    assert commands
    for command in commands:
        done = bitsmith(*shlex.split(command, comments=True)[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
