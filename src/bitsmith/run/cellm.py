"""Write a Hugging Face checkpoint as .cellm: as cellm's converter would, or with better scales."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from pydantic import TypeAdapter

from bitsmith.archs.tokenizer import TOKENIZER_FILES, TOKENIZER_NAME, TOKENIZER_SUFFIX, tokenizer_folder
from bitsmith.errors import BitsmithError, OutputError, UnsupportedError, printable
from bitsmith.formats import format_named
from bitsmith.formats.format import Bytes
from bitsmith.formats.integer import GridFormat, grid_named
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.choice import Choice
from bitsmith.progress import Progress, silent
from bitsmith.run.cellm_header import cellm_metadata
from bitsmith.run.encode import SLICE_BYTES, check_rounder
from bitsmith.run.guide import Guide, Total, finite_rows
from bitsmith.run.overrides import Override, first_match
from bitsmith.run.record import TensorFacts, output_record, source_facts
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import Content, atomic_folder, refuse_taken
from bitsmith.store.cellm import Q1, SCALE_SUFFIX, CellmInfo
from bitsmith.store.cellm_writer import cellm_rows, cellm_size_bytes, write_cellm_file
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.gguf import GgufCheckpoint
from bitsmith.store.manifest import write_manifest
from bitsmith.store.packed import refuse_rounded
from bitsmith.store.parts import Parts, finished_parts
from bitsmith.store.safetensors import side_files

Kind = Literal["f16", "i8", "i4", "i2", "q1"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_ALIASES = {"int8": "i8", "int4": "i4", "int2": "i2", "int1": "q1", Q1: "q1"}
Selection = Literal["cellm", "text", "layers"]
"""Which matrices are quantized: those cellm's converter would, all of the text model, those of its layers."""

