"""A killed run of error feedback goes on with the matrices it had finished, and ends with the same bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bitsmith.errors import OutputError
from bitsmith.run.calibrate import calibrate
from bitsmith.run.cellm import write_cellm
from bitsmith.run.folder import write_folder
from bitsmith.store.parts import Parts


@pytest.fixture(scope="module")
def stats(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats")
    text = folder / "text.txt"
    text.write_text("".join(f"def f{n}(x):\n    return {n} * x + {n * n % 977}\n\n" for n in range(200)))
    calibrate(demo_model, text, folder / "stats", ctx_tokens=64, chunks=8, saliency=False)
    return folder / "stats"


def bytes_of(out: Path) -> dict[str, bytes]:
    files = [out] if out.is_file() else sorted(out.iterdir())
    return {file.name: file.read_bytes() for file in files}


WRITERS: dict[str, Callable[..., object]] = {
    "x.cellm": lambda model, out, **options: write_cellm(model, out, "i2", **options),
    "ct": lambda model, out, **options: write_folder(model, out, "W4A16", **options),
    "nf4": lambda model, out, **options: write_folder(model, out, "NF4", **options),
}


@pytest.mark.parametrize(
    "name", [name if name == "ct" else pytest.param(name, marks=pytest.mark.slow) for name in WRITERS]
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    demo_model: Path, stats: Path, tmp_path: Path, name: str
) -> None:
    write, out = WRITERS[name], tmp_path / name
    options = {"statistics": stats, "rounder": "gptq"}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "round" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(demo_model, out, progress=stop, **options)
    assert not out.exists()
    parts = tmp_path / f".{name}.parts"
    assert parts.is_dir()
    record = write(demo_model, out, **options)
    assert record.resumed == 3
    assert not parts.exists()
    fresh = write(demo_model, tmp_path / f"fresh-{name}", **options)
    assert fresh.resumed == 0
    assert record.tensors == fresh.tensors
    expected = bytes_of(tmp_path / f"fresh-{name}")
    assert bytes_of(out) == {file.removeprefix("fresh-"): data for file, data in expected.items()}


def test_a_killed_run_is_not_gone_on_with_where_something_changed(
    demo_model: Path, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, out = WRITERS["x.cellm"], tmp_path / "x.cellm"
    options = {"statistics": stats, "rounder": "weighted"}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "round" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(demo_model, out, progress=stop, **options)
    kept = bytes_of(tmp_path / ".x.cellm.parts")
    changed = tmp_path / "changed"
    shutil.copytree(demo_model, changed)
    [shard] = changed.glob("*.safetensors")
    with shard.open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)  # the last weight's sign
        last = stream.read(2)
        stream.seek(-2, os.SEEK_END)
        stream.write(bytes([last[0], last[1] ^ 0x80]))
    with pytest.raises(OutputError, match=r"\.x\.cellm\.parts/journal: .* with other source;"):
        write(changed, out, **options)
    with pytest.raises(OutputError, match="with other types or schemes;"):
        write(demo_model, out, **options, group=32)
    with monkeypatch.context() as patch:
        patch.setattr("bitsmith.store.journal.__version__", "99")
        with pytest.raises(OutputError, match=r'other bitsmith version \(".*", now "99"\); .* --overwrite'):
            write(demo_model, out, **options)
    assert bytes_of(tmp_path / ".x.cellm.parts") == kept and not out.exists()
    assert write(demo_model, out, **options).resumed == 1


def test_parts_of_another_key_are_refused_or_dropped(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Parts(out, {"source": "a"}) as parts:
        parts.write("x", [b"1"])
        parts.add("x", ["x"], {"n": 1})
    with Parts(out, {"source": "a"}) as parts:
        assert parts.note("x") == {"n": 1}
        assert b"".join(chunk.tobytes() for chunk in parts.read("x")) == b"1"
        with pytest.raises(OutputError, match="another run"), Parts(out, {"source": "a"}):
            pass
    with pytest.raises(OutputError, match=r'other source \("a", now "b"\)'), Parts(out, {"source": "b"}):
        pass
    with Parts(out, {"source": "b"}, overwrite=True) as parts:
        assert not parts.finished
        assert not parts.path("x").exists()
    assert not (tmp_path / ".out.parts").exists()
