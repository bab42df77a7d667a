"""Recipes of a study as jobs of `compress`: what each writes, under which name, and which cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError, printable
from bitsmith.run.overrides import split_rule
from bitsmith.run.study_file import AUTO, SAHC_RECIPE, Output, Recipe, Study

_NAMES: dict[Output, str] = {"gguf": "model.gguf", "cellm": "model.cellm", "folder": "model"}
_EITHER = ("F16", "BF16")
"""Types of a GGUF and of another output: a GGUF, unless the recipe says otherwise."""

_FIELDS = {
    "type": "type_name",
    "recipe": "recipe",
    "transforms": "transforms",
    "target": "target",
    "fit": "fit",
    "ctx": "ctx_tokens",
    "chunks": "chunks",
    "ppl_limit": "ppl_limit",
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


def output_of(recipe: Recipe) -> Output:
    """Return what a recipe writes: as it says, else as its `recipe` or its type does, else a GGUF."""
    from bitsmith.run.folder_layout import takes  # noqa: PLC0415 (loads all formats)
    from bitsmith.run.job import SPI  # noqa: PLC0415

    if recipe.output is not None:
        return recipe.output
    if recipe.recipe in (SPI, SAHC_RECIPE):
        return "folder"
    wanted = (recipe.type or "").upper()
    if recipe.recipe is not None or wanted in ("", *_EITHER):
        return "gguf"
    if takes(wanted):
        return "folder"
    return "cellm" if _is_cellm(wanted) else "gguf"


def model_name(recipe: Recipe) -> str:
    """Return what a recipe's model is called in its artifact."""
    return _NAMES[output_of(recipe)]


def model_path(study: Study, model: str, name: str) -> Path:
    """Return the path that the printed commands give a recipe's model."""
    suffix = Path(model_name(study.recipes[name])).suffix
    stem = f"{model}-{name}"
    if not suffix and Path(stem).suffix in (".gguf", ".cellm"):  # a suffix would say what is written
        stem += "-folder"
    return Path(stem + suffix)


def set_options(recipe: Recipe) -> set[str]:
    """Return the options that a recipe sets to something other than the default, `output` left out."""
    fields = type(recipe).model_fields
    given = {name for name in recipe.model_fields_set if getattr(recipe, name) != fields[name].default}
    return given - {"output"}


def job_fields(study: Study, recipe: Recipe) -> dict[str, Any]:
    """Return the fields of `Job` that a recipe sets, JSON-able; statistics of a calibration are left out."""
    found: dict[str, Any] = {
        _FIELDS[name]: getattr(recipe, name) for name in set_options(recipe) & set(_FIELDS)
    }
    if recipe.tensor_type:
        found["tensor_types"] = [list(pair) for rule in recipe.tensor_type if (pair := split_rule(rule))]
    if recipe.ignore:
        found["ignore"] = list(recipe.ignore)
    if recipe.stats not in (None, AUTO):
        found["statistics"] = str(study.place(str(recipe.stats)))
    if recipe.text is not None:
        found["text"] = str(study.text(recipe.text))
    if recipe.plan is not None:
        found["plan_file"] = str(study.place(recipe.plan))
    return found


def job_of(model: Path, out: Path, fields: Mapping[str, Any]) -> Any:
    """Return the `Job` that `job_fields` describes."""
    from bitsmith.run.job import Job  # noqa: PLC0415 (loads all formats)

    known = dict(fields)
    for listed in ("tensor_types", "ignore"):
        if listed in known:
            known[listed] = tuple(tuple(one) if isinstance(one, list) else one for one in known[listed])
    known |= {key: Path(known[key]) for key in ("text", "plan_file", "statistics") if known.get(key)}
    return Job(model=model, out=out, overwrite=True, **known)


def refuse_recipes(study: Study) -> None:
    """Refuse a recipe that none of the study's models can be compressed by, before anything runs.

    Where some can, the others' tasks fail and say why. What only a measurement tells is not asked here: a
    size is read, not allocated, and the linears of recipe `spi` are not ranked. Raises BitsmithError with the
    recipe's line and name, and what the first model is refused for.
    """
    for name, recipe in study.recipes.items():
        refused = [_refused(study, study.model(model), recipe) for model in study.models]
        if all(refused):
            raise study.refusal(("recipes", name), refused[0])


def _refused(study: Study, model: Path, recipe: Recipe) -> str:
    try:
        _plan(model, recipe, job_fields(study, recipe))
    except BitsmithError as error:
        return printable(str(error), 400)
    return ""


def _plan(model: Path, recipe: Recipe, fields: Mapping[str, Any]) -> None:
    from bitsmith.run import compress  # noqa: PLC0415 (loads all formats)
    from bitsmith.run.critical import parse_critical, rule_named  # noqa: PLC0415
    from bitsmith.run.encode import check_rounder  # noqa: PLC0415
    from bitsmith.run.folder import KEPT, plan_folder  # noqa: PLC0415

    job = job_of(model, Path(model_name(recipe)), fields)
    output = compress.output_of(job)
    if recipe.stats is None and recipe.text is None:
        check_rounder(job.rounder, None, None)
    if output == "gguf":
        resolved = job.resolved()
        resolved.check()
        if resolved.goal() is not None:
            return
    if output == "spi":
        _ = recipe.critical is None or parse_critical(recipe.critical)
        _ = recipe.by is None or rule_named(recipe.by)
        plan_folder(model, KEPT)
        return
    compress.plan(job)


def _is_cellm(wanted: str) -> bool:
    from bitsmith.run.cellm import parse_kind  # noqa: PLC0415 (loads all formats)

    try:
        parse_kind(wanted)
    except BitsmithError:
        return False
    return True
