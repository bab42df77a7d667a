"""Opening whatever a path holds, what a checkpoint promises, and outputs that are whole or not there."""

from __future__ import annotations

import ast
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import bitsmith.store
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.store import (
    Checkpoint,
    ComputedTensor,
    TensorData,
    TensorInfo,
    View,
    open_checkpoint,
    write_gguf,
    write_safetensors,
)
from bitsmith.store.atomic import atomic_file, atomic_folder

ARRAYS = {
    "b": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a": np.arange(6, dtype=np.int16),
    "scalar": np.float32(7.5),
}


def save(path: Path, arrays: dict[str, Any] | None = None) -> Path:
    safetensors.numpy.save_file({n: np.asarray(a) for n, a in (arrays or ARRAYS).items()}, path)
    return path


def gguf(path: Path) -> Path:
    write_gguf(path, {"general.architecture": "x"}, [TensorInfo("w", (4,), "F32")], lambda _: [bytes(16)])
    return path


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


# ---------------------------------------------------------------- opening


def test_a_folder_a_file_and_a_nameless_file_open(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors")
    save(tmp_path / "nameless")
    gguf(tmp_path / "g")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "nameless"):
        assert open_checkpoint(path)["b"].read().tolist() == ARRAYS["b"].tolist()
    assert open_checkpoint(tmp_path / "g").metadata == {"general.architecture": "x"}


def test_a_single_oddly_named_file_in_a_folder_opens(tmp_path: Path) -> None:
    save(tmp_path / "odd.safetensors")
    assert set(open_checkpoint(tmp_path)) == set(ARRAYS)


def test_a_folder_with_one_gguf_opens_it_and_with_two_asks(tmp_path: Path) -> None:
    gguf(tmp_path / "x.gguf")
    assert set(open_checkpoint(tmp_path)) == {"w"}
    gguf(tmp_path / "y.gguf")
    with pytest.raises(BitsmithError, match=r"several model files.*x\.gguf, y\.gguf"):
        open_checkpoint(tmp_path)
    save(tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path)) == set(ARRAYS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "empty folder"),
        (lambda path: (path.mkdir(), (path / "readme").write_text("x")), r"no \.safetensors or \.gguf"),
        (lambda path: path.write_bytes(b""), "neither"),
        (lambda path: path.write_bytes(b"PK\3\4 something else"), "neither"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, make: Any, words: str) -> None:
    path = tmp_path / "model"
    make(path)
    with pytest.raises(BitsmithError, match=words) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what a checkpoint promises


