"""Text that every machine with Python has: the standard library's own sources, read at run time."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from bitsmith.errors import BitsmithError
from bitsmith.store.atomic import atomic_file

DEFAULT_TEXT_BYTES = 400_000
"""Of `default_text`: about a hundred thousand tokens."""

_DOCUMENT_BYTES = 8_000  # of each source in the default text, so that many are in it
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "ensurepip",
    "__pycache__",
}
_HELD_OUT_SHARE = 20  # one file in twenty


def source_files() -> list[tuple[str, Path]]:
    """Return the standard library's sources as (path relative to it, file), sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [(p.relative_to(root).as_posix(), p) for p in root.rglob("*.py")]
    kept = [(name, p) for name, p in files if not _SKIPPED_FOLDERS & set(name.split("/"))]
    if not kept:
        raise BitsmithError("no Python sources found for the lab's corpus", path=root)
    return sorted(kept)


def is_held_out(name: str) -> bool:
    """Tell whether a source belongs to the held-out split: SHA-256 of its relative path, modulo 20, is 0.

    The split depends on the path alone, so it stays the same across Python versions.
    """
    return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def documents(held_out: bool) -> Iterator[str]:
    """Yield the texts of one split, a source file each, in path order, without those that are not UTF-8."""
    for name, path in source_files():
        if is_held_out(name) == held_out:
            try:
                yield path.read_text("utf-8")
            except UnicodeDecodeError:
                continue


def default_text(limit_bytes: int = DEFAULT_TEXT_BYTES) -> str:
    """Return the beginnings of the training split's sources, spread over all of it, joined by newlines."""
    texts = [text[:_DOCUMENT_BYTES] for text in documents(held_out=False)]
    step = max(1, sum(map(len, texts)) // limit_bytes)
    return "\n".join(texts[::step]).encode()[:limit_bytes].decode("utf-8", "ignore")


def write_default_text(out: Path) -> Path:
    """Write `default_text()` to `out`, replacing it, and return its path."""
    with atomic_file(out, overwrite=True) as stream:
        stream.write(default_text().encode())
    return out
