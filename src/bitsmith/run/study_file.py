"""What a study's YAML may say: models × recipes × evaluations, by names; unknown keys are refused.

version: 1
models: {tiny: ../models/tiny}           # names and paths; paths are relative to the file
texts: {calib: calib.txt, held: held.txt}
calibration: {text: calib, ctx: 512, chunks: 200}   # the statistics of `stats: auto`
merges:                                   # models too: options of `bitsmith merge`
  both: {teacher: ../models/big, student: tiny, text: calib, held: held}
recipes:                                  # options as on the command line of `bitsmith compress`
  q4: {type: Q4_K_M}
  mixed: {recipe: auto, target: 4.5bpw, stats: auto}
evaluations:
  - {text: held, ctx: 512, chunks: 32}
generate: {prompts: ["import os"], tokens: 32}
claims: {text: held, only: [tt-gate]}     # options of `bitsmith study claims`
gates: {ppl_ratio: {at-most: 2}}          # measures of `bitsmith evaluate`
limits: {seconds: 3600, memory: 8GiB, retries: 1}
inspect: true
assay: true                               # spectra
peers: peers.json                         # points of others: a list of `bitsmith.run.study_peers.Peer`
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from bitsmith.errors import BitsmithError, printable
from bitsmith.run.actions import ACTIONS
from bitsmith.run.budget import parse_memory
from bitsmith.run.gate import Gate
from bitsmith.run.merge_recipe import ALPHA_MAX, Basis, Ffn, Head, Heads, MapName
from bitsmith.run.overrides import split_rule
from bitsmith.run.strict_yaml import Document, read_yaml
from bitsmith.run.task import Limits

AUTO = "auto"
SAHC_RECIPE = "sahc"
LARGEST = 2**31 - 1
CLAIM_CHUNKS = 8
_UNITS = {"top1_agreement": "fraction", "ppl_ratio": "ratio"}
MEASURES = (
    *("ppl_ref", "ppl_cand", "ppl_ratio", "ppl_difference", "mean_kld", "median_kld"),
    *("kld_99", "kld_99_9", "max_kld", "top1_agreement"),
)


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}", value):
        raise ValueError("a name is made of letters, digits and . _ + -")
    return value


def _memory(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("expected a size: 8GiB or bytes")
    try:
        return parse_memory(str(value))
    except BitsmithError as error:
        raise ValueError(error.message) from error


Name = Annotated[str, AfterValidator(_name)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Ctx = Annotated[int, Field(ge=8, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=LARGEST)]


Row = tuple[str, str]
"""A model's and a recipe's name; a merge by itself has no recipe."""


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )


Output = Literal["gguf", "cellm", "folder"]


class Calibration(_Part):
    """How the statistics of `stats: auto` are collected: the text's name and options of `calibrate`."""

    text: str
    ctx: Ctx = 512
    chunks: Positive | None = None
    block: Positive | None = None
    saliency: bool = True


class Merging(_Part):
    """A model made by merging a teacher into a student, in the options of `bitsmith merge`.

    `student` is a model's name, `teacher` one's or a path; `text` and `held` are texts' names. `layers` is
    `cka`, `proportional` or the teacher's layer for each of the student's, `alpha` a share, `rule` or `sweep`
    (of `budget` trials).
    """

    teacher: Annotated[str, Field(min_length=1)]
    student: str
    text: str
    held: str | None = None
    tokens: Positive | None = None
    ctx: Ctx = 512
    chunks: Positive | None = None
    samples: Positive | None = None
    layers: Literal["cka", "proportional"] | tuple[Annotated[int, Field(ge=0, le=LARGEST)], ...] = "cka"
    map: MapName = "tiered"
    basis: Basis = "global"
    trunk: Positive | None = None
    heads: Heads = "match"
    ffn: Ffn = "match"
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["rule", "sweep"] = "rule"
    alpha_max: Annotated[float, Field(ge=0, le=1)] = ALPHA_MAX
    budget: Positive | None = None
    no_ends: bool = False
    head: Head = "auto"
    no_activations: bool = False
    no_fallback: bool = False
    seed: Seed = 0


class Recipe(_Part):
    """One way to compress, in the options of the command line.

    `output` is needed where the type leaves it open: F16 and BF16 are a GGUF's unless it says otherwise.
    `stats` is `auto` (those of the study's `calibration`) or a path; `text` is a text's name, on which recipe
    `sahc` is judged.
    """

    type: str | None = None
    recipe: Literal["auto", "sbgq-iq4xs", "spi", "sahc"] | None = None
    transforms: str | None = None
    target: str | None = None
    fit: str | None = None
    ctx: Positive | None = None
    chunks: Positive | None = None
    ppl_limit: Annotated[float, Field(gt=0)] | None = None
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
    group: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    like_seed: bool = False
    select: Literal["cellm", "text", "layers"] | None = None
    ignore: tuple[str, ...] = ()
    critical: str | None = None
    by: str | None = None
    seed: Seed = 0
    output: Output | None = None


class Evaluation(_Part):
    """A text to measure on, by its name, and the window of `evaluate`."""

    text: str
    ctx: Ctx = 512
    chunks: Positive | None = None


class Generate(_Part):
    """Prompts that the original and every result continue; temperature 0 is greedy."""

    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 0.0
    seed: Seed = 0
    chat: bool = False


