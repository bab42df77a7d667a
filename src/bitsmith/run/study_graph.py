"""A study's tasks: what each model × recipe × evaluation takes, and the commands that do the same by hand."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitsmith.run.study_file import AUTO, SAHC_RECIPE, Evaluation, Recipe, Study
from bitsmith.run.task import Task

_FIELDS = {
    "type": "type_name",
    "recipe": "recipe",
    "transforms": "transforms",
    "target": "target",
    "fit": "fit",
    "ctx": "ctx_tokens",
    "rounder": "rounder",
    "sequential": "sequential",
    "tune": "tune",
    "tune_steps": "tune_steps",
    "pure": "pure",
    "no_fallback": "no_fallback",
    "group": "group",
    "like_seed": "like_seed",
    "select": "selection",
    "critical": "critical",
    "by": "by",
    "seed": "seed",
}
"""Options of a recipe and the fields of `Job` that they are."""


def graph_of(study: Study) -> list[Task]:
    """Return the tasks of a study; each needs those whose artifacts its parameters name.

    A model is inspected, calibrated once for all recipes that ask for statistics, and run once over every
    evaluation's text; each recipe is compressed once, then measured on every text and sampled.
    """
    graph = _Graph(study)
    for model in study.models:
        graph.add_model(model)
    return graph.tasks


def named(kind: str, *parts: str) -> str:
    """Return a task's name: `compress tiny/q4`."""
    return f"{kind} {'/'.join(parts)}"


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

    def add_model(self, model: str) -> None:
        """Add all tasks of one model."""
        study, source = self._study, {"model": str(self._study.model(model))}
        if study.inspect:
            self._add(named("inspect", model), "inspect", source)
        if study.assay:
            self._add(named("assay", model), "assay", source)
        if any(recipe.stats == AUTO for recipe in study.recipes.values()):
            self._add(named("calibrate", model), "calibrate", source | self._calibration())
        for evaluation in study.evaluations:
            name = named("reference", model, window_name(study, evaluation))
            self._add(name, "reference", source | self._window(evaluation))
        self._add_sample(named("generate", model), source)
        for recipe in study.recipes:
            self._add_recipe(model, recipe, source)

    def _add_recipe(self, model: str, name: str, source: dict[str, Any]) -> None:
        recipe, made = self._study.recipes[name], named("compress", model, name)
        if recipe.recipe == SAHC_RECIPE:
            window = {"ctx_tokens": recipe.ctx, "chunks": recipe.chunks, "text": self._text(recipe)}
            self._add(made, "sahc", source | {key: one for key, one in window.items() if one is not None})
        else:
            self._add(made, "compress", source | self._options(recipe, model))
        for evaluation in self._study.evaluations:
            where = window_name(self._study, evaluation)
            states = {"states": named("reference", model, where), "candidate": made}
            self._add(
                named("evaluate", model, name, where),
                "evaluate",
                source | self._window(evaluation) | states,
            )
        sampled: dict[str, Any] = {"model": made}
        if recipe.output == "cellm":
            sampled["tokenizer"] = source["model"]
        self._add_sample(named("generate", model, name), sampled)

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

    def _text(self, recipe: Recipe) -> str:
        return "" if recipe.text is None else str(self._study.text(recipe.text))

    def _options(self, recipe: Recipe, model: str) -> dict[str, Any]:
        """Return the fields of `Job` that a recipe sets."""
        params: dict[str, Any] = {
            _FIELDS[name]: getattr(recipe, name) for name in _set(recipe) & set(_FIELDS)
        }
        params["output"] = recipe.model_name
        if recipe.tensor_type:
            rules = [rule.rpartition("=") for rule in recipe.tensor_type]
            params["tensor_types"] = [[pattern, wanted] for pattern, _, wanted in rules]
        if recipe.ignore:
            params["ignore"] = list(recipe.ignore)
        if recipe.stats is not None:
            given = recipe.stats
            params["statistics"] = (
                named("calibrate", model) if given == AUTO else str(self._study.place(given))
            )
        if recipe.text is not None:
            params["text"] = self._text(recipe)
        if recipe.plan is not None:
            params["plan_file"] = str(self._study.place(recipe.plan))
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


_PLACES = ("model", "text", "candidate", "statistics", "plan_file", "tokenizer")


def compress_command(study: Study, model: str, name: str, out: Path) -> str:
    """Return the command that makes the same bytes as a recipe's task."""
    recipe = study.recipes[name]
    words = ["bitsmith", "compress", str(study.model(model)), "-o", str(out)]
    for option in sorted(_set(recipe) - {"output"}):
        value = getattr(recipe, option)
        if option == "stats" and value == AUTO:
            value = f"{model}-statistics"
        if option in ("plan", "stats") and value != f"{model}-statistics":
            value = str(study.place(value))
        if option == "text":
            value = str(study.text(value))
        words += _flag(option.replace("_", "-"), value)
    return shlex.join(words)


def calibrate_command(study: Study, model: str) -> str:
    """Return the command that collects the statistics that the study uses; empty without a calibration."""
    wanted = study.calibration
    if wanted is None:
        return ""
    words = ["bitsmith", "calibrate", str(study.model(model)), "--text", str(study.text(wanted.text))]
    words += ["--ctx", str(wanted.ctx), *_flag("chunks", wanted.chunks), *_flag("block", wanted.block)]
    words += [] if wanted.saliency else ["--no-saliency"]
    return shlex.join([*words, "-o", f"{model}-statistics"])


def evaluate_command(study: Study, model: str, evaluation: Evaluation, out: Path) -> str:
    """Return the command that measures a result as the study does."""
    words = [
        "bitsmith",
        "evaluate",
        str(study.model(model)),
        str(out),
        "--text",
        str(study.text(evaluation.text)),
    ]
    return shlex.join([*words, "--ctx", str(evaluation.ctx), *_flag("chunks", evaluation.chunks)])


def _set(recipe: Recipe) -> set[str]:
    """Return the options that a recipe sets to something other than the default."""
    fields = type(recipe).model_fields
    return {name for name in recipe.model_fields_set if getattr(recipe, name) != fields[name].default}


def _flag(option: str, value: Any) -> list[str]:
    if value is None or (value is False and option != "sequential"):
        return []
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, tuple):
        return [word for one in value for word in (f"--{option}", str(one))]
    return [f"--{option}", str(value)]
