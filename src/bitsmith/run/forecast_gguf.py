"""What writing a GGUF will take: the real encoder rehearsed on whole tensors of every kind in the plan."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

import numba

from bitsmith.archs.export import renamed
from bitsmith.formats.accelerator import accelerator
from bitsmith.passes.transform import transform_of
from bitsmith.run.encode import TensorEncoder, check_rounder
from bitsmith.run.execute import carry_out, peak_memory_bytes, statistics_of
from bitsmith.run.forecast import (
    Budget,
    Forecast,
    Io,
    Part,
    disk_part,
    folder_of,
    io_so_far,
    scratch,
    seconds_of_process,
    total_seconds,
)
from bitsmith.run.forecast_guided import guided_parts
from bitsmith.run.job import Job
from bitsmith.run.machine import usable_cores
from bitsmith.run.machine_rates import MachineRates, machine_rates
from bitsmith.run.partial import first_rows
from bitsmith.run.plan import Plan, PlanRow, Source, SourceTensor, open_source
from bitsmith.store import open_checkpoint
from bitsmith.store.checkpoint import Checkpoint

_SMALL_WEIGHTS = 1 << 16
"""Up to this size tensors are rehearsed whole, all together: their number is what takes the time."""
_FIRST_WEIGHTS = 1 << 20
_ROWS_TOGETHER = 64
_GROWTH, _GROWTH_STEP = 16, 1.5
_OVERLAP = 0.92  # share of the threads' time that a run is at work: the rest goes by at its ends


class Kind(NamedTuple):
    """What the time of a weight depends on: its type, the stored dtype, and the way from one to the other."""

    type: str
    source_dtype: str
    computed: bool


@dataclass(frozen=True)
class Rehearsal:
    """What encoding so many weights took: `seconds` are processor time shared by the threads.

    What a short run waits for besides, above all for the disk to have it, a long one does not; `wall_seconds`
    have it, and are the seconds where a device encodes.
    """

    weights: int
    seconds: float
    io: Io
    wall_seconds: float

    def beyond(self, less: Rehearsal) -> Rehearsal:
        """Return what the weights beyond a smaller rehearsal's took; all where they are too few to tell."""
        weights, seconds = self.weights - less.weights, self.seconds - less.seconds
        if weights < less.weights or seconds <= 0:
            return self
        return Rehearsal(weights, seconds, self.io.since(less.io), self.wall_seconds - less.wall_seconds)


