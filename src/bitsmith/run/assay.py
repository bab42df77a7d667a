"""Can low rank beat int4 here? Every matrix of a checkpoint measured, one by one, and each result kept."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from bitsmith import __version__
from bitsmith.archs import TensorSpec, architecture_of, claim, import_view
from bitsmith.archs.arch import refuse_quantized
from bitsmith.archs.generic import named_specs
from bitsmith.errors import BitsmithError, UnsupportedError, printable
from bitsmith.log import event
from bitsmith.numerics.power_law import RESAMPLES
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.progress import Progress, silent
from bitsmith.run.assay_result import SCHEMA, Assay, MatrixAssay, MixerAssay, Protocol, Skipped
from bitsmith.run.claims import CLAIMS, component_key, seed_checks
from bitsmith.run.measure import Target, measure, measure_mixer, mixers
from bitsmith.run.moments import Moments, StoredMoments, stored_moments
from bitsmith.run.record import seal
from bitsmith.run.verdict import (
    Population,
    component_rows,
    data_aware_verdict,
    group_verdict,
    ranking,
    totals,
)
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import atomic_file
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.hub import local
from bitsmith.store.journal import Journal, content_key, result_folder
from bitsmith.store.stored import INTEGERS

RESULT_NAME = "assay.json"
PAGE_NAME = "assay.html"
JOURNAL_NAME = ".assay.journal"

_Pair = tuple[TensorSpec, TensorRef]


@dataclass(frozen=True)
class _Content:
    """A checkpoint's tensors with their roles; `arch` is None where they come from names alone."""

    arch: str | None
    config: Mapping[str, Any]
    pairs: list[_Pair]
    notes: list[str]


