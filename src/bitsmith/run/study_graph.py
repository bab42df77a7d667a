"""A study's tasks: what each model × recipe × evaluation takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitsmith.run.study_file import AUTO, SAHC_RECIPE, Claims, Evaluation, Study
from bitsmith.run.study_merge import merge_params
from bitsmith.run.study_recipe import job_fields, model_name, output_of
from bitsmith.run.task import Task


def graph_of(study: Study) -> list[Task]:
    """Return the tasks of a study; each needs those whose artifacts its parameters name.

    A model is inspected, calibrated once for all that asks for statistics, and run once over every
    evaluation's text; each recipe is compressed once, then measured on every text and sampled. The claims are
    tested last. Then the same of each merge, once it is made; it and its recipes are measured against its
    student.
    """
    graph = _Graph(study)
    for model in study.models:
        graph.add_model(model, str(study.model(model)))
    for merge in study.merges:
        graph.add_merge(merge)
    return graph.tasks


def named(kind: str, *parts: str) -> str:
    """Return a task's name: `compress tiny/q4`; parts that are empty are left out."""
    return f"{kind} {'/'.join(part for part in parts if part)}"


def maker(model: str, recipe: str) -> str:
    """Return the task that makes a row: that of its recipe, or of the merge."""
    return named("compress" if recipe else "merge", model, recipe)


def window_name(study: Study, evaluation: Evaluation) -> str:
    """Return what an evaluation is called: its text, and the window where the text has several."""
    same = [one for one in study.evaluations if one.text == evaluation.text]
    if len(same) == 1:
        return evaluation.text
    return f"{evaluation.text}@{evaluation.ctx}x{evaluation.chunks or 'all'}"


class _Graph:
    """Collects tasks; a parameter that is the name of a task makes that task needed."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self.tasks: list[Task] = []

    def add_merge(self, merge: str) -> None:
        """Add what makes a merge, then all tasks of it as a model."""
        made = maker(merge, "")
        self._add(made, "merge", merge_params(self._study, merge))
        self._add_evaluations(merge, "")
        self.add_model(merge, made)

    def add_model(self, model: str, place: str) -> None:
        """Add all tasks of one model, that lies at `place` or is made by the task so named."""
        study, source = self._study, {"model": place}
        if study.inspect:
            self._add(named("inspect", model), "inspect", source)
        if study.assay:
            self._add(named("assay", model), "assay", source)
        if any(one is not None and one.stats == AUTO for one in (*study.recipes.values(), study.claims)):
            self._add(named("calibrate", model), "calibrate", source | self._calibration())
        for evaluation in study.evaluations if model in study.models else ():
            name = named("reference", model, window_name(study, evaluation))
            self._add(name, "reference", source | self._window(evaluation))
        self._add_sample(named("generate", model), source)
        for recipe in study.recipes:
            self._add_recipe(model, recipe, source)
        if study.claims is not None:
            self._add(named("claims", model), "claims", source | self._claims(study.claims, model))

    def _add_recipe(self, model: str, name: str, source: dict[str, Any]) -> None:
        recipe, made = self._study.recipes[name], maker(model, name)
        params = job_fields(self._study, recipe)
        if recipe.stats == AUTO:
            params["statistics"] = named("calibrate", model)
        if recipe.recipe == SAHC_RECIPE:
            del params["recipe"]
            self._add(made, "sahc", source | params)
        else:
            self._add(made, "compress", source | params | {"output": model_name(recipe)})
        self._add_evaluations(model, name)
        sampled: dict[str, Any] = {"model": made}
        if output_of(recipe) == "cellm":
            sampled["tokenizer"] = str(self._study.model(self._study.reference(model)))
        self._add_sample(named("generate", model, name), sampled)

    def _add_evaluations(self, model: str, recipe: str) -> None:
        reference = self._study.reference(model)
        for evaluation in self._study.evaluations:
            where = window_name(self._study, evaluation)
            params = {"model": str(self._study.model(reference)), **self._window(evaluation)}
            params |= {"states": named("reference", reference, where), "candidate": maker(model, recipe)}
            self._add(named("evaluate", model, recipe, where), "evaluate", params)

    def _add_sample(self, name: str, model: Mapping[str, Any]) -> None:
        wanted = self._study.generate
        if wanted is not None:
            sampling = {"temperature": wanted.temperature, "seed": wanted.seed}
            options = {"prompts": list(wanted.prompts), "tokens": wanted.tokens, "chat": wanted.chat}
            self._add(name, "generate", {**model, **options, "sampling": sampling})

    def _calibration(self) -> dict[str, Any]:
        wanted = self._study.calibration
        if wanted is None:
            return {}
        options = {"ctx_tokens": wanted.ctx, "chunks": wanted.chunks, "block": wanted.block}
        return options | {"saliency": wanted.saliency, "text": str(self._study.text(wanted.text))}

    def _window(self, evaluation: Evaluation) -> dict[str, Any]:
        text = str(self._study.text(evaluation.text))
        return {"text": text, "ctx_tokens": evaluation.ctx, "chunks": evaluation.chunks}

    def _claims(self, wanted: Claims, model: str) -> dict[str, Any]:
        study = self._study
        params: dict[str, Any] = {"text": str(study.text(wanted.text)), "ctx_tokens": wanted.ctx}
        params |= {"chunks": wanted.chunks, "seed": wanted.seed}
        if wanted.only is not None:
            params["only"] = list(wanted.only)
        if wanted.calibration is not None:
            params["calibration"] = str(study.text(wanted.calibration))
        if wanted.stats is not None:
            own = wanted.stats == AUTO
            params["statistics"] = named("calibrate", model) if own else str(study.place(wanted.stats))
        return params

    def _add(self, name: str, action: str, params: Mapping[str, Any]) -> None:
        known = {task.name for task in self.tasks}
        named_tasks = [value for value in params.values() if isinstance(value, str) and value in known]
        sources = [key for key in _PLACES if key in params and params[key] not in known]
        wanted = self._study.limits_of.get(action, self._study.limits)
        task = Task(
            name,
            action,
            dict(params),
            tuple(dict.fromkeys(named_tasks)),
            wanted.limits,
            wanted.retries,
            tuple(sources),
        )
        self.tasks.append(task)


_PLACES = (
    *("model", "text", "candidate", "statistics", "plan_file", "tokenizer", "calibration"),
    *("teacher", "student", "held"),
)
