"""Push: an output that verifies to a repository of a hub, as one commit, read back by its digests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bitsmith.errors import BitsmithError, OutputError, printable
from bitsmith.run.verify import verify
from bitsmith.store.hub import is_offline, parse_hub_id
from bitsmith.store.hub_calls import HubError
from bitsmith.store.hub_push import Source, commit_files, digests_of, remote_state
from bitsmith.store.manifest import (
    FOLDER_MANIFEST,
    FOLDER_RECORD,
    MANIFEST_SUFFIX,
    RECORD_SUFFIX,
    digest_of,
    listed_files,
    read_record,
    record_of,
)


@dataclass(frozen=True)
class PushedFile:
    """A file of a push: `state` is against what the repository holds."""

    name: str
    size_bytes: int
    state: Literal["new", "same", "changed"]


@dataclass(frozen=True)
class Push:
    """What was pushed, or with a dry run would be: then `commit` is None."""

    repo: str
    revision: str
    files: tuple[PushedFile, ...]
    commit: str | None
    creates: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"kind": "push", **asdict(self)}


def pushable(out: Path) -> dict[str, Source]:
    """Return the files of an output by their names in a repository, with its manifest and record.

    A folder's files come to the root; where the output was made of a path, that path is left out of the
    record. Raises BitsmithError for what does not verify by its digests.
    """
    verify(out, digests_only=True).refuse()
    listed = listed_files(out)
    record = None
    if record_of(out).exists():
        record = read_record(out)
        for source in record.get("sources", {}).values():
            source.pop("path", None)
    inside = f"{out.name}/"
    files: dict[str, Source] = {
        name.removeprefix(inside): out.parent / name for name in listed if name != out.name + RECORD_SUFFIX
    }
    digests = {name.removeprefix(inside): sha256 for name, sha256 in listed.items()}
    names = (FOLDER_RECORD, FOLDER_MANIFEST) if out.is_dir() else _beside(out)
    digests.pop(out.name + RECORD_SUFFIX, None)
    if record is not None:
        text = (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()
        files[names[0]] = text
        digests[names[0]] = next(one for one in digests_of(text) if len(one) == 64)
    if any("\n" in name or "\\" in name for name in digests):
        raise BitsmithError("has file names with line ends or backslashes, which no hub takes", path=out)
    files[names[1]] = "".join(f"{sha256}  {name}\n" for name, sha256 in digests.items()).encode()
    return files


def push(
    out: Path,
    repo: str,
    card: Mapping[str, bytes],
    *,
    revision: str = "main",
    private: bool = False,
    message: str = "",
    overwrite: bool = False,
    dry_run: bool = False,
) -> Push:
    """Push an output and its `card` (files by name) to `repo`, `org/name`; a dry run only asks what is there.

    Nothing is uploaded unless the output verifies by its digests; all files come in one commit on top of the
    one that was looked at, and are held against the hub's own digests of that commit afterwards.

    Raises BitsmithError for a repository's name that is none and as `pushable` does, OutputError for files
    that are there with other bytes (unless `overwrite`), HubError where the hub refuses or fails.
    """
    wanted = parse_hub_id(repo)
    if wanted is None or wanted.repo != repo:
        raise BitsmithError(f"{printable(repo)!r} is no repository, expected ORG/NAME")
    files: dict[str, Source] = {**card, **pushable(out)}
    if is_offline():
        raise HubError("nothing is pushed offline", path=repo)
    remote = remote_state(repo, revision)
    known = {name: digests_of(source) for name, source in files.items()}
    rows = tuple(_row(name, files[name], remote.digests.get(name), known[name]) for name in sorted(files))
    changed = [row.name for row in rows if row.state == "changed"]
    if changed and not overwrite:
        raise OutputError(
            f"holds other bytes of {_listed(changed)}; pass --overwrite to replace them",
            path=f"{repo}@{revision}",
        )
    if dry_run:
        return Push(repo, revision, rows, None, not remote.exists)
    _refuse_changed(out)
    commit = remote.commit
    if commit is None or any(row.state != "same" for row in rows):
        said = message or f"{out.name}, made by bitsmith"
        commit = commit_files(repo, files, remote, revision=revision, private=private, message=said)
        _refuse_others(repo, commit, known)
    return Push(repo, revision, rows, commit, not remote.exists)


def _beside(out: Path) -> tuple[str, str]:
    return out.name + RECORD_SUFFIX, out.name + MANIFEST_SUFFIX


def _row(name: str, source: Source, there: str | None, digests: set[str]) -> PushedFile:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    return PushedFile(name, size, "new" if there is None else "same" if there in digests else "changed")


def _refuse_changed(out: Path) -> None:
    """Refuse an output that was changed since it was verified."""
    for name, sha256 in listed_files(out).items():
        if digest_of(out.parent / name) != sha256:
            raise BitsmithError("has changed while it was pushed", path=out.parent / name)


def _refuse_others(repo: str, commit: str, known: Mapping[str, set[str]]) -> None:
    found = remote_state(repo, commit).digests
    others = [name for name, digests in known.items() if found.get(name) not in digests]
    if others:
        raise HubError(
            f"the hub holds other bytes than were sent: {_listed(others)}", path=f"{repo}@{commit}"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(printable(name) for name in names)
