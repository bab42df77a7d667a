"""Plans as YAML that a person can read, edit and pass back: one line per tensor.

    version: 1
    layout_sha256: 6b1f…            # names and shapes of the model's tensors, as a GGUF has them
    mix: Q4_K_M                     # what the file calls itself; decides nothing
    transforms: [fold, untie, drop-mtp, "rotate:seed=3"]    # done before, in this order; left out for none
    tensors:
      blk.0.attn_qkv.weight: {type: Q4_K, bytes: 147456, bpw: 4.5, kld_nats: 4.5e-04}

`transforms` and `type` decide; `bytes`, `bpw` and `kld_nats` are there to read and are worked out anew. The
digest covers the layout and not the weights, so that a plan also serves a fine-tune of the same model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError, printable
from bitsmith.formats import format_named
from bitsmith.passes.transform import Transform, parse_transforms
from bitsmith.run.plan import Plan, Source, plan_of_types
from bitsmith.run.strict_yaml import read_yaml
from bitsmith.store.atomic import atomic_file

VERSION = 1
"""Version of the layout of the YAML."""

_MAX_BYTES = 16 << 20
_KEYS = frozenset({"version", "layout_sha256", "mix", "transforms", "tensors", "about"})
_TENSOR_KEYS = frozenset({"type", "bytes", "bpw", "kld_nats", "reason"})


def layout_digest(source: Source) -> str:
    """Return the SHA-256 of the names and shapes (`out in`) of the model's tensors in GGUF layout.

    Transforms do not change it, so that they can be taken out of a plan by hand.
    """
    layout = sorted((name, list(shape)) for name, shape in source.layout)
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


def plan_text(
    plan: Plan,
    source: Source,
    nats: Mapping[str, float] | None = None,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Return `plan` as YAML; `nats` are predicted mean KLDs by GGUF name, `about` plain values to add.

    `about` might say the target and what was predicted and measured; reading ignores it.
    """
    lines = [
        "# A bitsmith plan. Edit a tensor's type and pass the file back; nothing else in its line decides.",
        f"# {plan.file_bytes} bytes of file, {plan.bpw:.4f} bits per weight, as first written.",
        f"version: {VERSION}",
        f"layout_sha256: {layout_digest(source)}",
        f"mix: {plan.type}",
    ]
    if plan.transforms:
        lines.append(f"transforms: {json.dumps(list(plan.transforms))}")
    if about:
        lines.append(f"about: {json.dumps(dict(about))}")
    lines.append("tensors:")
    for row in plan.rows:
        fields = [f"type: {row.type}", f"bytes: {row.nbytes}", f"bpw: {row.bpw:.4g}"]
        if nats and row.gguf_name in nats:
            fields.append(f"kld_nats: {nats[row.gguf_name]:.3e}")
        fields.append(f"reason: {json.dumps(row.reason)}")
        lines.append(f"  {_key(row.gguf_name)}: {{{', '.join(fields)}}}")
    return "\n".join(lines) + "\n"


def write_plan(
    plan: Plan,
    path: Path,
    source: Source,
    nats: Mapping[str, float] | None = None,
    about: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write `plan_text` to `path`, whole or not at all.

    Raises OutputError if the file exists without `overwrite`.
    """
    with atomic_file(path, overwrite=overwrite) as target:
        target.write(plan_text(plan, source, nats, about).encode())


def read_transforms(path: Path) -> tuple[Transform, ...]:
    """Return the transforms that the plan at `path` names, those they need put before them.

    Raises BitsmithError for a file that cannot be read and as `parse_transforms` does.
    """
    names = _mapping(_parsed(path), "the plan", path).get("transforms", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BitsmithError(f"'transforms' is {printable(repr(names), 60)}, expected names", path=path)
    try:
        return tuple(parse_transforms(",".join(names))) if names else ()
    except BitsmithError as error:
        raise BitsmithError(error.message, path=path) from error


def read_plan(path: Path, source: Source) -> Plan:
    """Return the plan that the YAML at `path` describes for `source`, with sizes worked out anew.

    `source` must have been opened with the plan's transforms (`read_transforms`).

    Raises BitsmithError for a file that cannot be read, is no such plan or belongs to another model; for a
    tensor that is missing, unknown or twice there; and for a type that is unknown or does not fit its tensor.
    """
    document = _mapping(_parsed(path), "the plan", path)
    _check_keys(document, _KEYS, "the plan", path)
    if document.get("version") != VERSION:
        found = printable(repr(document.get("version")))
        raise BitsmithError(f"version is {found}, expected {VERSION}", path=path)
    if document.get("layout_sha256") != layout_digest(source):
        raise BitsmithError(
            f"is a plan for a model of other tensors than {source.checkpoint.path}", path=path
        )
    tensors = _mapping(document.get("tensors"), "'tensors'", path)
    types = {name: _type(name, entry, path) for name, entry in tensors.items()}
    reasons = {name: _reason(entry) for name, entry in tensors.items()}
    mix = document.get("mix")
    if not isinstance(mix, str):
        raise BitsmithError("'mix' is missing; it names the file, such as Q4_K_M", path=path)
    try:
        return plan_of_types(source, types, mix=mix, reasons=reasons)
    except BitsmithError as error:
        raise BitsmithError(error.message, path=path, tensor=error.tensor) from error


def _parsed(path: Path) -> Any:
    return read_yaml(path, "a plan", _MAX_BYTES).value


def _mapping(value: Any, what: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BitsmithError(f"{what} is {printable(repr(value), 60)}, expected names and values", path=path)
    return value


def _check_keys(found: Mapping[str, Any], known: frozenset[str], what: str, path: Path) -> None:
    for key in found:
        if key not in known:
            expected = ", ".join(sorted(known))
            raise BitsmithError(
                f"{what} has the unknown key {printable(key)!r}; known: {expected}", path=path
            )


def _type(name: str, entry: Any, path: Path) -> str:
    """Return the type of a tensor's line, which may be the type alone."""
    if isinstance(entry, str):
        entry = {"type": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        raise BitsmithError("has no type", path=path, tensor=name)
    for key in entry:
        if key not in _TENSOR_KEYS:
            raise BitsmithError(f"has the unknown key {printable(str(key))!r}", path=path, tensor=name)
    try:
        return format_named(entry["type"]).name
    except BitsmithError as error:
        raise BitsmithError(error.message, path=path, tensor=name) from error


def _reason(entry: Any) -> str:
    reason = entry.get("reason") if isinstance(entry, dict) else None
    return reason if isinstance(reason, str) else "plan"


def _key(name: str) -> str:
    """Return a tensor name as a YAML key, quoted unless it is plainly one."""
    plain = name.isascii() and name.replace(".", "").replace("_", "").isalnum() and name[0].isalpha()
    return name if plain else json.dumps(name)
