"""Compress: carry a plan out as a stream, slice by slice, and record what was written."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import DamagedFileError, OutputError
from bitsmith.formats import format_named
from bitsmith.numerics.finite import first_non_finite
from bitsmith.progress import Progress, silent
from bitsmith.run.mixes import mix_named
from bitsmith.run.plan import Plan, PlanRow, Source, SourceTensor, open_source, plan, plan_source
from bitsmith.store import TensorInfo, open_checkpoint, write_gguf
from bitsmith.store.atomic import atomic_file
from bitsmith.store.checkpoint import Bytes, TensorRef

MANIFEST_SUFFIX = ".sha256"
SLICE_BYTES = 8 << 20
"""Float32 bytes of the rows in hand at a time."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Written:
    """One tensor as written; `relative_error` is `sum (w - decoded)^2 / sum w^2` over what the file holds."""

    hf_name: str
    gguf_name: str
    type: str
    nbytes: int
    relative_error: float
    seconds: float


@dataclass(frozen=True)
class Record:
    """What one compression did; `sha256` is of the file, also in the manifest `OUT.sha256` beside it.

    `peak_memory_bytes` is the process's peak resident memory, None where the system does not tell.
    """

    out: Path
    plan: Plan
    tensors: tuple[Written, ...]
    file_bytes: int
    sha256: str
    seconds: float
    peak_memory_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {
            "out": str(self.out),
            "file_bytes": self.file_bytes,
            "sha256": self.sha256,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "fallbacks": [row.gguf_name for row in self.plan.fallbacks],
            "tensors": [asdict(written) for written in self.tensors],
            "plan": self.plan.to_json(),
        }


def plan_for(
    model: Path,
    type_name: str,
    *,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    no_fallback: bool = False,
) -> Plan:
    """Return the plan that `compress` would carry out; nothing is written. Raises as `plan` does."""
    with open_checkpoint(model) as checkpoint:
        return plan(checkpoint, type_name, pure=pure, tensor_types=tensor_types, no_fallback=no_fallback)


def compress(
    model: Path,
    out: Path,
    type_name: str,
    *,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    no_fallback: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Record:
    """Write `model` (a Hugging Face folder, a safetensors file or a float GGUF) to the GGUF `out`.

    Memory holds one slice of one tensor at a time. The bytes depend on the source (and its folder's name,
    which becomes `general.name`) and the options alone.

    Raises OutputError if `out` exists without `overwrite`, is the input, is no `.gguf` or does not fit the
    disk; DamagedFileError for a weight that is not finite; else as `plan` does. Nothing is left then.
    """
    started = time.monotonic()
    if out.suffix != ".gguf":
        raise OutputError("cannot tell what to write: the output's name must end in .gguf", path=out)
    if out.exists() and not overwrite:
        raise OutputError("exists; pass --overwrite", path=out)
    with open_checkpoint(model) as checkpoint:
        source = open_source(checkpoint)
        todo = plan_source(source, type_name, pure=pure, tensor_types=tensor_types, no_fallback=no_fallback)
        written = _write(source, todo, out, overwrite, progress)
    return Record(
        out=out,
        plan=todo,
        tensors=written,
        file_bytes=out.stat().st_size,
        sha256=_write_manifest(out),
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def peak_memory_bytes() -> int | None:
    """Return the peak resident memory of this process so far, None on a system that does not tell."""
    try:
        import resource  # noqa: PLC0415 (absent on Windows)
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write(source: Source, todo: Plan, out: Path, overwrite: bool, progress: Progress) -> tuple[Written, ...]:
    rows = {row.gguf_name: row for row in todo.rows}
    tensors = {tensor.gguf_name: tensor for tensor in source.tensors}
    written: list[Written] = []
    done = 0

    def encode(info: TensorInfo) -> Iterator[Bytes]:
        return _encoded(tensors[info.name], rows[info.name], source.checkpoint.path, written)

    def report(info: TensorInfo, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("compress", done, todo.tensor_bytes)

    write_gguf(
        out,
        source.metadata_for(mix_named(todo.type)),
        [TensorInfo(row.gguf_name, row.shape, row.type) for row in todo.rows],
        encode,
        overwrite=overwrite,
        sources=source.checkpoint.files,
        progress=report,
    )
    return tuple(written)


def _encoded(tensor: SourceTensor, row: PlanRow, path: Path, written: list[Written]) -> Iterator[Bytes]:
    """Yield the tensor's blocks slice by slice, then note what was written."""
    started = time.monotonic()
    fmt = format_named(row.type)
    width = row.shape[-1]
    error = energy = 0.0
    for start, stop in tensor.ref.slices(SLICE_BYTES):
        weights = _read(tensor.ref, start, stop).reshape(-1, width if len(row.shape) > 1 else stop - start)
        if first_non_finite(weights) is not None:
            _refuse_non_finite(tensor, path)
        blocks = fmt.encode(weights)
        energy += _squares(weights)
        if row.type != "F32":
            decoded = fmt.decode(blocks)
            error += _squares(np.subtract(decoded, weights, out=decoded))
        yield blocks
    relative = error / energy if energy else 0.0
    seconds = time.monotonic() - started
    written.append(Written(row.hf_name, row.gguf_name, row.type, row.nbytes, relative, seconds))


def _read(ref: TensorRef, start: int, stop: int) -> Float32:
    with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is refused
        return np.ascontiguousarray(ref.read(start, stop), dtype=np.float32)


def _squares(values: Float32) -> float:
    flat = values.reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


def _refuse_non_finite(tensor: SourceTensor, path: Path) -> NoReturn:
    """Raise DamagedFileError with the first NaN or infinity: in the stored tensor, else as exported."""
    for ref, layout in ((tensor.origin, ""), (tensor.ref, f" of {tensor.gguf_name}")):
        for start, stop in ref.slices(SLICE_BYTES):
            rows = _read(ref, start, stop)
            for first, *rest in np.argwhere(~np.isfinite(rows))[:1].tolist():
                place = [start + first, *rest]
                raise DamagedFileError(
                    f"is {rows[first, *rest]} at {place}{layout}, expected finite weights",
                    path=path,
                    tensor=tensor.hf_name,
                )
    raise DamagedFileError("changed while it was read", path=path, tensor=tensor.hf_name)


def _write_manifest(out: Path) -> str:
    """Write `OUT.sha256`, which `sha256sum -c` checks, and return the digest of `out`."""
    with out.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    manifest = out.with_name(out.name + MANIFEST_SUFFIX)
    with atomic_file(manifest, overwrite=True) as target:
        target.write(f"{digest}  {out.name}\n".encode())
    return digest
