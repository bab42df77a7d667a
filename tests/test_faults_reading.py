"""Faults of what lies beside the weights, of links and of archives; code that comes along is never run."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from bitsmith.archs import architecture_of
from bitsmith.archs.tokenizer import load_tokenizer, tokenizer_metadata
from bitsmith.cli.main import main
from bitsmith.errors import BitsmithError, DamagedFileError
from bitsmith.run.cellm import write_cellm
from bitsmith.run.compress import compress
from bitsmith.run.folder import write_folder
from bitsmith.run.job import Job
from bitsmith.store import open_checkpoint

# ---------------------------------------------------------------- links

PRIVATE = '{"private": "what the user may read and others may not"}'


def linked(model: Path, tmp_path: Path, name: str) -> Path:
    """Return a copy of a model whose side file `name` is a link out of the folder."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    outside = tmp_path / "secret"
    outside.write_text(PRIVATE)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    return folder


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.json"]
)
def test_a_side_file_that_links_out_is_refused(name: str, demo_model: Path, tmp_path: Path) -> None:
    folder = linked(demo_model, tmp_path, name)
    settings = json.loads((demo_model / "tokenizer_config.json").read_text())
    if name == "chat_template.json":
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    with open_checkpoint(folder) as model, pytest.raises(DamagedFileError) as caught:
        tokenizer_metadata(model, architecture_of(model))
    assert str(folder / name) in str(caught.value) and "links out of the model folder" in str(caught.value)
    with pytest.raises(DamagedFileError, match="links out"):
        compress(Job(model=folder, out=tmp_path / "x.gguf"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "secret"]


def test_a_chat_template_that_links_out_is_refused(demo_model: Path, tmp_path: Path) -> None:
    folder = linked(demo_model, tmp_path, "chat_template.jinja")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DamagedFileError, match=r"chat_template\.jinja: links out"):
        compress(Job(model=folder, out=tmp_path / "x.gguf"))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "LICENSE", "vocab.json"])
def test_what_would_be_copied_is_not_followed_out(name: str, demo_model: Path, tmp_path: Path) -> None:
    folder = linked(demo_model, tmp_path, name)
    with pytest.raises(DamagedFileError, match="links out"):
        write_folder(folder, tmp_path / "out", "W4A16")
    if name == "vocab.json":
        with pytest.raises(DamagedFileError, match="links out"):
            write_cellm(folder, tmp_path / "out.cellm", "i4")
    assert not (tmp_path / "out").exists()


def test_links_of_a_hub_cache_reach_the_tokenizer(demo_model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(demo_model.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    with open_checkpoint(snapshot) as cached, open_checkpoint(demo_model) as plain:
        assert cached.source_digest == plain.source_digest
        assert load_tokenizer(cached).to_str() == load_tokenizer(plain).to_str()


# ---------------------------------------------------------------- code and archives


def test_code_that_comes_along_is_never_run(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ran = Path(shutil.copytree(demo_model, tmp_path / "model")), tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil.py", "modeling_qwen3_5.py", "tokenization_evil.py", "custom_generate.py"):
        (folder / name).write_text(code)
    trust = {"trust_remote_code": True, "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | trust | {"rope_parameters": _nested(config)}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | tokenizer))
    monkeypatch.chdir(folder)
    for command in (
        ["generate", folder, "-p", "import", "-n", 2, "--temperature", 0],
        ["compress", folder, "--type", "W8A16", "-o", tmp_path / "packed"],
    ):
        monkeypatch.setattr(sys, "argv", ["bitsmith", *map(str, command)])
        with suppress(SystemExit):
            main()
        assert "error" not in capsys.readouterr().err
    assert not ran.exists()
    written = tmp_path / "packed"
    assert not list(written.rglob("*.py"))
    assert "auto_map" not in (written / "config.json").read_text()
    assert "trust_remote_code" not in (written / "config.json").read_text()


def _nested(config: dict[str, dict[str, object]]) -> dict[str, object]:
    return {**config["rope_parameters"], "trust_remote_code": True}


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../escaped", "x")


def _tar(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(__file__, "../escaped")


def _pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch escaped'\ntR.")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("model.zip", _zip), ("model.tar.gz", _tar), ("pytorch_model.bin", _pickle), ("model.pt", _zip),
        ("model.nemo", _tar), ("model.pth", _pickle), ("model.gguf", _zip), ("model.safetensors", _pickle),
    ],
)  # fmt: skip
def test_archives_and_pickles_are_neither_unpacked_nor_loaded(
    name: str,
    make: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder / name)
    monkeypatch.chdir(tmp_path)
    for path in (folder / name, folder):
        with pytest.raises(BitsmithError, match=r"expected|neither|only pickle|no \.safetensors") as caught:
            open_checkpoint(path)
        assert str(path) in str(caught.value)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["model", name]


def test_a_folder_of_pickles_names_them_and_what_to_do(tmp_path: Path) -> None:
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        _pickle(tmp_path / name)
    with pytest.raises(BitsmithError, match=r"00001-of-00002\.bin.*00002-of-00002\.bin.*safetensors"):
        open_checkpoint(tmp_path)


def test_a_header_over_100_mb_is_refused_in_a_file_that_has_as_much(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little") + b'{"')
        stream.truncate(100_000_100)  # a hole: nothing is stored
    tracemalloc.start()
    try:
        with pytest.raises(
            DamagedFileError, match="its header has 100000001 bytes, expected at most 100000000"
        ):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