_GRIDS = {"i8": "int8", "i4": "int4", "i2": "int2", "q1": "int1_g128"}
_SEED_GRIDS = {"i8": "cellm-i8", "i4": "cellm-i4", "i2": "cellm-i2", "q1": f"cellm-{Q1}"}
_LAYERS = ("model.layers.", "model.text_model.layers.", "model.language_model.layers.")
_TEXT = (*_LAYERS, "language_model.model.layers.")
_OUTER = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class CellmTensor:
    """One tensor as written, scales counted; `relative_error` is `sum (w - decoded)^2 / sum w^2`.

    `held_error` is `sum |E x|² / sum |W x|²` over held-out inputs x, None where there are none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: str | None
    rounder: str
    nbytes: int
    relative_error: float
    held_error: float | None = None


_WRITTEN = TypeAdapter(CellmTensor)


@dataclass(frozen=True)
class CellmPlan:
    """What a conversion would write: each tensor of the file with its bytes, its grid (None: float16)."""

    kind: Kind
    file_bytes: int
    parameters: int
    tensors: tuple[tuple[CellmInfo, str | None], ...]

    @property
    def bpw(self) -> float:
        """Bits of the file, header and padding included, per parameter."""
        return 8 * self.file_bytes / max(1, self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        tensors = [
            {"name": info.name, "dtype": info.dtype, "shape": info.shape, "grid": grid, "nbytes": info.nbytes}
            for info, grid in self.tensors
        ]
        return {**asdict(self), "tensors": tensors, "bpw": self.bpw}


@dataclass(frozen=True)
class CellmRecord:
    """What one conversion did; `resumed` matrices were taken over from a killed run.

    `bpw` are the file's bits per parameter.
    """

    out: Path
    kind: Kind
    like_seed: bool
    selection: Selection
    file_bytes: int
    parameters: int
    tensors: tuple[CellmTensor, ...]
    seconds: float
    resumed: int = 0

    @property
    def bpw(self) -> float:
        """Bits of the file, header and padding included, per parameter."""
        return 8 * self.file_bytes / max(1, self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {**asdict(self), "out": str(self.out), "bpw": self.bpw}


@one_blas_thread()
def write_cellm(
    model: Path,
    out: Path,
    kind: str,
    *,
    like_seed: bool = False,
    group: int | None = None,
    selection: Selection | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    statistics: Path | None = None,
    rounder: str = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> CellmRecord:
    """Write `model` (a Hugging Face checkpoint, or a .cellm of floats) to the .cellm file `out`.

    `like_seed` takes cellm's encodings and its choice of tensors. Without it all matrices of the text model
    are quantized (`selection`) with searched scales; with `statistics` each is coded by the weighted search
    or by error feedback, whichever `rounder` allows and does best on held-out inputs (`choose_grid`). What is
    not quantized is float16. `group` columns share a scale (32, 64 or 128; None: a row, with q1 128).
    `kind` may name its group (`i4_g32`), and say `int4` for `i4`. `tensor_types` are (regex, kind) pairs,
    searched in a matrix's name; the first that matches says its kind instead. Memory holds a slice of one
    tensor, its scales and one site's statistics.

    Raises BitsmithError for an unknown kind, group, selection or rounder, for a rule without effect and for
    statistics with `like_seed`; UnsupportedError for weights that are no floats; DamagedFileError for one
    that is not finite; OutputError as `atomic_file` does and for a name that does not end in .cellm. Nothing
    is written then. The tokenizer goes to `OUT.tokenizer`, where generating and evaluating find it, digests
    and errors to `OUT.sha256` and `OUT.record.json`.
    """
    started = time.monotonic()
    wanted = _Wanted(kind, like_seed, group, selection, tensor_types)
    _refuse_options(out, rounder, like_seed, statistics)
    with open_checkpoint(model) as checkpoint:
        guide = None if statistics is None else Guide(checkpoint, statistics, rounder)
        job = _Job(checkpoint, wanted.grids(checkpoint), guide, progress)
        metadata = cellm_metadata(checkpoint, like_seed=like_seed)
        sources = [*checkpoint.files, *([] if statistics is None else [statistics])]
        refuse_taken(out, overwrite, sources, folder=False)
        options = {
            "type": kind,
            "group": group,
            "selection": wanted.selection,
            "like_seed": like_seed,
            "tensor_types": [list(rule) for rule in tensor_types],
            "rounder": "nearest" if guide is None else guide.rounder,
            "statistics_sha256": None if guide is None else guide.digest,
        }
        checkpoint.hash_reads()

        def finish(content: Content) -> None:
            kept = {"model": source_facts(checkpoint, out)}  # all of it has been read by now
            rows = [
                TensorFacts.of(job.written[name], job.written[name].dtype) for name in sorted(job.written)
            ]
            folders = _write_tokenizer(tokenizer_folder(checkpoint), out)
            record = output_record(out, "cellm", kept, options, rows)
            write_manifest(out, record, content=content, folders=folders)

        with job.prepared(out, overwrite):
            size = write_cellm_file(
                out, metadata, job.infos, job.encode, overwrite=overwrite, sources=sources, finish=finish
            )
        parameters = sum(ref.size for ref in checkpoint.values())
    seconds = time.monotonic() - started
    written = tuple(job.written[name] for name in sorted(job.written))
    made = wanted.kind, like_seed, wanted.selection
    return CellmRecord(out, *made, size, parameters, written, seconds, job.resumed)


def plan_cellm(
    model: Path,
    kind: str,
    *,
    like_seed: bool = False,
    group: int | None = None,
    selection: Selection | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
) -> CellmPlan:
    """Return what `write_cellm` would write, with exact bytes; options and errors are its own."""
    wanted = _Wanted(kind, like_seed, group, selection, tensor_types)
    with open_checkpoint(model) as checkpoint:
        grids = wanted.grids(checkpoint)
        infos = sorted(_Job(checkpoint, grids, None, silent).infos)
        size = cellm_size_bytes(cellm_metadata(checkpoint, like_seed=like_seed), infos)
        parameters = sum(ref.size for ref in checkpoint.values())
    named = {name: grid.name for name, grid in grids.items()}
    return CellmPlan(wanted.kind, size, parameters, tuple((info, named.get(info.name)) for info in infos))


def cellm_chunks(checkpoint: Checkpoint, grids: Mapping[str, GridFormat]) -> Iterator[Bytes]:
    """Yield what a .cellm file holds of a checkpoint, or of a part of one, without statistics."""
    job = _Job(checkpoint, grids, None, silent)
    for info in job.infos:
        yield from job.encode(info)


def _write_tokenizer(folder: Path, out: Path) -> list[Path]:
    """Copy the tokenizer, for which the file has no place, to a folder beside it; return that, if any."""
    found = side_files(folder, TOKENIZER_FILES)
    if TOKENIZER_NAME not in found:
        return []
    target = out.with_name(out.name + TOKENIZER_SUFFIX)
    with atomic_folder(
        target, last=TOKENIZER_NAME, stale=TOKENIZER_FILES.__contains__, overwrite=True
    ) as part:
        for name, data in found.items():
            (part / name).write_bytes(data)
    return [target]


class _Wanted:
    """The grids that are asked for: one for what `selection` selects, others by rules."""

    def __init__(
        self,
        kind: str,
        like_seed: bool,
        group: int | None,
        selection: str | None,
        tensor_types: Sequence[tuple[str, str]],
    ) -> None:
        named, own = parse_kind(kind)
        self._grid = _grid(named, like_seed, group if own is None else own)
        self.kind = named
        chosen = selection or ("cellm" if like_seed else "text")
        if chosen not in get_args(Selection):
            known = ", ".join(get_args(Selection))
            raise BitsmithError(f"unknown selection {printable(chosen)!r}; known: {known}")
        self.selection = cast("Selection", chosen)
        self._rules = [Override(pattern, name) for pattern, name in tensor_types]
        ruled = {name: parse_kind(name) for _, name in tensor_types}
        self._ruled = {name: _grid(kind, like_seed, width) for name, (kind, width) in ruled.items()}

    def grids(self, checkpoint: Checkpoint) -> dict[str, GridFormat]:
        """Return the grid of each tensor that is quantized; refuse a checkpoint and rules that cannot be."""
        _refuse_source(checkpoint)
        found = {name: self._grid_of(name, ref) for name, ref in checkpoint.items()}
        for rule in self._rules:
            rule.refuse_idle()
        return {name: grid for name, grid in found.items() if grid is not None}

    def _grid_of(self, name: str, ref: TensorRef) -> GridFormat | None:
        rule = None
        if len(ref.shape) == 2 and name.endswith(".weight"):
            rule = first_match(self._rules, name)
        if rule is not None:
            return self._ruled[rule.type]
        grid = self._grid
        return grid if grid is not None and is_selected(self.selection, grid, name, ref.shape) else None


def is_selected(selection: Selection, grid: GridFormat, name: str, shape: Sequence[int]) -> bool:
    """Tell whether a tensor is quantized to `grid`; the rules of `cellm` are its converter's.

    Those of groups of columns are its `quantize` tool's.
    """
    if len(shape) != 2 or not name.endswith(".weight"):
        return False
    if selection == "text":
        return "norm" not in name and (name.startswith(_TEXT) or _is_outer(name))
    if selection == "layers":
        return "norm" not in name and name.startswith(_TEXT)
    if grid.bits == 4 and grid.group is not None:
        return not any(part in name for part in ("norm", "embed", "lm_head"))
    return {8: _is_i8, 4: _is_i4, 2: _is_i2, 1: _is_q1}[grid.bits](name)


class _Job:
    """The tensors on their way out; scales wait in memory until the file comes to them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        grids: Mapping[str, GridFormat],
        guide: Guide | None,
        progress: Progress,
    ) -> None:
        self._checkpoint, self._grids, self._guide, self._progress = checkpoint, grids, guide, progress
        self._scales: dict[str, Bytes] = {}
        self._parts: Parts | None = None
        self.written: dict[str, CellmTensor] = {}
        self.resumed = 0
        self.infos = [info for name, ref in checkpoint.items() for info in self._listed(name, ref)]
        self._total, self._done = sum(info.nbytes for info in self.infos), 0

    def _listed(self, name: str, ref: TensorRef) -> Iterator[CellmInfo]:
        grid = self._grids.get(name)
        dtype = "f16" if grid is None else Q1 if grid.bits == 1 else f"i{grid.bits}"
        yield CellmInfo(name, ref.shape, dtype)
        if grid is not None and grid.bits > 1:
            per_row = () if grid.group is None else (grid.groups(ref.shape[1]),)
            yield CellmInfo(name + SCALE_SUFFIX, (ref.shape[0], *per_row), "f16")

    @contextmanager
    def prepared(self, out: Path, overwrite: bool) -> Iterator[None]:
        """Round what statistics guide beforehand, into parts that outlive a killed run."""
        if self._guide is None:
            yield
            return
        infos = {info.name: info for info in self.infos}

        def make(parts: Parts, name: str) -> tuple[list[str], dict[str, Any]]:
            parts.write(name, self._encoded(infos[name]))
            scales = name + SCALE_SUFFIX
            if scales in self._scales:
                parts.write(scales, [self._scales.pop(scales)])
            return [file for file in (name, scales) if file in infos], asdict(self.written[name])

        names = self._guide.ordered(self._grids)
        key = self._guide.key(self._checkpoint, {name: grid.name for name, grid in self._grids.items()})
        with finished_parts(out, key, names, make, self._progress, overwrite=overwrite) as self._parts:
            self.resumed = self._parts.resumed
            for name in names:
                self.written[name] = _WRITTEN.validate_python(self._parts.note(name))
            yield

    def encode(self, info: CellmInfo) -> Iterator[Bytes]:
        """Yield a tensor's bytes slice by slice."""
        if self._parts is not None and info.name.removesuffix(SCALE_SUFFIX) in self._grids:
            made = self._parts.read(info.name)
        else:
            made = self._scaled(info) if info.name in self._scales else self._encoded(info)
        for chunk in made:
            yield chunk
            self._done += chunk.size
            self._progress("write", self._done, self._total)

    def _scaled(self, info: CellmInfo) -> Iterator[Bytes]:
        yield self._scales.pop(info.name)

    def _encoded(self, info: CellmInfo) -> Iterator[Bytes]:
        ref, grid, half = self._checkpoint[info.name], self._grids.get(info.name), format_named("F16")
        scales, choice, total = [], Choice("nearest"), Total(None)
        if grid is not None and self._guide is not None:
            choice, total = self._guide.choice(ref, grid), Total(self._guide.inputs(info.name))
        for start, stop in ref.slices(SLICE_BYTES):
            rows = finite_rows(ref, start, stop, self._checkpoint.path)
            if grid is None:
                blocks = half.encode(rows)
                decoded = half.decode(blocks)
            else:
                guide = self._guide
                coded = grid.quantize(rows) if guide is None else guide.coded(info.name, grid, rows, choice)
                blocks, decoded = cellm_rows(coded, info.dtype), grid.dequantize(coded)
                scales.append(coded.scales.astype("<f2"))
            total.add(rows, decoded)
            yield blocks.reshape(-1)
        nbytes = info.nbytes
        if grid is not None and grid.bits > 1:
            waiting = np.concatenate([part.reshape(-1) for part in scales]).view(np.uint8)
            self._scales[info.name + SCALE_SUFFIX] = waiting
            nbytes += waiting.size
        name = None if grid is None else grid.name
        self.written[info.name] = CellmTensor(
            info.name, ref.shape, info.dtype, name, choice.rounder, nbytes, *total.errors()
        )


