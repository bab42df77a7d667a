"""Models of a hub by name: one commit of a repository, in the Hugging Face cache."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from bitsmith import log
from bitsmith.errors import BitsmithError, OutputError, printable
from bitsmith.progress import Progress, silent
from bitsmith.store.atomic import atomic_file
from bitsmith.store.hub_calls import FIRST_ATTEMPTS, HubError, NoSuchModelError, UnreachableError, retried
from bitsmith.store.hub_names import Chosen, HubId, Origin, called, choose, origin, parse_hub_id
from bitsmith.store.hub_transfer import RemoteFile, fetch_file, sizes_of

__all__ = ["HubError", "HubId", "Origin", "called", "fetch", "local", "origin", "parse_hub_id"]

_YES = {"1", "true", "yes", "on"}


def local(model: Path | str, progress: Progress = silent, *, weights: bool = True) -> Path:
    """Return where a model lies: a path that exists as it is, else `org/name[@revision]` in the hub's cache.

    `org/name:Q4_K_M` and `org/name/file.gguf` name one GGUF of several. A revision is resolved to a commit
    first, all files are of that commit, and only those that make the model are downloaded (without `weights`
    those that tell of text): never pickles, nothing is unpacked. Each is checked by the SHA that the commit
    has for it; what a killed download left is gone on with. The cache alone answers with HF_HUB_OFFLINE
    (`--offline`), or if no hub can be reached.

    Raises BitsmithError for what is neither, HubError for a hub that refuses or fails, UnsupportedError for a
    repository without a model that can be read safely, OutputError where the disk is too full.
    """
    path = Path(model)
    if _exists(path):
        return path
    wanted = parse_hub_id(model if isinstance(model, str) else path.as_posix())
    if wanted is None or _is_local(path):
        raise BitsmithError("does not exist", path=path)
    try:
        return fetch(wanted, progress, weights=weights)
    except NoSuchModelError as error:
        said = f"no such file here, and as a model of a hub: {error.message}"
        raise NoSuchModelError(said, path=path) from error


def fetch(wanted: HubId, progress: Progress = silent, *, weights: bool = True) -> Path:
    """Return where a model of a hub lies in the cache, downloaded first; see `local`."""
    if is_offline():
        return _cached(wanted, "the hub was not asked (offline)", weights)
    try:
        return _from_hub(wanted, progress, weights)
    except UnreachableError as error:
        try:
            found = _cached(wanted, error.message, weights)
        except HubError:
            raise error from None
        log.warn(f"{error}; taking {origin(found)} of the cache")
        return found


def is_offline() -> bool:
    """Tell whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids asking a hub."""
    return any(
        os.environ.get(name, "").lower() in _YES for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _is_local(path: Path) -> bool:
    """Tell whether a path of three words or more begins with a folder that is here: no hub hears of it."""
    return len(path.parts) > 2 and Path(path.parts[0]).is_dir()


def _storage(repo: str) -> Path:
    """Return the cache's folder of a repository, by HF_HUB_CACHE or HF_HOME."""
    from huggingface_hub import constants  # noqa: PLC0415 (imported only where a hub is named)

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def _from_hub(wanted: HubId, progress: Progress, weights: bool) -> Path:
    from huggingface_hub import HfApi, constants  # noqa: PLC0415

    log.event("hub", repo=wanted.repo, revision=wanted.revision)
    api = HfApi(endpoint=constants.ENDPOINT)
    info = retried(
        str(wanted),
        lambda: api.model_info(
            wanted.repo, revision=wanted.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        ),
        FIRST_ATTEMPTS,
    )
    commit = str(info.sha)
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise HubError(f"the hub names no commit for {printable(wanted.revision)!r}", path=str(wanted))
    storage = _storage(wanted.repo)
    listed = {one.rfilename: one for one in info.siblings or []}

    def get(names: Sequence[str], report: Progress) -> None:
        files = sizes_of(wanted.repo, commit, [listed[name] for name in names])
        _download(storage, [file for file in files if not file.place(storage).exists()], report)

    def read(name: str) -> bytes:
        get([name], silent)
        return (storage / "snapshots" / commit / name).read_bytes()

    chosen = choose(sorted(listed), wanted, read, weights)
    get(chosen.files, progress)
    _note_revision(storage, wanted, commit)
    log.event("pinned", repo=wanted.repo, commit=commit, files=len(chosen.files))
    return _entry(storage, commit, chosen)


def _download(storage: Path, files: Sequence[RemoteFile], progress: Progress) -> None:
    _refuse_full(storage, sum(file.bytes_left(storage) for file in files))
    total = sum(file.size for file in files)
    done = 0
    for file in files:
        fetch_file(storage, file, partial(_report, progress, done, total))
        done += file.size


def _report(progress: Progress, before: int, total: int, done: int) -> None:
    progress("download", before + done, total)


def _cached(wanted: HubId, why: str, weights: bool) -> Path:
    """Return a model of the cache; raises HubError where it is not there as a whole."""
    storage = _storage(wanted.repo)
    commit = wanted.revision
    if not wanted.is_pinned:
        with suppress(OSError):
            commit = (storage / "refs" / wanted.revision).read_text().strip()
    folder = storage / "snapshots" / commit
    if not folder.is_dir():
        raise NoSuchModelError(f"is not in the cache {storage.parent}; {why}", path=str(wanted))
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.exists()
    )
    try:
        chosen = choose(names, wanted, lambda name: (folder / name).read_bytes(), weights)
    except BitsmithError as error:
        raise HubError(
            f"the cache {storage.parent} has not all of it: {error.message}; {why}", path=str(wanted)
        ) from error
    return _entry(storage, commit, chosen)


def _entry(storage: Path, commit: str, chosen: Chosen) -> Path:
    folder = storage / "snapshots" / commit
    return folder / chosen.entry if chosen.entry else folder


def _note_revision(storage: Path, wanted: HubId, commit: str) -> None:
    """Tell the cache which commit a revision is, once all is there: what is read without a hub later."""
    if wanted.is_pinned:
        return
    ref = storage / "refs" / wanted.revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OutputError), atomic_file(ref, overwrite=True) as stream:
        stream.write(commit.encode())


def _refuse_full(storage: Path, needed: int) -> None:
    place = next(folder for folder in (storage, *storage.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(f"needs {needed} bytes, the disk has {free} free", path=storage)
