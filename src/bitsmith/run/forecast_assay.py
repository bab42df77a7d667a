"""What an assay will take: the real measures of matrices cut to several sizes, and the law through them."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy.optimize import nnls  # type: ignore[attr-defined]

from bitsmith.numerics.power_law import RESAMPLES
from bitsmith.numerics.spectrum import LARGE
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.run.assay_jobs import Job, Request, Work, opened_work
from bitsmith.run.assay_workers import usable_workers
from bitsmith.run.execute import peak_memory_bytes
from bitsmith.run.forecast import (
    Budget,
    Forecast,
    Part,
    disk_part,
    folder_of,
    io_so_far,
    seconds_of_process,
    total_seconds,
)
from bitsmith.run.machine import usable_cores
from bitsmith.run.machine_rates import machine_rates
from bitsmith.run.measure import (
    HELD_BYTES,
    QUICK_BYTES,
    TRAIN_ROLES,
    Mixer,
    Target,
    measure,
    measure_mixer,
)
from bitsmith.store.checkpoint import ComputedTensor, TensorRef

_SIZES = (256, 256), (1024, 256), (512, 512), (2048, 512), (1024, 1024), (2048, 1024)
_SHARE = 0.85  # of the budget, for the laws of matrices
_BESIDE = 1.1  # how much longer a matrix takes beside others, which share caches; from one run
_TRAIN_COLUMNS = 512
_TRAIN_ROWS = 4096
_MIXER_HIDDEN = (64, 256)
_GRAM_BYTES = 40  # for each pair of columns of the short side: as `Target.memory_bytes` counts them


@dataclass(frozen=True)
class Law:
    """Seconds of one matrix `m × n` with `k = min(m, n)`: `a m n k + b k³ + c m n + d`, none negative."""

    terms: tuple[float, float, float, float]

    def seconds(self, shape: tuple[int, int]) -> float:
        """Return the seconds of a matrix of `shape`."""
        return float(np.dot(self.terms, _terms(shape)))

    @staticmethod
    def through(found: dict[tuple[int, int], float]) -> Law:
        """Return the law of least relative squared error through measured seconds."""
        rows = np.array([_terms(shape) for shape in found])
        seconds = np.array(list(found.values()))
        scale = np.maximum(rows.max(axis=0), 1.0)
        terms, _ = nnls(rows / scale / seconds[:, None], np.ones(len(seconds)))
        a, b, c, d = terms / scale
        return Law((float(a), float(b), float(c), float(d)))


def _terms(shape: tuple[int, int]) -> tuple[float, ...]:
    m, n = shape
    k = min(m, n)
    return float(m * n * k), float(k**3), float(m * n), 1.0


@one_blas_thread()
def forecast_assay(
    model: Path,
    out: Path | None = None,
    *,
    match: str | None = None,
    statistics: Path | None = None,
    text: Path | None = None,
    sample: int | None = None,
    workers: int | None = None,
) -> Forecast:
    """Predict what `assay` takes on so many processes, but for the forward of a `text`.

    Raises as `assay` does for what it refuses at first.
    """
    before, folder = io_so_far(), folder_of(out or Path("assay"))
    request = Request(model, match, statistics, RESAMPLES, 0, sample)
    with opened_work(request) as work:
        started, budget, rest = seconds_of_process(), Budget(), peak_memory_bytes() or 0
        costs = _Costs(work, request, budget)
        seconds = {job.name: costs.seconds(job) for job in work.jobs}
        used = usable_workers(work.jobs, workers)
        files, stored = work.checkpoint.files, sum(ref.nbytes for ref in work.checkpoint.values())
        wall = _makespan(list(seconds.values()), used) * (_BESIDE if used > 1 else 1.0)
        rates = machine_rates(files, folder, usable_cores(), work_seconds=wall)
        parts = [Part("start", started * (2 if used > 1 else 1), used, "processes", 1 / started)]
        if out is not None:
            parts.append(Part("digest of the source", stored / rates.sha256, stored, "bytes", rates.sha256))
        parts.append(Part("matrices", wall, sum(job.work for job in work.jobs), "multiplications", 0.0))
        parts[-1] = parts[-1]._replace(rate=parts[-1].amount / max(wall, 1e-9))
        parts.append(disk_part(files, rates))
        peak = _peak(work.jobs, used, rest, quick=sample is not None)
        read = before.read + _read_bytes(work, quick=sample is not None) + (stored if out is not None else 0)
        output = 0 if out is None else _PAGE_BYTES + 2 * _OUTPUT_BYTES * len(work.jobs)
    return Forecast(
        command="assay",
        seconds=total_seconds(tuple(parts)),
        peak_memory_bytes=peak,
        output_bytes=output,
        scratch_bytes=0 if out is None else _OUTPUT_BYTES * len(work.jobs),
        read_bytes=read,
        written_bytes=0 if out is None else output + _OUTPUT_BYTES * len(work.jobs),
        parts=tuple(parts),
        rates=rates,
        calibrated_seconds=budget.spent,
        unmeasured=(_LOOSE, *(() if text is None else ("the activations of --text",))),
        folder=folder,
    )


_LOOSE = "how near the matrices come to this: before the law was changed, runs took .6 to 1.5 times as long"
_OUTPUT_BYTES = 18 << 10  # of one matrix in assay.json, in the page and in the journal, measured
_PAGE_BYTES = 4 << 20  # of the page that shows them, measured


class _Costs:
    """Seconds of each job, from measures of cut matrices within a budget.

    Matrices whose short side is `LARGE` are decomposed in another way: they take so many times what the law
    says as one of just that size does.
    """

    def __init__(self, work: Work, request: Request, budget: Budget) -> None:
        self._request, self._moments = request, work.moments
        subjects = [_subject(job) for job in work.jobs]
        targets = [one for one in subjects if isinstance(one, Target)]
        plain = [target for target in targets if target.role not in TRAIN_ROLES] or targets
        largest = max(plain, key=lambda one: min(one.shape))
        wide, self._wide = (LARGE, LARGE), 1.0
        has_wide = min(largest.shape) >= LARGE
        self._law = Law.through(self._sampled(largest, budget, _SIZES[: 5 if has_wide else 6]))
        if has_wide:
            self._wide = self._seconds(largest, wide) / self._law.seconds(wide)
        self._train = self._train_weight(targets)
        self._guided = self._moments_ratio(plain)
        mixers = {one.kind: one for one in subjects if isinstance(one, Mixer)}
        self._mixers = {kind: self._mixer_line(mixer) for kind, mixer in mixers.items()}

    def seconds(self, job: Job) -> float:
        """Return the seconds of a job on one thread."""
        one = _subject(job)
        if isinstance(one, Mixer):
            fixed, column = self._mixers[one.kind]
            return fixed + column * _hidden(one)
        found = self._law.seconds(self._shape(one)) * (self._wide if min(one.shape) >= LARGE else 1.0)
        if one.role in TRAIN_ROLES:
            found += self._train * one.ref.size
        return found * (self._guided if one.name in self._moments else 1.0)

    def _shape(self, target: Target) -> tuple[int, int]:
        """Return the rows and columns that are looked at."""
        rows, columns = target.shape
        if self._request.sample is not None:
            rows = min(rows, _looked_at(target) // columns)
        return rows, columns

    def _sampled(
        self, target: Target, budget: Budget, sizes: Sequence[tuple[int, int]]
    ) -> dict[tuple[int, int], float]:
        """Measure cut matrices of growing size while the next one fits."""
        shapes = list(dict.fromkeys((min(m, target.shape[0]), min(n, target.shape[1])) for m, n in sizes))
        self._seconds(target, (min(256, target.shape[0]), min(256, target.shape[1])))  # loads what is used
        found: dict[tuple[int, int], float] = {}
        for shape in shapes:
            if found and budget.spent + Law.through(found).seconds(shape) > _SHARE * budget.seconds:
                break
            found[shape] = self._seconds(target, shape)
        return found

    def _train_weight(self, targets: Sequence[Target]) -> float:
        """Return what a weight of an embedding takes besides."""
        tables = [target for target in targets if target.role in TRAIN_ROLES]
        if not tables:
            return 0.0
        shape = min(tables[0].shape[0], _TRAIN_ROWS), min(tables[0].shape[1], _TRAIN_COLUMNS)
        more = self._seconds(tables[0], shape) - self._law.seconds(shape)
        return max(0.0, more) / (shape[0] * shape[1])

    def _moments_ratio(self, targets: Sequence[Target]) -> float:
        """Return how many times longer a matrix takes whose inputs' second moments are known."""
        known = [target for target in targets if target.name in self._moments]
        if not known:
            return 1.0
        side = min(512, *known[0].shape)
        given = np.asarray(self._moments[known[0].name])
        cut = given[:side] if given.ndim == 1 else given[:side, :side]
        return self._seconds(known[0], (side, side), cut) / self._seconds(known[0], (side, side))

    def _seconds(self, target: Target, shape: tuple[int, int], moments: Any = None) -> float:
        part = Target(target.spec, _cut(target.ref, shape))
        asked = self._request
        quick = asked.sample is not None
        return _spent(lambda: measure(part, asked.resamples, asked.seed, moments, quick=quick))

    def _mixer_line(self, mixer: Mixer) -> tuple[float, float]:
        """Return the seconds of a layer's projections, and those of each column of the residual stream."""
        few, more = (min(hidden, _hidden(mixer)) for hidden in _MIXER_HIDDEN)
        first, second = (_spent(partial(measure_mixer, _narrow(mixer, hidden))) for hidden in (few, more))
        column = max(0.0, second - first) / max(1, more - few)
        return max(0.0, first - few * column), column


