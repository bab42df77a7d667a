"""What a study came to, and its JSON as `bitsmith.report.study_json` documents it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitsmith import __version__
from bitsmith.run.actions import ASSAY, GATE_LOG
from bitsmith.run.audit import read_audit
from bitsmith.run.gate import Judged, Verdict
from bitsmith.run.graph import Outcome
from bitsmith.run.merge_lines import merge_line
from bitsmith.run.spectrum_lines import spectrum_lines
from bitsmith.run.study_commands import model_commands, recipe_commands
from bitsmith.run.study_file import Row, Study
from bitsmith.run.study_graph import maker, named, window_name
from bitsmith.run.study_lines import claim_lines, gate_line
from bitsmith.run.task import Task
from bitsmith.run.task_state import Status
from bitsmith.store.hub_names import last_name

_STATUS = {
    Status.PENDING: "pending",
    Status.IN_PROGRESS: "running",
    Status.COMPLETED: "done",
    Status.BLOCKED: "blocked",
    Status.FAILED: "failed",
    Status.KILLED: "failed",
}
_PACKAGES = ("numpy", "torch", "transformers", "numba", "gguf", "ray")
MERGED = "merged"
"""The group of merges that no recipe compressed."""
JUDGE = "study"
"""Who, in the audit log, holds rows against the study's gates."""


