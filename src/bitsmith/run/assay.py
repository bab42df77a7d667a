"""Can low rank beat int4 here? Every matrix of a checkpoint measured, one by one, and each result kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from bitsmith import __version__
from bitsmith.errors import BitsmithError, printable
from bitsmith.numerics.power_law import RESAMPLES
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.progress import Progress, silent
from bitsmith.run.assay_jobs import NOT_MATCHED, NOT_SAMPLED, Pair, Request, Work, opened_work
from bitsmith.run.assay_result import SCHEMA, Assay, MatrixAssay, MixerAssay, Protocol, Skipped
from bitsmith.run.assay_workers import measured, usable_workers
from bitsmith.run.claims import CLAIMS, component_key, seed_checks
from bitsmith.run.moments import Moments, StoredMoments
from bitsmith.run.record import seal
from bitsmith.run.verdict import (
    Population,
    component_rows,
    data_aware_verdict,
    group_verdict,
    ranking,
    totals,
)
from bitsmith.store.atomic import atomic_file
from bitsmith.store.hub import local
from bitsmith.store.journal import Journal, content_key, result_folder
from bitsmith.store.stored import INTEGERS

RESULT_NAME = "assay.json"
PAGE_NAME = "assay.html"
JOURNAL_NAME = ".assay.journal"


@one_blas_thread()
def assay(
    model: Path,
    out: Path | None = None,
    *,
    match: str | None = None,
    statistics: Moments | Path | None = None,
    text: Path | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    sample: int | None = None,
    workers: int | None = None,
    page: Callable[[Assay], object] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Assay:
    """Measure every matrix of a checkpoint: spectrum, power law, low rank against int4, bounds; and judge.

    Reads a Hugging Face folder, a safetensors file or a GGUF, of any family: without an architecture file
    roles come from names. `match` is a regex that chooses matrices by name, `statistics` (by tensor name,
    what `calibrate` wrote, or an imatrix) add what data-aware low rank sees, `text` the spectra of
    activations (known architectures only). With `out`, a folder, every finished matrix is kept there, so
    that a killed run goes on, and `assay.json` is written at the end, then what `page` makes of it there, and
    the digests of both; with `sample` that many matrices of each role are measured, with less precision
    (`measure`). A run killed in between goes on too. Matrices are measured in `workers` processes, by
    default one for each core as far as memory allows; their number changes nothing in the result.

    Raises BitsmithError naming the tensor and the value for one that is not finite, UnsupportedError for
    weights packed in a way that is not known, OutputError if `assay.json` exists (unless `overwrite`).
    """
    started = time.monotonic()
    model = local(model, progress)
    if out is not None:
        unfinished = (out / JOURNAL_NAME).exists()  # whatever has appeared, it was not all
        result_folder(out, RESULT_NAME, overwrite or unfinished, [model])
    request = Request(model, match, statistics, resamples, seed, sample)
    with opened_work(request) as work:
        digest = _digest(work.moments)
        protocol = Protocol(__version__, SCHEMA, match, resamples, seed, digest, _named(text), sample)
        journal = None
        if out is not None:
            key = content_key(work.checkpoint, asdict(protocol))
            journal = Journal(out / JOURNAL_NAME, key, overwrite=overwrite)
        with journal or nullcontext():
            activations = None if text is None else _activations(model, text, progress)
            found = _run(request, work, journal, workers, progress)
            result = _result(work, found, protocol, activations, started)
            if out is not None and journal is not None:
                _write(out / RESULT_NAME, result)
                if page is not None:
                    page(result)
                seal(out, "assay")
                journal.remove()
    return result


def _run(
    request: Request, work: Work, journal: Journal | None, workers: int | None, progress: Progress
) -> list[Any]:
    """Return every job's result in order, taken from the journal where it is there."""
    kept = {} if journal is None else journal.entries
    left = [job for job in work.jobs if job.name not in kept]
    results = {
        job.name: TypeAdapter(job.result).validate_python(kept[job.name])
        for job in work.jobs
        if job.name in kept
    }
    done, total = 0, sum(job.work for job in left)
    progress("assay", done, total)
    try:
        for job, result in measured(request, left, usable_workers(left, workers)):
            if journal is not None:
                journal.add(job.name, asdict(result))
            results[job.name] = result
            done += job.work
            progress("assay", done, total)
    except BitsmithError as error:
        place = error.path or work.checkpoint.path
        raise type(error)(error.message, path=place, tensor=error.tensor) from error
    return [results[job.name] for job in work.jobs]


def _result(
    work: Work,
    found: Sequence[MatrixAssay | MixerAssay],
    protocol: Protocol,
    activations: Any | None,
    started: float,
) -> Assay:
    checkpoint, content, skipped = work.checkpoint, work.content, work.skipped
    matrices = tuple(result for result in found if isinstance(result, MatrixAssay))
    weights = [(spec, ref) for spec, ref in content.pairs if ref.dtype not in INTEGERS]
    population = _population(weights, skipped)
    rows = component_rows(matrices, population)
    return Assay(
        path=str(checkpoint.path),
        architecture=content.arch,
        parameters=sum(ref.size for _, ref in weights),
        stored_bytes=sum(ref.nbytes for ref in checkpoint.values()),
        protocol=protocol,
        matrices=matrices,
        mixers=tuple(result for result in found if isinstance(result, MixerAssay)),
        components=rows,
        totals=totals(rows, matrices, population),
        ranking=ranking(matrices),
        verdict=group_verdict(matrices),
        data_aware=data_aware_verdict(matrices),
        seed_checks=seed_checks(),
        skipped=tuple(skipped),
        notes=tuple(content.notes),
        activations=activations,
        seconds=time.monotonic() - started,
    )


def _population(weights: Sequence[Pair], skipped: Sequence[Skipped]) -> dict[str, Population]:
    left_out = {tensor.name for tensor in skipped if tensor.why in (NOT_MATCHED, NOT_SAMPLED)}
    parts = {}
    for key in (seed.key for seed in CLAIMS):
        own = [(spec, ref) for spec, ref in weights if component_key(spec) == key]
        parts[key] = Population(
            len(own), sum(ref.size for _, ref in own), sum(spec.name in left_out for spec, _ in own)
        )
    return parts


def _digest(moments: Moments) -> str | None:
    if not moments:
        return None
    if isinstance(moments, StoredMoments):
        return moments.digest
    digest = hashlib.sha256()
    for name in sorted(moments):
        digest.update(name.encode() + np.ascontiguousarray(moments[name]).tobytes())
    return digest.hexdigest()


def _named(text: Path | None) -> str | None:
    return None if text is None else printable(str(text))


def _activations(model: Path, text: Path, progress: Progress) -> Any:
    from bitsmith.run.activations import activation_spectra  # noqa: PLC0415 (loads torch)

    return activation_spectra(model, text, progress=progress)


def _write(path: Path, result: Assay) -> None:
    with atomic_file(path, overwrite=True) as stream:
        stream.write((json.dumps(result.to_json(), allow_nan=False) + "\n").encode())
