"""The recipe `auto`: calibrate, allocate, round, measure the candidates, keep the best, tune it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitsmith.archs import TensorSpec
from bitsmith.errors import BitsmithError, OutputError
from bitsmith.numerics.threads import one_blas_thread
from bitsmith.passes.transform import Transform, Vectors, model_of, transform_of
from bitsmith.progress import Progress, silent
from bitsmith.run.allocate import Allocation, Costs, Tried, allocate, held_out_kld, held_out_tokens, pick
from bitsmith.run.budget import Target, limit_of
from bitsmith.run.calibrate import Calibration, calibrate
from bitsmith.run.corpus import write_default_text
from bitsmith.run.decoded import gguf_errors
from bitsmith.run.evaluate import PROTOCOL, open_model
from bitsmith.run.evaluation import INTERVAL
from bitsmith.run.execute import (
    Record,
    check_output,
    compress,
    peak_memory_bytes,
    plan_for,
    statistics_of,
    with_manifest,
)
from bitsmith.run.groups import groups_of
from bitsmith.run.job import Job, Made
from bitsmith.run.plan import Plan, open_source
from bitsmith.run.plan_file import write_plan
from bitsmith.run.record import source_facts
from bitsmith.run.sequential import sequential
from bitsmith.run.transform_search import Search, all_that_may_apply, search
from bitsmith.run.transforms import asked_for, block_formats
from bitsmith.run.tune import TuneOptions, TuneRecord, tune
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import refuse_taken
from bitsmith.store.journal import Journal, content_key, remove_work
from bitsmith.store.statistics import Statistics

PLAN_SUFFIX = ".plan.yaml"
_LEARNED = "statistics"
_NO_OPTION = (
    "model",
    "out",
    "overwrite",
    "plan_out",
    "threads",
)  # what changes no byte of the output, or is in the key


@one_blas_thread()
def make(job: Job, goal: Target | None, progress: Progress = silent) -> Made:
    """Write the job's file: as `compress` does, with what needs the model's forward as well.

    Without statistics they are collected on the job's text first, else on `default_text`. With a `goal` the
    types are allocated: several plans near the optimum are written and measured on held-out tokens, and the
    best is kept; its plan lies in `OUT.plan.yaml`, to be edited and passed back. With `tune` the values that
    cost no bytes are fitted by KL to the original. A killed run, or one that the disk stopped, keeps its
    statistics and finished tensors in the work folder `.OUT.recipe` for the next.

    Raises BitsmithError for types beside a goal, else as `calibrate`, `allocate`, `compress` and `tune` do.
    """
    started = time.monotonic()
    _check_files(job, goal)
    _check_goal(job, goal)
    with _opened(job, progress) as run:
        if goal is not None:
            run.allocate(goal)
        else:
            run.write()
        if job.tune:
            run.tune()
        return run.finish(started)


@one_blas_thread()
def plan_target(job: Job, goal: Target, progress: Progress = silent) -> Plan:
    """Return the plan that the additive model predicts to be best for `goal`; nothing is written.

    Raises as `make` does.
    """
    _check_goal(job, goal)
    with _opened(job, progress) as run:
        return run.allocation(goal).plans[0]


def _plan_file(job: Job) -> Path:
    return job.destination.with_name(job.destination.name + PLAN_SUFFIX)


def _check_files(job: Job, goal: Target | None) -> None:
    """Refuse outputs that cannot be written, before minutes are spent."""
    check_output(job.destination, job.overwrite)
    given = [path for path in (job.statistics, job.text, job.plan_file) if path is not None]
    with open_checkpoint(job.model) as checkpoint:
        refuse_taken(job.destination, job.overwrite, [*checkpoint.files, *given], folder=False)
    if goal is not None:
        refuse_taken(_plan_file(job), job.overwrite, given, folder=False)


def _check_goal(job: Job, goal: Target | None) -> None:
    """Refuse a model that cannot be rounded and a goal that cannot be met, before minutes are spent."""
    if goal and (job.type_name or job.plan_file or job.pure or job.tensor_types):
        raise BitsmithError("a target chooses the types itself; pass it without types, a plan or overrides")
    with open_checkpoint(job.model) as checkpoint:
        source = open_source(checkpoint, asked_for(job.transforms), allow_requantize=job.allow_requantize)
        if goal is None:
            return
        Costs(source, groups_of(source), limit_of(source, goal)).refuse_too_small()


@contextmanager
def _opened(job: Job, progress: Progress) -> Iterator[_Recipe]:
    """Run in the folder `.OUT.recipe`, locked; it outlives a killed run and a disk that is full."""
    work = job.destination.absolute().with_name(f".{job.destination.name}.recipe")
    try:
        work.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made: {error.strerror or error}", path=work) from error
    with Journal(work / "journal", _key(job), overwrite=job.overwrite) as journal:
        try:
            yield _Recipe(job, work, journal, progress)
        except OutputError:
            if set(work.iterdir()) == {journal.path}:
                remove_work(work)
            raise
        except BitsmithError:
            remove_work(work)
            raise
        remove_work(work)


def _key(job: Job) -> dict[str, Any]:
    """Return what the pieces of a killed run must agree on to be taken over."""
    options = {name: value for name, value in vars(job).items() if name not in _NO_OPTION}
    for name in ("text", "plan_file"):
        path = getattr(job, name)
        if path is not None:
            with suppress(OSError):  # who reads it tells what is wrong
                options[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    with open_checkpoint(job.model) as checkpoint:
        return content_key(checkpoint, options)


class _Recipe:
    """One run: what has been made so far lies in the work folder."""

    def __init__(self, job: Job, work: Path, journal: Journal, progress: Progress) -> None:
        self._job, self._work, self._journal, self._progress = job, work, journal, progress
        self._out = job.destination
        self._calibration: Calibration | None = None
        self._allocation: Allocation | None = None
        self._tried: tuple[Tried, ...] = ()
        self._tuning: TuneRecord | None = None
        self._search: Search | None = None
        self._transforms = asked_for(job.transforms)
        self._vectors: Mapping[str, Vectors] = {}
        self._path = job.statistics or self._learned()
        self._follows = job.follows(self._path)
        with open_checkpoint(job.model) as checkpoint:
            self._statistics = statistics_of(open_source(checkpoint, allow_requantize=True), self._path)
        self._tokens = held_out_tokens(job.model, self._statistics)
        if job.tune and (self._statistics.held_chunks or 0) < 1:
            raise BitsmithError("tuning needs held-out chunks, and these have none", path=self._path)

    def _learned(self) -> Path:
        """Return statistics of the job's text, collected now or by a killed run."""
        statistics, text = self._work / "statistics", self._job.text
        if text is None:
            text = write_default_text(self._work / "python-standard-library.txt")
        if _LEARNED not in self._journal.entries:
            self._calibration = calibrate(
                self._job.model, text, statistics, overwrite=True, progress=self._progress
            )
            self._journal.add(_LEARNED, self._calibration.text_sha256)
        return statistics

    def allocation(self, goal: Target) -> Allocation:
        """Return plans for the goal; sensitivities are those of the weights before transforms."""
        transforms: Sequence[Transform] = asked_for(self._job.transforms)
        if self._job.searches:
            with open_checkpoint(self._job.model) as checkpoint:
                transforms = all_that_may_apply(model_of(checkpoint))
        return allocate(
            self._job.model, self._statistics, goal, transforms=transforms, progress=self._progress
        )

    def search(self, planned: Plan) -> None:
        """Find the transforms that help where types are as planned."""
        with open_checkpoint(self._job.model) as checkpoint, open_model(self._job.model) as network:
            self._search = search(
                network,
                model_of(checkpoint),
                block_formats(planned),
                self._statistics,
                self._job.rounder,
                self._tokens,
                progress=self._progress,
            )
        self._transforms = tuple(one.transform for one in self._search.applied)
        self._vectors = {one.transform.name: one.vectors for one in self._search.applied}

    def allocate(self, goal: Target) -> None:
        """Choose the types: write and measure the candidates, keep the best."""
        self._allocation = self.allocation(goal)
        if self._job.searches:
            self.search(self._allocation.plans[0])
        records: dict[Path, Record] = {}

        def write(plan: Plan, number: int) -> Path:
            plan = replace(plan, transforms=tuple(map(str, self._transforms)))
            plan_file, file = (self._work / f"candidate-{number}{end}" for end in (".yaml", ".gguf"))
            self._write_plan(plan, plan_file, None)
            records[file] = self._compress(file, plan_file=plan_file)
            return file

        self._tried = pick(self._job.model, self._allocation, write, self._tokens, self._progress)
        best = self._tried[0]
        self._file, self._record = best.file, records[best.file]
        if self._follows:
            self._follow(best)

    def _follow(self, best: Tried) -> None:
        """Write the best plan once more with sequential statistics; keep that where it measures better."""
        file = self._work / "sequential.gguf"
        record = self._compress(file, follows=True, plan_file=best.file.with_suffix(".yaml"))
        found = held_out_kld(self._job.model, file, self._tokens, self._progress)
        name = f"{best.name}, sequential"
        self._tried = (*self._tried, replace(best, name=name, file=file, measures=found))
        if found["mean_kld"].value < best.mean_nats:
            self._file, self._record = file, record

    def write(self) -> None:
        """Write the types that were asked for."""
        self._file = self._work / "plain.gguf"
        types = self._job.types
        if self._job.searches:
            self.search(plan_for(self._job.model, statistics=self._path, **types))
        types["transforms"] = self._transforms
        self._record = self._compress(self._file, follows=self._follows, **types)

    def tune(self) -> None:
        """Fit what costs no bytes."""
        tokens = self._statistics.tokens()
        if tokens is None:
            raise BitsmithError(
                "tuning needs tokens, and an imatrix holds none; pass statistics made by calibrate",
                path=self._path,
            )
        tuned, steps = self._work / "tuned.gguf", self._job.tune_steps
        defaults = TuneOptions()
        options = replace(
            defaults,
            steps=defaults.steps if steps is None else steps,
            window_tokens=min(defaults.window_tokens, tokens[0].shape[1]),
        )
        self._tuning = tune(
            self._job.model,
            self._file,
            tuned,
            *tokens,
            options,
            applied=self._record.applied,
            overwrite=True,
            progress=self._progress,
            say_cost=lambda seconds: self._progress(f"tuning takes about {seconds:,.0f} s", 0, 1),
        )
        self._file = tuned

    def finish(self, started: float) -> Made:
        """Measure the file and move it to its place."""
        measured = held_out_kld(self._job.model, self._file, self._tokens, self._progress)
        check_output(self._out, self._job.overwrite)
        if self._allocation is not None:
            nats = {one.plan.digest: one.tensor_nats for one in self._allocation.candidates}
            self._write_plan(self._record.plan, _plan_file(self._job), nats.get(self._record.plan.digest))
        record = self._recorded()
        self._file.replace(self._out)
        chunks, ctx = self._tokens.shape
        times = {"seconds": time.monotonic() - started, "peak_memory_bytes": peak_memory_bytes()}
        facts = vars(record) | times
        return Made(
            **facts,
            calibration=self._calibration,
            allocation=self._allocation,
            tried=self._tried,
            search=self._search,
            tuning=self._tuning,
            measured=measured,
            protocol=f"{PROTOCOL}; held-out part of {self._statistics.text or 'the text'}, "
            f"context {ctx} tokens, {chunks} chunks; {INTERVAL}",
        )

    def _recorded(self) -> Record:
        """Return the record of what becomes the output, and write it beside; tuned tensors are read back."""
        with open_checkpoint(self._job.model) as checkpoint:
            facts = source_facts(checkpoint, self._out)
        record = replace(self._record, out=self._out, file_bytes=self._file.stat().st_size, source=facts)
        if self._tuning is not None:
            errors = gguf_errors(self._job.model, self._file, record.applied, self._progress)
            tensors = [replace(one, relative_error=errors[one.gguf_name]) for one in record.tensors]
            record = replace(record, tensors=tuple(tensors))
        return with_manifest(record, {"": self._file}, tuned=self._tuning is not None)

    def _compress(self, file: Path, *, follows: bool = False, **types: Any) -> Record:
        with ExitStack() as stack:

            def follow(statistics: Statistics, specs: Sequence[TensorSpec]) -> Statistics:
                folder = self._work / "sequential"
                return stack.enter_context(sequential(self._job.model, statistics, specs, folder))

            return compress(
                self._job.model,
                file,
                statistics=self._path,
                rounder=self._job.rounder,
                follow=follow if follows else None,
                vectors=self._vectors,
                overwrite=True,
                progress=self._progress,
                **types,
            )

    def _write_plan(self, plan: Plan, path: Path, nats: Mapping[str, float] | None) -> None:
        with open_checkpoint(self._job.model) as checkpoint:
            transforms = [transform_of(name) for name in plan.transforms]
            source = open_source(checkpoint, transforms, allow_requantize=True)
            write_plan(plan, path, source, nats, overwrite=True)
