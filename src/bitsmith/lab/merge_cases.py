"""Rows of the merge experiments: what is merged, of which text, with which shares, and judged on what."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, ClassVar, Literal

from bitsmith.lab.merge_turns import Span
from bitsmith.passes.merge_fold import LayerAlpha
from bitsmith.run.merge_plan import MergePlan
from bitsmith.run.merge_recipe import Alphas, MergeRecipe

Task = Literal["text", "other", "held", "other_held", "mixed"]
"""A text: of the task and of another, what each is judged on, and pieces of both of those by turns."""

PARTS = 3
"""Places of a text that small samples are taken from, evenly spread."""


@dataclass(frozen=True)
class Source:
    """What maps are found from: `tokens` (None: all that are used) of a text, from one of its parts on.

    With `fixed` layers are paired as those of the task's whole text, else as this text's own CKA has them.
    """

    task: Task = "text"
    tokens: int | None = None
    part: int = 0
    fixed: bool = False


Where = Literal["rule", "mean", "all", "layer", "mixer", "ffn", "ends", "head"]


@dataclass(frozen=True)
class Shares:
    """The teacher's share: by the rule, the rule's mean everywhere, `alpha` everywhere or in one place only.

    With `decided` they are what a merge with the fallback makes of these: the part of them that is best on
    the even chunks (or with `budget` a sweep from there of so many trials), nothing where that does not hold
    on the odd chunks, on which alone the row is judged then.
    """

    where: Where = "rule"
    alpha: float | None = None
    layer: int | None = None
    decided: bool = False
    budget: int | None = None

    @property
    def words(self) -> str:
        """The shares in a row's label."""
        known = {"rule": "by rule", "mean": "the rule's mean"}
        said = f"α {known.get(self.where, f'{self.alpha:g}' if self.alpha is not None else '')}"
        if self.budget is not None:
            return f"{said}, swept in {self.budget} trials, with the fallback"
        return f"{said}, with the fallback" if self.decided else said


RULE = Shares()


def everywhere(alpha: float) -> Shares:
    """Return one share for all."""
    return Shares("all", alpha)


@dataclass(frozen=True)
class Case:
    """A row to measure, one of a `series` in a figure. `key` is the same for rows that measure the same."""

    kind: ClassVar[str] = ""
    label: str
    judged: Task = "held"
    series: str = ""

    @property
    def key(self) -> str:
        """What the row's figures depend on."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("label", "series")}
        return json.dumps([self.kind, facts], sort_keys=True)


@dataclass(frozen=True)
class Original(Case):
    """One of the two models as it is."""

    kind: ClassVar[str] = "original"
    side: Literal["student", "teacher"] = "student"


@dataclass(frozen=True)
class Merged(Case):
    """A merge; `blend` mixes in other sources by weight, `diagnosed` adds what diagnostics find of it."""

    kind: ClassVar[str] = "merged"
    recipe: MergeRecipe = field(default_factory=MergeRecipe)
    shares: Shares = RULE
    source: Source = field(default_factory=Source)
    blend: tuple[tuple[Source, float], ...] = ()
    diagnosed: bool = False


@dataclass(frozen=True)
class Distilled(Case):
    """The student trained once over the same tokens by back-propagation, the teacher's logits its targets."""

    kind: ClassVar[str] = "distilled"
    source: Source = field(default_factory=Source)


@dataclass(frozen=True)
class Turned(Case):
    """The heads' outputs of both models turned into each other: how alike they are on text not turned for.

    `span` is what one rotation covers: all heads, a KV group's heads, or each head as its KV group's others.
    """

    kind: ClassVar[str] = "turned"
    span: Span = "KV group"
    tokens: int = 0

    @property
    def sources(self) -> list[Source]:
        """What is judged on, then what each rotation is found on."""
        parts = [Source("text", self.tokens, part, fixed=True) for part in range(PARTS)]
        return [Source("held", fixed=True), *parts]


AnyCase = Original | Merged | Distilled | Turned


@dataclass(frozen=True)
class Sizes:
    """What the rows of the experiments depend on.

    `layers` are the student's; `tokens`, `other_tokens` and `held_tokens` are used of the texts.
    """

    layers: int
    tokens: int
    other_tokens: int
    held_tokens: int
    ctx_tokens: int

    def of(self, source: Source) -> int:
        """Return the tokens of a source."""
        if source.tokens is not None:
            return source.tokens // self.ctx_tokens * self.ctx_tokens
        return {"text": self.tokens, "other": self.other_tokens}.get(source.task, self.held_tokens)


def alphas_of(plan: MergePlan, shares: Shares) -> Alphas:
    """Return the shares of every part of the student."""
    if shares.where == "rule":
        return plan.alphas
    ends = float(plan.recipe.ends)
    if shares.where == "mean":
        mean = mean_alpha(plan.alphas)
        return _uniform(len(plan.layer_map), mean, mean * ends)
    alpha = shares.alpha or 0.0
    if shares.where == "all":
        return _uniform(len(plan.layer_map), alpha, alpha * ends)
    none = _uniform(len(plan.layer_map), 0.0, 0.0)
    if shares.where == "ends":
        return Alphas(none.layers, alpha, alpha)
    if shares.where == "head":
        return Alphas(none.layers, 0.0, alpha)
    mixer, ffn = alpha * (shares.where != "ffn"), alpha * (shares.where != "mixer")
    return none.with_layer(shares.layer or 0, LayerAlpha(mixer, ffn))


def mean_alpha(alphas: Alphas) -> float:
    """Return the mean share of the mixers and FFNs of all layers."""
    listed = alphas.to_json()["layers"]
    return fmean(value for one in listed for value in (fmean(one["mixer"]), one["ffn"]))


def alpha_facts(alphas: Alphas) -> dict[str, Any]:
    """Return the shares as facts of a row."""
    return {"alpha_mean": mean_alpha(alphas), "alphas": alphas.to_json()}


def plan_facts(plan: MergePlan) -> dict[str, Any]:
    """Return what a plan's maps keep and meet, means over the states in front of and behind all layers."""
    seen = [plan.facts[0].before, *(one.after for one in plan.facts)]
    costs = [one["transition_cost_normalised"] for one in plan.to_json()["layers"]]
    return {
        "cosine": fmean(one.cosine.value for one in seen),
        "variance_kept": fmean(one.variance_kept for one in seen),
        "transition_cost_normalised": fmean(costs),
        "recipe": plan.recipe.to_json(),
    }


def _uniform(layers: int, alpha: float, ends: float) -> Alphas:
    return Alphas(tuple(LayerAlpha(alpha, alpha) for _ in range(layers)), ends, ends)
