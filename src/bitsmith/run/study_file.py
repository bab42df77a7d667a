"""What a study's YAML may say: models × recipes × evaluations, by names; unknown keys are refused.

version: 1
models: {tiny: ../models/tiny}           # names and paths; paths are relative to the file
texts: {calib: calib.txt, held: held.txt}
calibration: {text: calib, ctx: 512, chunks: 200}   # the statistics of `stats: auto`
recipes:                                  # options as on the command line of `bitsmith compress`
  q4: {type: Q4_K_M}
  mixed: {recipe: auto, target: 4.5bpw, stats: auto}
evaluations:
  - {text: held, ctx: 512, chunks: 32}
generate: {prompts: ["import os"], tokens: 32}
gates: {ppl_ratio: {at-most: 2}}          # measures of `bitsmith evaluate`
limits: {seconds: 3600, memory: 8GiB, retries: 1}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitsmith.errors import BitsmithError, printable
from bitsmith.run.actions import ACTIONS
from bitsmith.run.budget import parse_target
from bitsmith.run.gate import Gate
from bitsmith.run.strict_yaml import Document, read_yaml
from bitsmith.run.task import Limits

AUTO = "auto"
SAHC_RECIPE = "sahc"
_OUTPUTS = {"gguf": "model.gguf", "cellm": "model.cellm", "folder": "model"}
_UNITS = {"top1_agreement": "fraction", "ppl_ratio": "ratio"}
MEASURES = (
    *("ppl_ref", "ppl_cand", "ppl_ratio", "ppl_difference", "mean_kld", "median_kld"),
    *("kld_99", "kld_99_9", "max_kld", "top1_agreement"),
)


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}", value):
        raise ValueError("a name is made of letters, digits and . _ + -")
    return value


def _memory(value: str | int) -> int:
    try:
        found = parse_target(str(value))
    except BitsmithError as error:
        raise ValueError(error.message) from error
    if found.kind != "file":
        raise ValueError("expected a size: 8GiB or bytes")
    return int(found.amount)


Name = Annotated[str, AfterValidator(_name)]
Positive = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )


class Calibration(_Part):
    """How the statistics of `stats: auto` are collected: the text's name and options of `calibrate`."""

    text: str
    ctx: Annotated[int, Field(ge=8)] = 512
    chunks: Positive | None = None
    block: Positive | None = None
    saliency: bool = True


class Recipe(_Part):
    """One way to compress, in the options of the command line; `output` where the type leaves it open.

    `stats` is `auto` (those of the study's `calibration`) or a path; `text` is a text's name. Recipe `sahc`
    is judged on `text`, in chunks of `ctx`, at most `chunks`.
    """

    type: str | None = None
    recipe: str | None = None
    transforms: str | None = None
    target: str | None = None
    fit: str | None = None
    ctx: Positive | None = None
    chunks: Positive | None = None
    stats: str | None = None
    text: str | None = None
    rounder: Literal["nearest", "weighted", "gptq", "auto"] = "auto"
    sequential: bool | None = None
    tune: bool = False
    tune_steps: Positive | None = None
    plan: str | None = None
    pure: bool = False
    tensor_type: tuple[str, ...] = ()
    no_fallback: bool = False
    group: int | None = None
    like_seed: bool = False
    select: Literal["cellm", "text", "layers"] | None = None
    ignore: tuple[str, ...] = ()
    critical: str | None = None
    by: str | None = None
    seed: int = 0
    output: Literal["gguf", "cellm", "folder"] = "gguf"

    @property
    def model_name(self) -> str:
        """What the model is called in the artifact; its suffix says what is written."""
        return _OUTPUTS[self.output]


class Evaluation(_Part):
    """A text to measure on, by its name, and the window of `evaluate`."""

    text: str
    ctx: Annotated[int, Field(ge=8)] = 512
    chunks: Positive | None = None