class Claims(_Part):
    """The seeds' claims to be tested on every model: `only` those so named, in the options of `study claims`.

    They are judged on `text` and learn from `calibration` (both are texts' names) or from `stats`, which are
    as a recipe's.
    """

    text: str
    only: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    calibration: str | None = None
    stats: str | None = None
    ctx: Ctx = 512
    chunks: Positive = CLAIM_CHUNKS
    seed: Seed = 0

    @model_validator(mode="after")
    def _one(self) -> Claims:
        if (self.calibration is None) == (self.stats is None):
            raise ValueError("expected one of calibration, stats")
        return self


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
    """What one attempt at a task may use: `memory` as `8GiB` or bytes, and how often it is repeated.

    It is stuck when it did nothing for `stuck_seconds`.
    """

    seconds: Annotated[float, Field(gt=0)] | None = None
    memory: Annotated[int, BeforeValidator(_memory)] | None = None
    stuck_seconds: Annotated[float, Field(gt=0)] | None = None
    retries: Annotated[int, Field(ge=0, le=LARGEST)] = 1

    @property
    def limits(self) -> Limits:
        """The limits as a task has them."""
        return Limits(self.seconds, self.memory, self.stuck_seconds)


class Study(_Part):
    """A whole file; `path` is where it lies."""

    version: Literal[1]
    title: str = ""
    models: Annotated[dict[Name, str], Field(min_length=1)]
    texts: dict[Name, str] = {}
    calibration: Calibration | None = None
    merges: dict[Name, Merging] = {}
    recipes: dict[Name, Recipe] = {}
    evaluations: tuple[Evaluation, ...] = ()
    generate: Generate | None = None
    claims: Claims | None = None
    gates: dict[str, Bound] = {}
    inspect: bool = True
    assay: bool = False
    limits: TaskLimits = TaskLimits()
    limits_of: dict[str, TaskLimits] = {}
    peers: str | None = None
    path: Path = Field(default=Path("study.yaml"), exclude=True)

    def place(self, path: str) -> Path:
        """Return a path of the file: absolute, or relative to where the file lies."""
        given = Path(path)
        with suppress(RuntimeError):  # nobody's home: a folder that begins with ~
            given = given.expanduser()
        whole = Path(self.path).absolute().parent / given
        tidy = Path(os.path.normpath(whole))
        with suppress(OSError, ValueError, RuntimeError):
            if tidy.resolve() != whole.resolve():  # .. behind a link
                return whole
        return tidy

    def model(self, name: str) -> Path:
        """Return where a model lies."""
        return self.place(self.models[name])

    def teacher(self, merge: str) -> Path:
        """Return where the teacher of a merge lies: a model of the study, or another."""
        given = self.merges[merge].teacher
        return self.model(given) if given in self.models else self.place(given)

    def text(self, name: str) -> Path:
        """Return where a text lies."""
        return self.place(self.texts[name])

    def reference(self, name: str) -> str:
        """Return the model that a model's results are measured against: itself, of a merge its student."""
        return self.merges[name].student if name in self.merges else name

    @property
    def rows(self) -> list[Row]:
        """What is measured: every merge by itself, then every model and merge in every recipe."""
        made = [(model, recipe) for model in (*self.models, *self.merges) for recipe in self.recipes]
        return [*((merge, "") for merge in self.merges), *made]

    def refusal(self, place: tuple[str | int, ...], message: str) -> BitsmithError:
        """Return the error that names a place of the file with its line, and what is wrong there."""
        return _refusal(self.path, read_yaml(self.path, "a study"), place, message)


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
    return BitsmithError(f"line {line or 1}: {printable(where)}: {printable(message, 500)}", path=path)


def _faulty(study: Study, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the options of a recipe that cannot be as they are, with why."""
    if recipe.stats == AUTO and study.calibration is None:
        yield "stats", "auto needs the study's calibration"
    if any(split_rule(rule) is None for rule in recipe.tensor_type):
        yield "tensor-type", "expected REGEX=TYPE"
    if recipe.recipe == SAHC_RECIPE and recipe.text is None:
        yield "recipe", f"{SAHC_RECIPE} needs a text to be judged on"


def _unmergeable(study: Study, name: str, merge: Merging) -> Iterator[tuple[str, str]]:
    """Yield the options of a merge that cannot be as they are, with why."""
    if name in study.models:
        yield "student", f"{name} is a model already; a merge needs a name of its own"
    if merge.student not in study.models:
        known = ", ".join(study.models)
        yield "student", f"there is no model {printable(merge.student)!r}; models: {known}"
    elif study.teacher(name) == study.model(merge.student):
        yield "teacher", "is the student"
    if merge.held is not None and merge.held == merge.text:
        yield "held", "is the text that the merge is made of"
    if merge.budget is not None and merge.alpha != "sweep":
        yield "budget", "is for alpha: sweep"


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
    if study.claims is not None:
        named(("claims", "text"), study.claims.text)
        named(("claims", "calibration"), study.claims.calibration)
        if study.claims.stats == AUTO and study.calibration is None:
            found.append((("claims", "stats"), "auto needs the study's calibration"))
    for name, merge in study.merges.items():
        named(("merges", name, "text"), merge.text)
        named(("merges", name, "held"), merge.held)
        found += [(("merges", name, option), why) for option, why in _unmergeable(study, name, merge)]
    for name, recipe in study.recipes.items():
        named(("recipes", name, "text"), recipe.text)
        found += [(("recipes", name, option), why) for option, why in _faulty(study, recipe)]
    for measure in study.gates:
        if measure not in MEASURES:
            found.append((("gates", measure), f"no measure; measures: {', '.join(MEASURES)}"))
    for action in study.limits_of:
        if action not in ACTIONS:
            found.append((("limits-of", action), f"no action; actions: {', '.join(ACTIONS)}"))
    if study.gates and not study.evaluations:
        found.append((("gates",), "need evaluations"))
    return found
