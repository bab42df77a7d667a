"""`bitsmith verify`: files against their digests, every tensor against its recorded error, for every kind."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bitsmith.cli.main import app
from bitsmith.errors import BitsmithError, DamagedFileError
from bitsmith.run.compress import compress
from bitsmith.run.job import Job
from bitsmith.run.record import seal, without_places
from bitsmith.run.verify import Verification, verify
from bitsmith.store import open_gguf
from bitsmith.store.atomic import atomic_file, atomic_folder
from bitsmith.store.manifest import check_manifest, record_of, write_manifest

FAST = (
    ("x.gguf", {"type_name": "Q4_K_M", "transforms": "permute,scale-ffn,rotate"}),
    ("x.cellm", {"type_name": "i4_g32", "tensor_types": (("down_proj", "i8"),)}),
    ("ct", {"type_name": "W4A16_ASYM", "group": 32}),
)
FACTORS = (
    ("layers.0.mlp.down", "SVD+INT4:r=8"),
    ("layers.0.mlp.up", "TT:r=8"),
    ("layers.0.mlp.gate", "TT+SVD:r=6:core=24"),
)
SLOW = (
    ("plain.gguf", {"type_name": "IQ4_XS", "pure": True}),
    ("seed.cellm", {"type_name": "q1", "like_seed": True}),
    ("nf4", {"type_name": "NF4"}),
    ("fp4", {"type_name": "FP4"}),
    ("spi", {"recipe": "spi", "critical": "3"}),
    ("svd", {"type_name": "SVD:r=16:int8"}),
    ("int8", {"type_name": "INT8"}),
    ("factors", {"type_name": "BF16", "tensor_types": FACTORS}),
)


@pytest.fixture(scope="module")
def made(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF with its manifest and record, beside its source; tests work on copies of the folder."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_qwen3, folder / "model")
    compress(Job(folder / "model", folder / "out.gguf", "Q4_K_M"))
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "work")


@pytest.mark.parametrize(
    ("name", "options"),
    [*FAST, *(pytest.param(*one, marks=pytest.mark.slow, id=one[0]) for one in SLOW)],
)
def test_every_kind_verifies(tiny_qwen3: Path, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    out = tmp_path / name
    compress(Job(tiny_qwen3, out, **options))
    found = verify(out)
    assert found.passed and not found.faults and not found.skipped
    assert all(one.agrees for one in found.tensors)
    assert any(one.recorded for one in found.tensors), "something is rounded"
    assert len(found.tensors) == len(json.loads(record_of(out).read_text())["tensors"])


def test_the_record_is_of_the_inputs_alone(made: Path, work: Path) -> None:
    compress(Job(work / "model", work / "out.gguf", "Q4_K_M", overwrite=True))
    for end in ("", ".sha256", ".record.json"):
        assert (work / f"out.gguf{end}").read_bytes() == (made / f"out.gguf{end}").read_bytes()
    said = (made / "out.gguf.record.json").read_text()
    assert json.loads(said)["sources"]["model"]["path"] == "model"
    assert "seconds" not in said and "memory" not in said


def flipped(path: Path, place: int, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)


def tensor_start(path: Path, name: str) -> int:
    """Return where a tensor's bytes begin in a GGUF."""
    with open_gguf(path) as stored:
        raw = stored[name].raw().tobytes()
    return path.read_bytes().index(raw)


def test_one_flipped_bit_names_the_file_and_the_tensor(work: Path) -> None:
    out, name = work / "out.gguf", "blk.1.ffn_down.weight"
    flipped(out, tensor_start(out, name) + 20, 4)
    found = verify(out)
    assert not found.passed
    assert [(one.path, one.tensor) for one in found.faults] == [(out, None), (out, name)]
    with pytest.raises(DamagedFileError, match=r"out\.gguf: has SHA-256 \w+…, was written as \w+…; 1 more"):
        found.refuse()


def test_a_manifest_made_again_does_not_hide_a_changed_tensor(work: Path) -> None:
    out, name = work / "out.gguf", "blk.0.attn_q.weight"
    flipped(out, tensor_start(out, name) + 30, 16)
    write_manifest(out, json.loads(record_of(out).read_text()))
    assert not check_manifest(out)
    found = verify(out)
    assert [(one.path, one.tensor) for one in found.faults] == [(out, name)]
    assert "recorded were" in found.faults[0].what