@dataclass(frozen=True)
class StudyResult:
    """How a study ended: every task's outcome, the gates' verdicts by row, the audit log, the seconds.

    A row whose gate failed, or was not measured, is not `passed`. `sources` are SHA-256 of models and texts
    by what they are, `peers` points of others as the report has them.
    """

    study: Study
    tasks: tuple[Task, ...]
    outcomes: Mapping[str, Outcome]
    judged: Mapping[Row, tuple[Judged, ...]]
    audit: Path
    environment: Mapping[str, str]
    command: str
    seconds: float
    sources: Mapping[str, str] = field(default_factory=dict)
    peers: Sequence[Mapping[str, Any]] = ()

    @property
    def is_whole(self) -> bool:
        """Whether every task is done and every gate passed."""
        done = all(outcome.status is Status.COMPLETED for outcome in self.outcomes.values())
        return done and all(one.passed for row in self.judged.values() for one in row)

    def counts(self) -> dict[str, int]:
        """Return how many tasks ended as done, failed and blocked."""
        found = [_STATUS[outcome.status] for outcome in self.outcomes.values()]
        return {name: found.count(name) for name in ("done", "failed", "blocked")}

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values, in the report's schema."""
        study = self.study
        return {
            "kind": "study",
            "schema_version": 1,
            "bitsmith": __version__,
            "title": study.title or f"Study {Path(study.path).stem}",
            "summary": list(self._summary()),
            "artifacts": [
                *map(self._original, study.models),
                *(self._artifact(*row) for row in self.study.rows),
            ],
            "peers": list(self.peers),
            "protocols": list(self._protocols()),
            "gates": list(self._gates()),
            "tasks": [self._task_line(task) for task in self.tasks],
            "claims": list(self._claims()),
            "merges": list(self._merges()),
            "spectra": list(self._spectra()),
            "samples": list(self._samples()),
            "environment": dict(self.environment),
            "digests": list(self._digests()),
            "commands": [self.command],
            "seconds": self.seconds,
        }

    def result(self, *names: str) -> Mapping[str, Any]:
        """Return the result of the task so named; nothing where there is none."""
        outcome = self.outcomes.get(named(names[0], *names[1:]))
        return {} if outcome is None or outcome.result is None else outcome.result

    def _gates(self) -> Iterator[dict[str, Any]]:
        """Yield the study's log, and behind it those of recipes that judge themselves.

        Rows are judged at every run's end; the last time counts.
        """
        lines = list(read_audit(self.audit))
        last = {line.what: line for line in lines if line.who == JUDGE}
        kept = (line for line in lines if line.who != JUDGE or line is last[line.what])
        yield from (gate_line(asdict(line)) for line in kept)
        for model, recipe in self.study.rows:
            outcome = self.outcomes[maker(model, recipe)]
            own = None if outcome.path is None else outcome.path.parent / GATE_LOG
            if own is not None and own.is_file():
                for line in read_audit(own):
                    yield {**gate_line(asdict(line)), "artifact": f"{model}/{recipe}"}

    def _claims(self) -> Iterator[dict[str, Any]]:
        several = len(self._models) > 1
        for model in self._models:
            found = self.result("claims", model).get("claims", ())
            yield from claim_lines(found, model if several else "")

    def _spectra(self) -> Iterator[dict[str, Any]]:
        """Yield the spectra of every model that was assayed."""
        several = len(self._models) > 1
        for model in self._models if self.study.assay else ():
            outcome = self.outcomes[named("assay", model)]
            if outcome.path is not None:
                assay = json.loads((outcome.path / ASSAY).read_bytes())
                for line in spectrum_lines(assay):
                    yield line | ({"model": model} if several else {})

    def _merges(self) -> Iterator[dict[str, Any]]:
        for name in self.study.merges:
            found = self.result("merge", name)
            if found:
                yield merge_line(found["merge"], name)

    @property
    def _models(self) -> tuple[str, ...]:
        return (*self.study.models, *self.study.merges)

    def _summary(self) -> Iterator[str]:
        counts = self.counts()
        said = ", ".join(f"{number} {name}" for name, number in counts.items())
        yield f"{len(self.tasks)} tasks: {said}"
        for (model, recipe), judged in self.judged.items():
            for one in judged:
                if not one.passed:
                    yield f"{_row_name(model, recipe)}: {one.name} {one.outcome.value}"

    def _original(self, model: str) -> dict[str, Any]:
        study = self.study
        size = self.result("inspect", model)
        measures: dict[str, Any] = {}
        for evaluation in study.evaluations:
            window = window_name(study, evaluation)
            size = size or self.result("reference", model, window)
            rows = (row for row in study.rows if study.reference(row[0]) == model)
            found = (self.result("evaluate", *row, window) for row in rows)
            first = next((one["measures"]["ppl_ref"] for one in found if one), None)
            if first is not None:
                measures[self._measure_name("ppl_cand", window)] = first
        return {
            "name": model,
            "group": "original",
            "model": model,
            "path": str(study.model(model)),
            "is_original": True,
            "measures": measures,
            "protocol": self._first_window(),
            "sha256": self.sources.get(f"model {model}", ""),
            "commands": list(model_commands(study, model)),
            **_size(size),
        }

    def _artifact(self, model: str, recipe: str) -> dict[str, Any]:
        study, made = self.study, self.outcomes[maker(model, recipe)]
        measures: dict[str, Any] = {}
        lost = [] if made.status is Status.COMPLETED else [f"not made: {made.reason}"]
        for evaluation in study.evaluations:
            window = window_name(study, evaluation)
            outcome = self.outcomes[named("evaluate", model, recipe, window)]
            if outcome.result is None:
                lost.append(f"not measured on {window}: {outcome.reason}")
            for name, figure in (outcome.result or {}).get("measures", {}).items():
                measures[self._measure_name(name, window)] = figure
        facts = made.result or {}
        return {
            "name": _row_name(model, recipe),
            "group": recipe or MERGED,
            "what": _made_of(study, model),
            "model": model,
            "recipe": recipe or MERGED,
            "path": "" if made.path is None or "path" not in facts else str(made.path / facts["path"]),
            "measures": measures,
            "protocol": self._first_window(),
            "verdict": _verdict(self.judged.get((model, recipe), ())),
            "unmeasured": "; ".join(lost),
            "seconds": made.seconds or None,
            "sha256": facts.get("sha256", ""),
            "tensors": facts.get("tensors", []),
            "layers": facts.get("layers", []),
            "commands": list(
                recipe_commands(study, model, recipe) if recipe else model_commands(study, model)
            ),
            **_size(facts),
        }

    def _first_window(self) -> str:
        return window_name(self.study, self.study.evaluations[0]) if self.study.evaluations else ""

    def _measure_name(self, name: str, window: str) -> str:
        """Return a measure's name: alone in the first window, with the window's in the others."""
        return name if window == self._first_window() else f"{name} @ {window}"

    def _protocols(self) -> Iterator[dict[str, Any]]:
        for evaluation in self.study.evaluations:
            window = window_name(self.study, evaluation)
            rows = (self.result("evaluate", *row, window) for row in self.study.rows)
            settings = next((one["protocol"] for one in rows if one), None)
            yield {"name": window, "settings": settings or evaluation.model_dump(mode="json")}

    def _task_line(self, task: Task) -> dict[str, Any]:
        outcome = self.outcomes[task.name]
        return {
            "name": task.name,
            "action": task.action,
            "status": _STATUS[outcome.status],
            "attempts": outcome.attempts,
            "seconds": outcome.seconds,
            "needs": list(task.needs),
            "key": outcome.key,
            "why": "" if outcome.status is Status.COMPLETED else outcome.reason,
        }

    def _samples(self) -> Iterator[dict[str, Any]]:
        wanted = self.study.generate
        if wanted is None:
            return
        how = (
            "greedy" if wanted.temperature == 0 else f"temperature {wanted.temperature:g}, seed {wanted.seed}"
        )
        made = (row for row in self.study.rows if row[1])
        makers = [*((model,) for model in self._models), *made]
        for index, prompt in enumerate(wanted.prompts):
            passages = []
            for written in makers:
                found = self.result("generate", *written).get("samples")
                if found:
                    note = f"stopped: {found[index]['stopped']}"
                    passages.append(
                        {
                            "artifact": "/".join(written),
                            "how": how,
                            "text": found[index]["text"],
                            "note": note,
                        }
                    )
            yield {"prompt": prompt, "passages": passages}

    def _digests(self) -> Iterator[dict[str, str]]:
        yield from ({"what": what, "sha256": sha256} for what, sha256 in self.sources.items())
        for row in self.study.rows:
            outcome = self.outcomes[maker(*row)]
            if outcome.result is not None and "sha256" in outcome.result:
                yield {"what": _row_name(*row), "sha256": outcome.result["sha256"]}


def environment() -> dict[str, str]:
    """Return the versions and the machine that a study ran with."""
    found = {"bitsmith": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found |= {"processor": platform.machine(), "cpus": str(os.cpu_count() or 0)}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _row_name(model: str, recipe: str) -> str:
    return f"{model}/{recipe}" if recipe else model


def _made_of(study: Study, model: str) -> str:
    """Return what a merge is of; nothing for other models."""
    found = study.merges.get(model)
    return "" if found is None else f"{last_name(study.teacher(model))} merged into {found.student}"


def _size(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's bytes of files, its weights and `bpw` = 8 bytes of tensors / weights."""
    return {name: facts.get(name) for name in ("file_bytes", "weights", "bpw")}


def _verdict(judged: Sequence[Judged]) -> str:
    """Return the worst of a row's verdicts; nothing without gates."""
    outcomes = {one.outcome for one in judged}
    worst = next((one for one in (Verdict.FAIL, Verdict.UNMEASURED, Verdict.PASS) if one in outcomes), None)
    return "" if worst is None else worst.value