@dataclass(frozen=True)
class _Job:
    """One piece of work: its name in the journal, its size, and the type of what it returns."""

    name: str
    work: int
    run: Callable[[], Any]
    result: Any


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
    the digests of both; a run killed in between goes on too.

    Raises BitsmithError naming the tensor and the value for one that is not finite, UnsupportedError for
    weights packed in a way that is not known, OutputError if `assay.json` exists (unless `overwrite`).
    """
    started = time.monotonic()
    pattern = _pattern(match)
    model = local(model, progress)
    if out is not None:
        unfinished = (out / JOURNAL_NAME).exists()  # whatever has appeared, it was not all
        result_folder(out, RESULT_NAME, overwrite or unfinished, [model])
    with open_checkpoint(model) as checkpoint:
        content = _content(checkpoint)
        targets, skipped = _targets(content.pairs, pattern, checkpoint.path)
        if not targets:
            raise BitsmithError(f"no matrix to assay{f' matches {match!r}' if match else ''}", path=model)
        moments = _moments(statistics, targets)
        protocol = Protocol(__version__, SCHEMA, match, resamples, seed, _digest(moments), _named(text))
        jobs = _jobs(targets, content.config, moments, resamples, seed)
        journal = None
        if out is not None:
            key = content_key(checkpoint, asdict(protocol))
            journal = Journal(out / JOURNAL_NAME, key, overwrite=overwrite)
        with journal or nullcontext():
            activations = None if text is None else _activations(model, text, progress)
            found = _run(jobs, journal, checkpoint.path, progress)
            result = _result(checkpoint, content, found, skipped, protocol, activations, started)
            if out is not None and journal is not None:
                _write(out / RESULT_NAME, result)
                if page is not None:
                    page(result)
                seal(out, "assay")
                journal.remove()
    return result


def _pattern(match: str | None) -> re.Pattern[str]:
    try:
        return re.compile(match or "")
    except re.error as error:
        raise BitsmithError(f"match {match!r} is not a regular expression: {error}") from error


def _content(checkpoint: Checkpoint) -> _Content:
    """Return roles from the architecture file, or by name where there is none or it does not fit."""
    refuse_quantized(checkpoint)
    try:
        arch = architecture_of(checkpoint)
        pairs = claim(checkpoint if checkpoint.config else import_view(checkpoint))
    except BitsmithError as error:
        nested = checkpoint.config.get("text_config")
        config = nested if isinstance(nested, Mapping) else checkpoint.config
        note = f"grouped by name and shape only: {error.message}"
        return _Content(None, config, named_specs(checkpoint), [note])
    return _Content(arch.gguf_arch, arch.text_config, pairs, [])


def _targets(
    pairs: Sequence[_Pair], pattern: re.Pattern[str], path: Path
) -> tuple[list[Target], list[Skipped]]:
    targets, skipped = [], []
    for spec, ref in pairs:
        why = _not_assayed(ref, pattern.search(spec.name) is not None)
        if why is None and ref.dtype.startswith("F8"):  # said now, not after hours of other matrices
            raise UnsupportedError(f"is {ref.dtype}, expected 16 or 32 bits", path=path, tensor=spec.name)
        if why is None:
            targets.append(Target(spec, ref))
        else:
            skipped.append(Skipped(spec.name, ref.shape, ref.size, component_key(spec), why))
    return targets, skipped


def _not_assayed(ref: TensorRef, matched: bool) -> str | None:
    if ref.dtype in INTEGERS:
        return f"holds {ref.dtype}, no weights"
    if len(ref.shape) < 2 or ref.size == 0:
        return "is empty" if ref.size == 0 else "is a vector"
    return None if matched else "does not match"


def _jobs(
    targets: Sequence[Target], config: Mapping[str, Any], moments: Moments, resamples: int, seed: int
) -> list[_Job]:
    matrices = [
        _Job(
            target.name,
            target.work,
            partial(_measured, target, resamples, seed, moments),
            MatrixAssay,
        )
        for target in targets
    ]
    layers = [
        _Job(f"layer {m.layer}", m.work, partial(measure_mixer, m), MixerAssay)
        for m in mixers(targets, config)
    ]
    return matrices + layers


def _measured(target: Target, resamples: int, seed: int, moments: Moments) -> MatrixAssay:
    return measure(target, resamples, seed, moments.get(target.name))


def _run(jobs: Sequence[_Job], journal: Journal | None, path: Path, progress: Progress) -> list[Any]:
    """Return every job's result, taken from the journal where it is there."""
    kept = {} if journal is None else journal.entries
    total = sum(job.work for job in jobs if job.name not in kept)
    done, results = 0, []
    for job in jobs:
        if job.name in kept:
            results.append(TypeAdapter(job.result).validate_python(kept[job.name]))
            continue
        progress("assay", done, total)
        event("assay", tensor=job.name)
        try:
            result = job.run()
        except BitsmithError as error:
            raise type(error)(error.message, path=path, tensor=error.tensor or job.name) from error
        if journal is not None:
            journal.add(job.name, asdict(result))
        results.append(result)
        done += job.work
    progress("assay", total, total)
    return results


def _result(
    checkpoint: Checkpoint,
    content: _Content,
    found: Sequence[MatrixAssay | MixerAssay],
    skipped: Sequence[Skipped],
    protocol: Protocol,
    activations: Any | None,
    started: float,
) -> Assay:
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


def _population(weights: Sequence[_Pair], skipped: Sequence[Skipped]) -> dict[str, Population]:
    left_out = {tensor.name for tensor in skipped if tensor.why == "does not match"}
    parts = {}
    for key in (seed.key for seed in CLAIMS):
        own = [(spec, ref) for spec, ref in weights if component_key(spec) == key]
        parts[key] = Population(
            len(own), sum(ref.size for _, ref in own), sum(spec.name in left_out for spec, _ in own)
        )
    return parts


def _moments(statistics: Moments | Path | None, targets: Sequence[Target]) -> Moments:
    if isinstance(statistics, Path):
        return stored_moments(statistics, (target.spec for target in targets))
    return statistics or {}


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
