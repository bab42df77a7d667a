"""The record beside an output: of what it was made, how, and every tensor's error. It holds no times."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from bitsmith import __version__
from bitsmith.store.atomic import Content, files_in
from bitsmith.store.checkpoint import Checkpoint
from bitsmith.store.hub import origin
from bitsmith.store.hub_names import last_name
from bitsmith.store.manifest import is_hidden, read_record, record_of, replace_record, write_manifest

MODELS = ("gguf", "cellm", "folder", "sahc", "merge")
"""Kinds of outputs that hold tensors of a model, each with its error in the record."""

ERROR_UNIT = "sum (w - decoded)² / sum w², w as read from the source (after the transforms, if there are any)"


class _Written(Protocol):
    """What writers of whole checkpoints tell of a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def relative_error(self) -> float: ...
    @property
    def rounder(self) -> str: ...


class TensorFacts(NamedTuple):
    """One tensor of an output; `source` is the name of what it was made of, `error` is in `ERROR_UNIT`.

    The error is None where there is nothing to compare with.
    """

    name: str
    source: str
    type: str
    shape: tuple[int, ...]
    error: float | None
    rounder: str = ""

    @classmethod
    def of(cls, written: _Written, stored_as: str) -> Self:
        """Return the facts of a tensor that keeps its name."""
        return cls(
            written.name, written.name, stored_as, written.shape, written.relative_error, written.rounder
        )


def output_record(
    out: Path,
    kind: str,
    sources: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
    tensors: Iterable[TensorFacts] = (),
) -> dict[str, Any]:
    """Return the record of an output of a kind; `sources` are what `source_facts` finds, by their part.

    Equal inputs and options give equal records, on any machine and in any time.
    """
    rows = [
        {
            "name": one.name,
            **({"source": one.source} if one.source != one.name else {}),
            "type": one.type,
            "shape": list(one.shape),
            "relative_error": one.error,
            **({"rounder": one.rounder} if one.rounder else {}),
        }
        for one in tensors
    ]
    return {
        "output": out.name,
        "kind": kind,
        "bitsmith": __version__,
        "sources": {part: dict(facts) for part, facts in sources.items()},
        "options": dict(options),
        **({"error_unit": ERROR_UNIT} if rows else {}),
        "tensors": rows,
    }


def source_facts(checkpoint: Checkpoint, out: Path) -> dict[str, Any]:
    """Return what a model is known by: its name, its path as seen from the output's folder, its digest.

    The digest (`Checkpoint.source_digest`) reads every byte.
    """
    path = os.path.abspath(checkpoint.path)  # noqa: PTH100 (links stay as named)
    found = origin(checkpoint.path)
    return {
        **({} if found is None else {"hub": str(found)}),
        "name": last_name(path),
        "path": os.path.relpath(path, out.absolute().parent),
        "sha256": checkpoint.source_digest,
    }


def seal(
    out: Path,
    kind: str,
    content: Content | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> None:
    """Write the manifest and the record of an output that holds no tensors of a model to compare with.

    Without `content` it is what lies there, hidden files left out; a model keeps its own record. Raises
    OutputError as `write_manifest` does.
    """
    if content is None:
        if record_of(out).exists() and read_record(out).get("kind") in MODELS:
            return
        content = {name: path for name, path in files_in(out).items() if not is_hidden(name)}
    write_manifest(out, output_record(out, kind, sources or {}, options), content=content)


def without_places(out: Path, changed: Iterable[Path] = ()) -> None:
    """Let an output's record tell what it was made of by name and digest alone; `changed` files are its own.

    Raises as `replace_record` does.
    """
    record = read_record(out)
    for facts in record["sources"].values():
        facts.pop("path", None)
    replace_record(out, record, changed)


def rebased(record: Mapping[str, Any], made: Path, out: Path) -> dict[str, Any]:
    """Return the record of an output that moves from `made` to `out`."""
    sources = {part: dict(facts) for part, facts in record["sources"].items()}
    for facts in sources.values():
        if facts.get("path"):
            path = os.path.normpath(made.absolute().parent / facts["path"])
            facts["path"] = os.path.relpath(path, out.absolute().parent)
    return {**record, "output": out.name, "sources": sources}
