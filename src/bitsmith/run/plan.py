"""A plan: every tensor of the output with its type and bytes, decided before anything is read or written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from bitsmith.archs import Export, TensorSpec
from bitsmith.archs.export import export_of
from bitsmith.archs.tokenizer import tokenizer_metadata
from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.formats import format_named
from bitsmith.passes.transform import Model as Rewritten
from bitsmith.passes.transform import Transform, model_of
from bitsmith.run.mixes import MIXES, Mix, Model, assign, fitting_type, is_quantizable, mix_named
from bitsmith.run.overrides import Override, first_match
from bitsmith.store import TensorInfo, Typed, gguf_size_bytes
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.gguf import GgufCheckpoint
from bitsmith.store.gguf_layout import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, padded
from bitsmith.store.gguf_split import SPLIT_KEYS
from bitsmith.store.hub import origin
from bitsmith.store.packed import refuse_rounded
from bitsmith.store.stored import FLOATS

QUANTIZATION_VERSION = 2
"""`general.quantization_version`: the layout of ggml's blocks that the formats write."""

REPOSITORY_KEY, SOURCE_KEY = "general.source.huggingface.repository", "bitsmith.source"
"""Of a model of a hub: its repository, and that with the commit."""

TRANSFORMS_KEY, TRANSFORMS_DIGEST_KEY = "bitsmith.transforms", "bitsmith.transforms.sha256"
"""Keys of a transformed GGUF: its transforms in their order, and the SHA-256 of their vectors."""

_MTP_KEY = ".nextn_predict_layers"
_REPLACED_KEYS = (
    "general.file_type", "general.quantization_version", "quantize.imatrix.",
    TRANSFORMS_KEY, TRANSFORMS_DIGEST_KEY, *SPLIT_KEYS,
)  # fmt: skip


@dataclass(frozen=True)
class SourceTensor:
    """A tensor on its way out: `ref` is in GGUF layout, computed on read; `origin` is the one stored."""

    spec: TensorSpec
    gguf_name: str
    ref: TensorRef
    origin: TensorRef

    @property
    def hf_name(self) -> str:
        """The tensor's Hugging Face name."""
        return self.spec.name


