"""The recipe `auto`: calibrate, allocate, round, measure the candidates, keep the best, tune it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError, OutputError
from bitsmith.progress import Progress, silent
from bitsmith.run.allocate import Allocation, Tried, allocate, held_out_kld, held_out_tokens, pick
from bitsmith.run.budget import Target
from bitsmith.run.calibrate import Calibration, calibrate
from bitsmith.run.corpus import write_default_text
from bitsmith.run.evaluate import INTERVAL, PROTOCOL
from bitsmith.run.execute import Record, check_output, compress, peak_memory_bytes, write_manifest
from bitsmith.run.job import Job, Made
from bitsmith.run.plan import Plan, open_source
from bitsmith.run.plan_file import write_plan
from bitsmith.run.tune import TuneOptions, TuneRecord, tune
from bitsmith.store import open_checkpoint
from bitsmith.store.statistics import MANIFEST_NAME, Statistics, open_statistics

PLAN_SUFFIX = ".plan.yaml"


def make(job: Job, goal: Target | None, progress: Progress = silent) -> Made:
    """Write the job's file: as `compress` does, with what needs the model's forward as well.

    Without statistics they are collected on the job's text first, else on `default_text`. With a `goal` the
    types are allocated: several plans near the optimum are written and measured on held-out tokens, and the
    best is kept; its plan lies in `OUT.plan.yaml`, to be edited and passed back. With `tune` the values that
    cost no bytes are fitted by KL to the original. A killed run goes on from its work folder `.OUT.recipe`.

    Raises BitsmithError for types beside a goal, else as `calibrate`, `allocate`, `compress` and `tune` do.
    """
    started = time.monotonic()
    check_output(job.destination, job.overwrite)
    run = _Recipe(job, progress)
    if goal is not None:
        run.allocate(goal)
    else:
        run.write()
    if job.tune:
        run.tune()
    return run.finish(started)


def plan_target(job: Job, goal: Target, progress: Progress = silent) -> Plan:
    """Return the plan that the additive model predicts to be best for `goal`; nothing is written.

    Raises as `make` does.
    """
    run = _Recipe(job, progress)
    planned = run.allocation(goal).plans[0]
    run.clean()
    return planned


class _Recipe:
    """One run: what has been made so far lies in the work folder."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job, self._progress = job, progress
        self._out = job.destination
        self._work = self._out.absolute().with_name(f".{self._out.name}.recipe")
        try:
            self._work.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot be made: {error.strerror or error}", path=self._work) from error
        self._calibration: Calibration | None = None
        self._allocation: Allocation | None = None
        self._tried: tuple[Tried, ...] = ()
        self._tuning: TuneRecord | None = None
        with open_checkpoint(job.model) as checkpoint:
            specs = [tensor.spec for tensor in open_source(checkpoint).tensors]
        self._path = job.statistics or self._learned()
        self._statistics: Statistics = open_statistics(self._path, specs)
        self._tokens = held_out_tokens(job.model, self._statistics)

    def _learned(self) -> Path:
        """Return statistics of the job's text, collected now or by a killed run."""
        statistics, text = self._work / "statistics", self._job.text
        if text is None:
            text = write_default_text(self._work / "python-standard-library.txt")
        if not (statistics / MANIFEST_NAME).exists():
            self._calibration = calibrate(self._job.model, text, statistics, progress=self._progress)
        return statistics

    def allocation(self, goal: Target) -> Allocation:
        """Return plans for the goal."""
        job = self._job
        if job.type_name or job.plan_file or job.pure or job.tensor_types:
            raise BitsmithError(
                "a target chooses the types itself; pass it without types, a plan or overrides"
            )
        return allocate(job.model, self._statistics, goal, progress=self._progress)

    def allocate(self, goal: Target) -> None:
        """Choose the types: write and measure the candidates, keep the best."""
        self._allocation = self.allocation(goal)
        records: dict[Path, Record] = {}

        def write(plan: Plan, number: int) -> Path:
            plan_file, file = (self._work / f"candidate-{number}{end}" for end in (".yaml", ".gguf"))
            self._write_plan(plan, plan_file, None)
            records[file] = self._compress(file, plan_file=plan_file)
            return file

        self._tried = pick(self._job.model, self._allocation, write, self._tokens, self._progress)
        best = self._tried[0]
        self._file, self._record = best.file, records[best.file]

    def write(self) -> None:
        """Write the types that were asked for."""
        job = self._job
        self._file = self._work / "plain.gguf"
        self._record = self._compress(
            self._file,
            type_name=job.type_name,
            plan_file=job.plan_file,
            pure=job.pure,
            tensor_types=job.tensor_types,
            no_fallback=job.no_fallback,
        )

    def tune(self) -> None:
        """Fit what costs no bytes."""
        tokens = self._statistics.tokens()
        if tokens is None:
            raise BitsmithError(
                "tuning needs tokens, and an imatrix holds none; pass statistics made by calibrate",
                path=self._path,
            )
        tuned, steps = self._work / "tuned.gguf", self._job.tune_steps
        options = TuneOptions() if steps is None else TuneOptions(steps=steps)
        self._tuning = tune(
            self._job.model,
            self._file,
            tuned,
            *tokens,
            options,
            overwrite=True,
            progress=self._progress,
        )
        self._file = tuned

    def finish(self, started: float) -> Made:
        """Measure the file, move it to its place and drop the work folder."""
        measured = held_out_kld(self._job.model, self._file, self._tokens, self._progress)
        if self._allocation is not None:
            nats = {one.plan.digest: one.tensor_nats for one in self._allocation.candidates}
            plan_file = self._out.with_name(self._out.name + PLAN_SUFFIX)
            self._write_plan(self._record.plan, plan_file, nats.get(self._record.plan.digest))
        check_output(self._out, self._job.overwrite)
        self._file.replace(self._out)
        self.clean()
        chunks, ctx = self._tokens.shape
        facts = vars(self._record) | {
            "out": self._out,
            "file_bytes": self._out.stat().st_size,
            "sha256": write_manifest(self._out),
            "seconds": time.monotonic() - started,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        return Made(
            **facts,
            calibration=self._calibration,
            allocation=self._allocation,
            tried=self._tried,
            tuning=self._tuning,
            measured=measured,
            protocol=f"{PROTOCOL}; held-out part of {self._statistics.text or 'the text'}, "
            f"context {ctx} tokens, {chunks} chunks; {INTERVAL}",
        )

    def clean(self) -> None:
        """Delete the work folder."""
        shutil.rmtree(self._work, ignore_errors=True)

    def _compress(self, file: Path, **types: Any) -> Record:
        return compress(
            self._job.model,
            file,
            statistics=self._path,
            rounder=self._job.rounder,
            overwrite=True,
            progress=self._progress,
            **types,
        )

    def _write_plan(self, plan: Plan, path: Path, nats: Mapping[str, float] | None) -> None:
        with open_checkpoint(self._job.model) as checkpoint:
            write_plan(plan, path, open_source(checkpoint), nats, overwrite=True)