class Rehearsals:
    """Runs of the real encoder over samples of a plan's tensors, into a scratch folder."""

    def __init__(self, source: Source, plan: Plan, folder: Path) -> None:
        self._source, self._plan, self._folder = source, plan, folder
        self._tensors = {tensor.gguf_name: tensor for tensor in source.tensors}

    @cached_property
    def kinds(self) -> dict[Kind, list[PlanRow]]:
        """The plan's rows that are not small, by kind."""
        found: dict[Kind, list[PlanRow]] = {}
        for row in self._plan.rows:
            if prod(row.shape) > _SMALL_WEIGHTS:
                tensor = self._tensors[row.gguf_name]
                kind = Kind(row.type, row.source_dtype, bool(tensor.spec.all_steps))
                found.setdefault(kind, []).append(row)
        return found

    def fixed(self) -> Rehearsal:
        """Write the whole header and every small tensor."""
        small = [row for row in self._plan.rows if prod(row.shape) <= _SMALL_WEIGHTS]
        return self._run([(row, prod(row.shape)) for row in small], header=True)

    def of(self, kind: Kind, seconds: float) -> tuple[float, Rehearsal]:
        """Encode tensors of a kind for about `seconds`; return also what the first weights took besides.

        What a file takes however small it is (`fixed`) is not in either.
        """
        began = time.perf_counter()
        first = self._run(self._sample(kind, _FIRST_WEIGHTS))
        small = self._run(self._sample(kind, _FIRST_WEIGHTS))
        load, found = max(0.0, first.wall_seconds - small.wall_seconds), small
        while (left := seconds - (time.perf_counter() - began)) > _GROWTH_STEP * found.wall_seconds:
            wanted = found.weights * min(_GROWTH, 0.8 * left / found.wall_seconds)
            grown = self._run(self._sample(kind, int(wanted)))
            if grown.weights <= found.weights:
                break
            found = grown
        return load, found.beyond(small)

    def _sample(self, kind: Kind, weights: int) -> list[tuple[PlanRow, int]]:
        """Return rows of the plan, spread over the model, and how many weights of each."""
        rows, chosen, left = self.kinds[kind], list[tuple[PlanRow, int]](), weights
        step = max(1, len(rows) // 8)
        for row in [row for start in range(step) for row in rows[start::step]]:
            if left <= 0:
                break
            chosen.append((row, min(left, prod(row.shape))))
            left -= prod(row.shape)
        return chosen

    def _run(self, sample: Sequence[tuple[PlanRow, int]], *, header: bool = False) -> Rehearsal:
        pairs = [self._cut(row, weights) for row, weights in sample]
        tensors, rows = [tensor for tensor, _ in pairs], [row for _, row in pairs]
        _read_once(tensors)
        checkpoint = Checkpoint(self._source.checkpoint.path, {t.hf_name: t.origin for t in tensors})
        checkpoint.config = self._source.checkpoint.config
        metadata = self._source.metadata if header else {}
        source = replace(self._source, checkpoint=checkpoint, tensors=tuple(tensors), metadata=metadata)
        plan = replace(self._plan, rows=tuple(rows))
        before, began, worked = io_so_far(), time.perf_counter(), time.process_time()
        carry_out(source, plan, self._folder / "rehearsal.gguf", None, "nearest")
        wall_seconds = time.perf_counter() - began
        at_once = min(numba.get_num_threads(), usable_cores())
        seconds = (time.process_time() - worked) / (_OVERLAP * at_once)
        if accelerator() is not None:
            seconds = wall_seconds
        weights = sum(prod(row.shape) for row in rows)
        return Rehearsal(weights, seconds, io_so_far().since(before), wall_seconds)

    def _cut(self, row: PlanRow, weights: int) -> tuple[SourceTensor, PlanRow]:
        tensor = self._tensors[row.gguf_name]
        count = row.shape[0] if len(row.shape) > 1 else 1
        keep = -(-weights * count // prod(row.shape) // _ROWS_TOGETHER) * _ROWS_TOGETHER
        if keep >= count:
            keep = count
        else:
            shape, nbytes = (keep, *row.shape[1:]), row.nbytes * keep // count
            row = replace(row, shape=shape, nbytes=nbytes)
        return _cut(tensor, keep, count), row


def _cut(tensor: SourceTensor, keep: int, count: int) -> SourceTensor:
    """Return the first rows, as a stored tensor of their own where rows stay in their places."""
    alike = tensor.origin.n_rows in (count, tensor.ref.n_rows) and not tensor.spec.all_steps
    origin = (
        first_rows(tensor.origin, keep if count > 1 else tensor.origin.n_rows) if alike else tensor.origin
    )
    if tensor.ref is tensor.origin:
        ref = origin
    elif alike:
        ref = renamed(origin, tensor.gguf_name)
    else:
        ref = first_rows(tensor.ref, keep if count > 1 else tensor.ref.n_rows)
    return replace(tensor, ref=ref, origin=origin)


def _read_once(tensors: Iterable[SourceTensor]) -> None:
    """Bring what is to be read into the page cache: the disk is measured by itself."""
    for tensor in tensors:
        for start, stop in tensor.ref.slices():
            tensor.ref.raw(start, stop)


def gguf_parts(rehearsals: Rehearsals, budget: Budget, others: int = 1) -> tuple[list[Part], float, Io]:
    """Return the parts of the time, the seconds that loading the kernels takes, and the bytes of it all.

    The rest of the budget is left to as many `others`, less one.
    """
    parts: list[Part] = []
    load, found = 0.0, rehearsals.fixed()
    parts.append(Part("header and small tensors", found.seconds, 1, "file", 1 / found.seconds))
    io = found.io
    kinds = rehearsals.kinds
    for number, (kind, rows) in enumerate(kinds.items()):
        more, found = rehearsals.of(kind, budget.share(len(kinds) - number + 0.5) / others)
        load += more
        weights = sum(prod(row.shape) for row in rows)
        rate = found.weights / found.seconds
        name = f"{kind.type} of {kind.source_dtype}{' computed' if kind.computed else ''}"
        parts.append(Part(name, weights / rate, weights, "weights", rate))
        scale = weights / found.weights
        io = Io(io.read + int(scale * found.io.read), io.written + int(scale * found.io.written))
    return parts, load, io


def forecast_gguf(job: Job, todo: Plan) -> Forecast:
    """Predict what writing a planned GGUF takes, from a rehearsal of `CALIBRATION_SECONDS`.

    Seconds are the process's start until now, the header and the small tensors, the kinds' weights at their
    rehearsed rates, and the disk where that is slower than these; peak memory is this process's, which holds
    what the run will hold.
    """
    budget, started, before = Budget(), seconds_of_process(), io_so_far()
    folder = folder_of(job.destination)
    with open_checkpoint(job.model) as checkpoint, scratch(folder) as work:
        transforms = [transform_of(name) for name in todo.transforms]
        source = open_source(checkpoint, transforms, allow_requantize=True)
        statistics = None if job.statistics is None else statistics_of(source, job.statistics)
        rounder = check_rounder(job.rounder, statistics, job.statistics)
        encoder = TensorEncoder(statistics, rounder, checkpoint.path)
        tensors = {tensor.gguf_name: tensor for tensor in source.tensors}
        pairs = [(tensors[row.gguf_name], row) for row in todo.rows]
        guided = [pair for pair in pairs if encoder.is_guided(*pair)]
        plain = [row for tensor, row in pairs if not encoder.is_guided(tensor, row)]
        rehearsals = Rehearsals(source, replace(todo, rows=tuple(plain)), work)
        parts, load, io = gguf_parts(rehearsals, budget, 2 if guided else 1)
        if statistics is not None and guided:
            parts += guided_parts(statistics, rounder, guided, numba.get_num_threads(), budget)
        peak = peak_memory_bytes() or 0
        rates = machine_rates(
            checkpoint.files, folder, numba.get_num_threads(), work_seconds=total_seconds(tuple(parts))
        )
        aside = _aside_part(checkpoint, source, rates)
        waits = disk_part(checkpoint.files, rates, total_seconds(parts))
    start = Part("start", started + load, 1, "process", 1 / max(1e-3, started + load))
    read = sum(tensor.origin.nbytes for tensor, _ in guided) + int(aside.amount)
    return Forecast(
        command="compress",
        seconds=total_seconds((start, *parts, aside, waits)),
        peak_memory_bytes=peak,
        output_bytes=todo.file_bytes,
        scratch_bytes=0,
        read_bytes=before.read + io.read + read,
        written_bytes=io.written + sum(row.nbytes for _, row in guided),
        parts=(start, *parts, aside, waits),
        rates=rates,
        calibrated_seconds=budget.spent,
        folder=folder,
    )


def _aside_part(checkpoint: Checkpoint, source: Source, rates: MachineRates) -> Part:
    """Return the digest of the tensors that the file does not hold."""
    aside = sum(checkpoint[name].nbytes for name in source.set_aside if name in checkpoint)
    return Part("digest of what is set aside", aside / rates.sha256, aside, "bytes", rates.sha256)