def test_files_are_closed_by_the_context_and_by_being_dropped(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors")
    gguf(tmp_path / "x.gguf")
    before = open_descriptors()
    for path in (tmp_path, tmp_path / "x.gguf"):
        with open_checkpoint(path) as opened:
            ref = next(iter(opened.values()))
            ref.read()
            assert open_descriptors() == before + 1
        assert open_descriptors() == before
        with pytest.raises(BitsmithError, match="closed"):
            ref.read()
        opened.close()
        dropped = open_checkpoint(path)
        assert open_descriptors() == before + 1
        del dropped
        assert open_descriptors() == before


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    before = open_descriptors()
    for name in ("x.gguf", "x.safetensors"):
        (tmp_path / name).write_bytes(bytes(100))
        with pytest.raises(BitsmithError):
            open_checkpoint(tmp_path / name)
    assert open_descriptors() == before


def test_a_scalar_and_rows_outside(tmp_path: Path) -> None:
    opened = open_checkpoint(save(tmp_path / "x.safetensors"))
    assert opened["scalar"].read().shape == ()
    assert opened["scalar"].read() == 7.5
    assert list(opened["scalar"].slices()) == [(0, 1)]
    for start, stop in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(BitsmithError, match="tensor 'b': rows"):
            opened["b"].read(start, stop)


def test_slices_cover_every_row_once_within_the_limit(tmp_path: Path) -> None:
    ref = open_checkpoint(save(tmp_path / "x.safetensors", {"w": np.zeros((10, 8), np.float32)}))["w"]
    assert list(ref.slices(3 * 32)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(ref.slices(1)) == [(row, row + 1) for row in range(10)]


def digest(path: Path) -> str:
    with open_checkpoint(path) as opened:
        return opened.source_digest


def test_the_digest_follows_the_content_and_not_the_packing(tmp_path: Path) -> None:
    first = digest(save(tmp_path / "x.safetensors"))
    assert digest(save(tmp_path / "y.safetensors", dict(reversed(ARRAYS.items())))) == first
    with open_checkpoint(tmp_path / "x.safetensors") as opened:
        tensors = [TensorData(name, ref.dtype, ref.shape, [ref.raw()]) for name, ref in opened.items()]
        write_safetensors(tmp_path / "shards", tensors, shard_bytes=10)
        assert View(opened, {}).source_digest == first
    assert digest(tmp_path / "shards") == first
    changed = {
        "value": ARRAYS | {"a": ARRAYS["a"] + 1},
        "shape": ARRAYS | {"b": ARRAYS["b"].reshape(4, 3)},
        "dtype": ARRAYS | {"a": ARRAYS["a"].view(np.uint16)},
        "name": ARRAYS | {"c": ARRAYS["a"]},
    }
    digests = {digest(save(tmp_path / f"{what}.safetensors", arrays)) for what, arrays in changed.items()}
    assert len(digests | {first}) == 5
    (tmp_path / "shards" / "config.json").write_text('{"rope_theta": 1}')
    assert digest(tmp_path / "shards") != first


def test_the_digest_of_a_gguf_covers_its_metadata(tmp_path: Path) -> None:
    found = set()
    for number, value in enumerate((1.0, 2.0, [1], "1")):
        path = tmp_path / f"{number}.gguf"
        write_gguf(path, {"k": value}, [], lambda _: [])
        found.add(digest(path))
    assert len(found) == 4


def test_a_computed_tensor_gives_raw_bytes_and_a_digest() -> None:
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    ref = ComputedTensor("w", (4, 2), "F32", lambda start, stop: rows[start:stop])
    assert ref.raw(1, 3).tobytes() == rows[1:3].tobytes()
    assert len(Checkpoint(Path("x"), {"w": ref}).source_digest) == 64


# ---------------------------------------------------------------- atomic outputs


def fill(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"new")


def folder_of(target: Path, **options: Any) -> Any:
    return atomic_folder(
        target, last="model.safetensors", stale=lambda name: name.startswith("model"), **options
    )


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_file(tmp_path / "file") as stream:
        stream.write(b"half")
        raise error
    with pytest.raises(error), folder_of(tmp_path / "folder") as part:
        fill(part)
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_while_overwriting_keeps_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"old")
    with pytest.raises(error), atomic_file(tmp_path / "file", overwrite=True) as stream:
        stream.write(b"half")
        raise error
    with pytest.raises(error), folder_of(tmp_path / "folder", overwrite=True) as part:
        fill(part)
        raise error
    assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_second_run_on_the_same_output_is_refused_and_the_first_ends_well(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file") as stream, folder_of(tmp_path / "folder") as part:
        stream.write(b"first")
        fill(part)
        with (
            pytest.raises(OutputError, match="file: is being written by another run"),
            atomic_file(tmp_path / "file"),
        ):
            pass
        with (
            pytest.raises(OutputError, match="folder: is being written by another run"),
            folder_of(tmp_path / "folder"),
        ):
            pass
    assert (tmp_path / "file").read_bytes() == b"first"
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


KILLED = """
import os, signal, sys
from pathlib import Path
from bitsmith.store.atomic import atomic_file, atomic_folder
out = Path(sys.argv[1])
with atomic_file(out / "file") as stream, atomic_folder(
    out / "folder", last="model.safetensors", stale=lambda name: False
) as part:
    stream.write(bytes(3 << 20))
    (part / "half").write_bytes(b"half")
    os.kill(os.getpid(), int(sys.argv[2]))
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_output_and_the_next_one_succeeds(tmp_path: Path, number: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(int(number))], capture_output=True, check=False
    )
    assert ended.returncode != 0
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ([".file.part", ".folder.part"] if number == signal.SIGKILL else [])
    with atomic_file(tmp_path / "file") as stream, folder_of(tmp_path / "folder") as part:
        stream.write(b"whole")
        fill(part)
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


FULL = """
import resource, sys
from pathlib import Path
from bitsmith.errors import OutputError
from bitsmith.store import TensorData, TensorInfo, write_gguf, write_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
out, data = Path(sys.argv[1]), bytes(4 << 20)
for act in (
    lambda: write_gguf(out / "x.gguf", {}, [TensorInfo("w", (1 << 20,), "F32")], lambda _: [data]),
    lambda: write_safetensors(out / "x", [TensorData("w", "U8", (4 << 20,), [data])]),
):
    try:
        act()
    except OutputError as error:
        print(error)
"""


def test_a_write_that_fails_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = ended.stdout.splitlines()
    assert len(lines) == 2
    assert all("cannot be written: File too large" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_free_space_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    tensors = [TensorInfo("w", (1 << 50,), "F32")]
    with pytest.raises(OutputError, match=r"x\.gguf: needs 4503599627370\d+ bytes, the disk has \d+ free"):
        write_gguf(tmp_path / "x.gguf", {}, tensors, lambda _: pytest.fail("encoded"))
    with pytest.raises(OutputError, match=r"x: needs \d+ bytes, the disk has \d+ free"):
        write_safetensors(tmp_path / "x", [TensorData("w", "U8", (1 << 50,), [])])
    assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be_are_refused_early(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    cases: list[tuple[Any, str]] = [
        (atomic_file(tmp_path / "nowhere" / "x"), "is not in a folder that exists"),
        (atomic_file(Path("/")), "is not in a folder that exists"),
        (atomic_file(tmp_path / "folder", overwrite=True), "is a folder, the output is not"),
        (folder_of(tmp_path / "file", overwrite=True), "is a file, the output is not"),
        (atomic_file(tmp_path / "file"), "exists; pass --overwrite"),
        (atomic_file(tmp_path / ("n" * 255)), "cannot be written: File name too long"),
    ]
    for context, words in cases:
        with pytest.raises(OutputError, match=words), context:
            pytest.fail("was entered")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_empty_folder_is_filled_and_a_link_to_the_input_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with folder_of(tmp_path / "folder") as part:
        fill(part)
    (tmp_path / "link").symlink_to("folder")
    source = tmp_path / "folder" / "model.safetensors"
    with (
        pytest.raises(OutputError, match="is the input"),
        folder_of(tmp_path / "link", overwrite=True, sources=[source]),
    ):
        pytest.fail("was entered")
    assert source.read_bytes() == b"new"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


# ---------------------------------------------------------------- python -O


def test_no_check_is_an_assert() -> None:
    for path in Path(bitsmith.store.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], path


def test_faults_are_refused_under_python_o(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 16)
    code = (
        "import sys\nfrom pathlib import Path\nfrom bitsmith.errors import DamagedFileError\n"
        "from bitsmith.store import open_checkpoint\n"
        "for name in sys.argv[1:]:\n"
        "    try: open_checkpoint(Path(name))\n"
        "    except DamagedFileError as error: print(error)\n"
    )
    names = [str(tmp_path / "a.gguf"), str(tmp_path / "b.safetensors")]
    ended = subprocess.run(
        [sys.executable, "-O", "-c", code, *names], capture_output=True, text=True, check=True
    )
    assert [line.partition(": ")[0] for line in ended.stdout.splitlines()] == names
