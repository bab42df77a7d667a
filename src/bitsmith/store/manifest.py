"""What lies beside an output: `OUT.sha256`, digests of its files, and `OUT.record.json`, how it was made."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bitsmith.errors import BitsmithError, DamagedFileError, OutputError, printable
from bitsmith.store.atomic import Content, atomic_file, files_in, remove

MANIFEST_SUFFIX, RECORD_SUFFIX = ".sha256", ".record.json"
"""Follow an output's name."""

FOLDER_MANIFEST, FOLDER_RECORD = "SHA256SUMS", "bitsmith.record.json"
"""What a folder's manifest and record are called inside a repository, whose root is the folder."""

_UNLISTED = {FOLDER_MANIFEST, "README.md"}  # of a repository: the manifest itself, and its card

MAX_MANIFEST_BYTES = 64 << 20
MAX_RECORD_BYTES = 64 << 20

_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


@dataclass(frozen=True)
class Fault:
    """A file, or with `tensor` a tensor in it, that is not as it was written, and how."""

    path: Path
    what: str
    tensor: str | None = None

    def error(self, more: int = 0) -> BitsmithError:
        """Return the error that says it, and how many more there are."""
        said = f"{self.what}; {more} more" if more else self.what
        return DamagedFileError(said, path=self.path, tensor=self.tensor)


@dataclass(frozen=True)
class _Entry:
    digest: str
    name: str


def manifest_of(out: Path) -> Path:
    """Return where the digests of an output lie: beside it, or inside a folder that was pushed."""
    return _beside_or_inside(out, MANIFEST_SUFFIX, FOLDER_MANIFEST)


def record_of(out: Path) -> Path:
    """Return where the record of an output lies: beside it, or inside a folder that was pushed."""
    return _beside_or_inside(out, RECORD_SUFFIX, FOLDER_RECORD)


def _beside_or_inside(out: Path, suffix: str, name: str) -> Path:
    beside, inside = out.with_name(out.name + suffix), out / name
    return inside if inside.is_file() and not beside.exists() else beside