def recorded(out: Path, change: Any) -> Verification:
    """Verify with a changed record whose digest is in the manifest."""
    record = json.loads(record_of(out).read_text())
    change(record)
    write_manifest(out, record)
    return verify(out)


def test_a_record_that_tells_of_other_tensors_does_not_pass(work: Path) -> None:
    out = work / "out.gguf"
    found = recorded(out, lambda record: record["tensors"].pop())
    assert [one.what for one in found.faults] == ["is not in the record"]
    found = recorded(out, lambda record: record["tensors"].append(record["tensors"][0] | {"name": "more"}))
    assert "is in the record, not in the file" in [one.what for one in found.faults]
    found = recorded(out, lambda record: record["tensors"][0].update(type="Q8_0"))
    assert any("the record says Q8_0" in one.what for one in found.faults)
    found = recorded(out, lambda record: record["tensors"][0].update(relative_error=None))
    assert "tells no error" in [one.what for one in found.faults]
    with pytest.raises(DamagedFileError, match=r"record\.json: tensors\.0\.relative_error: .*greater than"):
        recorded(out, lambda record: record["tensors"][0].update(relative_error=-1.0))
    with pytest.raises(DamagedFileError, match=r"record\.json: kind: Input should be a valid string"):
        recorded(out, lambda record: record.update(kind=7))


def test_a_source_that_is_gone_or_changed_does_not_pass(work: Path) -> None:
    out = work / "out.gguf"
    (work / "model").rename(work / "moved")
    found = verify(out)
    assert not found.passed and not found.faults and not found.tensors
    with pytest.raises(
        BitsmithError, match=r"tensors are not compared: .*model: does not exist; pass --source"
    ):
        found.refuse()
    assert verify(out, digests_only=True).passed
    assert verify(out, work / "moved").passed
    flipped(next((work / "moved").glob("*.safetensors")), -3)
    found = verify(out, work / "moved")
    assert not found.passed and "is not the model that this was made of" in found.skipped


def test_missing_and_extra_files_of_a_folder_are_named(tiny_qwen3: Path, tmp_path: Path) -> None:
    out = tmp_path / "ct"
    compress(Job(tiny_qwen3, out, "W4A16"))
    (out / "tokenizer.json").unlink()
    (out / "modeling.py").write_text("import os")
    (out / "deep").mkdir()
    (out / "deep" / "more.json").write_text("{}")
    (out / ".DS_Store").write_text("a desktop's own")
    flipped(out / "config.json", 0)
    said = {(one.path.relative_to(out).as_posix(), one.what) for one in check_manifest(out)}
    named = dict(said)
    assert named.keys() == {"tokenizer.json", "modeling.py", "deep/more.json", "config.json"}
    assert named["tokenizer.json"] == "is missing" and named["modeling.py"] == "is not in ct.sha256"


def test_what_lies_beside_an_output_belongs_to_it(tiny_qwen3: Path, tmp_path: Path) -> None:
    gguf, cellm = tmp_path / "t.gguf", tmp_path / "t.cellm"
    compress(Job(tiny_qwen3, gguf, "Q8_0", transforms="permute"))
    compress(Job(tiny_qwen3, cellm, "i8"))
    flipped(tmp_path / "t.gguf.transforms", -1)
    flipped(tmp_path / "t.cellm.tokenizer" / "tokenizer.json", 5)
    assert (tmp_path / "t.gguf.transforms", None) in {(one.path, one.tensor) for one in verify(gguf).faults}
    assert [one.path.name for one in verify(cellm).faults] == ["tokenizer.json"]


def test_a_torn_overwrite_does_not_verify(work: Path) -> None:
    """What a run that is killed between its manifest and its output leaves of an earlier output."""
    out = work / "out.gguf"
    before = out.read_bytes()
    compress(Job(work / "model", out, "Q8_0", overwrite=True))
    out.write_bytes(before)
    assert not verify(out).passed and not verify(out, digests_only=True).passed


