"""Names of models on a hub: `org/name@revision`, which files are meant, and where a path came from."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.store.manifest import FOLDER_MANIFEST, FOLDER_RECORD
from bitsmith.store.safetensors import INDEX_NAME, SINGLE_NAME, load_json

MODEL_SUFFIXES = (".safetensors", ".gguf", ".cellm")
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "LICENSE", "NOTICE", FOLDER_MANIFEST, FOLDER_RECORD,
)  # fmt: skip
"""What of a repository is read beside weights, where it is there."""

COMPANIONS = (".sha256", ".record.json", ".transforms")
"""What may lie beside an output of bitsmith's, named after it."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.))*"
_HUB_ID = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>refs/(?:pr|convert)/[^/:@]+|[^/:@]+))?"
    r"(?::(?P<tag>[A-Za-z0-9_.-]+)|/(?P<inside>[^:@]+))?"
)
_WEB = re.compile(r"(?:hf:/{1,2}|(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/)")
_CACHED = re.compile(r"(?P<repo>models--.+)/snapshots/(?P<commit>[0-9a-f]{40,64})(?:/(?P<file>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LISTED = 20


@dataclass(frozen=True)
class HubId:
    """A model on a hub: a repository at a revision; of several, a GGUF's tag or a file or folder `inside`."""

    repo: str
    revision: str = "main"
    tag: str | None = None
    inside: str | None = None

    def __str__(self) -> str:
        what = f":{self.tag}" if self.tag else f"/{self.inside}" if self.inside else ""
        return f"{self.repo}{'' if self.revision == 'main' else f'@{self.revision}'}{what}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a whole commit, which never moves."""
        return _COMMIT.fullmatch(self.revision) is not None


@dataclass(frozen=True)
class Origin:
    """Where a path of the hub's cache came from; `file` is the file's place in the repository."""

    repo: str
    commit: str
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.rpartition("/")[2]


def parse_hub_id(given: str) -> HubId | None:
    """Read `org/name[@revision][:TAG | /file.gguf]` or a page's address; None for what is only a path.

    Two words that end as a model's file does (`out/model.gguf`) are a path.
    """
    plain, found_web = _WEB.subn("", given, count=1)
    if found_web:
        plain = re.sub(r"^([^/]+/[^/]+)/(?:tree|blob|resolve)/([^/]+)", r"\1@\2", plain.rstrip("/"))
    found = _HUB_ID.fullmatch(plain)
    if found is None or ".." in plain or "--" in found["repo"]:
        return None
    if not found_web and found["repo"] == plain and plain.endswith((*MODEL_SUFFIXES, ".imatrix", ".dat")):
        return None
    tag = None if found["tag"] in (None, "latest") else found["tag"]
    revision, inside = found["revision"] or "main", found["inside"]
    if found["revision"] and inside and not inside.endswith(MODEL_SUFFIXES):
        revision, inside = f"{revision}/{inside}", None  # a branch's name may have slashes
    return HubId(found["repo"], revision, tag, inside)


def origin(path: Path) -> Origin | None:
    """Return where a model's path came from, by the names of the hub's cache alone; None for another path."""
    whole = Path(os.path.abspath(path))  # noqa: PTH100 (a snapshot's own links lead to nameless blobs)
    for place in (whole, whole.parent.resolve() / whole.name, whole.resolve()):
        found = _CACHED.fullmatch(place.as_posix().rpartition("/models--")[2].join(("models--", "")))
        if found is None:
            continue
        parts = found["repo"].split("--")
        if len(parts) == 3:
            return Origin(f"{parts[1]}/{parts[2]}", found["commit"], found["file"])
    return None


def called(path: Path) -> str:
    """Return what a model, or one of a hub, is called: its repository, folder, or file without its suffix."""
    found = origin(path)
    if found is not None and found.file is None:
        return found.name
    if found is not None:
        return path.stem
    wanted = None if path.exists() else parse_hub_id(path.as_posix())
    if wanted is not None:
        return Path(wanted.inside).stem if wanted.inside else wanted.repo.rpartition("/")[2]
    real = path.resolve()
    return real.name if real.is_dir() else real.stem


def last_name(path: Path | str) -> str:
    """Return the last part of a path, of a hub's snapshot its repository's name."""
    found = origin(Path(path))
    return found.name if found is not None and found.file is None else Path(path).name or str(path)


def told(path: Path | str) -> str:
    """Return how a command names a model: a hub's as `org/name@commit`, another by its path."""
    found = origin(Path(path))
    if found is None:
        return str(path)
    return str(found) if found.file is None else f"{found}/{found.file}"


@dataclass(frozen=True)
class Chosen:
    """The files of a repository that make a model, weights last; `entry` is what of them is opened."""

    files: tuple[str, ...]
    entry: str


def choose(names: Sequence[str], wanted: HubId, read: Callable[[str], bytes], weights: bool = True) -> Chosen:
    """Choose the files that make the wanted model: its safetensors, else the GGUF or .cellm that is named.

    Of a folder with an index only the shards it names; without `weights` what lies beside them, if there is a
    tokenizer.json. `read` returns a small file's bytes. Raises
    UnsupportedError for pickles only, BitsmithError where nothing or several things answer.
    """
    usable = [name for name in names if _is_plain(name)]
    if wanted.tag is not None:
        return _tagged(usable, wanted)
    if wanted.inside is not None and wanted.inside in usable:
        return _whole_file(usable, wanted.inside)
    prefix = "" if wanted.inside is None else f"{wanted.inside.rstrip('/')}/"
    here = [name for name in usable if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    if not here and wanted.inside is not None:
        raise BitsmithError(f"has no {printable(wanted.inside)}; {_what_there_is(usable)}", path=str(wanted))
    side = [prefix + name for name in SIDE_FILES if prefix + name in here]
    if not weights and prefix + "tokenizer.json" in side:
        return Chosen(tuple(side), prefix.rstrip("/"))
    tensors = _safetensors(here, prefix, wanted, read)
    if tensors:
        return Chosen((*side, *tensors), prefix.rstrip("/"))
    models = _single_files([name for name in usable if name.startswith(prefix)])
    if len(models) == 1:
        return _whole_file(usable, models[0])
    if models:
        raise BitsmithError(
            f"has several models, name one as {wanted.repo}/FILE: {_listed(models)}", path=str(wanted)
        )
    pickles = [name for name in here if name.endswith(_PICKLES)]
    if pickles:
        raise UnsupportedError(
            f"has only pickle files ({_listed(pickles)}), which can run code: nothing was downloaded; "
            "look for a copy in safetensors",
            path=str(wanted),
        )
    raise UnsupportedError(f"is no model: {_what_there_is(names)}", path=str(wanted))


def _is_plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    unusual = "\\" in name or not name.isprintable() or name.startswith("/") or ":" in name
    return bool(parts) and not unusual and ".." not in parts and not any(len(p.encode()) > 255 for p in parts)


def _safetensors(
    here: Sequence[str], prefix: str, wanted: HubId, read: Callable[[str], bytes]
) -> tuple[str, ...]:
    found = sorted(name for name in here if name.endswith(".safetensors"))
    index = prefix + INDEX_NAME
    if index in here:
        given = load_json(read(index), Path(f"{wanted}/{INDEX_NAME}"), "index").get("weight_map")
        named = sorted({str(shard) for shard in given.values()}) if isinstance(given, dict) else []
        missing = [name for name in named if prefix + name not in found]
        if missing or not named:
            raise BitsmithError(
                f"{INDEX_NAME} names shards that are not there: {_listed(missing)}", path=str(wanted)
            )
        return (index, *(prefix + name for name in named))
    if prefix + SINGLE_NAME in found:
        return (prefix + SINGLE_NAME,)
    if len(found) > 1:
        raise BitsmithError(
            f"has several safetensors files and no {INDEX_NAME}, name one as {wanted.repo}/FILE: "
            f"{_listed(found)}",
            path=str(wanted),
        )
    return tuple(found)


def _single_files(names: Sequence[str]) -> list[str]:
    """Return GGUFs (of one in parts the first) and .cellm files; projectors and statistics are no models."""
    found = [name for name in names if name.endswith((".gguf", ".cellm"))]
    return sorted(
        name
        for name in found
        if not re.search(r"mmproj|imatrix", name.rpartition("/")[2], re.IGNORECASE)
        and ((shard := _SHARD.fullmatch(name)) is None or int(shard["number"]) == 1)
    )


def _tagged(names: Sequence[str], wanted: HubId) -> Chosen:
    models = _single_files(names)
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(wanted.tag or '')}[-.]", re.IGNORECASE)
    found = [name for name in models if pattern.search(name)]
    if len(found) == 1:
        return _whole_file(names, found[0])
    if found:
        raise BitsmithError(f"several files answer to it, name one: {_listed(found)}", path=str(wanted))
    raise BitsmithError(f"no file answers to it; {_what_there_is(models)}", path=str(wanted))


def _whole_file(names: Sequence[str], entry: str) -> Chosen:
    """Return a file with its further parts and what belongs to it: a GGUF needs no more of its folder."""
    parts = [entry]
    if (shard := _SHARD.fullmatch(entry)) is not None:
        count = int(shard["count"])
        parts = [f"{shard['stem']}-{n:05}-of-{count:05}.gguf" for n in range(1, min(count, 99_999) + 1)]
        missing = [name for name in parts if name not in names]
        if missing:
            raise BitsmithError(f"lacks parts of {entry}: {_listed(missing)}")
        entry = parts[0]
    beside = [entry + suffix for suffix in COMPANIONS]
    folder = entry.rpartition("/")[0]
    if not entry.endswith(".gguf"):
        beside += [f"{folder}/{name}" if folder else name for name in SIDE_FILES]
        beside += [f"{entry}.tokenizer/{name}" for name in SIDE_FILES]
    return Chosen((*(name for name in beside if name in names), *parts), entry)


def _what_there_is(names: Sequence[str]) -> str:
    return f"it has {_listed(sorted(names))}" if names else "it has none"


def _listed(names: Sequence[Any]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(printable(str(name)) for name in names[:_LISTED]) + (
        f" and {rest} more" if rest > 0 else ""
    )