def write_manifest(
    out: Path,
    record: Mapping[str, Any] | None = None,
    *,
    content: Content | None = None,
    beside: Mapping[str, bytes | None] | None = None,
    folders: Iterable[Path] = (),
    digests: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Write `OUT.sha256`, which `sha256sum -c` checks, and the record; return the output's digest.

    It is that of a file's bytes, or of a folder's lines in the manifest. `content` is what becomes the output
    (as `atomic_file` and `atomic_folder` tell before it appears; None: the output as it is there). The
    manifest also lists the record, the files `OUT<suffix>` that are `beside` the output, and the `folders`
    there. `digests` has those of content that need not be read for it. All of them are written or none; a
    record and a file beside without content are removed. Raises OutputError as `atomic_file` does.
    """
    files = files_in(out) if content is None else content
    known = {name: digests.get(name) or digest_of(path) for name, path in files.items()}
    own = [_line(sha256, _name_in(out, name)) for name, sha256 in sorted(known.items(), key=_by_parts)]
    texts = {RECORD_SUFFIX: None if record is None else _json(record), **(beside or {})}
    lines = [*own]
    for suffix, text in sorted(texts.items()):
        if text is not None:
            lines.append(_line(hashlib.sha256(text).hexdigest(), out.name + suffix))
    for folder in folders:
        lines += [_line(digest_of(path), f"{folder.name}/{name}") for name, path in files_in(folder).items()]
    _write_all(out, {**texts, MANIFEST_SUFFIX: _encoded(lines)})
    if set(files) == {""}:
        return own[0].removeprefix("\\")[:64]
    return hashlib.sha256(_encoded(own)).hexdigest()


def check_manifest(out: Path) -> tuple[Fault, ...]:
    """Return what is missing from an output, has changed in it, or is there without being listed.

    What lies beside it and is listed counts; hidden files do not. Raises BitsmithError if there is no
    manifest, DamagedFileError for one that cannot be read or that lists files of others.
    """
    path = manifest_of(out)
    entries = _entries(out, path)
    unlisted = _UNLISTED if path.parent == out else set()
    faults = [fault for entry in entries if (fault := _fault(out.parent / entry.name, entry.digest))]
    known = {entry.name for entry in entries}
    for name, found in files_in(out).items() if out.exists() else ():
        listed = _name_in(out, name)
        if listed not in known and not is_hidden(name) and name not in unlisted:
            faults.append(Fault(found, f"is not in {path.name}"))
    return tuple(faults)


def listed_files(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in an output's manifest, by its path from the output's folder.

    Raises as `check_manifest` does.
    """
    return {entry.name: entry.digest for entry in _entries(out, manifest_of(out))}


def read_record(out: Path) -> dict[str, Any]:
    """Return an output's record. Raises BitsmithError if there is none, DamagedFileError for a broken one."""
    path = record_of(out)
    try:
        found = json.loads(_bytes_of(path, MAX_RECORD_BYTES))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError("is no JSON", path=path) from error
    if not isinstance(found, dict) or not isinstance(found.get("output"), str):
        raise DamagedFileError("is no record of an output", path=path)
    return found


def replace_record(out: Path, record: Mapping[str, Any], changed: Iterable[Path] = ()) -> None:
    """Write an output's record anew, and its digest and those of `changed` files into the manifest.

    Raises as `check_manifest` does.
    """
    text, path = _json(record), manifest_of(out)
    fresh = {record_of(out).name: hashlib.sha256(text).hexdigest()}
    fresh |= {one.relative_to(out.parent).as_posix(): digest_of(one) for one in changed}
    lines = [_line(fresh.get(one.name, one.digest), one.name) for one in _entries(out, path)]
    _write_all(out, {RECORD_SUFFIX: text, MANIFEST_SUFFIX: _encoded(lines)})


def is_hidden(name: str) -> bool:
    """Tell whether a file in an output, or a folder that it is in, is hidden."""
    return any(part.startswith(".") for part in name.split("/"))


def remove_output(out: Path) -> None:
    """Remove an output that was only needed for a while, and what lies beside it."""
    for path in (manifest_of(out), record_of(out), out):
        remove(path)


def digest_of(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_all(out: Path, texts: Mapping[str, bytes | None]) -> None:
    """Write the files `OUT<suffix>`, each whole before any appears; the manifest appears first."""
    with ExitStack() as stack:
        for suffix, text in texts.items():
            path = out.with_name(out.name + suffix)
            if text is not None:
                stream = stack.enter_context(atomic_file(path, overwrite=True))
                stream.write(text)
                stream.flush()  # where the disk is full, none appears
            elif path.exists():
                _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise OutputError(f"cannot be removed: {error.strerror or error}", path=path) from error


def _by_parts(item: tuple[str, str]) -> tuple[str, ...]:
    return tuple(item[0].split("/"))


def _name_in(out: Path, name: str) -> str:
    return f"{out.name}/{name}" if name else out.name


def _line(digest: str, name: str) -> str:
    """Return a line as coreutils write it, names with line ends escaped."""
    escaped = "".join(_ESCAPES.get(char, char) for char in name)
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def _encoded(lines: Iterable[str]) -> bytes:
    return "".join(lines).encode("utf-8", "surrogateescape")


def _json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()


def _entries(out: Path, path: Path) -> list[_Entry]:
    text = _bytes_of(path, MAX_MANIFEST_BYTES).decode("utf-8", "surrogateescape")
    entries = [_entry(line, number, path) for number, line in enumerate(text.split("\n")[:-1], 1)]
    if path.parent == out:
        entries = [_Entry(entry.digest, _name_in(out, entry.name)) for entry in entries]
    if not text.endswith("\n") or not entries:
        raise DamagedFileError("is cut off", path=path)
    for entry in entries:
        parts = entry.name.split("/")
        is_own = parts[0] == out.name or parts[0].startswith(f"{out.name}.")
        if not is_own or any(part in ("", ".", "..") for part in parts):
            raise DamagedFileError(f"lists {printable(entry.name)!r}, which is no file of {out}", path=path)
    if not any(entry.name.split("/")[0] == out.name for entry in entries):
        raise DamagedFileError(f"lists no file of {out}", path=path)
    return entries


def _entry(line: str, number: int, path: Path) -> _Entry:
    found = _LINE.fullmatch(line)
    if found is None:
        raise DamagedFileError(f"line {number} is no SHA-256 and a name: {printable(line, 100)!r}", path=path)
    escaped, digest, name = found.groups()
    return _Entry(digest, _unescaped(name) if escaped else name)


def _unescaped(name: str) -> str:
    plain = {code: char for char, code in _ESCAPES.items()}
    return re.sub(r"\\.", lambda found: plain.get(found[0], found[0]), name)


def _fault(path: Path, digest: str) -> Fault | None:
    if not path.is_file():
        return Fault(path, "is no file" if path.exists() else "is missing")
    try:
        found = digest_of(path)
    except OSError as error:
        return Fault(path, f"cannot be read: {error.strerror or error}")
    return (
        None if found == digest else Fault(path, f"has SHA-256 {found[:16]}…, was written as {digest[:16]}…")
    )


def _bytes_of(path: Path, limit: int) -> bytes:
    if not path.is_file():
        raise BitsmithError("is missing" if not path.exists() else "is no file", path=path)
    try:
        if path.stat().st_size > limit:
            raise DamagedFileError(f"has {path.stat().st_size} bytes, {limit} at most are read", path=path)
        return path.read_bytes()
    except OSError as error:
        raise BitsmithError(f"cannot be read: {error.strerror or error}", path=path) from error