def _subject(job: Job) -> Target | Mixer:
    """Return what a job measures."""
    found: Target | Mixer = cast("partial[Any]", job.run).args[0]
    return found


def _spent(work: Callable[[], object]) -> float:
    """Return the processor seconds of `work`, which uses one thread."""
    began = time.process_time()
    work()
    return max(1e-6, time.process_time() - began)


def _cut(ref: TensorRef, shape: tuple[int, int]) -> TensorRef:
    m, n = shape

    def read(start: int, stop: int) -> Any:
        rows = np.asarray(ref.read(start, stop))
        return np.ascontiguousarray(rows.reshape(len(rows), -1)[:, :n])

    return ComputedTensor(ref.name, (m, n), ref.dtype, read)


def _hidden(mixer: Mixer) -> int:
    """Return the width of the residual stream, which every projection reads or writes."""
    return next(iter(mixer.targets.values())).shape[1]


def _narrow(mixer: Mixer, hidden: int) -> Mixer:
    """Return a layer's projections from and to the first `hidden` columns of the residual stream."""
    targets = {}
    for role, target in mixer.targets.items():
        rows, columns = target.shape
        shape = (hidden, columns) if role.endswith((".o", ".out")) else (rows, hidden)
        targets[role] = replace(target, ref=_cut(target.ref, shape))
    return replace(mixer, targets=targets)


