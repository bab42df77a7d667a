"""Compress: carry a plan out as a stream, slice by slice, and record what was written."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bitsmith import __version__
from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.formats.accelerator import device_facts
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.transform import Applied, Transform, Vectors, model_of
from bitsmith.progress import Progress, silent
from bitsmith.run.encode import Rounder, Written, check_rounder
from bitsmith.run.gguf_job import GgufJob
from bitsmith.run.plan import Plan, Source, open_source, plan_source
from bitsmith.run.plan_file import read_plan, read_transforms
from bitsmith.run.record import TensorFacts, output_record, source_facts
from bitsmith.run.transforms import SIDECAR_SUFFIX, refuse_inexact, sidecar_bytes, solved
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import Content, refuse_taken
from bitsmith.store.manifest import write_manifest
from bitsmith.store.statistics import Statistics, open_statistics


@dataclass(frozen=True)
class Record:
    """What one compression did; `sha256` is of the file, also in the manifest `OUT.sha256` beside it.

    `statistics` is the digest of what guided the rounding, None without. `resumed` counts tensors that a run
    killed before had finished. `peak_memory_bytes` is the process's peak resident memory, None where the
    system does not tell. `source` is the model's name, path and digest (`source_facts`).
    """

    out: Path
    plan: Plan
    tensors: tuple[Written, ...]
    file_bytes: int
    sha256: str
    seconds: float
    peak_memory_bytes: int | None
    rounder: Rounder = "nearest"
    statistics: str | None = None
    resumed: int = 0
    applied: tuple[Applied, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {
            "out": str(self.out),
            "bitsmith": __version__,
            "file_bytes": self.file_bytes,
            "sha256": self.sha256,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "rounder": self.rounder,
            "statistics_sha256": self.statistics,
            "device": self.device,
            "resumed_tensors": self.resumed,
            "transforms": [_said(one) for one in self.applied],
            "fallbacks": [row.gguf_name for row in self.plan.fallbacks],
            "tensors": [asdict(written) for written in self.tensors],
            "plan": self.plan.to_json(),
        }


def plan_for(
    model: Path,
    type_name: str | None = None,
    *,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    no_fallback: bool = False,
    plan_file: Path | None = None,
    statistics: Path | None = None,
    transforms: Sequence[Transform] = (),
    allow_requantize: bool = False,
) -> Plan:
    """Return the plan that `compress` would carry out; nothing is written. Raises as `compress` does.

    Transforms are not searched for the best scales and orders here.
    """
    with open_checkpoint(model) as checkpoint:
        steps = _transforms(transforms, plan_file)
        source = open_source(checkpoint, steps, allow_requantize=allow_requantize)
        refuse_inexact(source)
        opened = None if statistics is None else statistics_of(source, statistics)
        return _planned(source, type_name, plan_file, opened, pure, tensor_types, no_fallback)


@one_blas_thread()
def compress(
    model: Path,
    out: Path,
    type_name: str | None = None,
    *,
    pure: bool = False,
    tensor_types: Sequence[tuple[str, str]] = (),
    no_fallback: bool = False,
    plan_file: Path | None = None,
    statistics: Path | None = None,
    rounder: str = "auto",
    follow: Callable[[Statistics, Sequence[TensorSpec]], Statistics] | None = None,
    transforms: Sequence[Transform] = (),
    vectors: Mapping[str, Vectors] | None = None,
    allow_requantize: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Record:
    """Write `model` (a Hugging Face folder, a safetensors file or a GGUF) to the GGUF `out`.

    Types come from a stock mix, `type_name` (default Q4_K_M), or from `plan_file`, a YAML plan. `transforms`
    are done to the model before, solved for those types unless `vectors` has theirs by name; their vectors go
    to `OUT.transforms`, digests and every tensor's error to `OUT.sha256` and `OUT.record.json`. `statistics`
    (of `calibrate`, or an imatrix) guide `rounder`, see `TensorEncoder`; a killed run goes on behind the
    tensors that were finished (`gguf_job.KEPT_BYTES`). `follow` may put others in the place of those
    opened: they are told of every tensor as it is encoded, in their own order. With `allow_requantize`
    weights that are rounded already are rounded again; what a GGUF holds in the planned type is copied, as
    llama-quantize does. Memory holds one slice of one tensor and one site's statistics at a time. The bytes
    depend on the source (and its folder's name, which becomes `general.name`) and the options alone.

    Raises OutputError if `out` exists without `overwrite`, is the input, is no `.gguf` or does not fit the
    disk; DamagedFileError for a weight that is not finite; else as `plan`, `read_plan`, `open_statistics` and
    `check_rounder` do. Nothing is left then but finished tensors in `.OUT.parts`.
    """
    started = time.monotonic()
    check_output(out, overwrite)
    with open_checkpoint(model) as checkpoint:
        steps = _transforms(transforms, plan_file)
        source = open_source(checkpoint, steps, allow_requantize=allow_requantize)
        opened = None if statistics is None else statistics_of(source, statistics)
        kept = check_rounder(rounder, opened, statistics)
        todo = _planned(source, type_name, plan_file, opened, pure, tensor_types, no_fallback)
        inputs = [*checkpoint.files, *(path for path in (statistics, plan_file) if path is not None)]
        refuse_taken(out, overwrite, inputs, folder=False)
        source, applied = solved(source, todo, opened, vectors, progress)
        if opened is not None and follow is not None:
            opened = follow(opened, [tensor.spec for tensor in source.tensors])
        job = GgufJob(source, todo, out, opened, kept, progress, follows=follow is not None)
        record = Record(
            out=out,
            plan=todo,
            tensors=(),
            file_bytes=todo.file_bytes,
            sha256="",
            seconds=0.0,
            peak_memory_bytes=None,
            rounder="nearest" if opened is None else kept,
            statistics=None if opened is None else opened.digest,
            applied=applied,
            device=device_facts().get("device", "cpu"),
        )

        def finish(content: Content) -> None:
            nonlocal record
            facts = source_facts(checkpoint, out)  # all of it has been read by now
            record = replace(record, tensors=job.written, source=facts)
            record = with_manifest(record, content, {"": job.digest})

        job.write(overwrite, finish)
    return replace(
        record,
        resumed=job.resumed,
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def carry_out(
    source: Source, todo: Plan, out: Path, statistics: Statistics | None = None, rounder: Rounder = "auto"
) -> tuple[Written, ...]:
    """Write a plan's file alone, in place of any other: what `compress` does between planning and recording.

    The plan and the source may be parts of a model's; see `run.forecast_gguf`.
    """
    job = GgufJob(source, todo, out, statistics, rounder, silent)
    job.write(True, lambda _: None)
    return job.written


def with_manifest(
    record: Record, content: Content, digests: Mapping[str, str] = MappingProxyType({}), **options: Any
) -> Record:
    """Write what lies beside a GGUF that is about to appear; return the record with its digest.

    That is `OUT.sha256`, `OUT.record.json` with further `options`, and the vectors of its transforms.
    `digests` are those of the content where they are known (as `write_manifest` takes them).
    """
    plan = record.plan
    asked = {
        "type": plan.type,
        "pure": plan.pure,
        "tensor_types": [list(rule) for rule in plan.tensor_types],
        "transforms": list(plan.transforms),
        "plan_sha256": plan.digest,
        "rounder": record.rounder,
        "statistics_sha256": record.statistics,
        **device_facts(),
        **options,
    }
    shapes = {row.gguf_name: row.shape for row in plan.rows}
    tensors = [
        TensorFacts(
            one.gguf_name,
            one.hf_name,
            one.type,
            shapes[one.gguf_name],
            one.relative_error,
            one.rounding.rounder,
        )
        for one in record.tensors
    ]
    kept = output_record(record.out, "gguf", {"model": record.source}, asked, tensors)
    sidecar = {SIDECAR_SUFFIX: sidecar_bytes(record.applied)}
    sha256 = write_manifest(record.out, kept, content=content, beside=sidecar, digests=digests)
    return replace(record, sha256=sha256)


def check_output(out: Path, overwrite: bool) -> None:
    """Raise OutputError for an output that is no `.gguf`, has no place, or is there without `overwrite`."""
    if out.suffix != ".gguf":
        raise OutputError("cannot tell what to write: the output's name must end in .gguf", path=out)
    if not out.absolute().parent.is_dir():
        raise OutputError("is not in a folder that exists", path=out)
    if out.exists() and not overwrite:
        raise OutputError("exists; pass --overwrite", path=out)


def peak_memory_bytes() -> int | None:
    """Return the peak resident memory of this process so far, None on a system that does not tell."""
    try:
        import resource  # noqa: PLC0415 (absent on Windows)
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _transforms(given: Sequence[Transform], plan_file: Path | None) -> Sequence[Transform]:
    if plan_file is None:
        return given
    planned = read_transforms(plan_file)
    if given and list(map(str, given)) != list(map(str, planned)):
        raise BitsmithError("a plan names its transforms; pass it without --transforms", path=plan_file)
    return planned


def _said(one: Applied) -> dict[str, Any]:
    return {"transform": str(one.transform), "instances": len(one.vectors), "notes": list(one.notes)}


def statistics_of(source: Source, path: Path) -> Statistics:
    """Open statistics of the checkpoint as it is stored, answering for the tensors of `source`.

    Raises as `open_statistics` does.
    """
    opened = open_statistics(path, [spec for spec, _ in model_of(source.checkpoint).tensors.values()])
    opened.look_up([tensor.spec for tensor in source.tensors])
    return opened


def _planned(
    source: Source,
    type_name: str | None,
    plan_file: Path | None,
    statistics: Statistics | None,
    pure: bool,
    tensor_types: Sequence[tuple[str, str]],
    no_fallback: bool,
) -> Plan:
    if plan_file is not None:
        if type_name is not None or pure or tensor_types:
            raise BitsmithError("a plan names every type; pass it without --type, --pure and --tensor-type")
        planned = read_plan(plan_file, source)
    else:
        planned = plan_source(
            source,
            type_name or "Q4_K_M",
            pure=pure,
            tensor_types=tensor_types,
            no_fallback=no_fallback,
            has_imatrix=statistics is not None,
        )
    return replace(planned, notes=(*planned.notes, *(() if statistics is None else statistics.notes)))
