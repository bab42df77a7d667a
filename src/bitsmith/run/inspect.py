"""What is in a checkpoint: components and roles with their shares, stored types, sizes in every stock mix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitsmith.archs import TensorSpec, architecture_of, claim, import_view
from bitsmith.archs.generic import spec_by_name
from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.formats import FORMATS
from bitsmith.run.mixes import MIXES
from bitsmith.run.plan import open_source, plan_source
from bitsmith.store import open_checkpoint
from bitsmith.store.checkpoint import Checkpoint, TensorRef

COMPONENTS = {
    "embed": "embedding",
    "head": "head",
    "ffn": "FFN",
    "attn": "full attention",
    "delta": "DeltaNet",
    "norm": "norms",
    "mtp": "MTP",
    "vision": "vision",
}
"""What a role belongs to, by the part of its name before the dot."""

_Pair = tuple[str, TensorRef]


@dataclass(frozen=True)
class Share:
    """A group of tensors: their number, parameters, stored bytes and share of all parameters (0 to 1)."""

    name: str
    tensors: int
    parameters: int
    stored_bytes: int
    share: float


@dataclass(frozen=True)
class Size:
    """What one stock mix (or type) would make of the checkpoint, to the byte, and its bits per weight."""

    type: str
    file_bytes: int
    bpw: float


@dataclass(frozen=True)
class Inspection:
    """The content of one checkpoint; `architecture` is None where no architecture file claims the tensors.

    `components` then come from names and shapes alone.
    """

    path: Path
    architecture: str | None
    parameters: int
    stored_bytes: int
    components: list[Share]
    roles: list[Share]
    types: list[Share]
    sizes: list[Size]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as plain values."""
        return asdict(self) | {"path": str(self.path)}


def inspect(model: Path) -> Inspection:
    """Describe a Hugging Face folder, a safetensors file or a GGUF without reading its weights.

    Sizes come from the same plan that `compress` executes, so they are exact; where no architecture is known
    they are the tensor data alone, each matrix in the type where its rows fit.

    Raises BitsmithError for a damaged file or a checkpoint whose tensors are missing or mis-shaped.
    """
    with open_checkpoint(model) as checkpoint:
        notes: list[str] = []
        try:
            arch = architecture_of(checkpoint)
        except BitsmithError as error:
            return _by_name(checkpoint, error)
        try:
            hugging_face = checkpoint if checkpoint.config else import_view(checkpoint)
            pairs = [(spec, _stored(checkpoint, spec)) for spec, _ in claim(hugging_face)]
        except UnsupportedError as error:  # sound, but not as the architecture has it: a score head, biases
            return _by_name(checkpoint, error)
        named = [(_role(spec), ref) for spec, ref in pairs]
        return _inspection(checkpoint, arch.gguf_arch, named, named, _sizes(checkpoint, notes), notes)


def _by_name(checkpoint: Checkpoint, why: BitsmithError) -> Inspection:
    notes = [f"grouped by name and shape only: {why.message}"]
    named = [(_generic_role(name), ref) for name, ref in checkpoint.items()]
    guessed = [(_role(spec_by_name(name, ref)), ref) for name, ref in checkpoint.items()]
    return _inspection(checkpoint, None, named, guessed, _generic_sizes(checkpoint), notes)


def _stored(checkpoint: Checkpoint, spec: TensorSpec) -> TensorRef:
    return checkpoint[spec.name if spec.name in checkpoint else str(spec.gguf_name)]


def _role(spec: TensorSpec) -> str:
    return spec.role if spec.component == "text" else f"{spec.component}.{spec.role}"


def _generic_role(name: str) -> str:
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-3:-1]) or name


def _inspection(
    checkpoint: Checkpoint,
    arch: str | None,
    named: list[_Pair],
    parts: list[_Pair],
    sizes: list[Size],
    notes: list[str],
) -> Inspection:
    return Inspection(
        path=checkpoint.path,
        architecture=arch,
        parameters=sum(ref.size for _, ref in named),
        stored_bytes=sum(ref.nbytes for _, ref in named),
        components=_shares(parts, lambda role, _: COMPONENTS.get(role.split(".")[0], "other")),
        roles=_shares(named, lambda role, _: role),
        types=_shares(named, lambda _, ref: ref.dtype),
        sizes=sizes,
        notes=notes,
    )


def _shares(named: Iterable[_Pair], key: Callable[[str, TensorRef], str]) -> list[Share]:
    groups: dict[str, list[TensorRef]] = {}
    for role, ref in named:
        groups.setdefault(key(role, ref), []).append(ref)
    total = sum(ref.size for refs in groups.values() for ref in refs) or 1
    shares = [
        Share(name, len(refs), size := sum(r.size for r in refs), sum(r.nbytes for r in refs), size / total)
        for name, refs in groups.items()
    ]
    return sorted(shares, key=lambda share: -share.parameters)


def _sizes(checkpoint: Checkpoint, notes: list[str]) -> list[Size]:
    try:
        source = open_source(checkpoint)
    except UnsupportedError as error:
        notes.append(f"no sizes in other types: {error}")
        return []
    plans = [plan_source(source, name) for name in MIXES]
    notes.extend(source.notes)
    return [Size(p.type, p.file_bytes, p.bpw) for p in plans]


def _generic_sizes(checkpoint: Checkpoint) -> list[Size]:
    parameters = sum(ref.size for ref in checkpoint.values()) or 1
    sizes = []
    for name, fmt in FORMATS.items():
        total = sum(
            ref.n_rows * fmt.row_bytes(ref.size // ref.n_rows)
            if _is_matrix(ref, fmt.block_size)
            else ref.nbytes
            for ref in checkpoint.values()
        )
        sizes.append(Size(name, total, 8 * total / parameters))
    return sizes


def _is_matrix(ref: TensorRef, block_size: int) -> bool:
    return len(ref.shape) >= 2 and ref.size > 0 and (ref.size // ref.n_rows) % block_size == 0