def _makespan(seconds: Sequence[float], workers: int) -> float:
    """Return when the last of `workers` ends that take the longest job first."""
    ends = [0.0] * workers
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


def _peak(jobs: Sequence[Job], workers: int, rest: int, *, quick: bool) -> int:
    """Return the memory of the largest jobs side by side, each beside what a process holds at rest.

    One that does all by itself holds no less than this one has.
    """
    largest = heapq.nlargest(workers, (_held_bytes(_subject(job), quick=quick) for job in jobs))
    if workers == 1:
        return max(peak_memory_bytes() or 0, rest + sum(largest))
    return rest + sum(rest + held for held in largest)


def _held_bytes(one: Target | Mixer, *, quick: bool) -> int:
    """Return what measuring a matrix, or a layer's projections, holds: weights and Gram matrices."""
    if isinstance(one, Mixer):
        return sum(4 * target.ref.size for target in one.targets.values())
    short, size = min(one.shape), one.ref.size
    if 4 * size > HELD_BYTES:
        size = _looked_at(one) if quick else 0
    return 4 * size + _GRAM_BYTES * short * short


def _looked_at(target: Target) -> int:
    """Return the weights that a sample of a matrix has."""
    return target.ref.size if 4 * target.ref.size <= HELD_BYTES else QUICK_BYTES // 4


def _read_bytes(work: Work, *, quick: bool) -> int:
    """Return the bytes of all matrices, those of layers read a second time."""
    total = 0
    for job in work.jobs:
        one = _subject(job)
        for target in one.targets.values() if isinstance(one, Mixer) else [one]:
            total += target.ref.nbytes * (_looked_at(target) if quick else target.ref.size) // target.ref.size
    return total
