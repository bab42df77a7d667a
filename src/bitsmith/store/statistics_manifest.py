"""The manifest of a folder of statistics: what was run, and which tensors lie in which files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from bitsmith.errors import DamagedFileError, UnsupportedError, printable
from bitsmith.store.safetensors import load_json

MANIFEST_NAME = "statistics.json"
TOKENS_NAME = "tokens.safetensors"
SALIENCY_NAME = "saliency.safetensors"
SCHEMA = 1


@dataclass(frozen=True)
class SiteEntry:
    """One site in the manifest: its file, sizes, and the SHA-256 of each tensor's bytes by kind."""

    file: str
    columns: int
    tokens: int
    held_tokens: int
    tensors: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """The content of `statistics.json`: what was run, and what was kept of it.

    `tokens`, `saliency_sha256`: the SHA-256 of each tensor's bytes in their files; the latter is empty
    without weights, and in folders written before weights were kept.
    """

    bitsmith: str
    model: str
    model_sha256: str
    text: str
    text_sha256: str
    ctx_tokens: int
    chunks: int
    held_chunks: int
    fit_tokens: int
    seed: int
    tied: bool
    saliency: bool
    tokens: dict[str, str]
    sites: dict[str, SiteEntry]
    saliency_sha256: dict[str, str] = field(default_factory=dict)
    kind: str = "statistics"
    schema: int = SCHEMA


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `statistics.json`, not atomically."""
    path.write_text(json.dumps(asdict(manifest), indent=1, allow_nan=False) + "\n", "utf-8")


def parse_manifest(raw: bytes, path: Path) -> Manifest:
    """Return the manifest that `raw`, read from `path`, holds.

    Raises DamagedFileError for anything else, UnsupportedError for another schema.
    """
    value = load_json(raw, path, "manifest")
    if value.get("kind") != "statistics":
        raise DamagedFileError("is no manifest of statistics", path=path)
    if value.get("schema") != SCHEMA:
        raise UnsupportedError(
            f"has schema {printable(str(value.get('schema')), 40)}, expected {SCHEMA}", path=path
        )
    try:
        return TypeAdapter(Manifest).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedFileError(f"{printable(where)}: {printable(first['msg'])}", path=path) from error


def entries_from_json(value: object) -> dict[str, SiteEntry]:
    """Return manifest entries from what `asdict` and JSON made of them."""
    return TypeAdapter(dict[str, SiteEntry]).validate_python(value)
