"""Write a Hugging Face folder of packed weights, which transformers and vLLM load as it is.

How matrices are packed is a `Packer`'s (`run.packer`): compressed-tensors' in `run.pack_compressed`,
bitsandbytes' in `run.pack_bitsandbytes`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitsmith.archs.tokenizer import TOKENIZER_FILES, tokenizer_folder
from bitsmith.errors import UnsupportedError
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.progress import Progress, silent
from bitsmith.run.encode import Rounder, check_rounder
from bitsmith.run.finite import finite_bytes
from bitsmith.run.folder_layout import KEPT, SCHEMES, FolderRow, Layout, Piece, lay_out
from bitsmith.run.guide import Guide, rounding_key
from bitsmith.run.packer import Encoding, Matrix, Outcome
from bitsmith.run.record import TensorFacts, output_record, source_facts
from bitsmith.store import CellmCheckpoint, Checkpoint, GgufCheckpoint, open_checkpoint, write_safetensors
from bitsmith.store.atomic import Chunk, Content, refuse_taken
from bitsmith.store.manifest import write_manifest
from bitsmith.store.mlx_layout import Renamed
from bitsmith.store.packed import PackedTensor
from bitsmith.store.parts import Parts, finished_parts
from bitsmith.store.safetensors import side_files
from bitsmith.store.safetensors_writer import SHARD_BYTES, safetensors_size_bytes
from bitsmith.store.stored import StoredTensor

__all__ = [
    "KEPT",
    "SCHEMES",
    "FolderPlan",
    "FolderRecord",
    "FolderRow",
    "FolderTensor",
    "plan_folder",
    "write_folder",
]

SIDE_FILES = (
    *TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "LICENSE", "NOTICE",
)  # fmt: skip
"""What is copied beside the weights, as it is; code and pickles never are."""


@dataclass(frozen=True)
class FolderPlan:
    """What `write_folder` would write; `file_bytes` are those of all shards, headers included."""

    scheme: str
    rows: tuple[FolderRow, ...]
    file_bytes: int
    parameters: int

    @property
    def bpw(self) -> float:
        """Bits of the shards per parameter."""
        return 8 * self.file_bytes / max(1, self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {**asdict(self), "bpw": self.bpw}


@dataclass(frozen=True)
class FolderTensor(FolderRow):
    """One tensor as written; `relative_error` is `sum (w - q)² / sum w²`, 0 for what is not packed.

    `held_error` is `sum |E x|² / sum |W x|²` over held-out inputs x, None where there are none.
    """

    rounder: str = ""
    relative_error: float = 0.0
    held_error: float | None = None


@dataclass(frozen=True)
class FolderRecord:
    """What one conversion did; `file_bytes` are those of all shards, headers included.

    `resumed` matrices were taken over from a killed run.
    """

    out: Path
    scheme: str
    tensors: tuple[FolderTensor, ...]
    file_bytes: int
    parameters: int
    seconds: float
    resumed: int = 0

    @property
    def bpw(self) -> float:
        """Bits of the shards per parameter."""
        return 8 * self.file_bytes / max(1, self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {**asdict(self), "out": str(self.out), "bpw": self.bpw}


@one_blas_thread()
def write_folder(
    model: Path,
    out: Path,
    scheme: str,
    *,
    group: int | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (),
    statistics: Path | None = None,
    rounder: str = "auto",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    recipe: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> FolderRecord:
    """Write `model` (a Hugging Face checkpoint of floats) to the folder `out`, its linears packed.

    `scheme` (one of `SCHEMES`) holds for the linears of the text model's layers, except DeltaNet's in_proj_a
    and in_proj_b; `group` columns share a scale (0: a row; None: the scheme's own). `tensor_types` are
    (regex searched in the name, scheme) for linears of the text model, the head included, and the first
    match wins; `ignore` names modules that stay as they are, or `re:` patterns that their names match.
    Everything else keeps its dtype: embeddings, norms, convolutions, vision, MTP. A matrix whose width no
    group divides keeps it too (`note`). With `statistics` the codes are found as `rounder` says
    (`choose_grid`), without by the search; a killed run then goes on with the matrices it had finished,
    as one with factors does.
    Tokenizer, templates and generation settings are copied. Digests and errors go to `OUT.sha256` and
    `OUT.record.json`, there with the options of a `recipe` that chose these.

    Raises BitsmithError for an unknown scheme, group or rounder, for schemes of two packings, for an `ignore`
    or a regex that names no linear, and for what the packing's loaders cannot take; UnsupportedError for a
    source that is packed itself; DamagedFileError for a weight that is not finite; OutputError as
    `write_safetensors` does. Nothing is written then.
    """
    started = time.monotonic()
    with _opened(model) as checkpoint:
        layout = lay_out(checkpoint, scheme, group, tensor_types, ignore, statistics)
        job = _Job(checkpoint, layout, statistics, rounder, progress)
        sources = [*checkpoint.files, *([] if statistics is None else [statistics])]
        refuse_taken(out, overwrite, sources, folder=True)
        config = dict(checkpoint.config)
        if layout.settings is not None:
            config["quantization_config"] = layout.settings
        options = {
            "type": scheme,
            "group": group,
            "tensor_types": [list(rule) for rule in tensor_types],
            "ignore": list(ignore),
            **job.guided_by,
        }
        checkpoint.hash_reads()

        def finish(content: Content) -> None:
            kept = {"model": source_facts(checkpoint, out)}  # all of it has been read by now
            rows = [TensorFacts.of(one, _stored_as(one)) for one in job.written()]
            record = output_record(out, "folder", kept, {**options, **(recipe or {})}, rows)
            write_manifest(out, record, content=content)

        with job.prepared(out, overwrite):
            write_safetensors(
                out,
                layout.data(job.chunks),
                config,
                shard_bytes=shard_bytes,
                files=side_files(tokenizer_folder(checkpoint), SIDE_FILES),
                overwrite=overwrite,
                sources=sources,
                finish=finish,
            )
        size = safetensors_size_bytes(layout.data(), shard_bytes=shard_bytes)
        parameters = sum(ref.size for ref in checkpoint.values())
    seconds = time.monotonic() - started
    return FolderRecord(out, scheme, job.written(), size, parameters, seconds, job.resumed)


def plan_folder(
    model: Path,
    scheme: str,
    *,
    group: int | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (),
    statistics: Path | None = None,
    rounder: str = "auto",
    shard_bytes: int = SHARD_BYTES,
) -> FolderPlan:
    """Return what `write_folder` would write, with exact bytes. Raises as it does."""
    with _opened(model) as checkpoint:
        layout = lay_out(checkpoint, scheme, group, tensor_types, ignore, statistics)
        _Job(checkpoint, layout, statistics, rounder, silent)
        size = safetensors_size_bytes(layout.data(), shard_bytes=shard_bytes)
        return FolderPlan(scheme, layout.rows, size, sum(ref.size for ref in checkpoint.values()))


def folder_chunks(checkpoint: Checkpoint, layout: Layout) -> Iterator[Chunk]:
    """Yield what a folder of this layout holds of a checkpoint, or of a part of one, without statistics."""
    job = _Job(checkpoint, layout, None, "auto", silent)
    for piece in layout.pieces:
        if piece.source in checkpoint:
            yield from job.chunks(piece)


class _Job:
    """The tensors on their way out."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        statistics: Path | None,
        rounder: str,
        progress: Progress,
    ) -> None:
        self._checkpoint, self._layout, self._progress = checkpoint, layout, progress
        self._guide = None if statistics is None else Guide(checkpoint, statistics, rounder)
        self._rounder: Rounder = (
            check_rounder(rounder, None, None) if self._guide is None else self._guide.rounder
        )
        self._encodings: dict[str, Encoding] = {}
        self._parts: Parts | None = None
        self._outcomes: dict[str, Outcome] = {}
        self._total, self._done = sum(row.nbytes for row in layout.rows), 0
        self.resumed = 0

    @property
    def guided_by(self) -> dict[str, Any]:
        """The rounder and the digest of the statistics, for the record."""
        return {
            "rounder": self._rounder,
            "statistics_sha256": None if self._guide is None else self._guide.digest,
        }

    @contextmanager
    def prepared(self, out: Path, overwrite: bool) -> Iterator[None]:
        """Round what takes long beforehand, into parts that outlive a killed run."""
        if self._guide is None and not self._layout.packer.costly:
            yield
            return

        def make(parts: Parts, name: str) -> tuple[list[str], dict[str, Any]]:
            suffixes = [piece.part for piece in self._layout.pieces if piece.source == name and piece.part]
            for suffix in suffixes:
                parts.write(_file(name, suffix), self._encoded(name, suffix))
            outcome = self._encodings.pop(name).outcome()
            return [_file(name, suffix) for suffix in suffixes], asdict(outcome)

        names, layout = list(self._layout.packed), [asdict(row) for row in self._layout.rows]
        key = rounding_key(self._checkpoint, layout, None, self._rounder)
        if self._guide is not None:
            names, key = self._guide.ordered(names), self._guide.key(self._checkpoint, layout)
        with finished_parts(out, key, names, make, self._progress, overwrite=overwrite) as self._parts:
            self.resumed = self._parts.resumed
            self._outcomes = {name: Outcome(**self._parts.note(name)) for name in names}
            yield

    def chunks(self, piece: Piece) -> Iterator[Chunk]:
        """Yield a stored tensor's bytes."""
        name, part = piece.source, piece.part
        for chunk in self._copied(name) if part is None else self._packed(name, part):
            yield chunk
            self._done += chunk.nbytes if isinstance(chunk, np.ndarray) else len(chunk)
            self._progress("write", self._done, self._total)

    def written(self) -> tuple[FolderTensor, ...]:
        """Return the records in the source's order."""
        return tuple(map(self._record, self._layout.rows))

    def _copied(self, name: str) -> Iterator[Chunk]:
        ref = self._checkpoint[name]
        for start, stop in ref.slices():
            yield finite_bytes(ref, self._checkpoint.path, start, stop)

    def _packed(self, name: str, part: str) -> Iterator[Chunk]:
        return self._encoded(name, part) if self._parts is None else self._parts.read(_file(name, part))

    def _encoded(self, name: str, part: str) -> Iterator[Chunk]:
        if name not in self._encodings:
            matrix = Matrix(self._checkpoint[name], self._checkpoint.path, self._guide, self._rounder)
            self._encodings[name] = self._layout.packer.encode(self._layout.packed[name], matrix)
        yield from self._encodings[name].chunks(part)

    def _record(self, row: FolderRow) -> FolderTensor:
        outcome = self._outcomes.get(row.name, Outcome("", 0.0))
        if row.name in self._encodings:
            outcome = self._encodings[row.name].outcome()
        return FolderTensor(**vars(row), **vars(outcome))


def _stored_as(row: FolderTensor) -> str:
    """Return a tensor's scheme with its group, or the dtype that it keeps."""
    if row.group is None:
        return row.dtype
    return f"{row.scheme}_g{row.group}" if row.group else row.scheme


def _file(name: str, suffix: str) -> str:
    return f"{name.removesuffix('.weight')}.{suffix}"


def _opened(model: Path) -> Checkpoint:
    """Open a checkpoint whose tensors are copied as they are stored."""
    checkpoint = open_checkpoint(model)
    computed = [ref for ref in checkpoint.values() if not isinstance(ref, StoredTensor | Renamed)]
    if not computed and checkpoint.config and not isinstance(checkpoint, GgufCheckpoint | CellmCheckpoint):
        return checkpoint
    checkpoint.close()
    said = "is no Hugging Face checkpoint: safetensors with a config.json"
    if packed := next((ref for ref in computed if isinstance(ref, PackedTensor)), None):
        said = f"is packed as {packed.dtype} already; give the checkpoint it was made of"
    raise UnsupportedError(said, path=model)
