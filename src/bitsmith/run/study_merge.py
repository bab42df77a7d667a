"""Merges of a study: what `merge` is asked for, and which cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitsmith.errors import BitsmithError, printable
from bitsmith.run.merge_recipe import RULE, MergeRecipe
from bitsmith.run.study_file import Merging, Study

SWEEP = "sweep"
SWEEP_TRIALS = 24
"""Trials of `alpha: sweep` without a budget, as on the command line."""

_RECIPE = ("map", "basis", "trunk", "heads", "ffn", "head", "alpha_max", "seed")
_OPTIONS = ("tokens", "chunks", "samples")


def merge_params(study: Study, name: str) -> dict[str, Any]:
    """Return the parameters of the task that makes a merge, JSON-able."""
    wanted = study.merges[name]
    places = {"teacher": study.teacher(name), "student": study.model(wanted.student)}
    places |= {"text": study.text(wanted.text)}
    if wanted.held is not None:
        places["held"] = study.text(wanted.held)
    options: dict[str, Any] = {
        "output": name,
        "ctx_tokens": wanted.ctx,
        "seed": wanted.seed,
        **_options(wanted),
    }
    return {
        **{key: str(path) for key, path in places.items()},
        **options,
        "recipe": _recipe(wanted).to_json(),
    }


def refuse_merges(study: Study) -> None:
    """Refuse a merge that cannot be, before anything runs.

    Raises BitsmithError with the merge's line and name, and what it is refused for.
    """
    if not study.merges:
        return
    from bitsmith.run.merge_inputs import MergeAsk, open_inputs  # noqa: PLC0415 (loads torch)

    for name in study.merges:
        try:
            with open_inputs(MergeAsk(**merge_options(merge_params(study, name)))):
                continue
        except BitsmithError as error:
            raise study.refusal(("merges", name), printable(str(error), 400)) from error


def merge_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `merge` and `MergeAsk` take of a task's parameters."""
    found = {key: value for key, value in params.items() if key not in ("recipe", "output")}
    for key in ("teacher", "student", "text", "held"):
        if key in found:
            found[key] = Path(found[key])
    return {**found, "recipe": MergeRecipe(**params["recipe"])}


def _options(wanted: Merging) -> dict[str, Any]:
    """Return the options that are not a recipe's, where they are not the default."""
    found = {name: getattr(wanted, name) for name in _OPTIONS if getattr(wanted, name) is not None}
    if wanted.layers != "cka":
        found["layer_map"] = wanted.layers if isinstance(wanted.layers, str) else list(wanted.layers)
    if wanted.alpha == SWEEP:
        found["sweep_budget"] = wanted.budget or SWEEP_TRIALS
    if wanted.no_fallback:
        found["fallback"] = False
    return found


def _recipe(wanted: Merging) -> MergeRecipe:
    given = {name: getattr(wanted, name) for name in _RECIPE}
    alpha = RULE if isinstance(wanted.alpha, str) else wanted.alpha
    return MergeRecipe(**given, alpha=alpha, ends=not wanted.no_ends, activations=not wanted.no_activations)
