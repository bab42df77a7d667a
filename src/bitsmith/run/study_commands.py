"""The commands that do by hand what a study does, each exactly as the command line takes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitsmith.run.study_file import AUTO, Evaluation, Merging, Study
from bitsmith.run.study_recipe import model_path, set_options
from bitsmith.store.hub_names import told

_OPTIONS = (
    "type", "recipe", "text", "target", "fit", "ctx", "chunks", "ppl_limit", "stats", "plan", "transforms",
    "tensor_type", "rounder", "sequential", "tune", "tune_steps", "pure", "no_fallback", "group", "like_seed",
    "select", "ignore", "critical", "by", "seed",
)  # fmt: skip
"""Every option of a recipe but `output`, in the order of a command."""

_MERGE_OPTIONS = {
    option: option.replace("_", "-")
    for option in (
        "tokens", "ctx", "chunks", "samples", "layers", "map", "basis", "trunk", "heads", "ffn", "alpha",
        "alpha_max", "budget", "no_ends", "head", "no_activations", "no_fallback", "seed",
    )
}  # fmt: skip
"""Every option of a merge but its models and texts, as in a command and in its order."""
_MERGE_FIELDS = Merging.model_fields


def study_command(path: Path, out: Path) -> str:
    """Return the command that repeats a study; neither engine nor workers change what it finds."""
    return shlex.join(["bitsmith", "study", str(path), "-o", str(out)])


def model_commands(study: Study, model: str) -> Iterator[str]:
    """Yield what is done with an original: inspected, assayed, its claims tested, sampled.

    A merge is made first, and measured.
    """
    source = str(_place(study, model))
    if model in study.merges:
        yield merge_command(study, model)
        for evaluation in study.evaluations:
            yield evaluate_command(study, model, evaluation, Path(source))
    if study.inspect:
        yield _line("inspect", source)
    if study.assay:
        yield _line("assay", source, "-o", f"{model}-assay")
    wanted = study.claims
    if wanted is not None:
        if wanted.stats == AUTO:
            yield calibrate_command(study, model)
        words = ["--text", str(study.text(wanted.text)), *_stats(study, model, wanted.stats)]
        if wanted.calibration is not None:
            words += ["--calibration", str(study.text(wanted.calibration))]
        words += _flag("only", None if wanted.only is None else ",".join(wanted.only))
        words += [*_flag("ctx", wanted.ctx), *_flag("chunks", wanted.chunks), *_flag("seed", wanted.seed)]
        yield _line("study", "claims", source, *words, "-o", f"{model}-claims")
    yield from generate_commands(study, Path(source))


def recipe_commands(study: Study, model: str, name: str) -> Iterator[str]:
    """Yield what makes a recipe's model, and what measures and samples it."""
    out = model_path(study, model, name)
    if study.recipes[name].stats == AUTO:
        yield calibrate_command(study, model)
    yield compress_command(study, model, name, out)
    for evaluation in study.evaluations:
        yield evaluate_command(study, model, evaluation, out)
    yield from generate_commands(study, out)


def merge_command(study: Study, name: str) -> str:
    """Return the command that makes the same model as a merge's task."""
    wanted = study.merges[name]
    words = ["--text", str(study.text(wanted.text))]
    words += [] if wanted.held is None else ["--held", str(study.text(wanted.held))]
    given = {one for one in wanted.model_fields_set if getattr(wanted, one) != _MERGE_FIELDS[one].default}
    for option in (option for option in _MERGE_OPTIONS if option in given):
        value = getattr(wanted, option)
        listed = option == "layers" and not isinstance(value, str)
        words += _flag(_MERGE_OPTIONS[option], ",".join(map(str, value)) if listed else value)
    models = str(study.teacher(name)), str(study.model(wanted.student))
    return _line("merge", *models, *words, "-o", str(_place(study, name)))


def compress_command(study: Study, model: str, name: str, out: Path) -> str:
    """Return the command that makes the same bytes as a recipe's task."""
    recipe = study.recipes[name]
    given = set_options(recipe)
    words = []
    for option in (option for option in _OPTIONS if option in given):
        value = getattr(recipe, option)
        if option == "stats":
            words += _stats(study, model, value)
            continue
        if option == "plan":
            value = study.place(value)
        if option == "text":
            value = study.text(value)
        words += _flag(option.replace("_", "-"), value)
    return _line("compress", str(_place(study, model)), *words, "-o", str(out))


def calibrate_command(study: Study, model: str) -> str:
    """Return the command that collects the statistics that the study uses; empty without a calibration."""
    wanted = study.calibration
    if wanted is None:
        return ""
    words = ["--text", str(study.text(wanted.text)), *_flag("ctx", wanted.ctx)]
    words += [*_flag("chunks", wanted.chunks), *_flag("block", wanted.block)]
    words += [] if wanted.saliency else ["--no-saliency"]
    return _line("calibrate", str(_place(study, model)), *words, "-o", _statistics(model))


def evaluate_command(study: Study, model: str, evaluation: Evaluation, out: Path) -> str:
    """Return the command that measures a result as the study does."""
    words = ["--text", str(study.text(evaluation.text)), *_flag("ctx", evaluation.ctx)]
    words += _flag("chunks", evaluation.chunks)
    return _line("evaluate", str(study.model(study.reference(model))), str(out), *words)


def generate_commands(study: Study, out: Path) -> Iterator[str]:
    """Yield the commands that continue the study's prompts."""
    wanted = study.generate
    if wanted is not None:
        words = ["--gen", str(wanted.tokens), "--temperature", str(wanted.temperature)]
        words += [*_flag("seed", wanted.seed), *_flag("chat", wanted.chat)]
        for prompt in wanted.prompts:
            yield _line("generate", str(out), "--prompt", prompt, *words)


def _place(study: Study, model: str) -> Path:
    """Return where a model lies; of a merge, where its printed command puts it."""
    return Path(model) if model in study.merges else study.model(model)


def _line(*words: str) -> str:
    return shlex.join(["bitsmith", *map(told, words)])


def _statistics(model: str) -> str:
    return f"{model}-statistics"


def _stats(study: Study, model: str, stats: str | None) -> list[str]:
    if stats is None:
        return []
    return ["--stats", _statistics(model) if stats == AUTO else str(study.place(stats))]


def _flag(option: str, value: Any) -> list[str]:
    if value is None or (value is False and option != "sequential"):
        return []
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, tuple):
        return [word for one in value for word in (f"--{option}", str(one))]
    return [f"--{option}", str(value)]