@dataclass(frozen=True)
class Source:
    """A checkpoint in GGUF layout: tensors, what the mixes ask, and the metadata no type changes.

    `transforms` are still to be solved: only the tensors they add or remove are settled (see
    `run.transforms.solved`). `layout` has name and shape (`out in`) of every tensor that the checkpoint would
    export without them.
    """

    checkpoint: Checkpoint
    tensors: tuple[SourceTensor, ...]
    metadata: Mapping[str, Any]
    n_blocks: int
    gqa: int
    set_aside: tuple[str, ...]
    notes: tuple[str, ...]
    layout: tuple[tuple[str, tuple[int, ...]], ...]
    transforms: tuple[Transform, ...] = ()

    def metadata_for(self, mix: Mix) -> dict[str, Any]:
        """Return all key/values of the file that `mix` makes."""
        return {
            **self.metadata,
            "general.quantization_version": QUANTIZATION_VERSION,
            "general.file_type": mix.file_type,
        }

    def file_bytes(self, infos: Sequence[TensorInfo]) -> int:
        """Return the exact size of the file that holds `infos`, all of the source's tensors, in any types."""
        return self._header_bytes + self._data_bytes(infos)

    @cached_property
    def _header_bytes(self) -> int:
        # A quarter million tokens are packed to find it, and neither types nor solving transforms change it.
        infos = [TensorInfo(tensor.gguf_name, tensor.ref.shape, "F32") for tensor in self.tensors]
        return gguf_size_bytes(self.metadata_for(MIXES["F32"]), infos) - self._data_bytes(infos)

    def _data_bytes(self, infos: Iterable[TensorInfo]) -> int:
        alignment = _plain(self.metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT))
        return sum(padded(info.nbytes, alignment) for info in infos)


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the output; `shape` is in numpy order (`out in`).

    `reason` says where the type comes from. `fallback_from` is the type that was wanted where the rows are
    not whole blocks of it, else None.
    """

    hf_name: str
    gguf_name: str
    shape: tuple[int, ...]
    source_dtype: str
    type: str
    nbytes: int
    bpw: float
    reason: str
    fallback_from: str | None = None

    @property
    def note(self) -> str:
        """What a person should know about the row; empty where the mix simply applies."""
        if self.fallback_from is not None:
            block = format_named(self.fallback_from).block_size
            return (
                f"fallback from {self.fallback_from}: rows of {self.shape[-1]} are not divisible by {block}"
            )
        return "" if self.reason == "mix" else self.reason


@dataclass(frozen=True)
class Plan:
    """The resolved table of one compression; `file_bytes` is the exact size of the file it makes.

    `transforms` are done to the model before, in this order. `set_aside` names stored tensors that the file
    does not hold (vision), `notes` says what else to know.
    """

    type: str
    pure: bool
    tensor_types: tuple[tuple[str, str], ...]
    rows: tuple[PlanRow, ...]
    file_bytes: int
    set_aside: tuple[str, ...]
    notes: tuple[str, ...]
    transforms: tuple[str, ...] = ()

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data, without header and padding."""
        return sum(row.nbytes for row in self.rows)

    @property
    def parameters(self) -> int:
        """Number of weights written."""
        return sum(prod(row.shape) for row in self.rows)

    @property
    def bpw(self) -> float:
        """Bits per weight of the tensor data: `8 tensor_bytes / parameters`."""
        return 8 * self.tensor_bytes / self.parameters

    @property
    def fallbacks(self) -> list[PlanRow]:
        """Rows stored in another type than was wanted."""
        return [row for row in self.rows if row.fallback_from is not None]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the plan, its totals and its digest as plain values."""
        totals = {name: getattr(self, name) for name in ("tensor_bytes", "parameters", "bpw", "digest")}
        rows = [asdict(row) | {"note": row.note} for row in self.rows]
        return asdict(self) | totals | {"rows": rows}


def plan(
    checkpoint: Checkpoint,
    type_name: str,
    *,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    no_fallback: bool = False,
) -> Plan:
    """Decide the type of every tensor of `checkpoint` (Hugging Face or a float GGUF) under a stock mix.

    `tensor_types` are (regex, type) overrides, searched in the Hugging Face and in the GGUF name, any case.
    The first that matches a tensor wins, as in llama-quantize; unlike there, it leaves the types of all other
    tensors alone and also applies under F16, BF16 and F32. Tensors that llama.cpp never quantizes (norms,
    vectors, the convolution) stay F32 whatever an override says.

    Raises BitsmithError for an unknown type, a bad regex, an override that changes no tensor, and with
    `no_fallback` for rows that are not whole blocks; else as `claim` and `tokenizer_metadata` do.
    """
    return plan_source(
        open_source(checkpoint), type_name, pure=pure, tensor_types=tensor_types, no_fallback=no_fallback
    )


def open_source(
    checkpoint: Checkpoint, transforms: Sequence[Transform] = (), *, allow_requantize: bool = False
) -> Source:
    """Return `checkpoint` in GGUF layout with its metadata, for `transforms` to be done; no weight is read.

    A GGUF file's tensors and metadata are taken as they are. Raises UnsupportedError for weights that are not
    floats unless `allow_requantize`, else as `claim` and `tokenizer_metadata` do.
    """
    model, notes = model_of(checkpoint), list[str]()
    layout = tuple(
        (str(spec.gguf_name), spec.gguf_shape) for spec, _ in model.tensors.values() if spec.gguf_name
    )
    for transform in transforms:
        notes += transform.notes(model)
        model = transform.restructured(model)
    if isinstance(checkpoint, GgufCheckpoint):
        source = _from_gguf(checkpoint, model)
    else:
        source = _from_folder(checkpoint, model)
    source = replace(source, layout=layout, transforms=tuple(transforms), notes=(*source.notes, *notes))
    if transforms:
        names, unsolved = [str(transform) for transform in transforms], "0" * 64
        said = {TRANSFORMS_KEY: names, TRANSFORMS_DIGEST_KEY: unsolved}
        source = replace(source, metadata={**source.metadata, **said})
    rounded = [tensor.origin for tensor in source.tensors if tensor.origin.dtype not in FLOATS]
    for ref in [] if allow_requantize else rounded:
        refuse_rounded(ref, checkpoint.path, ", or --allow-requantize, which rounds what is rounded already")
    return replace(source, notes=(*source.notes, _requantized(rounded))) if rounded else source


def _requantized(rounded: Sequence[TensorRef]) -> str:
    types = ", ".join(sorted({ref.dtype for ref in rounded}))
    return (
        f"{len(rounded)} tensors are rounded already ({types}): what keeps its type is copied, the rest is "
        "rounded a second time, and errors are told against the rounded values"
    )


def plan_source(
    source: Source,
    type_name: str,
    *,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    no_fallback: bool = False,
    has_imatrix: bool = False,
) -> Plan:
    """Decide as `plan` does, for an opened source; the costly part, its metadata, is shared between plans."""
    mix = mix_named(type_name)
    overrides = [Override(pattern, format_named(name).name) for pattern, name in tensor_types]
    shapes = {tensor.gguf_name: tensor.ref.shape for tensor in source.tensors}
    wanted = assign(shapes, mix, Model(source.n_blocks, source.gqa, has_imatrix), pure=pure)
    rows = tuple(_row(tensor, wanted[tensor.gguf_name], overrides) for tensor in source.tensors)
    for override in overrides:
        override.refuse_idle()
    if no_fallback:
        _refuse_fallbacks(rows, source.checkpoint)
    return _resolved(source, mix, rows, pure, overrides)


def plan_of_types(
    source: Source, types: Mapping[str, str], *, mix: str, reasons: Mapping[str, str] | None = None
) -> Plan:
    """Return the plan that stores each tensor (by GGUF name) as `types` says; nothing falls back.

    `mix` names the file in its metadata and in the plan; `reasons` say per tensor where its type comes from.

    Raises BitsmithError for a tensor without a type, an unknown tensor or type, rows that are not whole
    blocks, and a quantized type for a tensor that llama.cpp keeps as floats.
    """
    named = mix_named(mix)
    path = source.checkpoint.path
    unknown = types.keys() - {tensor.gguf_name for tensor in source.tensors}
    if unknown:
        raise BitsmithError("is not in the model", path=path, tensor=sorted(unknown)[0])
    rows = tuple(_typed_row(source, tensor, types, reasons or {}) for tensor in source.tensors)
    return _resolved(source, named, rows, False, ())


def _typed_row(
    source: Source, tensor: SourceTensor, types: Mapping[str, str], reasons: Mapping[str, str]
) -> PlanRow:
    name, path = tensor.gguf_name, source.checkpoint.path
    if name not in types:
        raise BitsmithError("has no type in the plan", path=path, tensor=name)
    form = format_named(types[name])
    if not is_quantizable(name, tensor.ref.shape):
        if form.name != "F32":
            raise BitsmithError(f"is stored as F32 by llama.cpp, not as {form.name}", path=path, tensor=name)
        return _planned(tensor, "F32", "never quantized", None)
    if not form.fits(tensor.ref.shape[-1]):
        raise BitsmithError(
            f"has rows of {tensor.ref.shape[-1]} weights, {form.name} needs multiples of {form.block_size}",
            path=path,
            tensor=name,
        )
    return _planned(tensor, form.name, reasons.get(name, "plan"), None)


def _resolved(
    source: Source, mix: Mix, rows: tuple[PlanRow, ...], pure: bool, overrides: Sequence[Override]
) -> Plan:
    infos = [TensorInfo(row.gguf_name, row.shape, row.type) for row in rows]
    return Plan(
        type=mix.name,
        pure=pure,
        tensor_types=tuple((override.pattern, override.type) for override in overrides),
        rows=rows,
        file_bytes=source.file_bytes(infos),
        set_aside=source.set_aside,
        notes=source.notes,
        transforms=tuple(map(str, source.transforms)),
    )


def _row(tensor: SourceTensor, wanted: str, overrides: Iterable[Override]) -> PlanRow:
    names = tensor.hf_name, tensor.gguf_name
    reason = "mix"
    if not is_quantizable(tensor.gguf_name, tensor.ref.shape):
        reason = "never quantized"
        for override in overrides:
            if override.matches(*names):
                override.idle_because = f"llama.cpp never quantizes {tensor.hf_name}"
    elif (first := first_match(overrides, *names)) is not None:
        wanted, reason = first.type, f"override {first.pattern}"
    stored = fitting_type(wanted, tensor.ref.shape[-1])
    return _planned(tensor, stored, reason, wanted if stored != wanted else None)


def _planned(tensor: SourceTensor, stored: str, reason: str, fallback_from: str | None) -> PlanRow:
    nbytes = TensorInfo(tensor.gguf_name, tensor.ref.shape, stored).nbytes
    return PlanRow(
        hf_name=tensor.hf_name,
        gguf_name=tensor.gguf_name,
        shape=tensor.ref.shape,
        source_dtype=tensor.origin.dtype,
        type=stored,
        nbytes=nbytes,
        bpw=8 * nbytes / tensor.ref.size,
        reason=reason,
        fallback_from=fallback_from,
    )


def _refuse_fallbacks(rows: Iterable[PlanRow], checkpoint: Checkpoint) -> None:
    unfit = [
        f"{row.hf_name} (rows of {row.shape[-1]}: {row.fallback_from} would become {row.type})"
        for row in rows
        if row.fallback_from is not None
    ]
    if unfit:
        raise BitsmithError(f"{len(unfit)} tensors need a fallback: {', '.join(unfit)}", path=checkpoint.path)


def _from_folder(checkpoint: Checkpoint, model: Rewritten) -> Source:
    try:
        export = export_of(model.arch, model.tensors.values())
    except UnsupportedError as error:
        raise UnsupportedError(error.message, path=error.path or checkpoint.path) from error
    tokenizer, warnings = tokenizer_metadata(checkpoint, export.arch)
    architecture = {"general.architecture": export.metadata["general.architecture"]}
    general = {**architecture, "general.type": "model", "general.name": _model_name(checkpoint)}
    found = origin(checkpoint.path)
    if found is not None:
        general |= {REPOSITORY_KEY: found.repo, SOURCE_KEY: str(found)}
    tensors = tuple(
        SourceTensor(t.spec, t.gguf_name, t.ref, model.tensors[t.spec.name][1]) for t in export.tensors
    )
    metadata = {**general, **export.metadata, **tokenizer}
    set_aside = tuple(spec.name for spec in export.set_aside)
    notes = (*_component_notes(export), *warnings)
    return _source(checkpoint, tensors, metadata, export.arch.gguf_arch, set_aside, notes)


def _from_gguf(checkpoint: GgufCheckpoint, model: Rewritten) -> Source:
    named = [
        (spec, spec.gguf_name, ref) for spec, ref in model.tensors.values() if spec.gguf_name is not None
    ]
    tensors = tuple(
        SourceTensor(spec, name, checkpoint[name], checkpoint[name])
        if name in checkpoint
        else SourceTensor(spec, name, spec.to_gguf(ref), ref)  # an untied head
        for spec, name, ref in named
    )
    metadata = {k: v for k, v in checkpoint.typed_metadata().items() if not k.startswith(_REPLACED_KEYS)}
    if len(tensors) < len(checkpoint):  # MTP layers were dropped
        said = model.arch.gguf_metadata()
        metadata = {k: said.get(k, v) for k, v in metadata.items() if k in said or not k.endswith(_MTP_KEY)}
    return _source(checkpoint, tensors, metadata, model.arch.gguf_arch, (), ())


def _source(
    checkpoint: Checkpoint,
    tensors: tuple[SourceTensor, ...],
    metadata: Mapping[str, Any],
    arch: str,
    set_aside: tuple[str, ...],
    notes: tuple[str, ...],
) -> Source:
    heads, kv_heads = (
        _number(metadata, f"{arch}.attention.{key}") for key in ("head_count", "head_count_kv")
    )
    blocks = _number(metadata, f"{arch}.block_count")
    return Source(checkpoint, tensors, metadata, blocks, heads // max(1, kv_heads), set_aside, notes, ())


def _number(metadata: Mapping[str, Any], key: str) -> int:
    """Return an integer of plain or typed metadata; of an array its first element, the first block's."""
    value = _plain(metadata.get(key))
    value = value[0] if isinstance(value, list) and value else value
    if not isinstance(value, int):
        raise BitsmithError(f"metadata {key!r} is {printable(repr(value))}, expected an integer")
    return value


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def _model_name(checkpoint: Checkpoint) -> str:
    found = origin(checkpoint.path)
    if found is not None:
        return found.name
    path = checkpoint.path.resolve()
    return path.name if path.is_dir() else path.parent.name


def _component_notes(export: Export) -> list[str]:
    notes = []
    if vision := sum(spec.component == "vision" for spec in export.set_aside):
        notes.append(f"{vision} vision tensors are set aside: they belong in a separate mmproj file")
    if mtp := sum(tensor.spec.component == "mtp" for tensor in export.tensors):
        notes.append(f"{mtp} MTP tensors are kept as nextn blocks")
    return notes
