"""What measures the rows of the merge experiments: paired activations, plans and trials, each once."""

from __future__ import annotations

import time
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitsmith.errors import BitsmithError, OutputError, printable
from bitsmith.lab.distillation import DistillOptions, distilled
from bitsmith.lab.merge_cases import (
    PARTS,
    AnyCase,
    Distilled,
    Merged,
    Original,
    Source,
    Task,
    Turned,
    alpha_facts,
    alphas_of,
    plan_facts,
)
from bitsmith.lab.merge_cost import SAMPLES
from bitsmith.lab.merge_ranges import over_layers
from bitsmith.lab.merge_turns import alike_when_turned
from bitsmith.passes.transform import Model, model_of
from bitsmith.progress import Progress
from bitsmith.run.merge_diagnostics import merge_diagnostics
from bitsmith.run.merge_plan import MergePlan, merge_plan
from bitsmith.run.merge_trial import Trial, TrialMeasure
from bitsmith.run.merge_weights import Bench as Shared
from bitsmith.run.merge_weights import decide
from bitsmith.run.paired import paired
from bitsmith.run.paired_inputs import LayerMap
from bitsmith.store import open_checkpoint
from bitsmith.store.atomic import atomic_file, remove
from bitsmith.store.journal import Journal
from bitsmith.store.paired import MANIFEST_NAME, Paired, open_paired

Json = dict[str, Any]

_PLANS_KEPT = 3
_TOLD = (
    "fit_tokens",
    "held_tokens",
    "trained_tokens",
    "best_step",
    "held_loss_before_nats",
    "held_loss_after_nats",
    "parameters",
    "seconds",
    "peak_memory_bytes",
    "options",
)


@dataclass(frozen=True)
class Setting:
    """Two models, the texts by task, and how long they are run: `tokens` of each text at most."""

    teacher: Path
    student: Path
    texts: dict[Task, Path]
    names: dict[Task, str]
    tokens: dict[Task, int]
    ctx_tokens: int
    chunks: int
    seed: int


