"""What becomes of every tensor of a checkpoint in a packed folder: its scheme, its parts, the settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bitsmith.archs import TensorSpec, architecture_of, claim
from bitsmith.errors import BitsmithError, printable
from bitsmith.run.factored_choice import decided
from bitsmith.run.overrides import Override, first_match
from bitsmith.run.pack_bitsandbytes import BitsandbytesPacker
from bitsmith.run.pack_compressed import CompressedTensorsPacker
from bitsmith.run.pack_factored import FactoredPacker
from bitsmith.run.packer import Assigned, Packer
from bitsmith.store import Checkpoint, TensorData, TensorRef
from bitsmith.store.atomic import Chunk
from bitsmith.store.packed import refuse_rounded

KEPT = "BF16"
"""The scheme of what is not packed: it keeps its dtype, which is BF16 in most checkpoints."""

PACKERS: tuple[Packer, ...] = (CompressedTensorsPacker(), BitsandbytesPacker(), FactoredPacker())
SCHEMES = (*(scheme for packer in PACKERS for scheme in packer.schemes), KEPT)

_TINY_ROLES = ("delta.in_a", "delta.in_b")  # a row per head, whose errors stay in the recurrent state
_ANY_WIDTH = 1 << 20  # every group divides it
_PATTERN = "re:"

Rules = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class FolderRow:
    """One tensor of the source as it is stored, all parts counted; `note` says what was not as asked.

    `scheme` is one of `SCHEMES`; `group` columns share a scale (0: a row), None where nothing is packed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str
    group: int | None
    nbytes: int
    note: str = ""


class Piece(NamedTuple):
    """A stored tensor to be: the tensor it is made of, which part of it (None: a copy), and its layout."""

    source: str
    part: str | None
    data: TensorData


@dataclass(frozen=True)
class Layout:
    """Every tensor's row, the packed ones by name, the stored tensors in order, the `quantization_config`."""

    packer: Packer
    rows: tuple[FolderRow, ...]
    packed: Mapping[str, Assigned]
    pieces: tuple[Piece, ...]
    settings: Mapping[str, Any] | None

    def data(self, chunks: Callable[[Piece], Iterator[Chunk]] | None = None) -> list[TensorData]:
        """Return the stored tensors; without `chunks` their names and sizes alone."""
        if chunks is None:
            return [piece.data for piece in self.pieces]
        return [piece.data._replace(chunks=chunks(piece)) for piece in self.pieces]


def takes(scheme: str) -> bool:
    """Tell whether a packed folder can be made with `scheme`."""
    return scheme == KEPT or any(packer.takes(scheme) for packer in PACKERS)


def lay_out(
    checkpoint: Checkpoint,
    scheme: str,
    group: int | None,
    tensor_types: Rules,
    ignore: Sequence[str],
    statistics: Path | None = None,
) -> Layout:
    """Return what `run.folder.write_folder` makes of each tensor; options and errors are its own."""
    packer = _packer([scheme, *(named for _, named in tensor_types)])
    specs = {spec.name: spec for spec, _ in claim(checkpoint)}
    linears = [_module(name) for name, spec in specs.items() if _is_linear(spec)]
    if architecture_of(checkpoint).tied:
        linears.append("lm_head")
    asked = _asked(packer, specs, scheme, tensor_types, _ignored(ignore, linears))
    asked = decided(checkpoint, asked, statistics)
    rows = []
    packed: dict[str, Assigned] = {}
    pieces: list[Piece] = []
    for name, ref in checkpoint.items():
        found = None if name not in asked else _assigned(packer, ref, asked[name], group, checkpoint.path)
        if found is not None:
            packed[name] = found
        made = [Piece(name, None, TensorData(name, ref.dtype, ref.shape, ()))]
        if found is not None:
            made = [
                Piece(name, suffix, TensorData(f"{found.module}.{suffix}", dtype, shape, ()))
                for suffix, dtype, shape in packer.parts(found)
            ]
        rows.append(_row(packer, ref, found, asked.get(name), group, made))
        pieces += made
    modules = {row.module for row in packed.values()}
    kept = [module for module in linears if module not in modules]
    settings = packer.config(list(packed.values()), kept) if packed else None
    return Layout(packer, tuple(rows), packed, tuple(pieces), settings)


