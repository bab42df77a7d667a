"""What an assay has to do: the matrices and layers of a checkpoint that are measured, and which are not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bitsmith.archs import TensorSpec, architecture_of, claim, import_view
from bitsmith.archs.arch import refuse_quantized
from bitsmith.archs.generic import named_specs
from bitsmith.errors import BitsmithError, UnsupportedError
from bitsmith.run.assay_result import MatrixAssay, MixerAssay, Skipped
from bitsmith.run.claims import component_key
from bitsmith.run.measure import Target, measure, measure_mixer, mixers
from bitsmith.run.moments import Moments, stored_moments
from bitsmith.store import open_checkpoint
from bitsmith.store.checkpoint import Checkpoint, TensorRef
from bitsmith.store.stored import INTEGERS

Pair = tuple[TensorSpec, TensorRef]
NOT_SAMPLED, NOT_MATCHED = "is not in the sample", "does not match"


@dataclass(frozen=True)
class Request:
    """What an assay is asked for, as plain values: another process finds the same jobs by it."""

    model: Path
    match: str | None
    statistics: Moments | Path | None
    resamples: int
    seed: int
    sample: int | None = None


@dataclass(frozen=True)
class Content:
    """A checkpoint's tensors with their roles; `arch` is None where they come from names alone."""

    arch: str | None
    config: Mapping[str, Any]
    pairs: list[Pair]
    notes: list[str]


@dataclass(frozen=True)
class Job:
    """One piece of work: its name in the journal, its size, its memory, and the type of what it returns."""

    name: str
    work: int
    memory_bytes: int
    run: Callable[[], Any]
    result: Any


@dataclass(frozen=True)
class Work:
    """All that a request means for a checkpoint that is open."""

    checkpoint: Checkpoint
    content: Content
    moments: Moments
    skipped: list[Skipped]
    jobs: list[Job]


@contextmanager
def opened_work(request: Request) -> Iterator[Work]:
    """Open the request's model and find what is to be done.

    Raises BitsmithError for a pattern that is none, or where no matrix is left; UnsupportedError for weights
    that cannot be read.
    """
    pattern = _pattern(request.match)
    with open_checkpoint(request.model) as checkpoint:
        content = _content(checkpoint)
        targets, skipped = _targets(content.pairs, pattern, checkpoint.path)
        if request.sample is not None:
            targets = _sampled(targets, request.sample, skipped)
        if not targets:
            matching = f" matches {request.match!r}" if request.match else ""
            raise BitsmithError(f"no matrix to assay{matching}", path=request.model)
        moments = _moments(request.statistics, targets)
        jobs = _jobs(targets, content.config, moments, request)
        yield Work(checkpoint, content, moments, skipped, jobs)


def _pattern(match: str | None) -> re.Pattern[str]:
    try:
        return re.compile(match or "")
    except re.error as error:
        raise BitsmithError(f"match {match!r} is not a regular expression: {error}") from error


def _content(checkpoint: Checkpoint) -> Content:
    """Return roles from the architecture file, or by name where there is none or it does not fit."""
    refuse_quantized(checkpoint)
    try:
        arch = architecture_of(checkpoint)
        pairs = claim(checkpoint if checkpoint.config else import_view(checkpoint))
    except BitsmithError as error:
        nested = checkpoint.config.get("text_config")
        config = nested if isinstance(nested, Mapping) else checkpoint.config
        note = f"grouped by name and shape only: {error.message}"
        return Content(None, config, named_specs(checkpoint), [note])
    return Content(arch.gguf_arch, arch.text_config, pairs, [])


def _targets(
    pairs: Sequence[Pair], pattern: re.Pattern[str], path: Path
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


def _sampled(targets: Sequence[Target], count: int, skipped: list[Skipped]) -> list[Target]:
    """Keep `count` matrices of each role, evenly spaced over the layers; vision and MTP are a role each.

    What is not kept is added to `skipped`.
    """
    groups: dict[str, list[Target]] = {}
    for target in targets:
        component = target.spec.component
        groups.setdefault(target.role if component == "text" else component, []).append(target)
    chosen = {
        group[(2 * place + 1) * len(group) // (2 * count)].name
        for group in groups.values()
        for place in range(count)
    }
    for target in targets:
        if target.name not in chosen:
            ref = target.ref
            skipped.append(Skipped(target.name, ref.shape, ref.size, component_key(target.spec), NOT_SAMPLED))
    return [target for target in targets if target.name in chosen]


def _not_assayed(ref: TensorRef, matched: bool) -> str | None:
    if ref.dtype in INTEGERS:
        return f"holds {ref.dtype}, no weights"
    if len(ref.shape) < 2 or ref.size == 0:
        return "is empty" if ref.size == 0 else "is a vector"
    return None if matched else NOT_MATCHED


def _jobs(
    targets: Sequence[Target], config: Mapping[str, Any], moments: Moments, request: Request
) -> list[Job]:
    matrices = [
        Job(
            target.name,
            target.work,
            target.memory_bytes,
            partial(
                measure,
                target,
                request.resamples,
                request.seed,
                moments.get(target.name),
                quick=request.sample is not None,
            ),
            MatrixAssay,
        )
        for target in targets
    ]
    if request.sample is not None:
        return matrices
    layers = [
        Job(f"layer {m.layer}", m.work, m.memory_bytes, partial(measure_mixer, m), MixerAssay)
        for m in mixers(targets, config)
    ]
    return matrices + layers


def _moments(statistics: Moments | Path | None, targets: Sequence[Target]) -> Moments:
    if isinstance(statistics, Path):
        return stored_moments(statistics, (target.spec for target in targets))
    return statistics or {}