class Bench:
    """Measures rows; what is done is in the journal, paired activations lie in `folder` until the end."""

    def __init__(self, setting: Setting, folder: Path, journal: Journal, progress: Progress) -> None:
        self._setting, self._folder, self._journal, self._progress = setting, folder, journal, progress
        self._trials: dict[Task, Trial] = {}
        self._plans: OrderedDict[str, MergePlan] = OrderedDict()
        self._opened = ExitStack()
        self._models: tuple[Model, Model] | None = None
        folder.mkdir(exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def row(self, case: AnyCase) -> Json:
        """Return a row: its three figures, or why they are `unmeasured`, and facts."""
        entries = self._journal.entries
        if case.key not in entries:
            started = time.monotonic()
            try:
                found = self._measured(case)
            except OutputError:
                raise
            except BitsmithError as error:
                found = _figures(None) | {"unmeasured": printable(str(error.message), 500)}
            self._journal.add(case.key, found | {"seconds": time.monotonic() - started})
        facts: Json = entries[case.key]
        said = {"label": case.label, "kind": case.kind, "judged_on": self._setting.names[case.judged]}
        return said | ({"series": case.series} if case.series else {}) | facts

    def _measured(self, case: AnyCase) -> Json:
        if isinstance(case, Original):
            trial = self._trial(case.judged)
            return _figures(trial.student if case.side == "student" else trial.teacher)
        if isinstance(case, Distilled):
            return self._distilled(case)
        if isinstance(case, Turned):
            return self._turned(case)
        return self._merged(case)

    def _merged(self, case: Merged) -> Json:
        plan, shares = self._plan(case), case.shares
        facts = self._found_on(case.source) | plan_facts(plan)
        if case.blend:
            facts["blend"] = [[self._setting.names[one.task], weight] for one, weight in case.blend]
        if case.diagnosed:
            facts |= self._diagnosed(case, plan)
        placed = {"alpha": shares.alpha, "layer": shares.layer}
        facts |= {name: value for name, value in placed.items() if value is not None}
        trial, alphas = self._trial(case.judged), alphas_of(plan, shares)
        if not shares.decided:
            return _figures(trial.measure(plan.view(alphas))) | facts | alpha_facts(alphas)
        decision = decide(Shared(trial, plan.view), alphas, sweep_budget=shares.budget, ends=plan.recipe.ends)
        judged = [one.measure for one in decision.tried if one.half == "judge"]
        measure = judged[-1] if decision.adopted and judged else trial.split()[1].student
        facts |= {"adopted": decision.adopted, "decision": decision.reason, "trials": len(decision.tried)}
        return _figures(measure) | facts | alpha_facts(decision.alphas)

    def _distilled(self, case: Distilled) -> Json:
        """Return the student trained on the text; its folder goes again."""
        setting = self._setting
        tokens = self._tokens_of(case.source)
        target = self._folder / "distilled"
        made = distilled(
            setting.teacher,
            setting.student,
            self._text(case.source),
            target,
            tokens=tokens,
            ctx_tokens=setting.ctx_tokens,
            samples=SAMPLES,
            steps=max(1, tokens // (setting.ctx_tokens * DistillOptions.batch_chunks)),
            seed=setting.seed,
            overwrite=True,
            progress=self._progress,
        ).to_json()
        found = _figures(self._trial(case.judged).measure(target))
        remove(target)
        facts = {"found_on": setting.names[case.source.task], "tokens": tokens}
        return found | facts | {"distillation": {name: made[name] for name in _TOLD}}

    def _turned(self, case: Turned) -> Json:
        """Return how alike heads are, turned by each part of the text and judged on what is held out."""
        plan = self._plan(Merged(""))
        held, *fits = (self._paired(source) for source in case.sources)
        found = alike_when_turned(plan, fits, held, case.span)
        return _figures(None) | self._found_on(case.sources[1]) | found

    def _diagnosed(self, case: Merged, plan: MergePlan) -> Json:
        key = f"diagnostics {self._plan_key(case)}"
        if key not in self._journal.entries:
            self._journal.add(key, over_layers(merge_diagnostics(plan).to_json()))
        found: Json = self._journal.entries[key]
        return found

    def _plan(self, case: Merged) -> MergePlan:
        key = self._plan_key(case)
        if key not in self._plans:
            teacher, student = self._both()
            blend = [(self._paired(one), weight) for one, weight in case.blend]
            made = merge_plan(self._paired(case.source), teacher, student, case.recipe, blend)
            self._plans[key] = made
            if len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _plan_key(self, case: Merged) -> str:
        return replace(case, shares=Merged("").shares, judged="held", diagnosed=False).key

    def _both(self) -> tuple[Model, Model]:
        if self._models is None:
            teacher, student = (
                model_of(self._opened.enter_context(open_checkpoint(path)))
                for path in (self._setting.teacher, self._setting.student)
            )
            self._models = teacher, student
        return self._models

    def _trial(self, task: Task) -> Trial:
        setting = self._setting
        if task not in self._trials:
            self._trials[task] = self._opened.enter_context(
                Trial(
                    setting.student,
                    setting.texts[task],
                    ctx_tokens=setting.ctx_tokens,
                    chunks=setting.chunks,
                    seed=setting.seed,
                    teacher=setting.teacher,
                )
            )
        return self._trials[task]

    def _found_on(self, source: Source) -> Json:
        manifest = self._paired(source).manifest
        return {
            "found_on": self._setting.names[source.task],
            "tokens": manifest.chunks * manifest.ctx_tokens,
            "part": source.part,
            "layer_map": manifest.layer_map,
        }

    def _paired(self, source: Source) -> Paired:
        """Return a source's activations; `fixed` ones pair layers as the task's whole text has them."""
        if not source.fixed:
            return self._pairing(source, "cka")
        layers = self._paired(Source()).layer_map
        free = replace(source, fixed=False)
        if self._name(free) in self._journal.entries:
            found = self._pairing(free, "cka")
            if found.layer_map == layers:
                return found
        return self._pairing(source, layers)

    def _name(self, source: Source) -> str:
        return f"paired-{source.task}-{self._tokens_of(source)}-{source.part}{'-fixed' * source.fixed}"

    def _pairing(self, source: Source, layers: LayerMap) -> Paired:
        """Return what this run, or the one it goes on with, has in its folder; else make it."""
        name = self._name(source)
        path, entries = self._folder / name, self._journal.entries
        if name in entries and (path / MANIFEST_NAME).exists():
            return open_paired(path)
        made = paired(
            self._setting.teacher,
            self._setting.student,
            self._text(source),
            path,
            tokens=self._tokens_of(source),
            ctx_tokens=self._setting.ctx_tokens,
            layer_map=layers,
            samples=SAMPLES,
            sparse=True,
            overwrite=True,
            progress=self._progress,
        )
        self._journal.add(name, made.digest)
        return made

    def _tokens_of(self, source: Source) -> int:
        ctx = self._setting.ctx_tokens
        if source.tokens is not None:
            return source.tokens // ctx * ctx
        limit = self._setting.tokens[source.task]
        return min(limit, self._setting.chunks * ctx) if source.task == "held" else limit

    def _text(self, source: Source) -> Path:
        """Return the text of a source: of a part of a text the rest of it from there on."""
        whole = self._setting.texts[source.task]
        if source.part == 0:
            return whole
        path = self._folder / f"{source.task}-{source.part}.txt"
        read = whole.read_text("utf-8")
        with atomic_file(path, overwrite=True) as stream:
            stream.write(read[len(read) * source.part // PARTS :].encode())
        return path


def _figures(measure: TrialMeasure | None) -> Json:
    """Return a row's three figures."""
    if measure is None:
        return {"ppl": None, "ppl_over_student": None, "kld_to_teacher": None, "unmeasured": ""}
    return {**measure.to_json(), "unmeasured": ""}
