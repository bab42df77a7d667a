"""One file of a hub into the Hugging Face cache: gone on with after a drop, checked by its SHA, named."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

from bitsmith import __version__, log
from bitsmith.errors import OutputError, printable
from bitsmith.store.atomic import link_file, sync_folder
from bitsmith.store.hub_calls import HubError, failure_types, retried, wait_or_raise

_CHUNK_BYTES = 1 << 20
_OK, _PARTIAL, _NO_SUCH_RANGE = 200, 206, 416


@dataclass(frozen=True)
class RemoteFile:
    """A file of one commit; `etag` is its SHA-256 (large files) or git's SHA-1 of it, and its blob's name.

    `is_digest` is False for a tag of which only a server's header tells: what kind it is nobody promised.
    """

    repo: str
    commit: str
    name: str
    size: int
    etag: str
    is_digest: bool = True

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}/{printable(self.name)}"

    def blob(self, storage: Path) -> Path:
        """Return where the cache keeps its bytes."""
        return storage / "blobs" / self.etag

    def place(self, storage: Path) -> Path:
        """Return its name in the snapshot of its commit."""
        return storage / "snapshots" / self.commit / self.name

    def part(self, storage: Path) -> Path:
        """Return where its bytes gather, also over runs."""
        return storage / "blobs" / f"{self.etag}.bitsmith.incomplete"

    def bytes_left(self, storage: Path) -> int:
        """Return how many bytes are still to be downloaded."""
        if self.blob(storage).exists():
            return 0
        part = self.part(storage)
        return max(0, self.size - (part.stat().st_size if part.exists() else 0))


def sizes_of(repo: str, commit: str, listed: Sequence[Any]) -> list[RemoteFile]:
    """Return files of a repository's listing; asks for what it does not tell. Raises HubError."""
    return [_remote(repo, commit, one) for one in listed]


def _remote(repo: str, commit: str, one: Any) -> RemoteFile:
    known = one.lfs.sha256 if one.lfs else one.blob_id
    if known is not None and one.size is not None:
        return RemoteFile(repo, commit, one.rfilename, int(one.size), _blob_name(str(known)))
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url  # noqa: PLC0415

    where = f"{repo}@{commit[:12]}/{printable(one.rfilename)}"
    url = hf_hub_url(repo, one.rfilename, revision=commit, endpoint=constants.ENDPOINT)
    found = retried(where, lambda: get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT))
    if found.etag is None or found.size is None:
        raise HubError("the hub tells neither size nor digest of it", path=where)
    _refuse_moved(where, commit, found.commit_hash)
    is_sha256 = re.fullmatch(r"[0-9a-f]{64}", found.etag) is not None
    return RemoteFile(repo, commit, one.rfilename, found.size, _blob_name(found.etag), is_sha256)


def _blob_name(etag: str) -> str:
    if re.fullmatch(r"[0-9A-Za-z_-]{1,128}", etag):
        return etag
    return hashlib.sha256(etag.encode()).hexdigest() + "-etag"


def _refuse_moved(where: str, commit: str, found: str | None) -> None:
    if found not in (None, commit):
        raise HubError(
            f"the hub gives a file of commit {printable(str(found), 64)}, asked for {commit}", path=where
        )


def fetch_file(storage: Path, file: RemoteFile, report: Callable[[int], None]) -> None:
    """Bring a file into the cache and name it in its commit's snapshot; `report` hears of its bytes.

    Raises HubError where the hub fails, or gives other bytes than it says; OutputError where they cannot be
    written. What came until then stays for the next run.
    """
    log.event("download", file=file.name, repo=file.repo, commit=file.commit, bytes=file.size)
    blob = file.blob(storage)
    try:
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            with _locked(file.part(storage), blob) as part:
                if part is not None:
                    _fill(part, file, report)
                    file.part(storage).replace(blob)
                    sync_folder(blob.parent)
        _name(storage, file, blob)
    except HubError:
        raise
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", path=blob) from error
    report(file.size)