class Generate(_Part):
    """Prompts that the original and every result continue; temperature 0 is greedy."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0
    chat: bool = False


class Bound(_Part):
    """One limit on a measure."""

    below: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _one(self) -> Bound:
        if sum(value is not None for value in (self.below, self.at_most, self.at_least)) != 1:
            raise ValueError("expected one of below, at-most, at-least")
        return self

    def gate(self, measure: str) -> Gate:
        """Return the gate that holds `measure` against the limit."""
        unit = _UNITS.get(measure, "perplexity" if measure.startswith("ppl") else "nats")
        if self.below is not None:
            return Gate(measure, self.below, "below", unit)
        if self.at_most is not None:
            return Gate(measure, self.at_most, "at most", unit)
        return Gate(measure, self.at_least or 0.0, "at least", unit)


class TaskLimits(_Part):
    """What one attempt at a task may use: `memory` as `8GiB` or bytes, and how often it is repeated."""

    seconds: Annotated[float, Field(gt=0)] | None = None
    memory: Annotated[str | int, AfterValidator(_memory)] | None = None
    retries: Annotated[int, Field(ge=0)] = 1

    @property
    def limits(self) -> Limits:
        """The limits as a task has them."""
        return Limits(self.seconds, None if self.memory is None else int(self.memory))


class Study(_Part):
    """A whole file; `path` is where it lies."""

    version: Literal[1]
    title: str = ""
    models: Annotated[dict[Name, str], Field(min_length=1)]
    texts: dict[Name, str] = {}
    calibration: Calibration | None = None
    recipes: dict[Name, Recipe] = {}
    evaluations: tuple[Evaluation, ...] = ()
    generate: Generate | None = None
    gates: dict[str, Bound] = {}
    inspect: bool = True
    assay: bool = False
    limits: TaskLimits = TaskLimits()
    limits_of: dict[str, TaskLimits] = {}
    path: Path = Field(default=Path("study.yaml"), exclude=True)

    def place(self, path: str) -> Path:
        """Return a path of the file: absolute, or relative to where the file lies."""
        return Path(self.path).absolute().parent / Path(path).expanduser()

    def model(self, name: str) -> Path:
        """Return where a model lies."""
        return self.place(self.models[name])

    def text(self, name: str) -> Path:
        """Return where a text lies."""
        return self.place(self.texts[name])


def load_study(path: Path) -> Study:
    """Read a study's YAML.

    Raises BitsmithError that names the line and the value for what is no YAML, no study, or names a text, a
    measure or an action that there is not.
    """
    document = read_yaml(path, "a study")
    if not isinstance(document.value, dict):
        raise BitsmithError("is not a study: expected names and values, version: 1 among them", path=path)
    if "path" in document.value:
        raise _refusal(path, document, ("path",), "unknown key")
    try:
        study = Study.model_validate({**document.value, "path": path})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise _refusal(path, document, first["loc"], _said(first)) from error
    for place, message in _inconsistent(study):
        raise _refusal(path, document, place, message)
    return study


def _said(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return "unknown key"
    found = error.get("input")
    shown = f", found {printable(repr(found), 40)}" if isinstance(found, str | int | float | bool) else ""
    return f"{message[:1].lower()}{message[1:]}{shown}"


def _refusal(path: Path, document: Document, place: tuple[str | int, ...], message: str) -> BitsmithError:
    said = tuple(part for part in place if part != "[key]")
    line = document.line(said)
    where = ".".join(map(str, said)) or "the whole"
    return BitsmithError(f"line {line or 1}: {printable(where)}: {printable(message)}", path=path)


def _misplaced(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the options that are not for this recipe, with why."""
    if recipe.recipe != SAHC_RECIPE:
        return [] if recipe.chunks is None else [("chunks", f"is for recipe {SAHC_RECIPE}")]
    others = recipe.model_fields_set - {"recipe", "text", "ctx", "chunks"}
    found = [(option.replace("_", "-"), f"is not for recipe {SAHC_RECIPE}") for option in sorted(others)]
    return found if recipe.text else [*found, ("recipe", f"{SAHC_RECIPE} needs a text to be judged on")]


def _inconsistent(study: Study) -> list[tuple[tuple[str | int, ...], str]]:
    """Return each place that names what there is not, with what is wrong."""
    found: list[tuple[tuple[str | int, ...], str]] = []

    def named(place: tuple[str | int, ...], text: str | None) -> None:
        if text is not None and text not in study.texts:
            known = ", ".join(study.texts) or "none"
            found.append((place, f"there is no text {printable(text)!r}; texts: {known}"))

    for index, evaluation in enumerate(study.evaluations):
        named(("evaluations", index, "text"), evaluation.text)
        if evaluation in study.evaluations[:index]:
            found.append((("evaluations", index), "is there twice"))
    if study.calibration is not None:
        named(("calibration", "text"), study.calibration.text)
    for name, recipe in study.recipes.items():
        named(("recipes", name, "text"), recipe.text)
        if recipe.stats == AUTO and study.calibration is None:
            found.append((("recipes", name, "stats"), "auto needs the study's calibration"))
        if any(not rule.rpartition("=")[0] for rule in recipe.tensor_type):
            found.append((("recipes", name, "tensor-type"), "expected REGEX=TYPE"))
        found += [(("recipes", name, option), why) for option, why in _misplaced(recipe)]
    for measure in study.gates:
        if measure not in MEASURES:
            found.append((("gates", measure), f"no measure; measures: {', '.join(MEASURES)}"))
    for action in study.limits_of:
        if action not in ACTIONS:
            found.append((("limits-of", action), f"no action; actions: {', '.join(ACTIONS)}"))
    if study.gates and not study.evaluations:
        found.append((("gates",), "need evaluations"))
    return found
