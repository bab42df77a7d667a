"""Outputs that are whole or not there: written beside the target, synced, renamed, and locked meanwhile."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import OutputError

Chunk = NDArray[np.generic] | bytes | bytearray | memoryview
Content = Mapping[str, Path]
"""Where the files of an output lie, by their names in it; the one of a file has the name ''."""
Finish = Callable[[Content], None]
"""Told of an output that is whole and on the disk, before it appears under its name."""

BUFFER_BYTES = 1 << 20


@contextmanager
def atomic_file(
    target: Path,
    *,
    overwrite: bool = False,
    expect_bytes: int = 0,
    sources: Iterable[Path] = (),
    finish: Finish | None = None,
) -> Iterator[BinaryIO]:
    """Open a file that appears as `target` only when the block ends well.

    It is written as `.NAME.part` beside the target, which doubles as the lock: a second run on the same
    target is refused, and what a killed run left is taken over. Raises OutputError if the target exists
    (unless `overwrite`), is one of `sources`, or needs more than the free space (`expect_bytes`).
    """
    target = _absolute(target)
    with _claimed(target, _open_file) as (part, descriptor):
        refuse_taken(target, overwrite, sources, folder=False)
        os.ftruncate(descriptor, 0)
        refuse_full(target, expect_bytes)
        with open(descriptor, "wb", buffering=BUFFER_BYTES, closefd=False) as stream:
            yield stream
            stream.flush()
            os.fsync(descriptor)
        if finish is not None:
            finish({"": part})
        part.replace(target)
        sync_folder(target.parent)


@contextmanager
def atomic_folder(
    target: Path,
    *,
    last: str,
    stale: Callable[[str], bool],
    overwrite: bool = False,
    expect_bytes: int = 0,
    sources: Iterable[Path] = (),
    finish: Finish | None = None,
) -> Iterator[Path]:
    """Yield a folder to write files into; they appear in `target` only when the block ends well.

    A new or empty `target` appears by one rename. With `overwrite`, files of an existing one whose names are
    `stale` are removed first and the file `last` is moved in last, so that a half-replaced folder never reads
    as a whole one; other files stay. Raises as `atomic_file` does.
    """
    target = _absolute(target)
    with _claimed(target, _open_folder) as (part, _):
        refuse_taken(target, overwrite, sources, folder=True)
        for left_over in part.iterdir():
            remove(left_over)
        refuse_full(target, expect_bytes)
        yield part
        for path in part.rglob("*"):
            sync_path(path)
        sync_folder(part)
        if finish is not None:
            kept = files_in(target) if target.exists() else {}
            kept = {name: path for name, path in kept.items() if not stale(name.partition("/")[0])}
            finish({**kept, **files_in(part)})
        if target.exists():
            _move_into(part, target, last, stale)
        else:
            part.rename(target)
        sync_folder(target.parent)


def files_in(out: Path) -> dict[str, Path]:
    """Return the files of an output, those of folders in it too, by their names in it."""
    if not out.is_dir():
        return {"": out}
    found = (Path(parent) / name for parent, _, names in os.walk(out) for name in names)
    return {path.relative_to(out).as_posix(): path for path in sorted(found) if path.is_file()}


def write_chunk(stream: BinaryIO, chunk: Chunk) -> int:
    """Write an array's or buffer's bytes and return how many they are."""
    if isinstance(chunk, np.ndarray):
        chunk = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
    return stream.write(chunk)


def sync_path(path: Path) -> None:
    """Force a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_path


@contextmanager
def _claimed(target: Path, open_part: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """Make and lock the part beside `target`; what of it the block did not move away is removed."""
    part = target.with_name(f".{target.name}.part")
    try:
        descriptor = _locked(part, target, open_part)
        try:
            yield part, descriptor
        finally:
            try:
                if is_open_as(part, descriptor):  # else it was renamed, and the next run may have its own
                    remove(part)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=target) from error


def _locked(part: Path, target: Path, open_part: Callable[[Path], int]) -> int:
    while True:
        descriptor = open_part(part)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_open_as(part, descriptor):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError("is being written by another run", path=target) from error
        except BaseException:  # an interrupt between making the part and using it
            _drop(part, descriptor)
            raise
        os.close(descriptor)  # its owner finished between our opening and our locking it


def _drop(part: Path, descriptor: int) -> None:
    """Close a part and remove it unless another run holds it."""
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_open_as(part, descriptor):
                remove(part)
    finally:
        os.close(descriptor)


def is_open_as(path: Path, descriptor: int) -> bool:
    """Tell whether a path still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _absolute(target: Path) -> Path:
    target = Path(os.path.abspath(target))  # noqa: PTH100 (links stay as named)
    if not target.name or not target.parent.is_dir():
        raise OutputError("is not in a folder that exists", path=target)
    return target


def _open_file(part: Path) -> int:
    return os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _open_folder(part: Path) -> int:
    part.mkdir(exist_ok=True)
    return os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def refuse_taken(target: Path, overwrite: bool, sources: Iterable[Path], *, folder: bool) -> None:
    """Raise OutputError for a target that is an input, of the other kind, or there without `overwrite`."""
    if not target.exists():
        return
    for source in sources:
        if source.exists() and (target.samefile(source) or target.samefile(source.parent)):
            raise OutputError("is the input; choose another output", path=target)
    if target.is_dir() != folder:
        raise OutputError(f"is a {'file' if folder else 'folder'}, the output is not", path=target)
    if not overwrite and not (folder and not any(target.iterdir())):
        raise OutputError("exists; pass --overwrite", path=target)


def refuse_full(target: Path, expect_bytes: int) -> None:
    """Raise OutputError if the disk under `target` has less than `expect_bytes` free."""
    free = shutil.disk_usage(target.parent).free
    if expect_bytes > free:
        raise OutputError(f"needs {expect_bytes} bytes, the disk has {free} free", path=target)


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _move_into(part: Path, target: Path, last: str, stale: Callable[[str], bool]) -> None:
    for path in target.iterdir():
        if stale(path.name):
            remove(path)
    sync_folder(target)
    for path in sorted(part.iterdir(), key=lambda path: (path.name == last, path.name)):
        if path.is_dir() and (target / path.name).exists():
            remove(target / path.name)
        path.replace(target / path.name)
    sync_folder(target)


def remove(path: Path) -> None:
    """Remove a file or a folder with all it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