@contextmanager
def _locked(path: Path, blob: Path) -> Iterator[BufferedRandom | None]:
    """Open the part for one run alone; None where another made the blob while this one waited."""
    while True:
        with path.open("ab+") as part:
            fcntl.flock(part, fcntl.LOCK_EX)
            if blob.exists():
                with suppress(FileNotFoundError):
                    path.unlink()
                yield None
                return
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(part.fileno()), path.stat()):
                    yield part
                    return


def _fill(part: BufferedRandom, file: RemoteFile, report: Callable[[int], None]) -> None:
    resumed = part.seek(0, os.SEEK_END) > 0
    _download(part, file, report)
    found = _digest(part, file)
    if found != file.etag and resumed:  # what an earlier run left was torn
        log.event("download again", file=file.name, repo=file.repo)
        part.truncate(0)
        _download(part, file, report)
        found = _digest(part, file)
    if found != file.etag:
        part.truncate(0)
        raise HubError(
            f"has digest {found} after downloading, the hub says {file.etag}: try again", path=str(file)
        )
    os.fsync(part.fileno())


def _download(part: BufferedRandom, file: RemoteFile, report: Callable[[int], None]) -> None:
    """Append what is missing, over as many connections as it takes; those that bring nothing are counted."""
    failures = 0
    kinds = failure_types()
    while True:
        have = part.seek(0, os.SEEK_END)
        if have == file.size:
            return
        try:
            _stream(part, file, have if have < file.size else 0, report)
            now = part.seek(0, os.SEEK_END)
            if now != file.size:
                raise ConnectionError(f"the connection ended after {now} of {file.size} bytes")
        except HubError:
            raise
        except kinds as error:
            if (
                isinstance(error, OSError)
                and error.errno is not None
                and not isinstance(error, ConnectionError)
            ):
                raise  # of the disk, not of the hub
            failures = 1 if part.seek(0, os.SEEK_END) > have else failures + 1
            log.event("dropped", file=file.name, repo=file.repo, bytes=part.tell(), why=str(error)[:200])
            wait_or_raise(str(file), error, failures)


def _stream(part: BufferedRandom, file: RemoteFile, have: int, report: Callable[[int], None]) -> None:
    from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

    headers = build_hf_headers(library_name="bitsmith", library_version=__version__)
    headers |= {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    url = hf_hub_url(file.repo, file.name, revision=file.commit, endpoint=constants.ENDPOINT)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream(
        "GET", url, headers=headers, timeout=timeout, follow_redirects=True
    ) as response:
        for one in (*response.history, response):
            _refuse_moved(str(file), file.commit, one.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT))
        if response.status_code == _NO_SUCH_RANGE:
            part.truncate(0)
            raise ConnectionError("the hub does not go on where the download ended")
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        if response.status_code != _PARTIAL or not _starts_at(response.headers.get("Content-Range"), have):
            if response.status_code == _PARTIAL:
                part.truncate(0)
                raise ConnectionError("the hub sends another range than it was asked for")
            have = 0
        part.truncate(have)
        for chunk in response.iter_bytes():
            have += len(chunk)
            if have > file.size:
                part.truncate(0)
                raise HubError(f"the hub sends more than its {file.size} bytes", path=str(file))
            part.write(chunk)
            report(have)


def _starts_at(content_range: str | None, have: int) -> bool:
    return content_range is None or content_range.startswith(f"bytes {have}-")


def _digest(part: BufferedRandom, file: RemoteFile) -> str:
    """Return the digest of the kind that the tag is, or the tag itself where that is of no kind known."""
    part.seek(0)
    etag = file.etag if file.is_digest else ""
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        return hashlib.file_digest(part, "sha256").hexdigest()
    if re.fullmatch(r"[0-9a-f]{40}", etag):
        digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)  # git's name of a blob
        while chunk := part.read(_CHUNK_BYTES):
            digest.update(chunk)
        return digest.hexdigest()
    return file.etag


def _name(storage: Path, file: RemoteFile, blob: Path) -> None:
    """Link the blob into the snapshot of its commit, as the hub's own client does."""
    place = file.place(storage)
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        return
    place.unlink(missing_ok=True)  # a link to a blob that was removed
    try:
        place.symlink_to(os.path.relpath(blob, place.parent))
    except FileExistsError:
        return
    except OSError:
        link_file(blob, place)
