"""`compress` writes what name, type and recipe ask for, and refuses options of another kind of output."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitsmith.cli.main import app
from bitsmith.errors import BitsmithError
from bitsmith.lab.models import DEMO_MODEL
from bitsmith.run.cellm import parse_kind, write_cellm
from bitsmith.run.compress import compress, destination, output_of, plan
from bitsmith.run.continuation import continue_prompt
from bitsmith.run.job import Job
from bitsmith.store import open_checkpoint


@pytest.mark.parametrize(
    ("out", "type_name", "recipe", "expected"),
    [
        ("x.gguf", None, None, "gguf"),
        ("x.gguf", "BF16", None, "gguf"),
        (None, "Q4_K_M", None, "gguf"),
        ("x.cellm", "i4", None, "cellm"),
        ("x", "w4a16", None, "folder"),
        (None, "NF4", None, "folder"),
        ("x", None, "spi", "spi"),
        ("x", None, "sahc", "sahc"),
    ],
)
def test_name_type_and_recipe_say_what_is_written(
    out: str | None, type_name: str | None, recipe: str | None, expected: str
) -> None:
    job = Job(Path("model"), None if out is None else Path(out), type_name, recipe)
    assert output_of(job) == expected


def test_names_of_outputs_follow_the_models(tiny_qwen3: Path) -> None:
    name = tiny_qwen3.name
    assert destination(Job(tiny_qwen3, type_name="nf4"), "folder") == Path(f"{name}-NF4")
    assert destination(Job(tiny_qwen3, recipe="spi"), "spi") == Path(f"{name}-spi")
    assert destination(Job(tiny_qwen3, recipe="sahc"), "sahc") == Path(f"{name}-sahc")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"out": Path("x.gguf"), "like_seed": True}, "a GGUF is not made with --like-seed"),
        ({"out": Path("x.cellm"), "type_name": "i4", "tune": True}, "a .cellm file is not made with --tune"),
        ({"out": Path("x"), "type_name": "W4A16", "pure": True, "target": "4bpw"}, "--pure, --target"),
        ({"out": Path("x.gguf"), "type_name": "W4A16"}, "makes a folder"),
        ({"out": Path("x"), "type_name": "NF5"}, "a folder takes --type W4A16|"),
        ({"out": Path("x.cellm"), "recipe": "spi"}, "makes a folder"),
        ({"out": Path("x"), "recipe": "spi", "type_name": "NF4"}, "recipe spi is not made with --type"),
        ({"out": Path("x"), "recipe": "spi", "by": "random", "text": Path("t")}, "--text is for --by kld"),
        ({"out": Path("x.gguf"), "recipe": "sahc"}, "recipe sahc makes a folder"),
        ({"out": Path("x"), "recipe": "sahc", "fit": "8GiB"}, "recipe sahc is not made with --fit"),
        ({"out": Path("x.gguf"), "chunks": 3, "ppl_limit": 9.0}, "not made with --chunks, --ppl-limit"),
        ({"out": Path("x.cellm")}, "needs a type: --type f16|i8|i4|i2|q1"),
        ({"out": Path("x.cellm"), "type_name": "i7"}, "unknown kind 'i7'"),
        ({"out": Path("x.cellm"), "type_name": "i4_g7"}, "unknown grid 'int4_g7'"),
    ],
)
def test_options_of_another_output_are_refused(tiny_qwen3: Path, options: dict, expected: str) -> None:
    with pytest.raises(BitsmithError, match=expected.replace("|", r"\|").replace("(", r"\(")):
        compress(Job(tiny_qwen3, **options))


def test_dry_runs_say_the_written_bytes(tiny_qwen3: Path, tmp_path: Path) -> None:
    for name, options in (
        ("x.cellm", {"type_name": "int4_g32", "tensor_types": (("down_proj", "i8"),)}),
        ("seed.cellm", {"type_name": "q1", "like_seed": True}),
        ("ct", {"type_name": "W4A16", "group": 32}),
        ("nf4", {"type_name": "NF4"}),
        ("spi", {"recipe": "spi", "critical": "3"}),
    ):
        job = Job(tiny_qwen3, tmp_path / name, **options)
        planned, record = plan(job), compress(job)
        planned, record = getattr(planned, "folder", planned), getattr(record, "folder", record)
        out = tmp_path / name
        files = [out] if out.is_file() else list(out.glob("*.safetensors"))
        assert planned.file_bytes == record.file_bytes == sum(file.stat().st_size for file in files)
        for line in (tmp_path / f"{name}.sha256").read_text().splitlines():
            digest, _, file = line.partition("  ")
            assert hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() == digest


def test_a_rule_gives_a_matrix_of_a_cellm_its_own_kind(tiny_qwen3: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixed.cellm"
    rules = [("down_proj", "i8"), ("layers.0.", "f16"), ("embed", "i4_g32")]
    record = write_cellm(tiny_qwen3, out, "i2", tensor_types=rules)
    grids = {tensor.name: tensor.grid for tensor in record.tensors}
    assert grids["model.layers.0.mlp.down_proj.weight"] == "int8"
    assert grids["model.layers.0.mlp.up_proj.weight"] is None
    assert grids["model.layers.1.mlp.up_proj.weight"] == "int2"
    assert grids["model.embed_tokens.weight"] == "int4_g32"
    with open_checkpoint(out) as made:
        assert made["model.layers.0.mlp.down_proj.weight"].dtype == "i8"
    with pytest.raises(BitsmithError, match="tensor type nothing=i8 changes nothing"):
        write_cellm(tiny_qwen3, tmp_path / "no.cellm", "i2", tensor_types=[("nothing", "i8")])
    assert not (tmp_path / "no.cellm").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("i4", ("i4", None)), ("INT4_g32", ("i4", 32)), ("q1_0_g128", ("q1", None)), ("f16", ("f16", None))],
)
def test_kinds_have_the_names_of_files_and_of_grids(name: str, expected: tuple[str, int | None]) -> None:
    assert parse_kind(name) == expected


@pytest.mark.parametrize("arguments", [["x.cellm", "--type", "i2"], ["ct", "--type", "W8A16"]])
def test_the_command_prints_and_records(tiny_qwen3: Path, tmp_path: Path, arguments: list[str]) -> None:
    out, record = tmp_path / arguments[0], tmp_path / "record.json"
    command = ["compress", str(tiny_qwen3), "-o", str(out), *arguments[1:]]
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "nothing written (dry run)" in dry.output
    assert not out.exists()
    made = CliRunner().invoke(app, [*command, "--json", str(record)])
    assert made.exit_code == 0, made.output
    found = json.loads(record.read_text())
    assert f"{found['file_bytes']:,} bytes" in made.output
    assert f"{found['bpw']:.4f} bpw" in made.output


def test_a_cellm_takes_its_tokenizer_along(tmp_path: Path) -> None:
    out = tmp_path / "demo.cellm"
    write_cellm(DEMO_MODEL, out, "i8")
    beside = tmp_path / "demo.cellm.tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (beside / name).read_bytes() == (DEMO_MODEL / name).read_bytes()
    command = ["generate", str(out), "-p", "import os", "--gen", "4", "--temperature", "0"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert continue_prompt(DEMO_MODEL, "import os", 4).text in found.output