def _grid(kind: Kind, like_seed: bool, group: int | None) -> GridFormat | None:
    if kind == "q1" and group not in (None, 128):
        raise BitsmithError(f"{Q1} has groups of 128 columns, not {group}")
    if kind in ("f16", "q1"):
        group = None
    grids = _SEED_GRIDS if like_seed else _GRIDS
    suffix = "" if group is None else f"_g{group}"
    return None if kind == "f16" else grid_named(grids[kind] + suffix)


def parse_kind(name: str) -> tuple[Kind, int | None]:
    """Return the kind and the group of columns that `i4`, `int4`, `i4_g32` or `q1_0_g128` name.

    Raises BitsmithError for an unknown kind.
    """
    kind, _, group = name.lower().partition("_g")
    if name.lower() in _ALIASES or not group.isdecimal():
        kind, group = name.lower(), ""
    found = next((known for known in KINDS if known == _ALIASES.get(kind, kind)), None)
    if found is None:
        raise BitsmithError(f"unknown kind {printable(name)!r}; known: {', '.join(KINDS)}")
    return found, int(group) if group else None


def _refuse_options(out: Path, rounder: str, like_seed: bool, statistics: Path | None) -> None:
    if out.suffix != ".cellm":
        raise OutputError("cannot tell what to write: the output's name must end in .cellm", path=out)
    if like_seed and statistics is not None:
        raise BitsmithError("cellm's encodings use no statistics: leave out one of the two")
    if statistics is None:
        check_rounder(rounder, None, None)


def _refuse_source(checkpoint: Checkpoint) -> None:
    if isinstance(checkpoint, GgufCheckpoint):
        raise UnsupportedError("is a GGUF file, expected a Hugging Face checkpoint", path=checkpoint.path)
    for ref in checkpoint.values():
        refuse_rounded(ref, checkpoint.path)


def _is_outer(name: str) -> bool:
    return name.endswith(_OUTER) and not name.startswith("mtp.")


def _is_i8(name: str) -> bool:
    layer = any(part in name for part in _TEXT)
    outer = name in ("model.embed_tokens.weight", "lm_head.weight", "model.lm_head.weight")
    return (layer or outer) and not any(part in name for part in ("norm", "conv1d", ".linear_attn."))


def _is_i4(name: str) -> bool:
    return any(part in name for part in (".mlp.", ".self_attn.", "embed_tokens", "lm_head"))


def _is_i2(name: str) -> bool:
    return name.startswith(_LAYERS) and "norm" not in name


def _is_q1(name: str) -> bool:
    parts = (".mlp.", ".self_attn.", "linear_attn.", "embed_tokens", "lm_head")
    return "norm" not in name and (name.startswith(_LAYERS) or any(part in name for part in parts))