def _packer(schemes: Sequence[str]) -> Packer:
    """Return the one packer of all schemes (of none but KEPT: any)."""
    found = []
    for scheme in schemes:
        if not takes(scheme):
            raise BitsmithError(f"unknown scheme {printable(scheme)!r}; known: {', '.join(SCHEMES)}")
        found += [packer for packer in PACKERS if packer.takes(scheme) and packer not in found]
    if len(found) > 1:
        said = " and ".join(sorted({scheme for scheme in schemes if scheme != KEPT}))
        raise BitsmithError(f"{said} cannot be in one folder: its config names one way of packing")
    return found[0] if found else PACKERS[0]


def _is_linear(spec: TensorSpec) -> bool:
    table = spec.role.startswith("embed") or spec.name.endswith("pos_embed.weight")
    return len(spec.shape) == 2 and spec.name.endswith(".weight") and not table


def _packs(packer: Packer, spec: TensorSpec) -> bool:
    return _is_linear(spec) or (packer.tables and spec.role == "embed")


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _asked(
    packer: Packer,
    specs: Mapping[str, TensorSpec],
    scheme: str,
    tensor_types: Rules,
    ignored: set[str],
) -> dict[str, str]:
    """Return the scheme asked for by tensor, of those that are to be packed."""
    text = {name: spec for name, spec in specs.items() if spec.component == "text" and _packs(packer, spec)}
    rules = [Override(pattern, named) for pattern, named in tensor_types]
    found = {}
    for name, spec in text.items():
        by_default = scheme if spec.layer is not None and spec.role not in _TINY_ROLES else KEPT
        rule = first_match(rules, name)
        named = by_default if rule is None else rule.type
        if named != KEPT and _module(name) not in ignored:
            found[name] = named
    for rule in rules:
        rule.refuse_idle("no linear of the text model has a name that matches")
    return found


def _ignored(entries: Sequence[str], linears: Sequence[str]) -> set[str]:
    """Return the modules that `entries` name, as compressed-tensors matches them."""
    found: set[str] = set()
    for entry in entries:
        pattern = _compiled(entry.removeprefix(_PATTERN)) if entry.startswith(_PATTERN) else None
        named = {name for name in linears if (name == entry if pattern is None else pattern.match(name))}
        if not named:
            raise BitsmithError(f"ignore: {printable(entry)!r} names no linear of the model")
        found |= named
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BitsmithError(f"{printable(pattern)!r} is no regular expression: {error}") from error


def _assigned(packer: Packer, ref: TensorRef, scheme: str, group: int | None, path: Path) -> Assigned | None:
    """Return a matrix with the group it gets, None where no group fits."""
    refuse_rounded(ref, path)
    taken = packer.group(scheme, group, ref.shape)
    return None if taken is None else Assigned(ref.name, ref.shape, ref.dtype, scheme, taken)


def _row(
    packer: Packer,
    ref: TensorRef,
    found: Assigned | None,
    asked: str | None,
    group: int | None,
    made: Sequence[Piece],
) -> FolderRow:
    note = ""
    wanted = None if asked is None else packer.group(asked, group, (1, _ANY_WIDTH))
    if asked is not None and found is None:
        note = f"kept: no group of {asked} divides {ref.shape[-1]} columns"
    elif found is not None and found.group != wanted:
        note = f"groups of {found.group}: {wanted} does not divide {ref.shape[-1]} columns"
    nbytes = sum(piece.data.nbytes for piece in made)
    scheme, taken = (KEPT, None) if found is None else (found.scheme, found.group)
    return FolderRow(ref.name, ref.shape, ref.dtype, scheme, taken, nbytes, note)
