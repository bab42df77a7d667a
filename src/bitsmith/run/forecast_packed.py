"""What a .cellm file or a packed folder will take: its encoders rehearsed on the first rows of matrices."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numba

from bitsmith.formats.integer import grid_named
from bitsmith.run.cellm import CellmPlan, cellm_chunks
from bitsmith.run.execute import peak_memory_bytes
from bitsmith.run.folder import FolderPlan, folder_chunks
from bitsmith.run.folder_layout import lay_out
from bitsmith.run.forecast import (
    Budget,
    Forecast,
    Part,
    disk_part,
    folder_of,
    io_so_far,
    scratch,
    seconds_of_process,
    total_seconds,
)
from bitsmith.run.job import Job
from bitsmith.run.machine_rates import MachineRates, machine_rates
from bitsmith.run.partial import first_rows
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import Chunk, write_chunk
from bitsmith.store.checkpoint import Checkpoint, TensorRef

_FIRST_WEIGHTS = 1 << 20
_GROWTH = 16

Chunks = Callable[[Checkpoint], Iterable[Chunk]]
Kinds = Mapping[str, list[TensorRef]]


def forecast_cellm(job: Job, plan: CellmPlan) -> Forecast:
    """Predict what writing a .cellm file without statistics takes."""
    grids = {info.name: grid_named(name) for info, name in plan.tensors if name is not None}
    with open_checkpoint(job.model) as checkpoint:
        kinds: dict[str, list[TensorRef]] = {}
        for name, ref in checkpoint.items():
            said = grids[name].name if name in grids else "f16"
            kinds.setdefault(f"{said} of {ref.dtype}", []).append(ref)
        return _forecast(job, checkpoint, kinds, lambda part: cellm_chunks(part, grids), plan.file_bytes)


def forecast_folder(job: Job, plan: FolderPlan) -> Forecast | None:
    """Predict what writing a packed folder without statistics takes; None for factors, which no rows show."""
    with open_checkpoint(job.model) as checkpoint:
        rules = job.tensor_types, job.ignore
        layout = lay_out(checkpoint, (job.type_name or "").upper(), job.group, *rules, job.statistics)
        if layout.packer.costly:
            return None
        kinds: dict[str, list[TensorRef]] = {}
        for row in plan.rows:
            said = row.scheme if row.group is not None else f"copy of {row.dtype}"
            kinds.setdefault(said, []).append(checkpoint[row.name])
        return _forecast(job, checkpoint, kinds, lambda part: folder_chunks(part, layout), plan.file_bytes)


def _forecast(job: Job, checkpoint: Checkpoint, kinds: Kinds, chunks: Chunks, file_bytes: int) -> Forecast:
    budget, started, before = Budget(), seconds_of_process(), io_so_far()
    out = job.destination
    folder = folder_of(out)
    parts, read = [], before.read + file_bytes
    with scratch(folder) as work:
        for number, (name, refs) in enumerate(kinds.items()):
            share = budget.share(len(kinds) - number + 1)
            load, rate, weight_read = _rate(checkpoint, refs, chunks, work, share)
            started += load
            weights = sum(ref.size for ref in refs)
            read += int(weights * weight_read)
            parts.append(Part(name, weights / rate, weights, "weights", rate))
    peak = peak_memory_bytes() or 0
    rates = machine_rates(
        checkpoint.files, folder, numba.get_num_threads(), work_seconds=total_seconds(tuple(parts))
    )
    stored = sum(ref.nbytes for ref in checkpoint.values())
    start = Part("start", started, 1, "process", 1 / max(1e-3, started))
    parts = [start, *parts, *_digests(stored, file_bytes, rates)]
    parts.append(disk_part(checkpoint.files, rates))
    return Forecast(
        command="compress",
        seconds=total_seconds(tuple(parts)),
        peak_memory_bytes=peak,
        output_bytes=file_bytes,
        scratch_bytes=0,
        read_bytes=read,
        written_bytes=file_bytes,
        parts=tuple(parts),
        rates=rates,
        calibrated_seconds=budget.spent,
        unmeasured=() if job.statistics is None else ("rounding by --stats",),
        folder=folder,
    )


def _digests(stored: int, written: int, rates: MachineRates) -> list[Part]:
    return [
        Part(f"digest of the {what}", size / rates.sha256, size, "bytes", rates.sha256)
        for what, size in (("source", stored), ("output", written))
    ]


def _rate(
    checkpoint: Checkpoint, refs: Sequence[TensorRef], chunks: Chunks, work: Path, seconds: float
) -> tuple[float, float, float]:
    """Return what the first weights took beside, weights per second of more of them, bytes read for each."""
    first = _encode(checkpoint, refs, _FIRST_WEIGHTS, chunks, work)
    found = _encode(checkpoint, refs, _FIRST_WEIGHTS, chunks, work)
    load = max(0.0, first.seconds - found.seconds)
    while found.seconds < seconds / 3:
        wanted = int(found.weights * min(_GROWTH, seconds / 1.5 / found.seconds))
        grown = _encode(checkpoint, refs, wanted, chunks, work)
        if grown.weights <= found.weights:
            break
        found = grown
    return load, found.weights / found.seconds, found.read_bytes / found.weights


class _Encoded(NamedTuple):
    """So many weights, the seconds that they took and the bytes that were read for them."""

    weights: int
    seconds: float
    read_bytes: int


def _encode(
    checkpoint: Checkpoint, refs: Sequence[TensorRef], weights: int, chunks: Chunks, work: Path
) -> _Encoded:
    """Encode and write the first rows of tensors, so many weights in all."""
    chosen, left = dict[str, TensorRef](), weights
    for ref in refs:
        if left <= 0:
            break
        part = first_rows(ref, -(-min(left, ref.size) * ref.n_rows // max(1, ref.size)))
        chosen[ref.name] = part
        left -= part.size
    for part in chosen.values():  # the disk is measured by itself
        for start, stop in part.slices():
            part.raw(start, stop)
    cut = Checkpoint(checkpoint.path, chosen)
    cut.config = checkpoint.config
    before, began = io_so_far(), time.perf_counter()
    with tempfile.TemporaryFile(dir=work) as stream:
        for chunk in chunks(cut):
            write_chunk(stream, chunk)
        stream.flush()
        os.fsync(stream.fileno())
    seconds = max(1e-6, time.perf_counter() - began)
    done = sum(ref.size for ref in chosen.values())
    return _Encoded(done, seconds, io_so_far().since(before).read)