def test_digests_are_written_before_the_output_appears(tmp_path: Path) -> None:
    told = []

    def finish(content: Any) -> None:
        told.append(
            {name: path.read_bytes() for name, path in content.items()} | {"out": (tmp_path / "out").exists()}
        )

    with atomic_file(tmp_path / "out", finish=finish) as stream:
        stream.write(b"whole")
    assert told == [{"": b"whole", "out": False}]
    (tmp_path / "folder").mkdir()
    for name in ("own.txt", "old.bin"):
        (tmp_path / "folder" / name).write_text(name)
    with atomic_folder(
        tmp_path / "folder",
        last="new.bin",
        stale=lambda name: name == "old.bin",
        overwrite=True,
        finish=finish,
    ) as part:
        (part / "new.bin").write_bytes(b"new")
    assert told[1:] == [{"own.txt": b"own.txt", "new.bin": b"new", "out": True}]


def test_a_record_without_places_is_compared_with_the_model_that_is_named(work: Path) -> None:
    out = work / "out.gguf"
    without_places(out)
    assert not check_manifest(out)
    assert "tells no place of model; pass --source MODEL" in verify(out).skipped
    assert verify(out, work / "model").passed


def test_a_report_in_a_folder_is_sealed_and_a_model_keeps_its_record(work: Path) -> None:
    folder = work / "report"
    folder.mkdir()
    (folder / "report.json").write_text("{}")
    (folder / ".lock").write_text("")
    for kind in ("study", "report"):
        seal(folder, kind)
    found = verify(folder)
    assert found.passed and (found.kind, found.files) == ("report", 2)
    (folder / "report.json").write_text("[]")
    assert [one.path.name for one in verify(folder).faults] == ["report.json"]
    seal(work / "out.gguf", "report")
    assert verify(work / "out.gguf", digests_only=True).kind == "gguf"


def test_sha256sum_reads_the_manifest(tmp_path: Path) -> None:
    out = tmp_path / "a\\b\nc"
    out.mkdir()
    (out / "plain").write_text("1")
    (out / "line\nend").write_text("2")
    write_manifest(out, {"output": out.name, "kind": "lab"})
    assert not check_manifest(out)
    if shutil.which("sha256sum") is not None:
        given = ["sha256sum", "--check", "--strict", f"{out.name}.sha256"]
        done = subprocess.run(given, cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("{digest}  ../secret\n", "lists '../secret', which is no file of"),
        ("{digest}  /etc/passwd\n", "lists '/etc/passwd', which is no file of"),
        ("{digest}  out/../../x\n", "which is no file of"),
        ("{digest}  out.record.json\n", "lists no file of"),
        ("{digest}  out", "is cut off"),
        ("", "is cut off"),
        ("nonsense\n", "line 1 is no SHA-256 and a name: 'nonsense'"),
        ("{digest}  out\n\x1b[31m\n", "line 2 is no SHA-256"),
    ],
)
def test_a_hostile_or_broken_manifest_is_refused(tmp_path: Path, manifest: str, said: str) -> None:
    (tmp_path / "out").write_text("x")
    digest = hashlib.sha256(b"x").hexdigest()
    (tmp_path / "out.sha256").write_text(manifest.format(digest=digest))
    with pytest.raises(DamagedFileError, match=r"out\.sha256: .*") as caught:
        verify(tmp_path / "out")
    assert said in str(caught.value)


def test_the_command_exits_with_what_it_found(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    run = CliRunner().invoke
    done = run(app, ["verify", "out.gguf", "--json", "found.json"])
    assert done.exit_code == 0 and "tensors decoded, errors as recorded, against" in done.output
    found = json.loads(Path("found.json").read_text())
    assert found["passed"] and len(found["tensors"]) == len(
        json.loads(record_of(work / "out.gguf").read_text())["tensors"]
    )
    (work / "model").rename(work / "moved")
    assert run(app, ["verify", "out.gguf"]).exit_code == 1
    done = run(app, ["verify", "out.gguf", "--digests-only"])
    assert done.exit_code == 0 and "1 file as written; tensors were not asked for" in done.output
    assert run(app, ["verify", "out.gguf", "--source", "moved"]).exit_code == 0
    flipped(work / "out.gguf", -1)
    done = run(app, ["verify", "out.gguf", "--source", "moved", "--json", "found.json"])
    assert done.exit_code == 1 and "out.gguf: does not verify" in done.output
    assert not json.loads(Path("found.json").read_text())["passed"]
    done = run(app, ["verify", "nothing"])
    assert done.exit_code == 1 and isinstance(done.exception, BitsmithError)
