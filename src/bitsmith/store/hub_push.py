"""Files to a repository of a hub: what is there already, and one commit of what is new."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bitsmith import log
from bitsmith.store.hub_calls import HubError, explained, failure_types, retried

_DEFAULT_ENDPOINT = "https://huggingface.co"
_CHUNK_BYTES = 1 << 20

Source = Path | bytes


class Remote(NamedTuple):
    """A branch of a repository: its commit, None where there is no such branch, and digests of its files.

    `exists` tells whether the repository does.
    """

    exists: bool
    commit: str | None
    digests: Mapping[str, str]


def remote_state(repo: str, revision: str) -> Remote:
    """Return what a branch holds; git's SHA-1 names small files, SHA-256 large ones. Raises HubError."""
    from huggingface_hub import HfApi, constants, errors  # noqa: PLC0415

    api = HfApi(endpoint=constants.ENDPOINT)

    def ask() -> Remote:
        try:
            info = api.model_info(repo, revision=revision, files_metadata=True)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return Remote(False, None, {})
        except errors.RevisionNotFoundError:
            return Remote(True, None, {})
        return Remote(True, info.sha, {one.rfilename: _digest(one) for one in info.siblings or []})

    return retried(repo, ask)


def digests_of(source: Source) -> set[str]:
    """Return both digests by which a hub may know these bytes."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    sha256 = hashlib.sha256()
    sha1 = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)  # git's name of a blob
    for chunk in _chunks(source):
        sha256.update(chunk)
        sha1.update(chunk)
    return {sha256.hexdigest(), sha1.hexdigest()}


def commit_files(
    repo: str, files: Mapping[str, Source], remote: Remote, *, revision: str, private: bool, message: str
) -> str:
    """Upload files as one commit on top of what was there, and return it; makes repository and branch.

    Raises HubError, also where another commit came in between.
    """
    from huggingface_hub import HfApi, constants  # noqa: PLC0415

    api = HfApi(endpoint=constants.ENDPOINT)
    if not remote.exists:
        retried(repo, lambda: api.create_repo(repo, private=private, exist_ok=True))
    if remote.commit is None and revision != constants.DEFAULT_REVISION:
        retried(repo, lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        additions = list(_additions(files, stack, as_streams=constants.ENDPOINT != _DEFAULT_ENDPOINT))
        log.event("push", repo=repo, revision=revision, files=len(additions))
        try:
            made = api.create_commit(
                repo, additions, commit_message=message, revision=revision, parent_commit=remote.commit
            )
        except failure_types() as error:
            raise explained(repo, error) from error
        except RuntimeError as error:  # the client's word for an upload that failed, with its cause
            cause = error.__cause__
            raise explained(repo, cause if isinstance(cause, Exception) else OSError(str(error))) from error
    if not made.oid:
        raise HubError("the hub names no commit", path=repo)
    return str(made.oid)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client from telling which protocol it takes."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _additions(files: Mapping[str, Source], stack: ExitStack, *, as_streams: bool) -> Iterator[Any]:
    """Yield what is committed; other hubs than the first may know no uploads but of streams."""
    from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

    for name, source in files.items():
        given: Any = source
        if isinstance(source, Path):
            given = stack.enter_context(source.open("rb")) if as_streams else str(source)
        yield CommitOperationAdd(path_in_repo=name, path_or_fileobj=given)


def _digest(one: Any) -> str:
    return str(one.lfs.sha256 if one.lfs else one.blob_id)


def _chunks(source: Source) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk
